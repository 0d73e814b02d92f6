"""What a run is made of before its first step: cache, samples, validation, model."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from ris_cache.ahead import map_ahead
from ris_cache.encoders.weights import WeightsRecord
from ris_cache.errors import ConfigError, DataError
from ris_cache.store.cache import CategorySet, FeatureCache
from ris_train.checkpoint import CategoryNames, CheckpointMetadata, build_from_metadata
from ris_train.config import RunConfig
from ris_train.data.batch import BatchBuilder, default_category_source
from ris_train.data.masks import TargetMasks
from ris_train.data.merge import TrainingSet, common_categories, load_training_set
from ris_train.data.sampler import SampleOrder
from ris_train.data.text import Tokenizer
from ris_train.model.segmenter import RisModel
from ris_train.optim import freeze_untrained
from ris_train.ranks import Ranks
from ris_train.training.building import build_model
from ris_train.training.step import StepBatch, build_step_batch
from ris_train.validation import Validation


@dataclass(frozen=True, slots=True, kw_only=True)
class Setup:
    """All that training needs.

    Attributes:
        metadata: of the run's checkpoints, at step 0 and without scores.
    """

    cache: FeatureCache
    config: RunConfig
    ranks: Ranks
    training_set: TrainingSet
    tokenizer: Tokenizer
    validation: Validation
    builder: BatchBuilder
    model: RisModel
    metadata: CheckpointMetadata

    def facts(self) -> dict[str, Any]:
        """What env.json records of a run beside the machine."""
        return {
            "cache": str(self.cache.root),
            "fingerprint": self.cache.fingerprint.digest,
            "weights": self.metadata.weight_labels,
            "device": str(self.ranks.device),
            "processes": self.ranks.world,
            "deterministic": self.config.train.deterministic,
            "training_set": [part.as_dict() for part in self.training_set.parts],
        }

    def batches(self, consumed: int, first_step: int) -> Iterator[StepBatch]:
        """Batches from a place in the order of samples on, without end, built one thread ahead."""
        config, samples = self.config, self.training_set.samples
        batch_size = config.train.batch_size
        order = SampleOrder(
            [sample.image_id for sample in samples],
            seed=config.train.seed,
            fingerprint=self.cache.fingerprint.digest,
            selection=config.data.train,
            expressions_per_image=config.train.expressions_per_image,
        )
        masks = masks_of(self.cache, config, self.training_set)

        def build(index: int) -> StepBatch:
            taken = order.take(consumed + index * batch_size, batch_size)
            chosen = [samples[position] for position in taken]
            return build_step_batch(first_step + index, chosen, self.builder, masks, config, self.ranks)

        remaining = max(0, config.train.steps - first_step + 1)
        return map_ahead(build, range(remaining), workers=1, depth=2)


def prepare(
    cache_root: Path,
    config: RunConfig,
    ranks: Ranks,
    *,
    random_seed: int | None,
    resumed: CheckpointMetadata | None = None,
) -> Setup:
    """Load the samples and build the model.

    Args:
        cache_root: a cache directory; nothing else is read but BERT's weights.
        config: the whole configuration.
        ranks: the processes that train together.
        random_seed: seed of random BERT weights, if those were asked for; None loads real ones.
        resumed: metadata of the state that the run goes on from, which is then to be loaded; BERT's weights
            are not needed then.

    Raises:
        CacheError: the cache cannot be used, or lacks the selections.
        DataError: nothing usable is selected.
        WeightsError: BERT's weights are missing.
        ConfigError: fewer expressions in a batch than processes, or as `build_model`.
    """
    if config.train.batch_size < ranks.world:
        raise ConfigError(
            f"train.batch_size={config.train.batch_size} is the batch of all {ranks.world} processes "
            "together, so some would have nothing to do. Raise it, or start fewer.",
            key="train.batch_size",
        )
    torch.manual_seed(config.train.seed)
    cache = FeatureCache.open(cache_root, integrity=config.data.integrity)
    training_set = load_usable(cache, config)
    tokenizer = Tokenizer.load(config.model.bert, config.model.max_tokens, keep_sep=config.model.keep_sep)
    validation = Validation(
        cache,
        tokenizer,
        config,
        ranks.device,
        samples=training_set.samples if config.train.overfit is not None else None,
    )
    builder = builder_of(cache, config, training_set, tokenizer, ranks.device)
    builder.require_categories(training_set.samples)
    if resumed is None:
        model, record = build_model(cache, config, tokenizer, random_seed=random_seed)
        metadata = _metadata(cache, config, model, record, _categories(cache, config, training_set))
    else:
        model = build_from_metadata(resumed)
        freeze_untrained(model, config.train)
        metadata = resumed.model_copy(update={"config": config, "step": 0, "val": {}})
    model.to(ranks.device)
    return Setup(
        cache=cache,
        config=config,
        ranks=ranks,
        training_set=training_set,
        tokenizer=tokenizer,
        validation=validation,
        builder=builder,
        model=model,
        metadata=metadata,
    )


def load_usable(cache: FeatureCache, config: RunConfig) -> TrainingSet:
    """Load the samples that a run trains on: the first ones alone with `train.overfit`.

    Raises:
        DataError: there are none.
    """
    training_set = load_training_set(
        cache,
        config.data.train,
        text=config.data.text,
        leakage=config.data.leakage,
        with_no_target=config.model.no_target_head,
        val=config.data.val,
    )
    if not training_set.samples:
        raise DataError(
            f"{config.data.train} has no usable expression: {_what_was_left_out(training_set)}.",
            left_out=[part.as_dict() for part in training_set.parts],
        )
    return replace(training_set, samples=training_set.samples[: config.train.overfit])


def builder_of(
    cache: FeatureCache,
    config: RunConfig,
    training_set: TrainingSet,
    tokenizer: Tokenizer,
    device: torch.device,
) -> BatchBuilder:
    """Make what builds the batches of a training set."""
    return BatchBuilder(
        cache,
        tokenizer,
        categories=_categories(cache, config, training_set),
        category_source=default_category_source(config),
        device=device,
    )


def masks_of(cache: FeatureCache, config: RunConfig, training_set: TrainingSet) -> TargetMasks:
    """Make what rasterises the targets of a training set."""
    instances = {name: cache.instances(name) for name in training_set.table_names}
    return TargetMasks(instances, cache.sizes, config.loss.mask_size)


def _categories(cache: FeatureCache, config: RunConfig, training_set: TrainingSet) -> CategorySet:
    """Return the categories of a run; a model that reads none records those of its first dataset."""
    reads_one = config.model.sparse_prompt == "category"
    return common_categories(cache, training_set.table_names[: None if reads_one else 1])


def _metadata(
    cache: FeatureCache,
    config: RunConfig,
    model: RisModel,
    bert_record: WeightsRecord,
    categories: CategorySet,
) -> CheckpointMetadata:
    fields: dict[str, Any] = cache.fingerprint.fields
    return CheckpointMetadata(
        config=config,
        encoders=fields["encoders"],
        fingerprint=cache.fingerprint.digest,
        weights={**fields["weights"], "bert": bert_record.as_dict()},
        weight_labels={**cache.manifest.weights, "bert": bert_record.label},
        categories=CategoryNames(
            ids=categories.ids, names=categories.names, prompt_template=categories.template
        ),
        bert=model.language.bert.config.to_diff_dict(),
        step=0,
        val={},
    )


def _what_was_left_out(training_set: TrainingSet) -> str:
    counts = {
        "refer to nothing, which a model without model.no_target_head cannot learn": sum(
            part.no_target for part in training_set.parts
        ),
        "have an annotation that encloses nothing": sum(part.degenerate for part in training_set.parts),
        "are of an unreadable image": sum(part.quarantined for part in training_set.parts),
        "are of an image that a validation or test split holds": training_set.left_out_for_leakage,
    }
    return "; ".join(f"{count} {what}" for what, count in counts.items() if count) or "it is empty"

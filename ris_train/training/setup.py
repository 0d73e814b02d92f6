"""What a run is made of before its first step: cache, samples, validation, model."""

from __future__ import annotations

import itertools
import re
from collections.abc import Generator, Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

import torch

from ris_cache.ahead import run_ahead
from ris_cache.datasets.records import InstanceRecord
from ris_cache.encoders.weights import WeightsRecord
from ris_cache.errors import ConfigError, DataError, WeightsError
from ris_cache.memory import return_freed_memory
from ris_cache.store.cache import CategorySet, FeatureCache
from ris_train.checkpoint import CategoryNames, CheckpointMetadata, build_from_metadata
from ris_train.config import RunConfig, recipe_head, recipes
from ris_train.data.batch import BatchBuilder, default_category_source
from ris_train.data.masks import TargetMasks
from ris_train.data.merge import TrainingSet, common_categories, load_training_set
from ris_train.data.sampler import SampleOrder
from ris_train.data.samples import Sample
from ris_train.data.text import Tokenizer
from ris_train.model.segmenter import RisModel
from ris_train.optim import freeze_untrained
from ris_train.ranks import Ranks
from ris_train.run import RunDirectory
from ris_train.training.building import build_model
from ris_train.training.data_digest import DataDigest
from ris_train.training.step import StepBatch, build_step_batch, is_grouped, part_slices
from ris_train.validation import Validation

Instances = Mapping[str, Mapping[int, InstanceRecord]]
"""By ann_id, of each table by its name."""
_BATCHES_AHEAD: Final = 2


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

    @property
    def training_digest(self) -> DataDigest:
        """Of the expressions that are trained on."""
        parts = self.training_set.parts
        return DataDigest.of(
            self.training_set.samples, [f"{part.selection} {part.expressions}" for part in parts]
        )

    @property
    def validation_digest(self) -> DataDigest:
        """Of the expressions that are scored."""
        return DataDigest.of(self.validation.samples, [self.validation.label])

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
            "cut_expressions": self.num_cut,
        }

    @property
    def num_cut(self) -> dict[str, int]:
        """How many expressions are cut at `model.max_tokens`, of those trained and of those validated on."""
        return {
            "train": self.tokenizer.count_cut(self.training_set.samples),
            "val": self.tokenizer.count_cut(self.validation.samples),
        }

    def batches(self, consumed: int, first_step: int) -> Generator[StepBatch, None, None]:
        """Batches of all steps that are left, from a place in the order of samples on.

        They are built on a thread ahead of their use, from features that further threads read ahead of that.
        All threads have ended when the generator has: close it where training stops early.

        Args:
            consumed: samples before that place.
            first_step: the step of the first batch.
        """
        return run_ahead(self._built(consumed, first_step), depth=_BATCHES_AHEAD)

    def _built(self, consumed: int, first_step: int) -> Generator[StepBatch, None, None]:
        """Build the batches of `batches`, each when it is asked for."""
        config, builder = self.config, self.builder
        masks = masks_of(self.cache, config, self.training_set, self.validation.truth.instances)
        current, coming = itertools.tee(self._chosen(consumed, config.train.steps - first_step + 1))
        parts = (
            samples[place] for samples in coming for place in part_slices(len(samples), config, self.ranks)
        )
        with closing(builder.read_ahead(parts, is_grouped=is_grouped(config))) as features:
            for step, samples in enumerate(current, first_step):
                yield build_step_batch(step, samples, builder, masks, config, self.ranks, features)

    def _chosen(self, consumed: int, num_steps: int) -> Iterator[list[Sample]]:
        """Yield the samples of each batch."""
        config, samples = self.config, self.training_set.samples
        order = SampleOrder(
            samples.column("image_id"),
            seed=config.train.seed,
            fingerprint=self.cache.fingerprint.digest,
            selection=config.data.train,
            expressions_per_image=config.train.expressions_per_image,
        )
        size = config.train.batch_size
        for index in range(num_steps):
            yield [samples[position] for position in order.take(consumed + index * size, size).tolist()]


def prepare(
    cache_root: Path,
    config: RunConfig,
    ranks: Ranks,
    *,
    random_seed: int | None,
    resumed: CheckpointMetadata | None = None,
    run: RunDirectory | None = None,
) -> Setup:
    """Load the samples and build the model.

    Args:
        cache_root: a cache directory; nothing else is read but BERT's weights.
        config: the whole configuration.
        ranks: the processes that train together.
        random_seed: seed of random BERT weights, if those were asked for; None loads real ones.
        resumed: metadata of the state that the run goes on from, which is then to be loaded; BERT's weights
            are not needed then.
        run: that goes on; its own tokenizer is used.

    Raises:
        CacheError: the cache cannot be used, or lacks the selections.
        DataError: nothing usable is selected.
        WeightsError: BERT's weights are missing.
        ConfigError: fewer expressions in a batch than processes, a recipe for caches of another preset, or as
            `build_model`.
    """
    require_enough_for(config, ranks.world)
    torch.manual_seed(config.train.seed)
    cache = FeatureCache.open(cache_root, integrity=config.data.integrity)
    if resumed is None:
        require_recipe_for(config.recipe, cache.manifest.preset, cache_root)
    training_set = load_usable(cache, config)
    tokenizer = load_tokenizer(config, None if resumed is None else run)
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
    return_freed_memory()
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


def require_enough_for(config: RunConfig, num_processes: int) -> None:
    """Refuse a batch that leaves processes without work.

    Raises:
        ConfigError: it has fewer expressions than there are processes.
    """
    if config.train.batch_size < num_processes:
        raise ConfigError(
            f"train.batch_size={config.train.batch_size} is the batch of all {num_processes} processes "
            "together, so some would have nothing to do. Raise it, or start fewer.",
            key="train.batch_size",
        )


def require_recipe_for(recipe: str, preset: str, cache_root: Path) -> None:
    """Refuse a recipe whose sizes are for features of another preset.

    A preset that no recipe ships for is left to whoever made it, and so is a recipe that does not ship.

    Raises:
        ConfigError: names the recipes for the cache.
    """
    presets = {name: _preset_of(recipe_head(name).needs) for name in recipes()}
    fitting = [name for name, needed in presets.items() if needed == preset]
    if recipe in presets and fitting and recipe not in fitting:
        raise ConfigError(
            f"Recipe {recipe} needs a cache of preset {presets[recipe]}; {cache_root} is of preset {preset}. "
            f"Choose --recipe {' or '.join(fitting)}, over which --config and --set lay what is to differ, "
            "or name another cache with --cache.",
            recipe=recipe,
            expected=presets[recipe],
            found=preset,
        )


def _preset_of(needs: str) -> str | None:
    """Read the preset out of what a recipe says it needs: `a cache of preset paper with refcoco`."""
    found = re.search(r"\bpreset (\S+)", needs)
    return None if found is None else found[1]


def load_tokenizer(config: RunConfig, run: RunDirectory | None) -> Tokenizer:
    """Load the tokenizer that a run has kept, so that it needs nothing else; or the configuration's.

    Raises:
        WeightsError: it cannot be had.
    """
    model = config.model
    if run is not None and run.tokenizer_dir.is_dir():
        try:
            return Tokenizer.from_folder(run.tokenizer_dir, model.max_tokens, keep_sep=model.keep_sep)
        except WeightsError as error:
            raise WeightsError(
                f"The run's own tokenizer, {run.tokenizer_dir}, cannot be used. Put it back, or remove the "
                "folder: the tokenizer that model.bert names is used then.",
                path=run.tokenizer_dir,
            ) from error
    return Tokenizer.load(model.bert, model.max_tokens, keep_sep=model.keep_sep)


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


def masks_of(
    cache: FeatureCache, config: RunConfig, training_set: TrainingSet, known: Instances | None = None
) -> TargetMasks:
    """Make what rasterises the targets of a training set.

    Args:
        cache: of the training set.
        config: has the loss grid.
        training_set: what is trained on.
        known: instances of tables that are loaded already.
    """
    known = known or {}
    instances = {name: known.get(name) or cache.instances(name) for name in training_set.table_names}
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

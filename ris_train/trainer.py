"""Stage 2: train the model from a cache directory alone."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

from ris_cache.ahead import map_ahead
from ris_cache.datasets.selection import Selection, parse_selections
from ris_cache.encoders.spec import spec_from_dict
from ris_cache.encoders.weights import WeightsRecord
from ris_cache.errors import ConfigError, DataError, NonFiniteError
from ris_cache.store.cache import FeatureCache
from ris_train.checkpoint import CategoryNames, CheckpointMetadata, save_checkpoint
from ris_train.config import ModelConfig, RunConfig
from ris_train.data.batch import Batch, BatchBuilder, CategorySource, default_category_source
from ris_train.data.masks import TargetMasks
from ris_train.data.sampler import batches
from ris_train.data.samples import Sample, SampleSet, load_samples
from ris_train.data.text import Tokenizer
from ris_train.evaluate import GroundTruth, count_samples, score
from ris_train.losses import total_loss
from ris_train.model.bert import load_bert
from ris_train.model.mask_decoder import load_sam_heads
from ris_train.model.segmenter import RisModel
from ris_train.optim import build_optimiser, build_schedule, freeze_untrained
from ris_train.run import RunDirectory
from ris_train.scoring import Scores


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingReport:
    """What a run came to.

    Attributes:
        best_step: step of the best checkpoint by oIoU on the validation selection.
        best: its scores; `best.num_samples` may be fewer than the selection holds (`train.val_samples`).
        val_size: expressions of the validation selection.
        category_source: which category the model was given.
        weights: labels of all weights that the scores rest on.
        seconds: of training, evaluations included.
        left_out: training expressions without a usable mask or image.
    """

    run: RunDirectory
    best_step: int
    best: Scores
    val_size: int
    category_source: CategorySource
    weights: dict[str, str]
    seconds: float
    left_out: int


def train(
    cache_root: Path,
    config: RunConfig,
    run_dir: Path,
    *,
    device: torch.device,
    random_seed: int | None,
    show_progress: bool = False,
) -> TrainingReport:
    """Train by the configuration and keep the best and the last checkpoint.

    Args:
        cache_root: a cache directory; nothing else is read but BERT's weights.
        config: the whole configuration.
        run_dir: where the run's files go; must not hold a run.
        device: where the model trains.
        random_seed: seed of random BERT weights, if those were asked for; None loads real ones.
        show_progress: whether to draw a bar on stderr.

    Raises:
        CacheError: the cache cannot be used, or lacks the selections.
        WeightsError: BERT's weights are missing.
        NonFiniteError: the loss or a gradient is no number any more; names the step and the samples.
    """
    torch.manual_seed(config.train.seed)
    cache = FeatureCache.open(cache_root, integrity=config.data.integrity)
    train_set = load_samples(cache, _single(config.data.train, "data.train"), text=config.data.text)
    val_set = load_samples(cache, _single(config.data.val, "data.val"), text=config.data.text)
    usable = [sample for sample in train_set.samples if sample.ann_ids and not sample.is_degenerate]
    left_out = len(train_set.samples) - len(usable) + train_set.quarantined
    if not usable or not val_set.samples:
        raise DataError(
            f"{config.data.train} has {len(usable)} usable expressions and {config.data.val} "
            f"{len(val_set.samples)}; both need at least one."
        )
    tokenizer = Tokenizer.load(config.model.bert, config.model.max_tokens)
    model, bert_record = build_model(cache, config, tokenizer, random_seed=random_seed)
    model.to(device)

    labels = {**cache.manifest.weights, "bert": bert_record.label}
    run = RunDirectory.create(
        run_dir,
        config,
        facts={
            "cache": str(cache.root),
            "fingerprint": cache.fingerprint.digest,
            "weights": labels,
            "device": str(device),
        },
    )
    tokenizer.save(run.tokenizer_dir)
    optimiser = build_optimiser(model, config.train)
    schedule = build_schedule(optimiser, config.train)
    builder = _batch_builder(cache, tokenizer, config, train_set, device)
    validation = _Validation(cache, tokenizer, config, val_set, device)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]

    best: tuple[int, Scores] | None = None
    started = time.monotonic()
    terms_since_log: list[dict[str, float]] = []
    model.train()
    with tqdm(total=config.train.steps, unit="step", desc="train", disable=not show_progress) as bar:
        for step, batch in enumerate(_training_batches(cache, config, train_set, usable, builder), start=1):
            assert batch.targets is not None
            loss, terms = total_loss(model(batch.inputs), batch.targets, config.loss)
            optimiser.zero_grad(set_to_none=True)
            loss.backward()  # type: ignore[no-untyped-call]
            grad_norm = nn.utils.clip_grad_norm_(trained, config.train.clip_grad_norm)
            values = {"loss": loss.item(), **{name: term.item() for name, term in terms.items()}}
            values["grad_norm"] = grad_norm.item()
            _require_finite(values, step, batch)
            rate = schedule.get_last_lr()[0]
            optimiser.step()
            schedule.step()
            bar.update()
            terms_since_log.append(values)

            is_last = step == config.train.steps
            if step % config.train.log_every == 0 or is_last:
                means = _means(terms_since_log)
                terms_since_log.clear()
                seconds = round(time.monotonic() - started, 3)
                run.log({"step": step, **means, "lr": rate, "seconds": seconds})
                bar.set_postfix(loss=f"{means['loss']:.2f}", refresh=False)
            if step % config.train.eval_every == 0 or is_last:
                scores = validation.score(model)
                fields = {"val": validation.label, "num_samples": scores.num_samples}
                run.log({"step": step, **fields, **_score_fields(scores)})
                metadata = _metadata(cache, config, model, bert_record, train_set, step, scores)
                save_checkpoint(run.checkpoint_path("last"), model, metadata)
                if best is None or _is_better(scores, best[1]):
                    best = (step, scores)
                    save_checkpoint(run.checkpoint_path("best"), model, metadata)
                if show_progress:
                    line = (
                        f"step {step}: {validation.label} oIoU {100 * scores.overall_iou:.2f} "
                        f"({scores.num_samples} expressions)"
                    )
                    bar.write(line, file=sys.stderr)
            if is_last:
                break
    assert best is not None, "the last step evaluates"
    return TrainingReport(
        run=run,
        best_step=best[0],
        best=best[1],
        val_size=len(val_set.samples),
        category_source=default_category_source(config),
        weights=labels,
        seconds=time.monotonic() - started,
        left_out=left_out,
    )


def build_model(
    cache: FeatureCache, config: RunConfig, tokenizer: Tokenizer, *, random_seed: int | None
) -> tuple[RisModel, WeightsRecord]:
    """Build the model for a cache: BERT as configured, SAM's heads from the cache, the rest from the seed.

    Returns:
        The model with `requires_grad` set, and where BERT's weights came from.

    Raises:
        ConfigError: widths that do not divide, or more tokens than BERT has positions.
    """
    encoders = spec_from_dict(cache.fingerprint.fields["encoders"])
    _require_widths_that_divide(config.model, encoders.sam.out_channels)
    bert, record = load_bert(config.model.bert, vocab_size=tokenizer.vocab_size, random_seed=random_seed)
    if config.model.max_tokens > bert.config.max_position_embeddings:
        raise ConfigError(
            f"model.max_tokens is {config.model.max_tokens}, but BERT has only "
            f"{bert.config.max_position_embeddings} positions."
        )
    model = RisModel(config.model, encoders, bert)
    load_sam_heads(model.mask_decoder, cache.sam_heads())
    freeze_untrained(model)
    return model, record


def _require_widths_that_divide(config: ModelConfig, channels: int) -> None:
    problems = [
        f"{name}={divisor} does not divide {what} {width}"
        for name, divisor, what, width in (
            ("model.num_heads", config.num_heads, "the cache's channels", channels),
            ("model.norm_groups", config.norm_groups, "the cache's channels", channels),
            (
                "model.bert.num_heads",
                config.bert.num_heads,
                "model.bert.hidden_size",
                config.bert.hidden_size,
            ),
        )
        if width % divisor
    ]
    if problems:
        raise ConfigError("; ".join(problems) + ".", problems=problems)


class _Validation:
    """The selection that chooses the best checkpoint, ready to be scored again and again."""

    def __init__(
        self,
        cache: FeatureCache,
        tokenizer: Tokenizer,
        config: RunConfig,
        samples: SampleSet,
        device: torch.device,
    ) -> None:
        self.label = config.data.val
        chosen = samples.samples
        limit = config.train.val_samples
        if limit is not None and limit < len(chosen):
            chosen = tuple(chosen[index * len(chosen) // limit] for index in range(limit))
        self._samples = chosen
        self._batch_size = config.train.batch_size
        self._builder = _batch_builder(cache, tokenizer, config, samples, device)
        self._truth = GroundTruth(cache.instances(samples.table_name), cache.sizes)

    def score(self, model: RisModel) -> Scores:
        return score(
            count_samples(model, self._samples, self._builder, self._truth, batch_size=self._batch_size)
        )


def _batch_builder(
    cache: FeatureCache, tokenizer: Tokenizer, config: RunConfig, samples: SampleSet, device: torch.device
) -> BatchBuilder:
    return BatchBuilder(
        cache,
        tokenizer,
        categories=cache.categories(cache.manifest.datasets[samples.table_name].category_set),
        category_source=default_category_source(config),
        device=device,
    )


def _training_batches(
    cache: FeatureCache,
    config: RunConfig,
    samples: SampleSet,
    usable: list[Sample],
    builder: BatchBuilder,
) -> Iterator[Batch]:
    """Endless batches in the order of the sampler, built one thread ahead."""
    masks = TargetMasks(cache.instances(samples.table_name), cache.sizes, config.loss.mask_size)
    order = batches(
        len(usable),
        config.train.batch_size,
        seed=config.train.seed,
        fingerprint=cache.fingerprint.digest,
    )
    return map_ahead(
        lambda indices: builder.training_batch(
            [usable[index] for index in indices], masks, vl_exclude=config.loss.vl_exclude
        ),
        order,
        workers=1,
        depth=2,
    )


def _single(text: str, key: str) -> Selection:
    selections = parse_selections(text)
    # A whole dataset would put its validation and test expressions into training.
    if len(selections) != 1 or selections[0].split is None:
        raise ConfigError(f"{key} takes one split such as refcoco:train, not {text!r}.", key=key)
    return selections[0]


def _require_finite(values: dict[str, float], step: int, batch: Batch) -> None:
    broken = [name for name, value in values.items() if not math.isfinite(value)]
    if broken:
        sent_ids = [sample.sent_id for sample in batch.samples]
        raise NonFiniteError(
            f"Step {step}: {', '.join(broken)} is not finite, for the expressions (sent_id) {sent_ids}. "
            "Lower train.lr, or look at these samples.",
            step=step,
            terms=broken,
            sent_ids=sent_ids,
        )


def _is_better(new: Scores, best: Scores) -> bool:
    """Compare by oIoU; NaN, from a selection whose masks are all empty, is worse than any score."""
    return math.isnan(best.overall_iou) or new.overall_iou > best.overall_iou


def _means(records: list[dict[str, float]]) -> dict[str, float]:
    return {name: sum(record[name] for record in records) / len(records) for name in records[0]}


def _score_fields(scores: Scores) -> dict[str, float]:
    return {"oIoU": scores.overall_iou, "mIoU": scores.mean_iou}


def _metadata(
    cache: FeatureCache,
    config: RunConfig,
    model: RisModel,
    bert_record: WeightsRecord,
    samples: SampleSet,
    step: int,
    scores: Scores,
) -> CheckpointMetadata:
    fields: dict[str, Any] = cache.fingerprint.fields
    categories = cache.categories(cache.manifest.datasets[samples.table_name].category_set)
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
        step=step,
        val=_score_fields(scores),
    )

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
from ris_cache.encoders.spec import spec_from_dict
from ris_cache.encoders.weights import WeightsRecord
from ris_cache.errors import ConfigError, DataError, NonFiniteError
from ris_cache.store.cache import CategorySet, FeatureCache
from ris_train.checkpoint import CategoryNames, CheckpointMetadata, save_checkpoint
from ris_train.config import ModelConfig, RunConfig
from ris_train.data.batch import Batch, BatchBuilder, CategorySource, default_category_source
from ris_train.data.masks import TargetMasks
from ris_train.data.merge import TrainingSet, common_categories, load_training_set
from ris_train.data.sampler import batches
from ris_train.data.text import Tokenizer
from ris_train.losses import total_loss
from ris_train.model.bert import load_bert
from ris_train.model.mask_decoder import load_sam_heads
from ris_train.model.segmenter import RisModel
from ris_train.optim import build_optimiser, build_schedule, freeze_untrained
from ris_train.run import RunDirectory
from ris_train.scoring import Scores
from ris_train.validation import Validation


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingReport:
    """What a run came to.

    Attributes:
        best_step: step of the best checkpoint on the validation selection.
        best: its scores; `best.num_samples` may be fewer than the selection holds (`train.val_samples`).
        headline: the metric that it is best by.
        val_size: expressions of the validation selection.
        category_source: which category the model was given.
        weights: labels of all weights that the scores rest on.
        seconds: of training, evaluations included.
        training_set: what was trained on, and what was left out of it.
    """

    run: RunDirectory
    best_step: int
    best: Scores
    headline: str
    val_size: int
    category_source: CategorySource
    weights: dict[str, str]
    seconds: float
    training_set: TrainingSet


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
    training_set = load_training_set(
        cache,
        config.data.train,
        text=config.data.text,
        leakage=config.data.leakage,
        with_no_target=config.model.no_target_head,
    )
    if not training_set.samples:
        raise DataError(
            f"{config.data.train} has no usable expression: {_what_was_left_out(training_set)}.",
            left_out=[part.as_dict() for part in training_set.parts],
        )
    tokenizer = Tokenizer.load(config.model.bert, config.model.max_tokens)
    validation = Validation(cache, tokenizer, config, device)
    categories = _categories(cache, config, training_set)
    builder = BatchBuilder(
        cache,
        tokenizer,
        categories=categories,
        category_source=default_category_source(config),
        device=device,
    )
    builder.require_categories(training_set.samples)
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
            "training_set": [part.as_dict() for part in training_set.parts],
        },
    )
    tokenizer.save(run.tokenizer_dir)
    optimiser = build_optimiser(model, config.train)
    schedule = build_schedule(optimiser, config.train)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]

    best: tuple[int, Scores] | None = None
    started = time.monotonic()
    terms_since_log: list[dict[str, float]] = []
    model.train()
    with tqdm(total=config.train.steps, unit="step", desc="train", disable=not show_progress) as bar:
        for step, batch in enumerate(_training_batches(cache, config, training_set, builder), start=1):
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
                fields = {"val": validation.label, "rules": scores.rules, "num_samples": scores.num_samples}
                run.log({"step": step, **fields, **scores.values})
                metadata = _metadata(cache, config, model, bert_record, categories, step, scores)
                save_checkpoint(run.checkpoint_path("last"), model, metadata)
                if best is None or validation.is_better(scores, best[1]):
                    best = (step, scores)
                    save_checkpoint(run.checkpoint_path("best"), model, metadata)
                if show_progress:
                    bar.write(f"step {step}: {_shown(scores, validation)}", file=sys.stderr)
            if is_last:
                break
    assert best is not None, "the last step evaluates"
    return TrainingReport(
        run=run,
        best_step=best[0],
        best=best[1],
        headline=validation.rules.headline,
        val_size=validation.size,
        category_source=default_category_source(config),
        weights=labels,
        seconds=time.monotonic() - started,
        training_set=training_set,
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


def _categories(cache: FeatureCache, config: RunConfig, training_set: TrainingSet) -> CategorySet:
    """Return the categories of a run; a model that reads none records those of its first dataset."""
    reads_one = config.model.sparse_prompt == "category"
    return common_categories(cache, training_set.table_names[: None if reads_one else 1])


def _training_batches(
    cache: FeatureCache,
    config: RunConfig,
    training_set: TrainingSet,
    builder: BatchBuilder,
) -> Iterator[Batch]:
    """Endless batches in the order of the sampler, built one thread ahead."""
    samples = training_set.samples
    instances = {name: cache.instances(name) for name in training_set.table_names}
    masks = TargetMasks(instances, cache.sizes, config.loss.mask_size)
    order = batches(
        len(samples),
        config.train.batch_size,
        seed=config.train.seed,
        fingerprint=cache.fingerprint.digest,
    )
    return map_ahead(
        lambda indices: builder.training_batch(
            [samples[index] for index in indices], masks, vl_exclude=config.loss.vl_exclude
        ),
        order,
        workers=1,
        depth=2,
    )


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


def _shown(scores: Scores, validation: Validation) -> str:
    values = ", ".join(f"{name} {100 * value:.2f}" for name, value in scores.values.items())
    return f"{validation.label} {values} (rules {scores.rules}, {scores.num_samples} expressions)"


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


def _means(records: list[dict[str, float]]) -> dict[str, float]:
    return {name: sum(record[name] for record in records) / len(records) for name in records[0]}


def _metadata(
    cache: FeatureCache,
    config: RunConfig,
    model: RisModel,
    bert_record: WeightsRecord,
    categories: CategorySet,
    step: int,
    scores: Scores,
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
        step=step,
        val=scores.values,
    )

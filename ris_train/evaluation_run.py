"""Evaluate a run on a cache: load both, score the selections, keep the result beside the run."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from ris_cache.datasets.selection import Selection, parse_selections
from ris_cache.errors import CacheMissError, ConfigError
from ris_cache.store.cache import FeatureCache
from ris_train.checkpoint import load_checkpoint, read_metadata, require_same_cache
from ris_train.config import RunConfig
from ris_train.data.batch import BatchBuilder, CategorySource, default_category_source
from ris_train.data.samples import load_samples, shuffle_expressions
from ris_train.data.text import Tokenizer
from ris_train.evaluate import EvaluationResult, GroundTruth, count_samples, score
from ris_train.run import RunDirectory

RULES_NAME = "ris"


def evaluate_run(
    cache_root: Path,
    run: RunDirectory,
    *,
    checkpoint: str,
    selections: Sequence[Selection] | None,
    category_source: str | None,
    shuffle_seed: int | None,
    batch_size: int,
    device: torch.device,
    show_progress: bool = False,
    is_comparison: bool = False,
) -> tuple[list[EvaluationResult], dict[str, str]]:
    """Score a checkpoint on each split.

    Args:
        cache_root: made by the encoders that the run was trained with.
        run: whose checkpoint to score.
        checkpoint: `best` or `last`.
        selections: what to score; None for every split but train of the run's own dataset.
        category_source: `annotated`, `predicted` or `none`; None for what the model was trained with.
        shuffle_seed: permute expressions within each image by this seed; None leaves them.
        batch_size: expressions per forward pass.
        device: where the model runs.
        show_progress: whether to draw a bar on stderr.
        is_comparison: whether to score on features of another fingerprint too, to see what they change. No
            file is kept beside the run then: they would not be the run's scores.

    Returns:
        One result per split, and the labels of all weights that the numbers rest on.

    Raises:
        CheckpointError: the run has no such checkpoint, or a damaged one.
        FingerprintMismatchError: the cache was made otherwise than the one that the run was trained from.
        ConfigError: a category source that the model cannot use.
    """
    path = run.checkpoint_path(checkpoint)
    metadata = read_metadata(path)
    cache = FeatureCache.open(cache_root, integrity=metadata.config.data.integrity)
    if not is_comparison:
        require_same_cache(metadata, cache.fingerprint.digest, path=path, cache=cache_root)
    config = metadata.config
    source = _category_source(config, category_source)
    model, _ = load_checkpoint(path, device=device)
    tokenizer = Tokenizer.from_folder(run.tokenizer_dir, config.model.max_tokens)
    results = []
    for selection in _one_split_each(cache, config, selections):
        samples = load_samples(cache, selection, text=config.data.text)
        chosen = samples.samples
        if shuffle_seed is not None:
            chosen = shuffle_expressions(chosen, seed=shuffle_seed)
        builder = BatchBuilder(
            cache,
            tokenizer,
            categories=cache.categories(cache.manifest.datasets[samples.table_name].category_set),
            category_source=source,
            device=device,
        )
        truth = GroundTruth(cache.instances(samples.table_name), cache.sizes)
        counts = count_samples(
            model, chosen, builder, truth, batch_size=batch_size, show_progress=show_progress
        )
        results.append(
            EvaluationResult(
                split=f"{samples.table_name}:{selection.split}",
                scores=score(counts, RULES_NAME),
                rules=RULES_NAME,
                category_source=source,
                expressions="own" if shuffle_seed is None else f"shuffled(seed={shuffle_seed})",
                quarantined=samples.quarantined,
                degenerate=sum(sample.is_degenerate for sample in chosen),
            )
        )
    if is_comparison:
        return results, metadata.weight_labels
    name = f"scores-{checkpoint}-{source}"
    if selections is not None:
        name += "-" + "+".join(result.split.replace(":", ".") for result in results)
    if shuffle_seed is not None:
        name += f"-shuffled{shuffle_seed}"
    run.write_evaluation(
        name,
        {
            "checkpoint": checkpoint,
            "step": metadata.step,
            "fingerprint": metadata.fingerprint,
            "weights": metadata.weight_labels,
            "results": [result.as_dict() for result in results],
        },
    )
    return results, metadata.weight_labels


def _one_split_each(
    cache: FeatureCache, config: RunConfig, selections: Sequence[Selection] | None
) -> list[Selection]:
    """Spell a selection without a split out into the splits that the cache has of it."""
    if selections is None:
        (own,) = parse_selections(config.data.val)
        selections = [Selection(dataset=own.dataset, split_by=own.split_by)]
    spelt: list[Selection] = []
    for selection in selections:
        entry = cache.manifest.datasets.get(selection.table_name)
        if selection.split is not None or entry is None:
            spelt.append(selection)
            continue
        spelt += [
            Selection(dataset=selection.dataset, split_by=selection.split_by, split=split)
            for split in entry.splits
            if split != "train"
        ]
    if not spelt:
        raise CacheMissError(
            f"{cache.root} holds no split but train to score. Add one, such as "
            "`ris extract --split refcoco:val`, or name train with --split.",
            path=cache.root,
        )
    return list(dict.fromkeys(spelt))


def _category_source(config: RunConfig, asked: str | None) -> CategorySource:
    reads_category = config.model.sparse_prompt == "category"
    if asked is None:
        return default_category_source(config)
    if reads_category == (asked == "none"):
        raise ConfigError(
            f"Category source {asked!r} does not fit sparse_prompt={config.model.sparse_prompt}; "
            + ("use annotated or predicted." if reads_category else "it reads no category: use none."),
            category_source=asked,
        )
    return "annotated" if asked == "annotated" else "predicted" if asked == "predicted" else "none"

"""Evaluate a run on a cache: load both, score the selections, keep the result beside the run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ris_cache.datasets.selection import Selection, parse_selections
from ris_cache.errors import CacheMissError, CheckpointError, ConfigError
from ris_cache.store.cache import FeatureCache
from ris_cache.store.files import sha256_file
from ris_train.annotated import holds_whole
from ris_train.checkpoint import CheckpointMetadata, load_checkpoint, read_metadata, require_same_cache
from ris_train.config import RunConfig
from ris_train.data.batch import BatchBuilder, CategorySource, default_category_source
from ris_train.data.samples import Sample, load_samples, shuffle_expressions
from ris_train.data.text import Tokenizer
from ris_train.evaluate import count_samples
from ris_train.model.segmenter import RisModel
from ris_train.params import count_parameters
from ris_train.run import RunDirectory
from ris_train.scoring.counts import Counts, concatenate
from ris_train.scoring.predictions import PredictionWriter
from ris_train.scoring.results import EvaluationResult, RunEvaluation, score_split, views_of
from ris_train.scoring.rules import RuleSet, default_rules, rules_named
from ris_train.scoring.samples import SampleTable
from ris_train.scoring.views import VIEWS, View
from ris_train.truth import GroundTruth


@dataclass(frozen=True, slots=True, kw_only=True)
class _Split:
    """One selection: its samples, how many the cache could not give, and whether it holds the whole split."""

    selection: Selection
    samples: Sequence[Sample]
    quarantined: int
    is_whole: bool


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
    rules: str | None = None,
    save_predictions: str | None = None,
    show_progress: bool = False,
    is_comparison: bool = False,
) -> RunEvaluation:
    """Score a checkpoint on each split; every sample is predicted once, whatever the number of rule sets.

    Beside the run, `eval/<evaluation>.json` keeps the results and `eval/<evaluation>.parquet` the samples.

    Args:
        cache_root: made by the encoders that the run was trained with.
        run: whose checkpoint to score.
        checkpoint: `best` or `last`.
        selections: what to score; None for every split but train of the run's own dataset.
        category_source: `annotated`, `predicted` or `none`; None for what the model was trained with.
        shuffle_seed: permute expressions within each image by this seed; None leaves them.
        batch_size: expressions per forward pass.
        device: where the model runs.
        rules: `all` or names of rule sets; None for each dataset's own.
        save_predictions: also write the predicted masks there; see `PredictionWriter`.
        show_progress: whether to draw a bar on stderr.
        is_comparison: whether to score on features of another fingerprint too, to see what they change. No
            file is kept beside the run then: they would not be the run's scores.

    Raises:
        CheckpointError: the run has no such checkpoint, or a damaged one, or wrote it anew meanwhile.
        FingerprintMismatchError: the cache was made otherwise than the one that the run was trained from.
        ConfigError: a category source that the model cannot use, an unknown rule set, or a place where
            predictions cannot be written.
    """
    path = run.checkpoint_path(checkpoint)
    sha256 = sha256_file(path).sha256 if path.is_file() else ""  # of one that is missing the next line tells
    metadata = read_metadata(path)
    cache = FeatureCache.open(cache_root, integrity=metadata.config.data.integrity)
    if not is_comparison:
        require_same_cache(metadata, cache.fingerprint.digest, path=path, cache=cache_root)
    config = metadata.config
    source = _category_source(config, category_source)
    splits = [
        _load(cache, selection, config, shuffle_seed)
        for selection in _one_split_each(cache, config, selections)
    ]
    chosen = {name: _rules(rules, name, splits) for name in _table_names(splits)}
    views = views_of([rule for of_table, _ in chosen.values() for rule in of_table])
    writer = None
    if save_predictions is not None:
        writer = PredictionWriter(save_predictions)
        writer.require_one_table(list(chosen))
        views = tuple({view.name: view for view in (*views, VIEWS["original"])}.values())
    model = _load_model(path, sha256, device)
    tokenizer = Tokenizer.from_folder(
        run.tokenizer_dir, config.model.max_tokens, keep_sep=config.model.keep_sep
    )
    samples, counts = _count_tables(
        cache, model, tokenizer, splits, views, source, batch_size, device, writer, show_progress
    )
    expressions = "own" if shuffle_seed is None else f"shuffled(seed={shuffle_seed})"
    results = _score_splits(splits, chosen, samples, counts, source=source, expressions=expressions)
    meaning: dict[str, Any] = {
        "method": run.path.resolve().name,
        "checkpoint": checkpoint,
        "step": metadata.step,
        "checkpoint_sha256": sha256,
        "fingerprint": cache.fingerprint.digest,
        "weights": metadata.weight_labels,
        "category_source": source,
        "text": config.data.text,
        "expressions": expressions,
        "source": "run",
    }
    if writer is not None:
        any_counts = next(iter(counts.values()))
        writer.write(samples, any_counts.says_no_target, has_head=any_counts.has_head, info=meaning)
    if not is_comparison:
        name = _evaluation_name(checkpoint, source, results if selections is not None else [], shuffle_seed)
        _keep(run, name, results, metadata, meaning, _sample_table(cache, samples, counts, metadata, meaning))
    return RunEvaluation(
        run=meaning["method"],
        checkpoint=checkpoint,
        step=metadata.step,
        checkpoint_sha256=sha256,
        weight_labels=metadata.weight_labels,
        results=tuple(results),
    )


def _load_model(path: Path, sha256: str, device: torch.device) -> RisModel:
    """Load a checkpoint, and make sure that no other has taken its place since it was digested."""
    model, _ = load_checkpoint(path, device=device)
    if sha256_file(path).sha256 != sha256:
        raise CheckpointError(
            f"Checkpoint {path} was written anew while it was read. Evaluate again.", path=path
        )
    return model


def _load(cache: FeatureCache, selection: Selection, config: RunConfig, shuffle_seed: int | None) -> _Split:
    found = load_samples(cache, selection, text=config.data.text)
    samples = found.samples
    if shuffle_seed is not None:
        samples = shuffle_expressions(samples, seed=shuffle_seed)
    return _Split(
        selection=selection,
        samples=samples,
        quarantined=found.quarantined,
        is_whole=holds_whole(cache, selection),
    )


def _table_names(splits: Sequence[_Split]) -> list[str]:
    return list(dict.fromkeys(split.selection.table_name for split in splits))


def _rules(asked: str | None, table_name: str, splits: Sequence[_Split]) -> tuple[tuple[RuleSet, ...], str]:
    """The rule sets of one table, and the name of its own one."""
    has_no_target = any(
        not sample.ann_ids
        for split in splits
        if split.selection.table_name == table_name
        for sample in split.samples
    )
    default = default_rules(table_name.partition(".")[0], has_no_target=has_no_target)
    return rules_named(default if asked is None else asked), default


def _score_splits(
    splits: Sequence[_Split],
    chosen: Mapping[str, tuple[Sequence[RuleSet], str]],
    samples: Sequence[Sample],
    counts: Mapping[str, Counts],
    *,
    source: CategorySource,
    expressions: str,
) -> list[EvaluationResult]:
    """Score each split by the rule sets of its table.

    Args:
        chosen: rule sets and the name of the default one, by table.
        samples: those that `counts`, by name of the view, are of, in their order.
    """
    position = {sample: index for index, sample in enumerate(samples)}
    results = []
    for split in splits:
        of_table, default = chosen[split.selection.table_name]
        rows = np.array([position[sample] for sample in split.samples], dtype=np.intp)
        results.append(
            score_split(
                f"{split.selection.table_name}:{split.selection.split}",
                {name: found.select(rows) for name, found in counts.items()},
                of_table,
                default_rules=default,
                category_source=source,
                expressions=expressions,
                quarantined=split.quarantined,
                degenerate=sum(sample.is_degenerate for sample in split.samples),
                is_whole=split.is_whole,
            )
        )
    return results


def _count_tables(
    cache: FeatureCache,
    model: RisModel,
    tokenizer: Tokenizer,
    splits: Sequence[_Split],
    views: Sequence[View],
    source: CategorySource,
    batch_size: int,
    device: torch.device,
    writer: PredictionWriter | None,
    show_progress: bool,
) -> tuple[list[Sample], dict[str, Counts]]:
    """Count every sample once, though several selections may hold it, table by table."""
    truth = GroundTruth.from_cache(cache, _table_names(splits))
    samples: list[Sample] = []
    parts: list[dict[str, Counts]] = []
    for name in _table_names(splits):
        own = [split.samples for split in splits if split.selection.table_name == name]
        of_table = list(dict.fromkeys(sample for some in own for sample in some))
        builder = BatchBuilder(
            cache,
            tokenizer,
            categories=cache.categories(cache.manifest.datasets[name].category_set),
            category_source=source,
            device=device,
        )
        builder.require_categories(of_table)
        parts.append(
            count_samples(
                model,
                of_table,
                builder,
                truth,
                views=views,
                batch_size=batch_size,
                show_progress=show_progress,
                keep_mask=writer.keep_mask if writer is not None else None,
            )
        )
        samples += of_table
    return samples, {view.name: concatenate([part[view.name] for part in parts]) for view in views}


def _evaluation_name(
    checkpoint: str, source: CategorySource, named: Sequence[EvaluationResult], shuffle_seed: int | None
) -> str:
    name = f"scores-{checkpoint}-{source}"
    if named:
        name += "-" + "+".join(result.split.replace(":", ".") for result in named)
    if shuffle_seed is not None:
        name += f"-shuffled{shuffle_seed}"
    return name


def _sample_table(
    cache: FeatureCache,
    samples: Sequence[Sample],
    counts: dict[str, Counts],
    metadata: CheckpointMetadata,
    meaning: dict[str, Any],
) -> SampleTable:
    """The table of all samples; of one shuffled differently by two selections, the first."""
    first: dict[tuple[str, str, int, int], int] = {}
    for index, sample in enumerate(samples):
        first.setdefault((sample.table_name, sample.split, sample.ref_id, sample.sent_id), index)
    rows = list(first.values())
    names = dict.fromkeys(sample.table_name for sample in samples)
    parts = count_parameters(metadata.encoder_spec, metadata.config.model)
    num_parameters = sum(part.count for part in parts if part.name in ("frozen", "trainable"))
    return SampleTable.of(
        [samples[index] for index in rows],
        {view: found.select(np.array(rows, dtype=np.intp)) for view, found in counts.items()},
        {name: cache.instances(name) for name in names},
        metadata=meaning | {"num_parameters": num_parameters},
    )


def _keep(
    run: RunDirectory,
    name: str,
    results: Sequence[EvaluationResult],
    metadata: CheckpointMetadata,
    meaning: dict[str, Any],
    table: SampleTable,
) -> None:
    """Write both files of an evaluation, the samples first: where there are results, there are samples."""
    table.write(run.path / "eval" / f"{name}.parquet")
    run.write_evaluation(
        name,
        meaning | {"fingerprint": metadata.fingerprint, "results": [result.as_dict() for result in results]},
    )


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

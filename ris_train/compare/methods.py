"""What is compared: runs, samples tables and published rows, each found by how the user names it."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np

from ris_cache.errors import ConfigError, DataError
from ris_train.compare.published import AS_PUBLISHED, PublishedMethod, published_method, published_tables
from ris_train.compare.reading import printable, read_table
from ris_train.run import RunDirectory, find_run
from ris_train.run_details import checkpoint_digest, staleness
from ris_train.scoring.rules import RULES, RuleSet, default_rules
from ris_train.scoring.samples import SampleTable
from ris_train.scoring.views import VIEWS

PUBLISHED_PREFIX = "published:"
DATASET_NAMES = {
    "refcoco": "RefCOCO",
    "refcoco+": "RefCOCO+",
    "refcocog": "G-Ref",
    "grefcoco": "gRefCOCO",
    "ref-zom": "Ref-ZOM",
}
"""Datasets in the order of the tables, as the supplement writes them."""
_USUAL_SPLIT_BY = {
    "refcoco": "unc",
    "refcoco+": "unc",
    "refcocog": "umd",
    "grefcoco": "unc",
    "ref-zom": "final",
}
_SPLIT_ORDER = ("train", "val", "testA", "testB", "test")
NOT_STATED = "not stated"
_MOST_PARAMETERS = 10**15
_LABELS = ("category_source", "text", "expressions")

SplitKey = tuple[str, str]
"""Table name (`dataset.split_by`) and split."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Method:
    """One row of a comparison.

    Attributes:
        name: as tables print it.
        origin: the files or the table that its numbers come from.
        category_source: `annotated`, `predicted` or `none`; `not stated` where the file does not say.
        text: which form of the expression the method read.
        expressions: `own`, or how they were shuffled.
        size: number of parameters as text; None where unknown.
        weights: labels of the weights that its numbers rest on.
        notes: by view, what its counts there rest on besides, such as masks that were resized.
        splits: its samples by split, one sample each expression; empty for published rows.
        published: its published numbers; None for what was scored here.
    """

    name: str
    origin: str
    category_source: str
    text: str
    expressions: str = "own"
    size: str | None = None
    weights: str = NOT_STATED
    notes: Mapping[str, str] = field(default_factory=dict)
    splits: Mapping[SplitKey, SampleTable]
    published: PublishedMethod | None = None

    @property
    def is_published(self) -> bool:
        """Whether only its published numbers are known."""
        return self.published is not None

    @property
    def split_keys(self) -> tuple[SplitKey, ...]:
        """Splits that it has any numbers of, in the order of the tables."""
        if self.published is None:
            return ordered_splits(self.splits)
        return ordered_splits({(value.table_name, value.split) for value in self.published.values})


def find_methods(
    arguments: Sequence[str],
    *,
    runs_dir: Path,
    checkpoint: str = "best",
    rules: Sequence[RuleSet] | None = None,
) -> tuple[Method, ...]:
    """Find what each argument names.

    Args:
        arguments: `published`, `published:<name>`, a path of a samples table (`*.parquet`), or a run by name
            or path; each may be preceded by `NAME=`. `published` alone stands for all published rows.
        runs_dir: where runs are looked for.
        checkpoint: whose evaluations of a run are meant, `best` or `last`.
        rules: that will score them, so that of a run's evaluations one that counted for these is taken; None
            for each dataset's own.

    Raises:
        ConfigError: nothing is named, or two methods have one name.
        CheckpointError: there is no such run.
        DataError: a run was not evaluated, or a samples table is missing or unreadable.
    """
    if not arguments:
        raise ConfigError("Nothing to compare. Name runs, samples tables or published rows.")
    methods: list[Method] = []
    for argument in arguments:
        name, what = _split_name(argument, runs_dir)
        if what == "published":
            if name is not None:
                raise ConfigError(
                    f"{argument!r} gives one name to all published rows. Name one: {name}=published:ours.",
                    argument=argument,
                )
            methods += [published_row(key) for key in published_tables().methods]
        elif what.startswith(PUBLISHED_PREFIX):
            methods.append(published_row(what.removeprefix(PUBLISHED_PREFIX), name=name))
        elif what.endswith(".parquet"):
            path = Path(what)
            table = read_table(path)
            named = name or str(table.metadata.get("method") or path.stem)
            methods.append(_from_tables([(path, table)], name=named))
        else:
            run = find_run(runs_dir, what).path
            methods.append(_from_tables(_evaluations(run, checkpoint, rules), name=name or run.name))
    names = [method.name for method in methods]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ConfigError(
            f"Two methods are called {twice[0]!r}. Give them names of their own: NAME=path.", name=twice[0]
        )
    return tuple(methods)


def published_row(key: str, *, name: str | None = None) -> Method:
    """Return published rows as a method.

    Raises:
        ConfigError: there are none of that name.
    """
    published = published_method(key)
    return Method(
        name=name or published.name,
        origin=f"{published_tables().source}, {_tables_named(published)}",
        category_source=published.category_source,
        text=published.text,
        expressions=AS_PUBLISHED,
        size=published.size,
        splits=MappingProxyType({}),
        published=published,
    )


def ordered_splits(keys: Any) -> tuple[SplitKey, ...]:
    """Sort splits as the supplement's tables do; other datasets and splits follow by name."""
    datasets, splits = list(DATASET_NAMES), list(_SPLIT_ORDER)

    def place(key: SplitKey) -> tuple[int, str, int, str]:
        dataset = key[0].partition(".")[0]
        return (
            datasets.index(dataset) if dataset in datasets else len(datasets),
            key[0],
            splits.index(key[1]) if key[1] in splits else len(splits),
            key[1],
        )

    return tuple(sorted(keys, key=place))


def dataset_title(table_name: str) -> str:
    """Name a dataset as the tables print it; a split_by other than the usual one is added."""
    dataset, _, split_by = table_name.partition(".")
    if dataset not in DATASET_NAMES:
        return split_by if dataset == "custom" else table_name
    title = DATASET_NAMES[dataset]
    return title if split_by == _USUAL_SPLIT_BY[dataset] else f"{title} ({split_by})"


def split_title(key: SplitKey) -> str:
    """Name a split for people: RefCOCO val."""
    return f"{dataset_title(key[0])} {key[1]}"


def _split_name(argument: str, runs_dir: Path) -> tuple[str | None, str]:
    name, equals, what = argument.partition("=")
    if not equals or Path(argument).exists() or (runs_dir / argument).exists():
        return None, argument
    if not name.strip() or not what:
        raise ConfigError(f"{argument!r} is no NAME=path.", argument=argument)
    return printable(name.strip()), what


def _tables_named(published: PublishedMethod) -> str:
    wordings = [f"Table {table} ({wording})" for table, wording in published.wording.items()]
    return ", ".join(wordings)


def _evaluations(
    run: Path, checkpoint: str, rules: Sequence[RuleSet] | None
) -> list[tuple[Path, SampleTable]]:
    """Return the newest samples table that fits, and the others that were made alike, newest first.

    One evaluation may have covered one split only. Others of the same weights, category source and text fill
    in the splits that the newest lacks; any other kind must be named by its path. So must one of a checkpoint
    that another has taken the place of; where the checkpoint is gone, the newest evaluation says which it is.
    """
    digest = checkpoint_digest(RunDirectory(run), checkpoint)
    stale: dict[Path, str] = {}
    paths = sorted((run / "eval").glob("*.parquet"), key=lambda path: (-path.stat().st_mtime_ns, path.name))
    fitting = []
    for path in paths:
        table = read_table(path)
        is_own = table.metadata.get("expressions", "own") == "own"
        if is_own and table.metadata.get("checkpoint") == checkpoint and _has_views(table, rules):
            why = staleness(table.metadata.get("checkpoint_sha256"), digest, checkpoint)
            if why and digest is not None:
                stale[path] = why
            else:
                fitting.append((path, table))
    if not fitting:
        option = "" if rules is None else " --rules " + ",".join(rule.name for rule in rules)
        raise DataError(
            f"{run} holds no samples table in eval/ of checkpoint {checkpoint}"
            f"{'' if rules is None else ' for these rule sets'}{_passed_over(stale)}. Make one: `ris eval "
            f"--run {shlex.quote(str(run))} --checkpoint {checkpoint}{option}`, or name a table by its path.",
            path=run / "eval",
            checkpoint=checkpoint,
            stale=sorted(stale),
        )
    return [item for item in fitting if _made_of(item[1]) == _made_of(fitting[0][1])]


def _passed_over(stale: Mapping[Path, str]) -> str:
    """Why tables were not taken that otherwise fit, for an error."""
    return f"; {', '.join(f'{path.name} is {why}' for path, why in stale.items())}" if stale else ""


def _has_views(table: SampleTable, rules: Sequence[RuleSet] | None) -> bool:
    if rules is None:
        has_no_target = bool(np.any(np.asarray(table.columns["is_no_target"])))
        datasets = {name.partition(".")[0] for name in table.columns["table"]}
        rules = [RULES[default_rules(dataset, has_no_target=has_no_target)] for dataset in datasets]
    return all(rule.view.name in table.views for rule in rules)


def _made_of(table: SampleTable) -> tuple[str, ...]:
    names = (*_LABELS, "weights", "fingerprint", "step", "checkpoint_sha256")
    return tuple(repr(table.metadata.get(name)) for name in names)


def _from_tables(tables: Sequence[tuple[Path, SampleTable]], *, name: str) -> Method:
    splits: dict[SplitKey, SampleTable] = {}
    used: list[Path] = []
    for path, table in tables:
        table_names = np.asarray(table.columns["table"], dtype=object)
        split_names = np.asarray(table.columns["split"], dtype=object)
        found = dict.fromkeys(zip(table_names.tolist(), split_names.tolist(), strict=True))
        for key in [key for key in found if key not in splits]:
            splits[key] = table.select((table_names == key[0]) & (split_names == key[1]))
            used.append(path)
    if not splits:
        raise DataError(f"{tables[0][0]} holds no samples to compare.", path=tables[0][0])
    metadata = tables[0][1].metadata
    labels = {label: printable(str(metadata.get(label, NOT_STATED))) for label in _LABELS}
    return Method(
        name=printable(name),
        origin=", ".join(str(path) for path in dict.fromkeys(used)),
        category_source=labels["category_source"],
        text=labels["text"],
        expressions=labels["expressions"],
        size=_size(metadata.get("num_parameters")),
        weights=_weights(metadata.get("weights")),
        notes=_notes(tables[0][1]),
        splits=MappingProxyType({key: splits[key] for key in ordered_splits(splits)}),
    )


def _size(num_parameters: object) -> str | None:
    if not isinstance(num_parameters, int) or isinstance(num_parameters, bool):
        return None
    if not 0 < num_parameters < _MOST_PARAMETERS:
        return None
    return f"{num_parameters / 1e6:.0f}M"


def _weights(labels: object) -> str:
    """Labels of all weights in one line."""
    if not isinstance(labels, dict) or not labels:
        return NOT_STATED
    return printable(", ".join(f"{role} {label}" for role, label in labels.items()))


def _notes(table: SampleTable) -> dict[str, str]:
    """By view, what counts rest on besides: what the table says, and whether the threshold was the view's."""
    given, stated = (table.metadata.get(name) for name in ("notes", "thresholds"))
    given, stated = (found if isinstance(found, dict) else {} for found in (given, stated))
    notes = {}
    for view in table.views:
        texts = [printable(str(given[view]))] if view in given else []
        is_predicted = table.metadata.get("source") == "predictions"
        if is_predicted and view in VIEWS and stated.get(view) != VIEWS[view].threshold:
            texts.append(
                f"masks as predicted; that probability > {VIEWS[view].threshold:g} made them is not stated"
            )
        if texts:
            notes[view] = "; ".join(texts)
    return notes

"""Scores by what the samples are like: crowding, target size, length of the expression, position words."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import numpy as np
import numpy.typing as npt

from ris_cache.errors import ConfigError
from ris_train.compare.comparison import (
    Comparison,
    Estimate,
    SplitScores,
    estimate,
    estimate_dict,
    reference_of,
)
from ris_train.compare.intervals import FACT_TITLES, common_caption, common_facts
from ris_train.compare.methods import split_title
from ris_train.compare.tables import Block, Cell, Column, Row, Table, count_cell, interval_cell
from ris_train.compare.terms import mean_name, metric_terms, overall_name
from ris_train.scoring.rules import RuleSet
from ris_train.scoring.samples import SampleTable

Bins = tuple[tuple[str, npt.NDArray[np.bool_]], ...]
"""Label and bool[N] of each bin; a sample is in one of them."""

NO_TARGET = "no target"
SMALL, MEDIUM = 32**2, 96**2
"""COCO's bounds of small and medium objects, in pixels of the original frame."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Bin:
    """The samples of one split that are alike.

    Attributes:
        estimates: by index of the method, by metric.
    """

    label: str
    num_samples: int
    estimates: Mapping[int, Mapping[str, Estimate]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Breakdown:
    """One split by one rule set, in bins."""

    scored: SplitScores
    bins: tuple[Bin, ...]


def break_down(comparison: Comparison, by: str) -> tuple[Breakdown, ...]:
    """Score each bin of each split.

    Args:
        by: a name of `BINNINGS`.

    Raises:
        ConfigError: there is no such binning, nothing but published rows, or the binning needs the original
            frame and the samples lack it.
    """
    if by not in BINNINGS:
        raise ConfigError(f"There is no breakdown by {by!r}; there are {', '.join(BINNINGS)}.", found=by)
    if not comparison.by_rules:
        raise ConfigError("Published rows have no samples for a breakdown; add a run or a samples table.")
    return tuple(
        Breakdown(scored=scored, bins=_score_bins(comparison, scored, by))
        for splits in comparison.by_rules.values()
        for scored in splits
    )


def breakdown_tables(comparison: Comparison, by: str, breakdowns: Sequence[Breakdown]) -> tuple[Table, ...]:
    """Make one table per rule set: a block for each split, a row for each bin."""
    tables = []
    indices = [index for index, method in enumerate(comparison.methods) if not method.is_published]
    for rules_name in dict.fromkeys(breakdown.scored.rules.name for breakdown in breakdowns):
        chosen = [breakdown for breakdown in breakdowns if breakdown.scored.rules.name == rules_name]
        rules = chosen[0].scored.rules
        metrics = _metrics(rules)
        names = [comparison.methods[index].name for index in indices]
        caption = common_caption(comparison, rules)
        tables.append(
            Table(
                title=f"{' and '.join(metrics)} by {_TITLES[by][0]}",
                lead_titles=(_TITLES[by][1],),
                columns=(
                    Column("", "samples"),
                    *(Column(metric, name) for metric in metrics for name in names),
                ),
                blocks=tuple(
                    _block(breakdown, metrics, indices, common_facts(comparison, rules))
                    for breakdown in chosen
                ),
                caption=caption,
                fact_titles=FACT_TITLES,
            )
        )
    return tuple(tables)


def breakdown_dict(comparison: Comparison, breakdown: Breakdown) -> dict[str, Any]:
    """A breakdown as plain values."""
    return {
        "table": breakdown.scored.key[0],
        "split": breakdown.scored.key[1],
        "rules": breakdown.scored.rules.name,
        "bins": [
            {
                "bin": found.label,
                "num_samples": found.num_samples,
                "scores": {
                    comparison.methods[index].name: {
                        metric: estimate_dict(value) for metric, value in estimates.items()
                    }
                    for index, estimates in found.estimates.items()
                },
            }
            for found in breakdown.bins
        ],
    }


def _objects(table: SampleTable) -> Bins:
    count = _column(table, "num_same_category")
    has_target = ~_is_no_target(table)
    labels = [(str(number), has_target & (count == number)) for number in (1, 2, 3)]
    # Objects of a custom dataset need no category, and then none are of the same.
    unknown = has_target & (count == 0)
    without = (("no category", unknown),) if unknown.any() else ()
    return (*_no_target(table), *without, *labels, ("4+", has_target & (count >= 4)))


def _size(table: SampleTable) -> Bins:
    if "original" not in table.views:
        raise ConfigError(
            "Target sizes are pixels of the original frame, on which these samples were not counted; "
            f"they have {', '.join(table.views)}. Score again with --rules ris or gres beside the others.",
            known=table.views,
        )
    area = _column(table, "G:original")
    has_target = ~_is_no_target(table)
    return (
        *_no_target(table),
        ("small, < 32²", has_target & (area < SMALL)),
        ("medium, < 96²", has_target & (area >= SMALL) & (area < MEDIUM)),
        ("large, ≥ 96²", has_target & (area >= MEDIUM)),
    )


def _length(table: SampleTable) -> Bins:
    words = _column(table, "num_words")
    bounds = ((1, 2), (3, 5), (6, 8))
    bins = [(f"{low}–{high}", (words >= low) & (words <= high)) for low, high in bounds]
    empty = words == 0
    return (*((("0", empty),) if empty.any() else ()), *bins, ("9+", words >= 9))


def _position(table: SampleTable) -> Bins:
    has_word = np.asarray(table.columns["has_position_word"], dtype=np.bool_)
    return (("yes", has_word), ("no", ~has_word))


BINNINGS: MappingProxyType[str, Callable[[SampleTable], Bins]] = MappingProxyType(
    {"objects": _objects, "size": _size, "length": _length, "position": _position}
)
"""What `--by` offers."""
_TITLES = MappingProxyType(
    {
        "objects": ("number of objects of the target's category in the image", "objects"),
        "size": ("target size, in pixels of the original frame", "pixels"),
        "length": ("length of the expression", "words"),
        "position": ("presence of a position word", "position word"),
    }
)
"""Of each breakdown: what it is by, and what stands over its bins."""


def _score_bins(comparison: Comparison, scored: SplitScores, by: str) -> tuple[Bin, ...]:
    metrics = _metrics(scored.rules)
    tables = scored.paired.tables
    terms = {
        index: metric_terms(scored.rules, table.counts(scored.rules.view.name))
        for index, table in tables.items()
    }
    bins = []
    # What samples are like is read from one table: the text may differ between methods, as raw and sent do.
    for label, chosen in BINNINGS[by](scored.paired.any_table):
        within = {
            index: {metric: ratios[metric].within(chosen) for metric in metrics}
            for index, ratios in terms.items()
        }
        estimates = estimate(
            within,
            scored.paired,
            reference=reference_of(comparison.methods),
            num_resamples=comparison.num_resamples,
            seed=comparison.seed,
        )
        bins.append(Bin(label=label, num_samples=int(chosen.sum()), estimates=estimates))
    return tuple(bins)


def _metrics(rules: RuleSet) -> tuple[str, ...]:
    found = tuple(name for name in (overall_name(rules), mean_name(rules)) if name is not None)
    return found or (rules.headline,)


def _block(
    breakdown: Breakdown, metrics: Sequence[str], indices: Sequence[int], facts: tuple[str, ...]
) -> Block:
    rows = []
    for found in breakdown.bins:
        cells = [count_cell(found.num_samples)]
        for metric in metrics:
            for index in indices:
                value = found.estimates.get(index, {}).get(metric)
                cells.append(Cell() if value is None else interval_cell(value.value, value.interval))
        rows.append(Row(label=found.label, cells=tuple(cells), facts=facts))
    return Block(title=split_title(breakdown.scored.key), rows=tuple(rows))


def _no_target(table: SampleTable) -> Bins:
    """The bin of no-target samples, where there are any."""
    is_no_target = _is_no_target(table)
    return ((NO_TARGET, is_no_target),) if is_no_target.any() else ()


def _is_no_target(table: SampleTable) -> npt.NDArray[np.bool_]:
    return np.asarray(table.columns["is_no_target"], dtype=np.bool_)


def _column(table: SampleTable, name: str) -> npt.NDArray[np.int64]:
    return np.asarray(table.columns[name], dtype=np.int64)

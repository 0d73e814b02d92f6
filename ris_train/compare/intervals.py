"""The table of intervals: how sure each score and each difference is."""

from __future__ import annotations

from ris_train.compare.bootstrap import CONFIDENCE
from ris_train.compare.comparison import Comparison, Estimate, SplitScores, describe_view, reference_of
from ris_train.compare.methods import split_title
from ris_train.compare.tables import Block, Cell, Column, Row, Table, interval_cell
from ris_train.scoring.rules import RuleSet

LEVEL = f"{CONFIDENCE:.0%}".replace("%", " %")


def interval_tables(comparison: Comparison) -> tuple[Table, ...]:
    """Make one table per rule set; none without resamples or without samples."""
    if not comparison.num_resamples:
        return ()
    return tuple(_table(comparison, scored) for scored in comparison.by_rules.values())


def common_caption(comparison: Comparison, rules: RuleSet) -> str:
    """Say by which rules, of which category source and how sure the scores of a table are."""
    parts = [
        f"rules: {rules.name}",
        f"grid: {describe_view(rules)}",
        f"category source: {category_sources(comparison)}",
        "percent",
    ]
    if comparison.num_resamples:
        parts.append(
            f"[low, high]: {LEVEL} interval by paired bootstrap over images, "
            f"{comparison.num_resamples:,} resamples, seed {comparison.seed}"
        )
    return " · ".join(parts)


FACT_TITLES = ("rules", "grid", "category source")


def common_facts(comparison: Comparison, rules: RuleSet) -> tuple[str, ...]:
    """What stands in the caption, for formats that have none; one for each of `FACT_TITLES`."""
    return rules.name, describe_view(rules), category_sources(comparison)


def category_sources(comparison: Comparison) -> str:
    """The category source of each method with samples, in one line."""
    return ", ".join(
        f"{method.name} {method.category_source}" for method in comparison.methods if not method.is_published
    )


def _table(comparison: Comparison, scored: tuple[SplitScores, ...]) -> Table:
    reference = reference_of(comparison.methods)
    assert reference is not None  # something was scored
    indices = [index for index, method in enumerate(comparison.methods) if not method.is_published]
    first = comparison.methods[reference].name
    columns = [Column(first, "score")]
    for index in indices[1:]:
        name = comparison.methods[index].name
        columns += [Column(name, "score"), Column(name, "difference")]
    caption = common_caption(comparison, scored[0].rules)
    if len(indices) > 1:
        caption += f" · difference: to {first} on the same samples"
    return Table(
        title=f"{LEVEL} intervals",
        lead_titles=("metric",),
        columns=tuple(columns),
        blocks=tuple(_block(split, indices, common_facts(comparison, scored[0].rules)) for split in scored),
        caption=caption,
        fact_titles=FACT_TITLES,
    )


def _block(split: SplitScores, indices: list[int], facts: tuple[str, ...]) -> Block:
    def cells(index: int, metric: str, *, with_difference: bool) -> list[Cell]:
        estimates = split.estimates.get(index)
        if estimates is None:
            return [Cell()] * (2 if with_difference else 1)
        found = estimates[metric]
        score = interval_cell(found.value, found.interval)
        return [score, difference_cell(found)] if with_difference else [score]

    rows = []
    for metric in split.rules.metrics:
        entries: list[Cell] = []
        for position, index in enumerate(indices):
            entries += cells(index, metric, with_difference=position > 0)
        rows.append(Row(label=metric, cells=tuple(entries), facts=facts))
    title = f"{split_title(split.key)}: {split.paired.num_samples:,} samples, {split.num_images:,} images"
    return Block(title=title, rows=tuple(rows))


def difference_cell(found: Estimate) -> Cell:
    """The cell of a difference; nothing where there is none."""
    if found.difference is None:
        return Cell()
    return interval_cell(found.difference, found.difference_interval, signed=True)

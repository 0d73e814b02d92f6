"""Count the expressions of a dataset, split by split and by the groups that published numbers exist for."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from ris_cache.datasets.check.report import WordFindings
from ris_cache.datasets.published import PUBLISHED, TOTAL, Quantity
from ris_cache.datasets.records import ExpressionRecord


def count_groups(
    table_name: str, expressions: Sequence[ExpressionRecord], *, is_whole: bool
) -> dict[str, dict[Quantity, int]]:
    """Count each split, then each published group whose splits are all there.

    Args:
        is_whole: whether `expressions` are all of the dataset's, so that there is a total.
    """
    by_split = by_splits(expressions)
    counts = {split: _counted(chosen) for split, chosen in by_split.items()}
    if is_whole:
        counts[TOTAL] = _counted(expressions)
    for group in PUBLISHED[table_name].groups if table_name in PUBLISHED else ():
        parts = group.split("+")
        if group not in counts and by_split.keys() >= set(parts):
            counts[group] = _counted([expression for part in parts for expression in by_split[part]])
    return counts


def missing_splits(table_name: str, present: Sequence[str]) -> tuple[str, ...]:
    """Name the splits that the published dataset has and this one has not."""
    groups = PUBLISHED[table_name].groups if table_name in PUBLISHED else ()
    return tuple(group for group in groups if group != TOTAL and "+" not in group and group not in present)


def judge_words(expressions: Sequence[ExpressionRecord]) -> dict[str, WordFindings]:
    """Find blank, repeated and contradictory sentences, split by split."""
    findings = {}
    for split, chosen in by_splits(expressions).items():
        said = Counter((e.image_id, e.sent, frozenset(e.ann_ids)) for e in chosen)
        meanings = Counter((image_id, sent) for image_id, sent, _ in said)
        findings[split] = WordFindings(
            blank=sum(not e.raw.strip() or not e.sent.strip() for e in chosen),
            repeated=len(chosen) - len(said),
            contradictory=sum(meanings[e.image_id, e.sent] > 1 for e in chosen),
        )
    return findings


def by_splits(expressions: Sequence[ExpressionRecord]) -> dict[str, list[ExpressionRecord]]:
    """Sort expressions by split, in the order of first appearance."""
    sorted_out: dict[str, list[ExpressionRecord]] = {}
    for expression in expressions:
        sorted_out.setdefault(expression.split, []).append(expression)
    return sorted_out


def _counted(expressions: Sequence[ExpressionRecord]) -> dict[Quantity, int]:
    kinds = Counter(expression.target_kind for expression in expressions)
    return {
        "refs": len({expression.ref_id for expression in expressions}),
        "images": len({expression.image_id for expression in expressions}),
        "sentences": len(expressions),
        "objects": len({ann_id for expression in expressions for ann_id in expression.ann_ids}),
        "none": kinds["none"],
        "one": kinds["one"],
        "many": kinds["many"],
    }

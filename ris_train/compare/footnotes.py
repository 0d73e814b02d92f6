"""What makes rows of a table differ in more than the method, said below the table.

Rows are set against the first: another category source, another text, other rules or weights, shuffled
expressions, masks of an unknown threshold, a decision without a head, and samples left out are each marked,
so that no such difference is compared in silence.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np

from ris_train.compare.comparison import Comparison, SplitScores, reference_of
from ris_train.compare.methods import NOT_STATED, Method, SplitKey, split_title
from ris_train.compare.published import PublishedMethod, published_tables
from ris_train.compare.tables import join_names

_SOURCES = {
    "annotated": "is given the annotated category",
    "predicted": "is given the category that CLIP predicts from the expression",
    "none": "is given no category",
    NOT_STATED: "does not state which category it is given, if any",
}
_TEXTS = {
    "raw": "reads expressions as they were typed (raw)",
    "sent": "reads cleaned expressions (sent)",
    NOT_STATED: "does not state which form of the expressions it reads",
}


def refusals(comparison: Comparison) -> list[str]:
    """Say which splits which rule sets could not score; one text, or none."""
    by_rules: dict[str, list[str]] = {}
    for key, rules in comparison.refused:
        by_rules.setdefault(rules, []).append(split_title(key))
    texts = [f"{', '.join(titles)} by {rules}" for rules, titles in by_rules.items()]
    return [f"not scored, for want of a rule for no-target samples: {'; '.join(texts)}"] if texts else []


def row_notes(
    comparison: Comparison,
    index: int,
    *,
    keys: Sequence[SplitKey],
    metrics: Sequence[str],
    scored: Sequence[SplitScores],
    table: str | None,
) -> list[str]:
    """Return the footnotes of a method's row.

    Args:
        index: of the method.
        keys: splits of the table.
        metrics: that the table shows.
        scored: the splits of the table that were scored here.
        table: number of the supplement's table that the layout follows.
    """
    method, first = comparison.methods[index], comparison.methods[0]
    notes: list[str] = []
    if method.published is not None:
        notes += _published_notes(method.published, keys=keys, metrics=metrics, table=table)
        notes += _size_notes(scored, keys)
    if method.category_source != first.category_source:
        notes.append(f"{_given(method)}; {first.name} {_given(first)}")
    if method.text != first.text:
        notes.append(f"{_read(method)}; {first.name} {_read(first)}")
    if not method.is_published and method.expressions != "own":
        notes.append(f"expressions {method.expressions}")
    notes += _weights_notes(comparison, method)
    notes += _head_notes(scored, index)
    for view in dict.fromkeys(split.rules.view.name for split in scored):
        if view in method.notes:
            notes.append(method.notes[view])
    notes += _left_out_notes(scored, index)
    return notes


def _read(method: Method) -> str:
    return _TEXTS.get(method.text, f"reads the text {method.text}")


def _given(method: Method) -> str:
    return _SOURCES.get(method.category_source, f"is given a category of the source {method.category_source}")


def _published_notes(
    method: PublishedMethod, *, keys: Sequence[SplitKey], metrics: Sequence[str], table: str | None
) -> Iterable[str]:
    found = [
        value
        for key in keys
        for metric in metrics
        if (value := method.value(*key, metric, table=table)) is not None
    ]
    named = sorted({f"Table {value.table} (“{method.wording[value.table]}”)" for value in found})
    yield (
        f"{join_names(named) if named else 'published rows'}: rules, grid and samples as published, not "
        f"scored here; {method.remark}"
    )
    shown = {(value.table_name, value.split, value.metric) for value in found}
    has_precision = any(value.metric.startswith("Pr@") for value in found)
    for entry in published_tables().inconsistencies:
        is_its_value = entry.method == method.key and (entry.table_name, entry.split, entry.metric) in shown
        if is_its_value or (entry.metric == "Pr@X" and has_precision):
            yield entry.text


def _weights_notes(comparison: Comparison, method: Method) -> Iterable[str]:
    """Say where a row rests on other weights than the first one scored here, whose are in the caption."""
    reference = reference_of(comparison.methods)
    if method.is_published or reference is None:
        return
    first = comparison.methods[reference]
    if method.weights != first.weights:
        yield f"rests on other weights than {first.name}: {method.weights}"


def _head_notes(scored: Sequence[SplitScores], index: int) -> Iterable[str]:
    """Say where the mask decides for want of a no-target head."""
    for split in scored:
        table = split.paired.tables.get(index)
        if split.rules.head == "decides" and table is not None and not np.any(table.columns["has_head"]):
            yield "has no no-target head: an empty mask counts as that decision"


def _size_notes(scored: Sequence[SplitScores], keys: Sequence[SplitKey]) -> Iterable[str]:
    """Say where the splits scored here are not the published ones."""
    other = []
    for split in scored:
        published = published_tables().num_expressions.get(split.key[0], {}).get(split.key[1])
        if split.key in keys and published is not None and published != split.paired.num_samples:
            other.append(f"{split_title(split.key)} {split.paired.num_samples:,} of {published:,}")
    if other:
        yield f"not over the same samples: scored here are expressions of {'; '.join(other)} published ones"


def _left_out_notes(scored: Sequence[SplitScores], index: int) -> Iterable[str]:
    for split in scored:
        left_out = split.paired.left_out.get(index, 0)
        if left_out:
            yield (
                f"{left_out:,} more samples of {split_title(split.key)} are left out, because another method "
                "lacks them"
            )

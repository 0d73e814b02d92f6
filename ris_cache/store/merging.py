"""Growing the tables of a dataset: new splits and instances join those that the cache has, nothing changes.

A cache serves runs that were started from it, so what one table has said it keeps saying; annotation files
that say otherwise belong in another cache.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from ris_cache.errors import DataError
from ris_cache.store.manifest import SplitCounts
from ris_cache.store.tables import EXPRESSIONS


def merge_expressions(name: str, known: Any, added: Any) -> Any:
    """Return the known expressions, with splits that are new behind them.

    A split that is known must come with the same annotations; its predicted categories are kept. One of the
    two may hold a part of the split only (a trial on a few images): then the larger one is returned in its
    place.

    Raises:
        DataError: a known split with other expressions.
    """
    pieces: dict[str, Any] = {}
    for split in pc.unique(known.column("split")).to_pylist():
        pieces[split] = known.filter(pc.equal(known.column("split"), split))
    for split in pc.unique(added.column("split")).to_pylist():
        new = added.filter(pc.equal(added.column("split"), split))
        old = pieces.get(split)
        pieces[split] = new if old is None else _larger(name, split, old, new)
    return pa.concat_tables([known.slice(0, 0), *pieces.values()])


def _larger(name: str, split: str, old: Any, new: Any) -> Any:
    annotated = [column for column in EXPRESSIONS.names if column != "clip_category_id"]
    if old.select(annotated).equals(new.select(annotated)):
        return old
    smaller, larger = (old, new) if old.num_rows < new.num_rows else (new, old)
    content = {(row["ref_id"], row["sent_id"]): row for row in larger.select(annotated).to_pylist()}
    is_part = smaller.num_rows < larger.num_rows and all(
        content.get((row["ref_id"], row["sent_id"])) == row for row in smaller.select(annotated).to_pylist()
    )
    if not is_part:
        raise DataError(
            f"{name}:{split} has {new.num_rows} expressions that are not the {old.num_rows} the cache "
            "was made from. Restore the annotation files, or extract into another directory.",
            table=name,
            split=split,
        )
    return larger


def merge_instances(name: str, known: Any, added: Any) -> Any:
    """Return known and added instances by ascending ann_id; both tables are in that order.

    Raises:
        DataError: an ann_id with other content than the known one.
    """
    is_shared = pc.is_in(added.column("ann_id"), value_set=known.column("ann_id").combine_chunks())
    shared = added.filter(is_shared)
    same = known.filter(pc.is_in(known.column("ann_id"), value_set=shared.column("ann_id").combine_chunks()))
    if not same.equals(shared):
        pairs = zip(same.to_pylist(), shared.to_pylist(), strict=True)
        ann_id = next(old["ann_id"] for old, new in pairs if old != new)
        raise DataError(
            f"{name}: instance {ann_id} is annotated otherwise than when the cache was made. Restore the "
            "annotation files, or extract into another directory.",
            table=name,
            ann_id=ann_id,
        )
    return pa.concat_tables([known, added.filter(pc.invert(is_shared))]).sort_by("ann_id")


def count_splits(expressions: Any) -> dict[str, SplitCounts]:
    """Count each split of an expression table, in order of first appearance."""
    counts: dict[str, SplitCounts] = {}
    for split in pc.unique(expressions.column("split")).to_pylist():
        rows = expressions.filter(pc.equal(expressions.column("split"), split))
        counts[split] = SplitCounts(
            expressions=rows.num_rows,
            refs=pc.count_distinct(rows.column("ref_id")).as_py(),
            images=pc.count_distinct(rows.column("image_id")).as_py(),
        )
    return counts


def merged_counts(
    expressions: Any, known: Mapping[str, SplitCounts], added_whole: Collection[str]
) -> dict[str, SplitCounts]:
    """Count each split of a merged table, and say which are whole.

    Args:
        known: counts of the table before.
        added_whole: splits that were just added, or compared, with all their expressions.
    """
    counts: dict[str, SplitCounts] = {}
    for split, found in count_splits(expressions).items():
        before = known.get(split)
        was_complete = before is not None and before.is_complete and before.expressions == found.expressions
        counts[split] = found.model_copy(update={"is_complete": was_complete or split in added_whole})
    return counts

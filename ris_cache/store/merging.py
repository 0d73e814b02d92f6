"""Growing the tables of a dataset: new splits and instances join those that the cache has, nothing changes.

A cache serves runs that were started from it, so what one table has said it keeps saying; annotation files
that say otherwise belong in another cache.
"""

from __future__ import annotations

from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from ris_cache.errors import DataError
from ris_cache.store.manifest import SplitCounts
from ris_cache.store.tables import EXPRESSIONS


def merge_expressions(name: str, known: Any, added: Any) -> Any:
    """Return the known expressions followed by the splits that are new.

    A split that is known must come with the same annotations; its predicted categories are kept.

    Raises:
        DataError: a known split with other expressions.
    """
    annotated = [column for column in EXPRESSIONS.names if column != "clip_category_id"]
    pieces = [known]
    for split in pc.unique(added.column("split")).to_pylist():
        new = added.filter(pc.equal(added.column("split"), split))
        old = known.filter(pc.equal(known.column("split"), split))
        if old.num_rows == 0:
            pieces.append(new)
        elif not old.select(annotated).equals(new.select(annotated)):
            raise DataError(
                f"{name}:{split} has {new.num_rows} expressions that are not the {old.num_rows} the cache "
                "was made from. Restore the annotation files, or extract into another directory.",
                table=name,
                split=split,
            )
    return pa.concat_tables(pieces)


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

"""Tables read column by column: what is wanted of many rows, without a record for each of them.

RefCOCO has 142,210 expressions and 50,000 instances. A record of each costs seconds and hundreds of megabytes
at every start, most of it for polygons that a run may never draw.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from itertools import compress, pairwise
from typing import Any

import pyarrow as pa

from ris_cache.datasets.records import InstanceRecord
from ris_cache.datasets.segmentation import from_json


def expression_columns(
    table: Any, names: Sequence[str], *, splits: Collection[str] | None = None
) -> tuple[list[Any], ...]:
    """Return some columns of a table of expressions as plain values.

    Args:
        table: of the schema `tables.EXPRESSIONS`.
        names: columns wanted.
        splits: keeps the expressions of these splits; by default all.

    Returns:
        One list per name, all of the same length, in the table's order. Lists become tuples; equal tuples,
        and equal strings of `split`, are one object.
    """
    columns = tuple(_values(table.column(name), is_shared=name == "split") for name in names)
    if splits is None:
        return columns
    is_wanted = [split in splits for split in _values(table.column("split"), is_shared=True)]
    return tuple(list(compress(column, is_wanted)) for column in columns)


class InstanceTable(Mapping[int, InstanceRecord]):
    """Instances by ann_id; the segmentation of each is parsed when that instance is asked for.

    `table[ann_id]` raises DataError if its segmentation is not of the form that `to_json` writes.

    Args:
        table: of the schema `tables.INSTANCES`.
    """

    def __init__(self, table: Any) -> None:
        ann_ids, image_ids, category_ids, is_crowd = (
            table.column(name).to_numpy() for name in ("ann_id", "image_id", "category_id", "iscrowd")
        )
        self._row = {ann_id: row for row, ann_id in enumerate(ann_ids.tolist())}
        self._image_ids = image_ids
        self._category_ids = category_ids
        self._is_crowd = is_crowd
        self._segmentations = table.column("segmentation")

    def __getitem__(self, ann_id: int) -> InstanceRecord:
        row = self._row[ann_id]
        return InstanceRecord(
            ann_id=ann_id,
            image_id=int(self._image_ids[row]),
            category_id=int(self._category_ids[row]),
            segmentation=from_json(self._segmentations[row].as_py()),
            is_crowd=bool(self._is_crowd[row]),
        )

    def __contains__(self, ann_id: object) -> bool:
        return ann_id in self._row

    def __iter__(self) -> Iterator[int]:
        return iter(self._row)

    def __len__(self) -> int:
        return len(self._row)


def _values(column: Any, *, is_shared: bool) -> list[Any]:
    """Plain values of a column without nulls."""
    if pa.types.is_list(column.type):
        known: dict[Any, Any] = {}
        return [known.setdefault(value, value) for chunk in column.chunks for value in _tuples(chunk)]
    values: list[Any] = column.to_numpy().tolist()
    if not is_shared:
        return values
    known = {}
    return [known.setdefault(value, value) for value in values]


def _tuples(chunk: Any) -> Iterator[tuple[Any, ...]]:
    """Each list of an Arrow array of lists as a tuple."""
    offsets, elements = chunk.offsets.to_pylist(), chunk.values.to_numpy().tolist()
    return (tuple(elements[start:stop]) for start, stop in pairwise(offsets))

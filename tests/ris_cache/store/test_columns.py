"""Columns and single instances of a table are what the records of the whole table are."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any
from unittest.mock import patch

import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ris_cache.datasets.records import ExpressionRecord, InstanceRecord, Rle
from ris_cache.errors import DataError
from ris_cache.store import columns, tables

ids = st.integers(0, 2**40)
expressions = st.builds(
    ExpressionRecord,
    split=st.sampled_from(["train", "val", "testA"]),
    ref_id=ids,
    sent_id=ids,
    sent_index=st.integers(0, 9),
    image_id=ids,
    raw=st.text(),
    sent=st.text(),
    ann_ids=st.lists(ids, max_size=3).map(tuple),
    category_ids=st.lists(st.integers(-1, 90), max_size=3).map(tuple),
    is_degenerate=st.booleans(),
)


def in_chunks(table: Any, size: int) -> Any:
    """The same table, its columns cut into slices of one buffer."""
    if not len(table):
        return table
    return pa.concat_tables([table.slice(start, size) for start in range(0, len(table), size)])


def instances_of(segmentations: Sequence[Any]) -> list[InstanceRecord]:
    return [
        InstanceRecord(
            ann_id=10 * index + 3,
            image_id=index // 2,
            category_id=index - 1,
            segmentation=segmentation,
            is_crowd=index % 3 == 0,
        )
        for index, segmentation in enumerate(segmentations)
    ]


@given(
    st.lists(expressions, max_size=12), st.integers(1, 5), st.sets(st.sampled_from(["train", "val", "no"]))
)
def test_columns_are_the_attributes_of_the_expressions(
    drawn: list[ExpressionRecord], chunk: int, splits: set[str]
) -> None:
    names = tables.EXPRESSIONS.names[: tables.EXPRESSIONS.names.index("no_target")]
    table = in_chunks(tables.expressions_table(drawn, range(len(drawn))), chunk)
    for wanted in (None, splits):
        kept = [one for one in drawn if wanted is None or one.split in wanted]
        found = columns.expression_columns(table, [*names, "category_id"], splits=wanted)
        for name, column in zip(names, found, strict=False):
            assert column == [getattr(one, name) for one in kept], name
            assert [type(value) for value in column] == [type(getattr(one, name)) for one in kept]
        assert found[-1] == [one.category_ids[0] if one.category_ids else -1 for one in kept]


def test_equal_targets_and_splits_are_kept_once() -> None:
    one = ExpressionRecord(
        split="train", ref_id=1, sent_id=2, sent_index=0, image_id=3, raw="a", sent="a", ann_ids=(2**40,),
        category_ids=(1,), is_degenerate=False,
    )  # fmt: skip
    table = in_chunks(tables.expressions_table([one] * 6, [1] * 6), 2)
    for column in columns.expression_columns(table, ["split", "ann_ids"]):
        assert len({id(value) for value in column}) == 1


def test_a_table_of_instances_is_the_mapping_it_was_written_from() -> None:
    written = instances_of([((0.0, 0.5, 9.25, 0.0, 9.5, 9.5),), (), Rle(size=(2, 3), counts="06")] * 3)
    found = columns.InstanceTable(in_chunks(tables.instances_table(written), 2))
    expected = {one.ann_id: one for one in written}
    assert found == expected
    assert list(found) == list(expected)
    assert (len(found), 3 in found, 4 in found, found.get(4)) == (9, True, False, None)
    with pytest.raises(KeyError):
        found[4]


def test_only_the_instances_asked_for_are_parsed() -> None:
    table = tables.instances_table(instances_of([((0.0, 0.0, 5.0, 0.0, 5.0, 5.0),)] * 8))
    with patch.object(columns, "from_json", side_effect=columns.from_json) as parse:
        found = columns.InstanceTable(table)
        assert (len(found), sorted(found)[0], 73 in found) == (8, 3, True)
        parse.assert_not_called()
        assert found[13].image_id == 0
        parse.assert_called_once()


def test_a_segmentation_of_another_form_is_refused_where_it_is_asked_for() -> None:
    table = tables.instances_table(instances_of([(), ()]))
    broken = pa.array([json.dumps([["x", 1]]), "[]"])
    table = table.set_column(table.schema.get_field_index("segmentation"), "segmentation", broken)
    found = columns.InstanceTable(table)
    assert found[13].segmentation == ()
    with pytest.raises(DataError, match="not a number"):
        found[3]

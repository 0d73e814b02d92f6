"""Growing tables: splits and instances join those there are, and nothing that was said changes."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ris_cache.datasets.records import ExpressionRecord, InstanceRecord
from ris_cache.errors import DataError
from ris_cache.store import merging, tables
from ris_cache.store.manifest import SplitCounts


def expression(sent_id: int, split: str = "train", **changes: object) -> ExpressionRecord:
    values: dict[str, object] = {
        "split": split,
        "ref_id": sent_id // 2,
        "sent_id": sent_id,
        "sent_index": sent_id % 2,
        "image_id": sent_id // 4,
        "raw": f"The cup {sent_id}",
        "sent": f"the cup {sent_id}",
        "ann_ids": (sent_id,),
        "category_ids": (47,),
        "is_degenerate": False,
    }
    return ExpressionRecord(**(values | changes))  # type: ignore[arg-type]


def expressions(sent_ids: list[int], split: str = "train", category_id: int = 1, **changes: object) -> Any:
    records = [expression(sent_id, split, **changes) for sent_id in sent_ids]
    return tables.expressions_table(records, [category_id] * len(records))


def instance(ann_id: int, category_id: int = 1) -> InstanceRecord:
    polygons = ((0.5, 1.0, 3.25, 1.0, 2.0, 4.125),)
    return InstanceRecord(
        ann_id=ann_id, image_id=7, category_id=category_id, segmentation=polygons, is_crowd=False
    )


def test_new_splits_join_known_ones_and_known_predictions_stay() -> None:
    known = tables.expressions_table([expression(0, "val"), expression(1, "val")], [1, 2])
    added = tables.expressions_table(
        [expression(8, "train"), expression(0, "val"), expression(1, "val")], [9, 8, 7]
    )
    merged = merging.merge_expressions("refcoco.unc", known, added)
    assert merged.column("sent_id").to_pylist() == [0, 1, 8]
    assert merged.column("clip_category_id").to_pylist() == [1, 2, 9]
    counts = merging.count_splits(merged)
    assert list(counts) == ["val", "train"]
    assert (counts["val"].expressions, counts["val"].refs, counts["val"].images) == (2, 1, 1)


@given(
    st.lists(st.sampled_from(["train", "val", "testA"]), unique=True, min_size=1),
    st.lists(st.sampled_from(["train", "val", "testA"]), unique=True),
)
def test_adding_what_is_there_changes_nothing_and_nothing_is_lost(
    first: list[str], second: list[str]
) -> None:
    numbers = {"train": [4, 5, 6], "val": [0, 1], "testA": [9]}

    def table(splits: list[str], category_id: int) -> Any:
        records = [expression(sent_id, split) for split in splits for sent_id in numbers[split]]
        return tables.expressions_table(records, [category_id] * len(records))

    known = table(first, 1)
    merged = merging.merge_expressions("a.b", known, table(second, 2))
    assert merged.slice(0, known.num_rows).equals(known)
    assert merging.merge_expressions("a.b", merged, table(second, 3)).equals(merged)
    assert set(merged.column("split").to_pylist()) == {*first, *second}


def test_a_part_of_a_split_gives_way_to_the_whole_and_never_the_other_way_round() -> None:
    part, whole = expressions([2, 5], category_id=1), expressions([1, 2, 3, 5], category_id=2)
    assert merging.merge_expressions("a.b", part, whole).equals(whole)
    assert merging.merge_expressions("a.b", whole, part).equals(whole)


def test_a_part_does_not_disturb_other_splits() -> None:
    known = merging.merge_expressions("a.b", expressions([2], "val"), expressions([8], "testA"))
    merged = merging.merge_expressions("a.b", known, expressions([2, 3], "val"))
    assert sorted(merged.column("sent_id").to_pylist()) == [2, 3, 8]


@pytest.mark.parametrize("changed", [{"sent": "another cup"}, {"ann_ids": (99,)}, {"category_ids": ()}])
@pytest.mark.parametrize("num_more", [0, 2])
def test_a_known_split_with_other_annotations_is_refused(changed: dict[str, Any], num_more: int) -> None:
    known = expressions([0, 1], "val")
    records = [expression(0, "val"), expression(1, "val", **changed)]
    records += [expression(10 + number, "val") for number in range(num_more)]
    added = tables.expressions_table(records, [1] * len(records))
    with pytest.raises(DataError, match=r"refcoco\.unc:val has \d expressions that are not the 2") as caught:
        merging.merge_expressions("refcoco.unc", known, added)
    assert caught.value.facts["split"] == "val"


def test_a_split_with_as_many_but_other_expressions_is_refused() -> None:
    with pytest.raises(DataError, match=r"a\.b:train"):
        merging.merge_expressions("a.b", expressions([0, 1]), expressions([0, 2]))


def test_a_split_is_complete_once_all_of_it_was_added() -> None:
    part, whole = expressions([0, 1], "val"), expressions([0, 1, 2], "val")
    tried = merging.merged_counts(part, {}, added_whole=set())
    assert tried == {"val": SplitCounts(expressions=2, refs=1, images=1, is_complete=False)}
    grown = merging.merged_counts(whole, tried, added_whole={"val"})
    assert grown == {"val": SplitCounts(expressions=3, refs=2, images=1, is_complete=True)}
    # Trying a part of it again leaves it whole.
    assert merging.merged_counts(whole, grown, added_whole=set()) == grown
    # A larger part of an incomplete split is no whole.
    assert not merging.merged_counts(whole, tried, added_whole=set())["val"].is_complete


def test_instances_are_united() -> None:
    known = tables.instances_table([instance(5), instance(1)])
    added = tables.instances_table([instance(3), instance(5)])
    merged = merging.merge_instances("refcoco.unc", known, added)
    assert merged.column("ann_id").to_pylist() == [1, 3, 5]


@given(st.sets(st.integers(0, 12)), st.sets(st.integers(0, 12)))
def test_the_union_of_instances_is_that_of_sets(first: set[int], second: set[int]) -> None:
    tables_of = [tables.instances_table([instance(ann_id) for ann_id in ids]) for ids in (first, second)]
    merged = merging.merge_instances("a.b", *tables_of)
    assert merged.equals(tables.instances_table([instance(ann_id) for ann_id in first | second]))


def test_an_instance_that_changed_is_refused() -> None:
    known = tables.instances_table([instance(4), instance(5)])
    with pytest.raises(DataError, match="instance 5 is annotated otherwise") as caught:
        merging.merge_instances(
            "x.y", known, tables.instances_table([instance(4), instance(5, category_id=2)])
        )
    assert caught.value.facts["ann_id"] == 5


def test_two_tables_without_expressions_merge_to_one() -> None:
    empty = tables.expressions_table([], [])
    assert merging.merge_expressions("a.b", empty, empty).num_rows == 0

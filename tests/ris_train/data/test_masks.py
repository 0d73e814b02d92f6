"""Target masks: what is remembered as runs is what would be drawn afresh."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import ris_train.data.masks
from ris_cache.datasets.records import InstanceRecord, Rle, Segmentation
from ris_cache.datasets.segmentation import parse_segmentation, rasterise
from ris_train.data.masks import Mask, TargetMasks

SIZES = {1: (30, 50), 2: (41, 23)}
TABLE = "refcoco.unc"
RUNS = [7, 100, 41 * 23 - 107]
TRIANGLE = ((3.0, 2.0, 44.5, 8.0, 20.0, 28.0),)
TWO_PARTS = ((1.0, 1.0, 10.0, 1.0, 10.0, 12.0), (20.0, 3.0, 48.0, 3.0, 33.0, 29.0))
BLOB = parse_segmentation({"size": [41, 23], "counts": RUNS}, (41, 23))


def instance(ann_id: int, image_id: int, segmentation: Segmentation) -> InstanceRecord:
    return InstanceRecord(
        ann_id=ann_id, image_id=image_id, category_id=1, segmentation=segmentation, is_crowd=False
    )


def square(ann_id: int) -> InstanceRecord:
    """An instance of image 1 whose left edge is its ann_id."""
    left = float(ann_id)
    return instance(ann_id, 1, ((left, 2.0, left + 9, 2.0, left + 9, 20.0, left, 20.0),))


SQUARE_BYTES = ris_train.data.masks._ENTRY_BYTES + 4 * 50
"""At most what a square takes on the grids of this file: not half of another one is left to it."""

INSTANCES = {
    10: instance(10, 1, TRIANGLE),
    11: instance(11, 1, TWO_PARTS),
    20: instance(20, 2, BLOB),
    21: instance(21, 2, ()),
}


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> Counter[Segmentation]:
    """How often each segmentation was drawn so far."""
    counts: Counter[Segmentation] = Counter()

    def draw(segmentation: Segmentation, *, frame_size: tuple[int, int], grid_size: tuple[int, int]) -> Mask:
        counts[segmentation] += 1
        return rasterise(segmentation, frame_size=frame_size, grid_size=grid_size)

    monkeypatch.setattr(ris_train.data.masks, "rasterise", draw)
    return counts


@pytest.mark.parametrize("side", [1, 5, 8, 13, 64])
@pytest.mark.parametrize("ann_id", INSTANCES)
def test_a_mask_is_the_instance_drawn_on_the_grid(ann_id: int, side: int) -> None:
    """Asked twice, since the second answer is from what was remembered; at sides of every kind."""
    record = INSTANCES[ann_id]
    expected = rasterise(record.segmentation, frame_size=SIZES[record.image_id], grid_size=(side, side))
    masks = TargetMasks({TABLE: INSTANCES}, SIZES, side)
    for found in (masks.of(TABLE, ann_id), masks.of(TABLE, ann_id)):
        assert found.dtype == np.bool_
        assert found.shape == (side, side)
        assert np.array_equal(found, expected)


def test_the_instances_of_this_file_are_of_both_kinds_and_not_all_empty() -> None:
    assert isinstance(BLOB, Rle)
    masks = TargetMasks({TABLE: INSTANCES}, SIZES, 32)
    assert {ann_id for ann_id in INSTANCES if masks.of(TABLE, ann_id).any()} == {10, 11, 20}


@given(st.integers(1, 40), st.integers(0, 2**32))
def test_runs_lose_no_cell_at_any_side(side: int, seed: int) -> None:
    cells = np.random.default_rng(seed).random((side, side)) < 0.5

    class Given(TargetMasks):
        """Draws what it is given."""

        def _rasterise(self, table_name: str, ann_id: int) -> Mask:
            return cells

    masks = Given({}, {}, side)
    assert np.array_equal(masks.of(TABLE, 1), cells)
    assert np.array_equal(masks.of(TABLE, 1), cells)


def test_a_mask_that_the_caller_changes_is_not_the_one_remembered() -> None:
    masks = TargetMasks({TABLE: INSTANCES}, SIZES, 16)
    expected = masks.of(TABLE, 10).copy()
    masks.of(TABLE, 10)[:] = True
    assert np.array_equal(masks.of(TABLE, 10), expected)


def test_an_instance_is_drawn_once_while_it_is_remembered(drawn: Counter[Segmentation]) -> None:
    masks = TargetMasks({TABLE: INSTANCES}, SIZES, 16)
    for _ in range(3):
        masks.of(TABLE, 10)
        masks.of(TABLE, 11)
    assert drawn == {TRIANGLE: 1, TWO_PARTS: 1}


def test_the_one_unused_for_longest_is_forgotten_first(drawn: Counter[Segmentation]) -> None:
    instances = {ann_id: square(ann_id) for ann_id in (1, 2, 3)}
    masks = TargetMasks({TABLE: instances}, SIZES, 16, max_bytes=2 * SQUARE_BYTES)
    counted: Callable[[int], int] = lambda ann_id: drawn[instances[ann_id].segmentation]  # noqa: E731
    for ann_id in (1, 2, 1, 3):  # 3 takes the place of 2, since 1 was used after it
        masks.of(TABLE, ann_id)
    masks.of(TABLE, 1)
    assert [counted(ann_id) for ann_id in (1, 2, 3)] == [1, 1, 1]
    masks.of(TABLE, 2)
    assert [counted(ann_id) for ann_id in (1, 2, 3)] == [1, 2, 1]


@given(st.lists(st.integers(1, 8), max_size=60), st.integers(0, 5 * SQUARE_BYTES))
def test_no_more_are_remembered_than_the_bound_and_all_are_right(
    asked: Sequence[int], max_bytes: int
) -> None:
    instances = {ann_id: square(ann_id) for ann_id in range(1, 9)}
    masks = TargetMasks({TABLE: instances}, SIZES, 25, max_bytes=max_bytes)
    for ann_id in asked:
        expected = rasterise(instances[ann_id].segmentation, frame_size=SIZES[1], grid_size=(25, 25))
        assert np.array_equal(masks.of(TABLE, ann_id), expected)
        held = sum(runs.nbytes + ris_train.data.masks._ENTRY_BYTES for runs in masks._runs.values())
        assert held == masks._num_bytes <= max_bytes


@given(st.lists(st.sampled_from([*INSTANCES]), max_size=12), st.integers(1, 40))
def test_many_masks_at_once_are_each_the_one_drawn_alone(asked: list[int], side: int) -> None:
    """Repeats and none at all too; the bound is below what they take, so some are drawn again."""
    masks = TargetMasks({TABLE: INSTANCES}, SIZES, side, max_bytes=900)
    found = masks.many([(TABLE, ann_id) for ann_id in asked])
    assert found.dtype == np.bool_
    assert found.shape == (len(asked), side, side)
    for ann_id, mask in zip(asked, found, strict=True):
        record = INSTANCES[ann_id]
        expected = rasterise(record.segmentation, frame_size=SIZES[record.image_id], grid_size=(side, side))
        assert np.array_equal(mask, expected)


def test_all_instances_of_refcoco_are_remembered_on_both_loss_grids() -> None:
    """50,000 stars of 30 points, more ragged than outlines are, about the size of an object on average."""
    angles = np.arange(30) * (2 * np.pi / 30)
    radii = np.random.default_rng(0).uniform(30, 90, (4, 30, 1))
    stars = (320, 240) + radii * np.stack([np.cos(angles), np.sin(angles)], axis=1)
    for side in (256, 1024):
        instances = {
            index: instance(index, 1, (tuple(star.ravel().tolist()),)) for index, star in enumerate(stars)
        }
        masks = TargetMasks({TABLE: instances}, {1: (480, 640)}, side)
        masks.many([(TABLE, index) for index in instances])
        assert masks._num_bytes / len(stars) * 50_000 < ris_train.data.masks.MAX_BYTES


def test_one_ann_id_in_two_tables_is_two_instances() -> None:
    masks = TargetMasks({TABLE: {1: square(1)}, "custom.birds": {1: instance(1, 2, BLOB)}}, SIZES, 32)
    for _ in range(2):
        for table_name, record in ((TABLE, square(1)), ("custom.birds", instance(1, 2, BLOB))):
            expected = rasterise(record.segmentation, frame_size=SIZES[record.image_id], grid_size=(32, 32))
            assert np.array_equal(masks.of(table_name, 1), expected)

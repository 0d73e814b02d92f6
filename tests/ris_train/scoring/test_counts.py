"""Counts: five values a sample, checked, taken apart and put together."""

from __future__ import annotations

from dataclasses import fields
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ris_cache.errors import ShapeError
from ris_train.scoring.counts import (
    Counts,
    SampleCount,
    collect,
    concatenate,
    count_pixels,
    with_empty_masks,
    with_min_area,
)

ROWS = [
    SampleCount(3, 5, 4),
    SampleCount(0, 49, 0, is_no_target=True),
    SampleCount(50, 50, 60, says_no_target=True),
    SampleCount(0, 0, 0, is_no_target=True, says_no_target=True),
]


def same(left: Counts, right: Counts) -> bool:
    return all(
        np.array_equal(getattr(left, field.name), getattr(right, field.name)) for field in fields(Counts)
    )


def test_samples_are_collected_in_order() -> None:
    counts = collect(ROWS, has_head=True)
    assert len(counts) == 4
    assert counts.intersection.tolist() == [3, 0, 50, 0]
    assert counts.predicted.tolist() == [5, 49, 50, 0]
    assert counts.annotated.tolist() == [4, 0, 60, 0]
    assert counts.union.tolist() == [6, 49, 60, 0]
    assert counts.is_no_target.tolist() == [False, True, False, True]
    assert counts.says_no_target.tolist() == [False, False, True, True]
    assert {values.dtype for values in (counts.intersection, counts.predicted, counts.union)} == {
        np.dtype(np.int64)
    }


def test_masks_on_different_grids_are_refused() -> None:
    with pytest.raises(ShapeError, match="different grids"):
        count_pixels(np.zeros((4, 4), bool), np.zeros((4, 5), bool))


@pytest.mark.parametrize(
    ("row", "text"),
    [
        (SampleCount(5, 4, 6), "exceeds"),
        (SampleCount(5, 6, 4), "exceeds"),
        (SampleCount(-1, 0, 0), "negative"),
        (SampleCount(1, 1, 1, is_no_target=True), "has ground-truth pixels"),
        (SampleCount(1, 1, 1, says_no_target=True), "has_head=True"),
    ],
)
def test_impossible_counts_are_refused(row: SampleCount, text: str) -> None:
    with pytest.raises(ValueError, match=text):
        collect([row])


def test_columns_of_different_lengths_are_refused() -> None:
    counts = collect(ROWS, has_head=True)
    columns = {field.name: getattr(counts, field.name) for field in fields(Counts)}
    with pytest.raises(ShapeError, match="one length"):
        Counts(**columns | {"predicted": np.array([5, 49, 50])})


def test_selecting_takes_samples_in_the_order_asked_for() -> None:
    counts = collect(ROWS, has_head=True)
    assert same(counts.select(np.array([2, 0, 2])), collect([ROWS[2], ROWS[0], ROWS[2]], has_head=True))
    assert same(counts.select(counts.is_no_target), collect([ROWS[1], ROWS[3]], has_head=True))


@given(st.lists(st.integers(0, 4), max_size=4).map(sorted))
def test_parts_put_together_are_the_whole(borders: list[int]) -> None:
    bounds = [0, *borders, 4]
    parts = [collect(ROWS[start:stop], has_head=True) for start, stop in pairwise(bounds)]
    assert same(concatenate(parts), collect(ROWS, has_head=True))


def test_counts_of_two_kinds_of_model_are_not_put_together() -> None:
    with pytest.raises(ValueError, match="one model"):
        concatenate([collect(ROWS[:1]), collect(ROWS[1:], has_head=True)])
    with pytest.raises(ValueError, match="one model"):
        concatenate([])


def test_emptying_a_mask_leaves_the_ground_truth() -> None:
    emptied = with_empty_masks(collect(ROWS, has_head=True), np.array([True, True, False, False]))
    assert emptied.intersection.tolist() == [0, 0, 50, 0]
    assert emptied.predicted.tolist() == [0, 0, 50, 0]
    assert emptied.union.tolist() == [4, 0, 60, 0]


def test_a_minimum_area_decides_by_the_mask_and_keeps_it() -> None:
    counts = with_min_area(collect(ROWS, has_head=True))
    assert counts.says_no_target.tolist() == [True, True, False, True]
    assert counts.predicted.tolist() == [5, 49, 50, 0]
    headless = with_min_area(collect(ROWS[:2]), 49)
    assert headless.says_no_target.tolist() == [True, False]
    assert headless.has_head


masks = st.lists(st.booleans(), min_size=12, max_size=12).map(lambda cells: np.array(cells).reshape(3, 4))


@given(masks, masks)
def test_counts_equal_set_arithmetic(prediction: np.ndarray, truth: np.ndarray) -> None:
    p = {i for i, cell in enumerate(prediction.ravel()) if cell}
    g = {i for i, cell in enumerate(truth.ravel()) if cell}
    counts = collect([count_pixels(prediction, truth)])
    assert counts.intersection.tolist() == [len(p & g)]
    assert counts.predicted.tolist() == [len(p)]
    assert counts.annotated.tolist() == [len(g)]
    assert counts.union.tolist() == [len(p | g)]

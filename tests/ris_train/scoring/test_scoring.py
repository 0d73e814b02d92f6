"""Scores against hand-worked and published values.

The 4 × 4 masks below are given by the row-major indices of their pixels. Worked by hand, as (I, P, G):
A (4, 4, 4) IoU 1 · B (4, 4, 8) IoU 1/2 · C (0, 0, 4) IoU 0 · D (4, 6, 4) IoU 2/3 · J (9, 9, 10) IoU 9/10;
Σ I = 21, Σ U = 4 + 8 + 4 + 6 + 10 = 32, so oIoU = 21/32 and mIoU = (1 + 1/2 + 0 + 2/3 + 9/10) / 5.
"""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ris_cache.errors import ShapeError
from ris_train.scoring import Counts, SampleCount, collect, count_pixels, ris_scores

GOLDEN = {
    "A": ([0, 1, 4, 5], [0, 1, 4, 5]),
    "B": (range(8), range(4)),
    "C": (range(4), []),
    "D": ([5, 6, 9, 10], [5, 6, 9, 10, 11, 15]),
    "J": (range(10), range(9)),
}


def _mask(pixels) -> np.ndarray:
    mask = np.zeros(16, dtype=bool)
    mask[list(pixels)] = True
    return mask.reshape(4, 4)


def _golden_counts() -> Counts:
    return collect(count_pixels(_mask(predicted), _mask(truth)) for truth, predicted in GOLDEN.values())


def test_ris_rules_give_the_published_golden_values():
    scores = ris_scores(_golden_counts())
    assert scores.overall_iou == 0.65625
    assert scores.mean_iou == pytest.approx(0.613333, abs=5e-7)
    assert scores.precision == {0.5: 0.8, 0.6: 0.6, 0.7: 0.4, 0.8: 0.4, 0.9: 0.4}
    assert scores.num_samples == 5


def test_an_iou_exactly_on_a_threshold_counts():
    for numerator in (5, 6, 7, 8, 9):
        counts = collect([SampleCount(numerator, numerator, 10)])
        assert ris_scores(counts).precision[numerator / 10] == 1.0


def test_an_empty_truth_with_an_empty_prediction_scores_zero_not_nan():
    scores = ris_scores(collect([SampleCount(0, 0, 0), SampleCount(4, 4, 4)]))
    assert scores.mean_iou == 0.5
    assert scores.overall_iou == 1.0


def test_nothing_to_score_is_nan():
    assert math.isnan(ris_scores(collect([])).mean_iou)
    assert math.isnan(ris_scores(collect([SampleCount(0, 0, 0)])).overall_iou)


def test_no_target_samples_are_refused_by_the_ris_rules():
    with pytest.raises(ValueError, match="no-target"):
        ris_scores(collect([SampleCount(0, 3, 0, is_no_target=True)]))


def test_masks_on_different_grids_are_refused():
    with pytest.raises(ShapeError, match="different grids"):
        count_pixels(np.zeros((4, 4), bool), np.zeros((4, 5), bool))


def test_an_impossible_intersection_is_refused():
    with pytest.raises(ValueError, match="exceeds"):
        collect([SampleCount(5, 4, 6)])


masks = st.lists(st.booleans(), min_size=12, max_size=12).map(lambda cells: np.array(cells).reshape(3, 4))


@given(st.lists(st.tuples(masks, masks), min_size=1, max_size=8), st.randoms())
def test_counts_equal_set_arithmetic_and_scores_do_not_depend_on_order(pairs, random):
    expected_ious = []
    inter_sum = union_sum = 0
    for prediction, truth in pairs:
        p = {i for i, cell in enumerate(prediction.ravel()) if cell}
        g = {i for i, cell in enumerate(truth.ravel()) if cell}
        inter_sum += len(p & g)
        union_sum += len(p | g)
        expected_ious.append(len(p & g) / len(p | g) if p | g else 0.0)
    scores = ris_scores(collect(count_pixels(*pair) for pair in pairs))
    assert scores.mean_iou == pytest.approx(sum(expected_ious) / len(pairs))
    if union_sum:
        assert scores.overall_iou == inter_sum / union_sum
    shuffled = list(pairs)
    random.shuffle(shuffled)
    again = ris_scores(collect(count_pixels(*pair) for pair in shuffled))
    assert again.precision == scores.precision
    assert again.overall_iou == pytest.approx(scores.overall_iou, nan_ok=True)

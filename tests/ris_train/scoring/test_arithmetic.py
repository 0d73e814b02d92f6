"""One sample's IoU, Pr@X, means and ratios, by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest

from ris_train.scoring.arithmetic import IouRule, PrecisionRule, mean, mean_percent_single, ratio

I_OF = np.array([3, 0, 0], dtype=np.int64)
U_OF = np.array([4, 5, 0], dtype=np.int64)


def test_the_iou_of_a_sample() -> None:
    assert IouRule().of(I_OF, U_OF).tolist() == [0.75, 0, 0]
    assert IouRule(empty=1.0).of(I_OF, U_OF).tolist() == [0.75, 0, 1]
    assert IouRule(epsilon=1.0).of(I_OF, U_OF).tolist() == [0.6, 0, 0]


@pytest.mark.parametrize(
    ("union", "is_felt"), [(4, True), (16, True), (31, True), (32, False), (1000, False)]
)
def test_a_small_epsilon_vanishes_beside_a_large_union_in_float32(union: int, is_felt: bool) -> None:
    area = np.array([union], dtype=np.int64)
    (single,) = IouRule(epsilon=1e-6, is_single=True).of(area, area)
    (double,) = IouRule(epsilon=1e-6).of(area, area)
    assert single.dtype == np.float32
    assert (single < 1) == is_felt
    assert double < 1


def test_strict_precision_leaves_out_the_threshold_itself() -> None:
    ious = np.array([0.25, 0.5, 0.75, 1.0])
    assert PrecisionRule(thresholds=(0.5,)).of(ious) == {"Pr@0.5": 0.75}
    assert PrecisionRule(thresholds=(0.5,), is_strict=True).of(ious) == {"Pr@0.5": 0.5}


def test_thresholds_of_float32_lie_beside_the_decimals() -> None:
    decimals = np.array([0.7, 0.6])
    assert PrecisionRule(thresholds=(0.7,), is_strict=True, is_single=True).of(decimals[:1]) == {"Pr@0.7": 1}
    assert PrecisionRule(thresholds=(0.6,), is_single=True).of(decimals[1:]) == {"Pr@0.6": 0}
    single = decimals.astype(np.float32)
    assert PrecisionRule(thresholds=(0.7, 0.6), is_single=True).of(single) == {"Pr@0.7": 0.5, "Pr@0.6": 1}


def test_nothing_is_undefined() -> None:
    none = np.zeros(0)
    assert math.isnan(mean(none))
    assert math.isnan(mean(none, count_epsilon=1e-5))
    assert math.isnan(mean_percent_single(none))
    assert math.isnan(ratio(0, 0, epsilon=1e-10))
    assert math.isnan(PrecisionRule().of(none)["Pr@0.9"])


def test_means_and_ratios() -> None:
    assert mean(np.array([0.5, 1.0])) == 0.75
    assert mean(np.array([0.5, 1.0]), count_epsilon=1.0) == 0.5
    assert ratio(1, 3, epsilon=1.0) == 0.25
    assert mean_percent_single(np.array([0.5, 1.0], dtype=np.float32)) == 0.75
    assert mean_percent_single(np.array([1, 0, 0])) == float(np.float32(100) / np.float32(3)) / 100


def test_a_sum_does_not_depend_on_the_order_of_its_terms() -> None:
    values = np.array([1.0, 1e16, 1.0, -1e16])
    assert mean(values) == mean(values[::-1]) == 0.5

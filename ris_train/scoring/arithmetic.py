"""The arithmetic in which rule sets differ: one sample's IoU, Pr@X, means and ratios.

I intersection, P predicted positives, G annotated positives, U = P + G − I; N samples. Sums are exact, so
neither the order of samples nor their split over processes changes a digit.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

Pixels = npt.NDArray[np.int64]
Ious = npt.NDArray[np.floating[Any]]


@dataclass(frozen=True, slots=True, kw_only=True)
class IouRule:
    """How the IoU of one sample is computed: I / (U + epsilon).

    Attributes:
        epsilon: added to the union.
        is_single: whether the quotient is taken in float32, where a small epsilon vanishes beside a large U.
        empty: IoU where U = 0.
    """

    epsilon: float = 0.0
    is_single: bool = False
    empty: float = 0.0

    def of(self, intersection: Pixels, union: Pixels) -> Ious:
        """IoU of each sample, float32[N] or float64[N]."""
        kind = np.float32 if self.is_single else np.float64
        ious: Ious = np.full(len(union), self.empty, dtype=kind)
        divisor = union.astype(kind) + np.array([self.epsilon], dtype=kind)
        np.divide(intersection.astype(kind), divisor, out=ious, where=union > 0)
        return ious


@dataclass(frozen=True, slots=True, kw_only=True)
class PrecisionRule:
    """How Pr@X is computed: the share of samples whose IoU reaches X.

    Attributes:
        thresholds: the X.
        is_strict: whether the IoU must exceed X (>) rather than reach it (≥).
        is_single: whether X is rounded to float32 first. In float32, 0.7 and 0.9 lie below the decimal value,
            0.6 and 0.8 above it; that decides exact ties.
    """

    thresholds: tuple[float, ...] = (0.5, 0.6, 0.7, 0.8, 0.9)
    is_strict: bool = False
    is_single: bool = False

    @property
    def names(self) -> tuple[str, ...]:
        """`Pr@X` for each X, in order."""
        return tuple(f"Pr@{threshold}" for threshold in self.thresholds)

    def of(self, ious: Ious) -> dict[str, float]:
        """Share of samples by name; NaN over no samples."""
        shares = {}
        for name, threshold in zip(self.names, self.thresholds, strict=True):
            # A Python float would be rounded to the type of `ious`; an array keeps its own precision.
            limit: Ious = np.array([threshold], dtype=np.float32 if self.is_single else np.float64)
            reached = ious > limit if self.is_strict else ious >= limit
            shares[name] = ratio(int(np.count_nonzero(reached)), len(ious))
        return shares


def mean(values: Ious, *, count_epsilon: float = 0.0) -> float:
    """Mean over N samples, or sum / (N + count_epsilon); NaN over none."""
    return ratio(math.fsum(values.tolist()), len(values), epsilon=count_epsilon)


def mean_percent_single(values: Ious) -> float:
    """Mean over N samples by way of a percentage in float32: sum · 100 / N, each step rounded; NaN over none.

    The sum is exact and rounded once, where a running sum in float32 would depend on the order of samples.
    """
    if not len(values):
        return math.nan
    percent = np.array([math.fsum(values.tolist())], dtype=np.float32) * np.float32(100)
    return float((percent / np.float32(len(values)))[0]) / 100


def ratio(numerator: float, denominator: float, *, epsilon: float = 0.0) -> float:
    """Quotient, the epsilon added to the denominator; NaN where the denominator itself is 0."""
    return float(numerator) / (float(denominator) + epsilon) if denominator else math.nan

"""Paired bootstrap over images: how far a score, or a difference of two, moves with the choice of images.

Images are drawn with replacement, each with all its expressions, because expressions of one image are not
independent. The same draws serve all methods, so what makes an image hard for everybody cancels out of their
differences. A draw only weighs images: with every score a ratio of sums over samples, a resampled score is
the ratio of the weighted sums, and all of them together are one matrix product.

M resamples, N samples, K images, T metrics.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ris_train.compare.terms import Ratio

CONFIDENCE = 0.95
_CHUNK = 256


@dataclass(frozen=True, slots=True)
class Interval:
    """Ends of an interval, fractions."""

    low: float
    high: float


def draw_weights(num_images: int, *, num_resamples: int, seed: int) -> Iterator[npt.NDArray[np.int64]]:
    """Yield how often each resample holds each image, int64[m, K], some resamples at a time, M in all.

    The draws depend on the arguments alone, so every method that is given them sees the same ones.
    """
    generator = np.random.default_rng(seed)
    for start in range(0, num_resamples, _CHUNK):
        rows = min(_CHUNK, num_resamples - start)
        drawn = generator.integers(0, num_images, size=(rows, num_images))
        drawn += np.arange(rows)[:, None] * num_images
        yield np.bincount(drawn.ravel(), minlength=rows * num_images).reshape(rows, num_images)


def resampled_values(
    methods: Sequence[dict[str, Ratio]],
    images: npt.NDArray[np.int64],
    *,
    num_resamples: int,
    seed: int,
) -> list[dict[str, npt.NDArray[np.float64]]]:
    """Compute each metric of each method on each resample.

    Args:
        methods: per method, the terms of its metrics over the same N samples in the same order.
        images: int64[N], whose image each sample is of; any numbers.

    Returns:
        Per method, float64[M] by metric; NaN where the resample leaves the metric undefined, and everywhere
        with fewer than two images, which have nothing to be resampled from.
    """
    _, index = np.unique(images, return_inverse=True)
    num_images = int(index.max()) + 1 if len(index) else 0
    if num_images < 2:
        return [{name: np.full(num_resamples, np.nan) for name in terms} for terms in methods]
    columns = [
        np.bincount(index, weights=values, minlength=num_images)
        for terms in methods
        for ratio in terms.values()
        for values in (ratio.numerator, ratio.denominator)
    ]
    sums = np.stack(columns, axis=1)  # [K, 2 T per method]: whole numbers below 2**53 stay exact
    drawn = [
        weights.astype(np.float64) @ sums
        for weights in draw_weights(num_images, num_resamples=num_resamples, seed=seed)
    ]
    totals = np.concatenate(drawn) if drawn else np.empty((0, sums.shape[1]))
    numerators, denominators = totals[:, 0::2], totals[:, 1::2]
    epsilons = np.array([ratio.epsilon for terms in methods for ratio in terms.values()])
    values = np.full(numerators.shape, np.nan)
    np.divide(numerators, denominators + epsilons, out=values, where=denominators > 0)
    columns_of = iter(values.T)
    return [{name: next(columns_of) for name in terms} for terms in methods]


def interval_of(values: npt.NDArray[np.float64]) -> Interval | None:
    """Return the percentile interval of resampled values.

    Args:
        values: float64[M]; undefined ones (NaN) are left out.

    Returns:
        None if fewer than half of them are defined, and if there are none.
    """
    defined = values[~np.isnan(values)]
    if not len(values) or 2 * len(defined) < len(values):
        return None
    tail = (1 - CONFIDENCE) / 2
    low, high = np.quantile(defined, (tail, 1 - tail))
    return Interval(float(low), float(high))

"""What evaluation keeps of each sample: five values per grid, from which every score follows.

H, W size of the grid on which prediction and ground truth are compared.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ris_cache.errors import ShapeError


@dataclass(frozen=True, slots=True, kw_only=True)
class Counts:
    """Pixel counts and no-target flags of N samples on one grid.

    Attributes:
        intersection: int64[N], I.
        predicted: int64[N], P, predicted positives.
        annotated: int64[N], G, ground-truth positives.
        is_no_target: bool[N], annotated as referring to nothing (from the annotation, not from G = 0).
        says_no_target: bool[N], the model says so; all false for models without such a head.
    """

    intersection: npt.NDArray[np.int64]
    predicted: npt.NDArray[np.int64]
    annotated: npt.NDArray[np.int64]
    is_no_target: npt.NDArray[np.bool_]
    says_no_target: npt.NDArray[np.bool_]

    def __post_init__(self) -> None:
        shapes = {field.shape for field in self._fields()}
        if len(shapes) != 1 or len(next(iter(shapes))) != 1:
            raise ShapeError(f"Counts of one grid must be vectors of one length, found {sorted(shapes)}.")
        if np.any(self.intersection > np.minimum(self.predicted, self.annotated)):
            raise ValueError("An intersection exceeds the prediction or the ground truth it lies in.")

    def __len__(self) -> int:
        return len(self.intersection)

    @property
    def union(self) -> npt.NDArray[np.int64]:
        """int64[N], U = P + G − I."""
        return self.predicted + self.annotated - self.intersection

    def _fields(self) -> tuple[npt.NDArray[np.generic], ...]:
        return (
            self.intersection,
            self.predicted,
            self.annotated,
            self.is_no_target,
            self.says_no_target,
        )


@dataclass(frozen=True, slots=True)
class SampleCount:
    """The five values of one sample, named as in `Counts`."""

    intersection: int
    predicted: int
    annotated: int
    is_no_target: bool = False
    says_no_target: bool = False


def count_pixels(
    prediction: npt.NDArray[np.bool_],
    truth: npt.NDArray[np.bool_],
    *,
    is_no_target: bool = False,
    says_no_target: bool = False,
) -> SampleCount:
    """Count one sample.

    Args:
        prediction: bool[H, W].
        truth: bool[H, W].
        is_no_target: whether the annotation says that the expression refers to nothing.
        says_no_target: whether the model does.

    Raises:
        ShapeError: the two masks lie on different grids.
    """
    if prediction.shape != truth.shape:
        raise ShapeError(
            f"Prediction {prediction.shape} and ground truth {truth.shape} lie on different grids; "
            "resize the logits to the grid of the ground truth first.",
            prediction=prediction.shape,
            truth=truth.shape,
        )
    return SampleCount(
        intersection=int(np.count_nonzero(prediction & truth)),
        predicted=int(np.count_nonzero(prediction)),
        annotated=int(np.count_nonzero(truth)),
        is_no_target=is_no_target,
        says_no_target=says_no_target,
    )


def collect(samples: Iterable[SampleCount]) -> Counts:
    """Gather the counts of many samples, in their order."""
    rows = list(samples)
    return Counts(
        intersection=np.array([row.intersection for row in rows], dtype=np.int64),
        predicted=np.array([row.predicted for row in rows], dtype=np.int64),
        annotated=np.array([row.annotated for row in rows], dtype=np.int64),
        is_no_target=np.array([row.is_no_target for row in rows], dtype=np.bool_),
        says_no_target=np.array([row.says_no_target for row in rows], dtype=np.bool_),
    )

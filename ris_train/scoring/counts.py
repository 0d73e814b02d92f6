"""What evaluation keeps of each sample: five values per grid, from which every score follows.

H, W size of the grid on which prediction and ground truth are compared.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

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
        has_head: whether `says_no_target` is a decision. False: the model has no way to say so, and a rule
            set that needs a decision takes the empty mask for one.
    """

    intersection: npt.NDArray[np.int64]
    predicted: npt.NDArray[np.int64]
    annotated: npt.NDArray[np.int64]
    is_no_target: npt.NDArray[np.bool_]
    says_no_target: npt.NDArray[np.bool_]
    has_head: bool

    def __post_init__(self) -> None:
        shapes = {field.shape for field in self._fields()}
        if len(shapes) != 1 or len(next(iter(shapes))) != 1:
            raise ShapeError(f"Counts of one grid must be vectors of one length, found {sorted(shapes)}.")
        if np.any(self.intersection > np.minimum(self.predicted, self.annotated)):
            raise ValueError("An intersection exceeds the prediction or the ground truth it lies in.")
        if np.any(self.intersection < 0):
            raise ValueError("An intersection is negative.")
        if np.any(self.annotated[self.is_no_target]):
            raise ValueError("A sample annotated as no-target has ground-truth pixels.")
        if self.says_no_target.any() and not self.has_head:
            raise ValueError("A model without a no-target head says no-target; pass has_head=True.")

    def __len__(self) -> int:
        return len(self.intersection)

    @property
    def union(self) -> npt.NDArray[np.int64]:
        """int64[N], U = P + G − I."""
        return self.predicted + self.annotated - self.intersection

    def select(self, chosen: npt.NDArray[np.bool_] | npt.NDArray[np.intp]) -> Counts:
        """Take some of the samples.

        Args:
            chosen: bool[N], or indices in any order, repeated or not.
        """
        return Counts(
            intersection=self.intersection[chosen],
            predicted=self.predicted[chosen],
            annotated=self.annotated[chosen],
            is_no_target=self.is_no_target[chosen],
            says_no_target=self.says_no_target[chosen],
            has_head=self.has_head,
        )

    def _fields(self) -> tuple[npt.NDArray[np.generic], ...]:
        return (
            self.intersection,
            self.predicted,
            self.annotated,
            self.is_no_target,
            self.says_no_target,
        )


def concatenate(parts: Sequence[Counts]) -> Counts:
    """Put the counts of several processes, or of several splits, one after another.

    Raises:
        ValueError: no parts, or parts of a model with a no-target head and of one without.
    """
    if len({part.has_head for part in parts}) != 1:
        raise ValueError("Only counts of one model can be put together; these are of none, or of several.")
    return Counts(
        intersection=np.concatenate([part.intersection for part in parts]),
        predicted=np.concatenate([part.predicted for part in parts]),
        annotated=np.concatenate([part.annotated for part in parts]),
        is_no_target=np.concatenate([part.is_no_target for part in parts]),
        says_no_target=np.concatenate([part.says_no_target for part in parts]),
        has_head=parts[0].has_head,
    )


def with_empty_masks(counts: Counts, emptied: npt.NDArray[np.bool_]) -> Counts:
    """Take all positive pixels away from some predictions: P = I = 0, hence U = G.

    Args:
        emptied: bool[N].
    """
    return replace(
        counts,
        intersection=np.where(emptied, 0, counts.intersection),
        predicted=np.where(emptied, 0, counts.predicted),
    )


def with_min_area(counts: Counts, pixels: int = 50) -> Counts:
    """Let a model say "no target" wherever its mask has fewer positive pixels than this: n := (P < pixels).

    The paper that introduced gRefCOCO is said to score methods without a no-target head so, with 50 pixels;
    nothing about it is in its released code, and no rule set does it by itself. How much of the image 50
    pixels are depends on the grid. The decision of a head, if there is one, is replaced.

    Args:
        pixels: how many positive pixels a mask needs to count as one, on the grid of the counts.
    """
    return replace(counts, says_no_target=counts.predicted < pixels, has_head=True)


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


def collect(samples: Iterable[SampleCount], *, has_head: bool = False) -> Counts:
    """Gather the counts of many samples of one model, in their order.

    Args:
        has_head: whether the model has a no-target head.

    Raises:
        ValueError: it has none, and a sample says no-target.
    """
    rows = list(samples)
    return Counts(
        intersection=np.array([row.intersection for row in rows], dtype=np.int64),
        predicted=np.array([row.predicted for row in rows], dtype=np.int64),
        annotated=np.array([row.annotated for row in rows], dtype=np.int64),
        is_no_target=np.array([row.is_no_target for row in rows], dtype=np.bool_),
        says_no_target=np.array([row.says_no_target for row in rows], dtype=np.bool_),
        has_head=has_head,
    )

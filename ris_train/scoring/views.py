"""Views: on which pixels a prediction meets its ground truth.

Two evaluations of the same masks differ before any formula is applied: in the grid on which pixels are
counted, in how the annotated polygons reach that grid, in what a pixel under two polygon parts is, and in the
probability from which a pixel is predicted positive. H, W: original frame. h, w: the grid of a view.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final, Literal

import numpy as np
import numpy.typing as npt

from ris_cache.datasets.records import Segmentation
from ris_cache.datasets.segmentation import part_count, resize_nearest, union_mask
from ris_cache.errors import ConfigError

Grid = Literal["original", "1024", "480"]


@dataclass(frozen=True, slots=True, kw_only=True)
class View:
    """One way to bring a prediction and its ground truth together.

    Attributes:
        grid: `original`: the image's own pixels; `1024`, `480`: the square that the image is squashed to.
        raster: how polygons reach a squashed grid: `polygons` scales them and draws there; `nearest` draws in
            the original frame and resizes that mask by nearest neighbour. The same on the original grid.
        overlap: `union`: foreground under any polygon part; `one`: only under exactly one, of all parts of
            all the sample's targets.
        threshold: probability above which, strictly, a pixel is predicted positive.
    """

    name: str
    grid: Grid
    raster: Literal["polygons", "nearest"]
    overlap: Literal["union", "one"]
    threshold: float

    def __post_init__(self) -> None:
        if not 0 < self.threshold < 1:
            raise ConfigError(
                f"The view {self.name} has the threshold {self.threshold}; choose one between 0 and 1.",
                view=self.name,
                found=self.threshold,
            )

    def grid_size(self, frame_size: tuple[int, int]) -> tuple[int, int]:
        """(h, w) of the grid for an image of (H, W)."""
        return frame_size if self.grid == "original" else (int(self.grid), int(self.grid))


def truth_mask(
    segmentations: Iterable[Segmentation], view: View, *, frame_size: tuple[int, int]
) -> npt.NDArray[np.bool_]:
    """Draw the ground truth of a sample as a view has it; all False without targets.

    Args:
        segmentations: of the sample's targets.
        view: where and how.
        frame_size: (H, W) of the original frame.
    Returns:
        bool[h, w].
    Raises:
        DataError: a segmentation that cannot be drawn, as `ris_cache.datasets.segmentation.rasterise`.
    """
    target = view.grid_size(frame_size)
    drawn_size = frame_size if view.raster == "nearest" else target
    if view.overlap == "one":
        mask = part_count(segmentations, frame_size=frame_size, grid_size=drawn_size) == 1
    else:
        mask = union_mask(segmentations, frame_size=frame_size, grid_size=drawn_size)
    return mask if drawn_size == target else resize_nearest(mask, target)


def _view(
    name: str,
    grid: Grid,
    raster: Literal["polygons", "nearest"] = "polygons",
    overlap: Literal["union", "one"] = "union",
    threshold: float = 0.5,
) -> View:
    return View(name=name, grid=grid, raster=raster, overlap=overlap, threshold=threshold)


VIEWS: Final[dict[str, View]] = {
    view.name: view
    for view in (
        _view("original", "original"),
        _view("original-one", "original", overlap="one"),
        _view("original-p35", "original", threshold=0.35),
        _view("1024", "1024"),
        _view("480", "480"),
        _view("480-nearest", "480", raster="nearest"),
        _view("480-nearest-one", "480", raster="nearest", overlap="one"),
    )
}
"""Every view that a rule set asks for, by name."""

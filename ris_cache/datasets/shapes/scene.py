"""Lay out a scene: which objects, where, and which of their pixels stay visible.

H, W: rows and columns of the image. Coordinates are pixels of the original frame, corner of the image = 0, 0.
"""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from ris_cache.datasets.shapes.objects import COLOURS, SHAPES, SIZE_LEVELS, Placement
from ris_cache.datasets.shapes.trace import Loop, signed_area, trace_loops

MIN_VISIBLE = 0.65
"""Share of an object's pixels that others may not cover."""

BACKGROUND = -1
"""Value of `Drawing.labels` where no object is visible."""

_SUPERSAMPLING = 3
_MAX_ASPECT = 1.6
_MAX_TILT = math.radians(12.0)
_DIAMETER_JITTER = 0.05
_NEIGHBOUR_SHARE = 0.3
_EDGE = 2.0


@dataclass(frozen=True, slots=True, kw_only=True)
class SceneObject:
    """What an expression can speak about.

    Attributes:
        diameter: of the circle of equal area, in pixels, as if nothing covered the object.
        x, y: centroid of the visible pixels.
    """

    shape: str
    colour: str
    diameter: float
    x: float
    y: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Scene:
    """An image as language sees it: its size and its objects, back to front."""

    height: int
    width: int
    objects: tuple[SceneObject, ...]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Drawing:
    """A scene together with its pixels.

    Attributes:
        placements: one per object of the scene, in drawing order (later ones cover earlier ones).
        labels: int8[H, W], index of the visible object, `BACKGROUND` elsewhere.
        boundaries: per object the loops that enclose exactly its visible pixels; none is a hole.
    """

    scene: Scene
    placements: tuple[Placement, ...]
    labels: NDArray[np.int8]
    boundaries: tuple[tuple[Loop, ...], ...]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Stamp:
    """The pixels that one outline covers, cut out of the image.

    Attributes:
        top, left: position of the cut-out's first pixel in the image.
        coverage: uint8[h, w], 255 where the outline covers the whole pixel.
    """

    top: int
    left: int
    coverage: NDArray[np.uint8]

    @property
    def region(self) -> tuple[slice, slice]:
        """Index of the cut-out in an [H, W, …] array."""
        height, width = self.coverage.shape
        return slice(self.top, self.top + height), slice(self.left, self.left + width)

    @property
    def inside(self) -> NDArray[np.bool_]:
        """bool[h, w]: the pixels counted as the object's own, at least half covered."""
        return self.coverage >= 128


def rasterise(outline: NDArray[np.float64]) -> Stamp:
    """Cover pixels with an outline, antialiased by supersampling.

    Args:
        outline: float64[V, 2], (x, y), wholly inside the image.
    """
    left, top = np.floor(outline.min(axis=0)).astype(int).tolist()
    right, bottom = np.ceil(outline.max(axis=0)).astype(int).tolist()
    canvas = Image.new("L", ((right - left) * _SUPERSAMPLING, (bottom - top) * _SUPERSAMPLING))
    # Pillow's coordinates name pixel centres, ours pixel corners.
    points = (outline - np.array([left, top])) * _SUPERSAMPLING - 0.5
    ImageDraw.Draw(canvas).polygon([(float(x), float(y)) for x, y in points], fill=255)
    return Stamp(top=top, left=left, coverage=np.asarray(canvas.reduce(_SUPERSAMPLING)))


def lay_out(rng: np.random.Generator, *, referable: Collection[str]) -> Drawing:
    """Draw lots for one image's size and objects, until they make a usable scene.

    A usable scene shows every object to `MIN_VISIBLE` or more, no visible region has a hole (COCO polygons
    cannot say one), and at least two objects have a referable shape.

    Args:
        referable: shapes that this image's refs may point at.
    """
    while True:
        width = int(rng.integers(200, 321))
        height = int(rng.integers(max(160, math.ceil(width / _MAX_ASPECT)), 281))
        placed = _place_objects(rng, height, width, _draw_looks(rng, referable))
        drawing = _look_at(*placed) if placed is not None else None
        if drawing is not None:
            return drawing


def _draw_looks(rng: np.random.Generator, referable: Collection[str]) -> list[tuple[str, str]]:
    """Choose (shape, colour) of three to five objects; most share one or the other with another object."""
    while True:
        count = int(rng.choice((3, 4, 5), p=(0.55, 0.35, 0.1)))
        looks = [(str(rng.choice(SHAPES)), str(rng.choice(list(COLOURS)))) for _ in range(count)]
        if sum(shape in referable for shape, _ in looks) >= 2 and len(set(looks)) > 1:
            return looks


def _place_objects(
    rng: np.random.Generator, height: int, width: int, looks: list[tuple[str, str]]
) -> tuple[tuple[Placement, ...], NDArray[np.int8]] | None:
    """Find each object a place; with them int8[H, W] labels. None if one finds none in a few tries."""
    labels = np.full((height, width), BACKGROUND, dtype=np.int8)
    areas: list[int] = []
    placed: list[Placement] = []
    for index, (shape, colour) in enumerate(looks):
        level = SIZE_LEVELS[int(rng.integers(len(SIZE_LEVELS)))]
        jitter = rng.uniform(1.0 - _DIAMETER_JITTER, 1.0 + _DIAMETER_JITTER)
        diameter = level * min(height, width) * jitter
        for _ in range(12):
            candidate = Placement(
                shape=shape,
                colour=colour,
                diameter=diameter,
                tilt=float(rng.uniform(-_MAX_TILT, _MAX_TILT)),
                **_draw_position(rng, height, width, diameter, placed),
            )
            outline = candidate.outline()
            if outline.min() < _EDGE or (outline.max(axis=0) > np.array([width, height]) - _EDGE).any():
                continue
            stamp = rasterise(outline)
            covered = labels.copy()
            covered[stamp.region][stamp.inside] = index
            visible = np.bincount(covered.ravel() + 1, minlength=index + 2)[1:]
            trial_areas = [*areas, int(stamp.inside.sum())]
            if (visible >= MIN_VISIBLE * np.array(trial_areas)).all():
                labels, areas = covered, trial_areas
                placed.append(candidate)
                break
        else:
            return None
    return tuple(placed), labels


def _draw_position(
    rng: np.random.Generator, height: int, width: int, diameter: float, placed: list[Placement]
) -> dict[str, float]:
    """Anywhere, or often enough beside an object that is there already, so that objects overlap."""
    if placed and rng.random() < _NEIGHBOUR_SHARE:
        neighbour = placed[int(rng.integers(len(placed)))]
        distance = rng.uniform(0.3, 0.55) * (neighbour.diameter + diameter)
        angle = rng.uniform(0.0, 2.0 * math.pi)
        return {
            "x": float(neighbour.x + distance * math.cos(angle)),
            "y": float(neighbour.y + distance * math.sin(angle)),
        }
    reach = diameter / 2.0
    return {"x": float(rng.uniform(reach, width - reach)), "y": float(rng.uniform(reach, height - reach))}


def _look_at(placements: tuple[Placement, ...], labels: NDArray[np.int8]) -> Drawing | None:
    """Work out where the visible regions end and what lies where; None if a region has a hole."""
    height, width = labels.shape
    objects: list[SceneObject] = []
    boundaries: list[tuple[Loop, ...]] = []
    for index, placement in enumerate(placements):
        visible = labels == index
        loops = trace_loops(visible)
        if any(signed_area(loop) < 0 for loop in loops):
            return None
        boundaries.append(loops)
        per_row, per_column = visible.sum(axis=1), visible.sum(axis=0)
        objects.append(
            SceneObject(
                shape=placement.shape,
                colour=placement.colour,
                diameter=placement.diameter,
                x=float(per_column @ (np.arange(width) + 0.5) / per_column.sum()),
                y=float(per_row @ (np.arange(height) + 0.5) / per_row.sum()),
            )
        )
    return Drawing(
        scene=Scene(height=height, width=width, objects=tuple(objects)),
        placements=placements,
        labels=labels,
        boundaries=tuple(boundaries),
    )

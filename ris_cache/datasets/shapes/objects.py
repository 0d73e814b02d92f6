"""What can be drawn: the shapes with their outlines, the colours, the size levels.

Outlines live in a unit frame: x right, y down, centroid at the origin, area π/4. So `diameter` always means
the diameter of the circle of equal area, and two objects of one diameter cover the same number of pixels
whatever their shapes are. "The bigger one" then has one meaning for a star and a square alike.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

CATEGORY_IDS: dict[str, int] = {
    "circle": 3,
    "square": 7,
    "triangle": 13,
    "star": 18,
    "cross": 44,
    "heart": 90,
}
"""Shape name → category id, spread over 1…90 with gaps as COCO's are."""

SHAPES: tuple[str, ...] = tuple(CATEGORY_IDS)

ROUND_SHAPES: frozenset[str] = frozenset({"circle", "heart"})
"""The shapes that testA refers to; testB refers to the others."""

COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (212, 38, 38),
    "green": (44, 158, 66),
    "blue": (42, 88, 220),
    "yellow": (246, 218, 44),
    "purple": (142, 58, 182),
    "orange": (246, 134, 26),
    "white": (246, 246, 246),
    "black": (26, 26, 30),
}
"""Colour name → RGB before jitter."""

SIZE_LEVELS: tuple[float, ...] = (0.18, 0.28, 0.40)
"""Diameters of small, medium and large objects as fractions of the image's shorter side, before jitter."""


def _circle() -> NDArray[np.float64]:
    angles = np.linspace(0.0, 2.0 * math.pi, 48, endpoint=False)
    return np.stack([np.cos(angles), np.sin(angles)], axis=1)


def _regular(sides: int, *, first_angle: float) -> NDArray[np.float64]:
    angles = first_angle + 2.0 * math.pi * np.arange(sides) / sides
    return np.stack([np.cos(angles), np.sin(angles)], axis=1)


def _star() -> NDArray[np.float64]:
    angles = -math.pi / 2 + math.pi * np.arange(10) / 5
    radii = np.where(np.arange(10) % 2 == 0, 1.0, 0.45)
    return np.stack([radii * np.cos(angles), radii * np.sin(angles)], axis=1)


def _cross() -> NDArray[np.float64]:
    arm = 0.36
    quarter = [(arm, -1.0), (arm, -arm), (1.0, -arm)]
    points = []
    for _ in range(4):
        points.extend(quarter)
        quarter = [(-y, x) for x, y in quarter]
    return np.array(points)


def _heart() -> NDArray[np.float64]:
    t = np.linspace(0.0, 2.0 * math.pi, 60, endpoint=False)
    x = 16.0 * np.sin(t) ** 3
    y = 13.0 * np.cos(t) - 5.0 * np.cos(2 * t) - 2.0 * np.cos(3 * t) - np.cos(4 * t)
    return np.stack([x, -y], axis=1)


_RAW_OUTLINES: dict[str, Callable[[], NDArray[np.float64]]] = {
    "circle": _circle,
    "square": lambda: _regular(4, first_angle=math.pi / 4),
    "triangle": lambda: _regular(3, first_angle=-math.pi / 2),
    "star": _star,
    "cross": _cross,
    "heart": _heart,
}


def _normalise(points: NDArray[np.float64]) -> NDArray[np.float64]:
    x, y = points.T
    next_x, next_y = np.roll(points, -1, axis=0).T
    cross = x * next_y - next_x * y
    area = cross.sum() / 2.0
    centroid = np.array([((x + next_x) * cross).sum(), ((y + next_y) * cross).sum()]) / (6.0 * area)
    scaled: NDArray[np.float64] = (points - centroid) * math.sqrt(math.pi / 4.0 / abs(area))
    return scaled


UNIT_OUTLINES: dict[str, NDArray[np.float64]] = {
    shape: _normalise(make()) for shape, make in _RAW_OUTLINES.items()
}
"""Shape name → float64[V, 2] vertices (x, y) in the unit frame."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Placement:
    """How one object is drawn.

    Attributes:
        diameter: of the circle of equal area, in pixels.
        tilt: clockwise rotation in radians; small, so that shapes stay upright.
        x, y: centroid of the whole outline, in pixels of the original frame (corner of the image = 0, 0).
    """

    shape: str
    colour: str
    diameter: float
    tilt: float
    x: float
    y: float

    def outline(self, *, shrink: float = 1.0) -> NDArray[np.float64]:
        """Vertices of the drawn outline.

        Args:
            shrink: factor about the centroid; below 1 gives the edge of the fill inside the rim.

        Returns:
            float64[V, 2], (x, y) in pixels.
        """
        cos, sin = math.cos(self.tilt), math.sin(self.tilt)
        rotation = np.array([[cos, sin], [-sin, cos]])
        placed: NDArray[np.float64] = UNIT_OUTLINES[self.shape] @ rotation * (
            self.diameter * shrink
        ) + np.array([self.x, self.y])
        return placed

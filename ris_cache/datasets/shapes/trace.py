"""Turn a mask into the polygons that enclose exactly its pixels.

The polygons run along pixel edges, so their vertices are whole numbers (corner of the image = 0, 0) and
COCO's rasteriser gives the mask back without loss. Pixels that touch only at a corner are separate parts.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Point = tuple[int, int]
Loop = tuple[Point, ...]

_Edge = tuple[int, int, int, int]
"""Corner x, corner y, and the unit step (dx, dy) that leaves it."""


def trace_loops(mask: NDArray[np.bool_]) -> tuple[Loop, ...]:
    """Follow every boundary of a mask along pixel edges.

    Args:
        mask: bool[H, W].

    Returns:
        Closed loops of (x, y) corners, turning points only, first point not repeated. The mask lies on the
        right hand of the walk, so outer boundaries run clockwise as seen on screen (positive `signed_area`)
        and the boundaries of holes counter-clockwise (negative). Empty for an empty mask.
    """
    remaining = dict.fromkeys(_boundary_edges(mask))
    loops: list[Loop] = []
    while remaining:
        first = x, y, dx, dy = next(iter(remaining))
        loop: list[Point] = []
        while True:
            x, y = x + dx, y + dy
            # At a corner shared by two diagonal pixels, turning right first stays with the same pixel.
            if (x, y, -dy, dx) in remaining:
                loop.append((x, y))
                dx, dy = -dy, dx
            elif (x, y, dx, dy) not in remaining:
                loop.append((x, y))
                dx, dy = dy, -dx
            del remaining[x, y, dx, dy]
            if (x, y, dx, dy) == first:
                break
        loops.append(tuple(loop))
    return tuple(loops)


def signed_area(loop: Loop) -> float:
    """Area that a loop encloses in pixels; negative for the boundary of a hole."""
    following = loop[1:] + loop[:1]
    return sum(x0 * y1 - x1 * y0 for (x0, y0), (x1, y1) in zip(loop, following, strict=True)) / 2.0


def _boundary_edges(mask: NDArray[np.bool_]) -> list[_Edge]:
    rows, columns = np.nonzero(mask.any(axis=1))[0], np.nonzero(mask.any(axis=0))[0]
    if not rows.size:
        return []
    top, left = int(rows[0]), int(columns[0])
    padded = np.pad(mask[top : int(rows[-1]) + 1, left : int(columns[-1]) + 1], 1)
    inside = padded[1:-1, 1:-1]
    edges: list[_Edge] = []
    # Per side of a pixel: the neighbour across it, where the side's walk starts, and where it heads.
    for neighbour, (start_x, start_y), step in (
        (padded[:-2, 1:-1], (0, 0), (1, 0)),
        (padded[1:-1, 2:], (1, 0), (0, 1)),
        (padded[2:, 1:-1], (1, 1), (-1, 0)),
        (padded[1:-1, :-2], (0, 1), (0, -1)),
    ):
        rows, columns = np.nonzero(inside & ~neighbour)
        edges.extend(
            (left + x + start_x, top + y + start_y, *step)
            for x, y in zip(columns.tolist(), rows.tolist(), strict=True)
        )
    return edges

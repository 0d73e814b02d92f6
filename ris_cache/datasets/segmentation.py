"""From the `segmentation` value of a COCO annotation to a mask, and to JSON and back.

H, W: rows and columns of the original frame. h, w: rows and columns of the grid that is asked for. Polygons
are scaled to the grid and rasterised there; run-length masks live in the original frame and are resized to
the grid. A pixel is foreground if any part covers it. pycocotools draws the polygons, but never sees
unchecked input: it takes a first polygon of four numbers for a box, drops an odd last coordinate in silence,
and decodes counts that do not fill the mask into uninitialised memory.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from typing import Any, Final

import numpy as np
import numpy.typing as npt
from pycocotools import mask as coco_mask

from ris_cache.datasets.records import Polygons, Rle, Segmentation
from ris_cache.errors import DataError

Mask = npt.NDArray[np.bool_]
PartCount = npt.NDArray[np.uint16]

_MIN_COORDINATES: Final = 6
_MAX_GROUPS: Final = 8
"""Five-bit groups of the longest run worth reading, 2⁴⁰ pixels; more would overflow int64."""
_MAX_FRAMES_AWAY: Final = 10
"""How many frame sizes a vertex may lie from the origin; drawing costs memory per pixel of outline."""


def parse_segmentation(value: object, size: tuple[int, int]) -> Segmentation:
    """Turn a JSON segmentation into polygons or one compressed RLE.

    Polygons with an odd number of coordinates or fewer than six are dropped, as ReLA and DFAM do.

    Args:
        value: a list of flat polygons [x0, y0, x1, y1, …]; an RLE dict {size, counts} whose counts are a list
            of runs or COCO's compressed str or bytes; or a list of RLE dicts, of which the union is taken.
        size: (H, W) of the image.
    Returns:
        `()` when nothing is left to draw: no polygon survives, or the RLE has no foreground.
    Raises:
        DataError: the value has another form, a number is not finite or far outside the image, or an RLE does
            not fill exactly H × W pixels.
    """
    if isinstance(value, dict):
        return _parse_rle(value, size)
    if not isinstance(value, list | tuple):
        raise _malformed("is neither a list of polygons nor an RLE object", type(value).__name__)
    if value and all(isinstance(part, dict) for part in value):
        return _union_of_rles([_parse_rle(part, size) for part in value], size)
    return tuple(tuple(map(float, part)) for part in value if _is_drawable(_checked_polygon(part, size)))


def rasterise(segmentation: Segmentation, *, frame_size: tuple[int, int], grid_size: tuple[int, int]) -> Mask:
    """Draw one segmentation on a grid that covers the whole original frame.

    Args:
        segmentation: as `parse_segmentation` returns it.
        frame_size: (H, W) of the original frame.
        grid_size: (h, w) of the result. Polygons are scaled by w / W and h / H in float64; an RLE is resized
            by taking, for each grid pixel, the frame pixel under its centre.
    Returns:
        bool[h, w].
    Raises:
        DataError: the RLE has another size than the frame, or a polygon has fewer than three points, half a
            point, or a number that cannot be drawn.
    """
    if isinstance(segmentation, Rle):
        return _resize_nearest(_decode(segmentation, frame_size), grid_size)
    if not segmentation:
        return np.zeros(grid_size, dtype=np.bool_)
    drawn = coco_mask.merge(_draw_parts(segmentation, frame_size, grid_size))["counts"].decode("ascii")
    return np.ascontiguousarray(_fill(_run_lengths(drawn, grid_size), grid_size))


def union_mask(
    segmentations: Iterable[Segmentation], *, frame_size: tuple[int, int], grid_size: tuple[int, int]
) -> Mask:
    """Draw several segmentations into one mask: foreground where any of them is; all False for none.

    Args:
        frame_size: (H, W) of the original frame.
        grid_size: (h, w) of the result.
    Returns:
        bool[h, w].
    Raises:
        DataError: as `rasterise`.
    """
    mask = np.zeros(grid_size, dtype=np.bool_)
    for segmentation in segmentations:
        mask |= rasterise(segmentation, frame_size=frame_size, grid_size=grid_size)
    return mask


def part_count(
    segmentations: Iterable[Segmentation], *, frame_size: tuple[int, int], grid_size: tuple[int, int]
) -> PartCount:
    """Count how many parts, of all the segmentations together, cover each pixel; 0 for none.

    Each polygon is a part, and so is each RLE: what overlapped before it was encoded is one part now. Some
    evaluators take only pixels with a count of exactly one for foreground; `part_count(…) > 0` is
    `union_mask(…)`.

    Args:
        frame_size: (H, W) of the original frame.
        grid_size: (h, w) of the result.
    Returns:
        uint16[h, w].
    Raises:
        DataError: as `rasterise`.
    """
    # One added where a run of foreground begins and taken away behind its end: one sum then counts all parts.
    steps = np.zeros(grid_size[0] * grid_size[1] + 1, dtype=np.int32)
    boxed = np.zeros(grid_size, dtype=np.int32)
    for segmentation in segmentations:
        if isinstance(segmentation, Rle):
            boxed += rasterise(segmentation, frame_size=frame_size, grid_size=grid_size)
            continue
        for part in _draw_parts(segmentation, frame_size, grid_size) if segmentation else ():
            borders = np.cumsum(_run_lengths(part["counts"].decode("ascii"), grid_size))
            np.add.at(steps, borders[:-1:2], 1)
            np.add.at(steps, borders[1::2], -1)
    drawn = np.cumsum(steps[:-1], dtype=np.int32).reshape(grid_size[1], grid_size[0]).T
    return np.ascontiguousarray((drawn + boxed).clip(max=np.iinfo(np.uint16).max).astype(np.uint16))


def resize_nearest(mask: Mask, grid_size: tuple[int, int]) -> Mask:
    """Resize a mask exactly as Pillow's NEAREST does, rounding included.

    Pillow adds up positions in float64, and the sum decides where a grid pixel's centre falls between two
    frame pixels. `rasterise` resizes an RLE in whole numbers instead; the two differ only at such ties.

    Args:
        mask: bool[H, W].
        grid_size: (h, w) of the result.
    Returns:
        bool[h, w].
    """
    rows, columns = (
        _summed_positions(source, target) for source, target in zip(mask.shape, grid_size, strict=True)
    )
    resized: Mask = np.ascontiguousarray(mask[np.ix_(rows, columns)])
    return resized


def to_json(segmentation: Segmentation) -> str:
    """Write a segmentation as COCO-style JSON: [[x0, y0, …], …] or {"size": [H, W], "counts": "…"}.

    Every float keeps its exact value.

    Raises:
        DataError: a coordinate is not finite.
    """
    value: object = segmentation
    if isinstance(segmentation, Rle):
        value = {"size": list(segmentation.size), "counts": segmentation.counts}
    try:
        return json.dumps(value, allow_nan=False, separators=(",", ":"))
    except ValueError as error:
        raise _malformed("has a coordinate that is not finite", segmentation) from error


def from_json(text: str) -> Segmentation:
    """Read what `to_json` wrote; nothing is dropped or rounded.

    Raises:
        DataError: the text is not a segmentation in that form.
    """
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise _malformed("is not JSON", text[:80]) from error
    if isinstance(value, dict):
        size = _checked_size(value.get("size"))
        counts = value.get("counts")
        if not isinstance(counts, str):
            raise _malformed("has RLE counts that are not text", type(counts).__name__)
        _run_lengths(counts, size)
        return Rle(size=size, counts=counts)
    if not isinstance(value, list):
        raise _malformed("is neither a list of polygons nor an RLE object", type(value).__name__)
    return tuple(tuple(map(float, _checked_numbers(part))) for part in value)


def _malformed(what: str, found: object, **facts: object) -> DataError:
    return DataError(
        f"A segmentation {what} (found {found!r:.80}). Correct it in the annotation file, or download the "
        "file again.",
        found=found,
        **facts,
    )


# Polygons.


def _draw_parts(
    polygons: Polygons, frame_size: tuple[int, int], grid_size: tuple[int, int]
) -> list[dict[str, Any]]:
    """Scale each polygon to the grid and draw it there: one compressed RLE of pycocotools' for each."""
    scale = np.array([grid_size[1] / frame_size[1], grid_size[0] / frame_size[0]])
    scaled = []
    for polygon in polygons:
        if not _is_drawable(_checked_polygon(polygon, frame_size)):
            raise _malformed("has a polygon of fewer than three points or with half a point", len(polygon))
        scaled.append((np.asarray(polygon, dtype=np.float64).reshape(-1, 2) * scale).ravel().tolist())
    drawn: list[dict[str, Any]] = coco_mask.frPyObjects(scaled, *grid_size)
    return drawn


def _is_drawable(polygon: Sequence[float]) -> bool:
    return len(polygon) >= _MIN_COORDINATES and len(polygon) % 2 == 0


def _checked_numbers(polygon: Any) -> Sequence[float]:
    if not isinstance(polygon, list | tuple):
        raise _malformed("has a part that is not a list of coordinates", type(polygon).__name__)
    if not {int, float}.issuperset(map(type, polygon)):
        raise _malformed("has a coordinate that is not a number", polygon)
    try:
        is_finite = all(map(math.isfinite, polygon))
    except OverflowError:  # a whole number beyond float64
        is_finite = False
    if not is_finite:
        raise _malformed("has a coordinate that is not finite", polygon)
    return polygon


def _checked_polygon(polygon: Any, size: tuple[int, int]) -> Sequence[float]:
    height, width = size
    numbers = _checked_numbers(polygon)
    for coordinates, side in ((numbers[0::2], width), (numbers[1::2], height)):
        limit = _MAX_FRAMES_AWAY * side
        if coordinates and not -limit <= min(coordinates) <= max(coordinates) <= limit:
            raise _malformed(
                f"has a vertex more than {_MAX_FRAMES_AWAY} image sizes away from its image of "
                f"{height} × {width} pixels",
                max(coordinates, key=abs),
                expected=limit,
            )
    return numbers


# Run-length masks.


def _checked_size(size: Any) -> tuple[int, int]:
    if not (isinstance(size, list | tuple) and len(size) == 2 and all(type(side) is int for side in size)):
        raise _malformed("has an RLE whose size is not [height, width]", size)
    return size[0], size[1]


def _parse_rle(value: dict[Any, Any], size: tuple[int, int]) -> Rle | Polygons:
    found = _checked_size(value.get("size"))
    if found != size:
        raise _malformed(f"has an RLE of another size than its image of {size}", found, expected=size)
    counts = value.get("counts")
    if isinstance(counts, list):
        if not all(type(run) is int and run >= 0 for run in counts):
            raise _malformed("has RLE counts that are not whole numbers of pixels", counts)
        _check_total(sum(counts), size)
        text = coco_mask.frPyObjects({"size": list(size), "counts": counts}, *size)["counts"].decode("ascii")
    elif isinstance(counts, str | bytes):
        text = counts if isinstance(counts, str) else counts.decode("latin1")
    else:
        raise _malformed("has RLE counts that are neither a list nor text", type(counts).__name__)
    return Rle(size=size, counts=text) if np.any(_run_lengths(text, size)[1::2]) else ()


def _union_of_rles(parts: Sequence[Rle | Polygons], size: tuple[int, int]) -> Rle | Polygons:
    encoded = [{"size": list(size), "counts": part.counts} for part in parts if isinstance(part, Rle)]
    if not encoded:
        return ()
    return Rle(size=size, counts=coco_mask.merge(encoded)["counts"].decode("ascii"))


def _check_total(total: int, size: tuple[int, int]) -> None:
    if total != size[0] * size[1]:
        raise _malformed(
            f"has RLE counts that do not add up to the {size[0] * size[1]} pixels of its image",
            total,
            expected=size[0] * size[1],
        )


def _run_lengths(counts: str, size: tuple[int, int]) -> npt.NDArray[np.int64]:
    """Decode COCO's compressed counts to the lengths of alternating background and foreground runs.

    Runs go down the columns, the first is background. Each length is a chain of characters from "0" on: five
    bits of value, least significant group first, and a sixth bit when more follow; the last group is signed.
    From the fourth on, lengths are stored as the difference from the one two before.
    """
    bits = np.frombuffer(counts.encode("utf-8", "surrogatepass"), dtype=np.uint8).astype(np.int64) - ord("0")
    if np.any((bits < 0) | (bits >= 64)):
        raise _malformed("has a character in its RLE counts that COCO's code lacks", counts)
    is_last = bits & 32 == 0
    if len(bits) and not is_last[-1]:
        raise _malformed("has RLE counts that end within a number", counts)
    lasts = np.flatnonzero(is_last)
    firsts = np.concatenate([[0], lasts[:-1] + 1]).astype(np.intp)[: len(lasts)]
    if np.any(lasts - firsts >= _MAX_GROUPS):
        raise _malformed("has a run in its RLE counts that is longer than any image", counts)
    shifts = 5 * (np.arange(len(bits)) - np.repeat(firsts, lasts - firsts + 1))
    runs = np.add.reduceat((bits & 31) << shifts, firsts) if len(firsts) else np.zeros(0, dtype=np.int64)
    runs -= np.where(bits[lasts] & 16, 32 << shifts[lasts], 0)
    runs[1::2] = np.cumsum(runs[1::2])
    runs[2::2] = np.cumsum(runs[2::2])
    if np.any(runs < 0):
        raise _malformed("has a run of negative length in its RLE counts", counts)
    longest = int(runs.max(initial=0))  # looked at first, since the sum of too long runs may overflow
    _check_total(longest if longest > size[0] * size[1] else int(runs.sum()), size)
    return runs


def _decode(rle: Rle, frame_size: tuple[int, int]) -> Mask:
    if rle.size != frame_size:
        raise _malformed(
            f"has an RLE of another size than its image of {frame_size}", rle.size, expected=frame_size
        )
    return _fill(_run_lengths(rle.counts, rle.size), frame_size)


def _fill(runs: npt.NDArray[np.int64], size: tuple[int, int]) -> Mask:
    """Give bool[H, W]. pycocotools' own decode checks nothing, and warns under numpy 2."""
    is_foreground = np.arange(len(runs)) % 2 == 1
    mask: Mask = np.repeat(is_foreground, runs).reshape(size[1], size[0]).T
    return mask


def _resize_nearest(mask: Mask, grid_size: tuple[int, int]) -> Mask:
    """Take the frame pixel under each grid pixel's centre, in whole numbers so that nothing is rounded."""
    rows, columns = (
        (2 * np.arange(target) + 1) * source // (2 * target)
        for source, target in zip(mask.shape, grid_size, strict=True)
    )
    resized: Mask = np.ascontiguousarray(mask[np.ix_(rows, columns)])
    return resized


def _summed_positions(source: int, target: int) -> npt.NDArray[np.intp]:
    """Frame pixel of each grid pixel along one axis: half a step, then one more step each time."""
    steps = np.full(target, source / target)
    steps[0] /= 2
    return np.add.accumulate(steps).astype(np.intp)

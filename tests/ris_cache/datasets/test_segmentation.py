"""Masks equal pycocotools, Pillow and a point-in-polygon test; malformed values are errors."""

from __future__ import annotations

import json
import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageDraw
from pycocotools import mask as coco_mask

from ris_cache.datasets import segmentation
from ris_cache.datasets.records import Rle
from ris_cache.datasets.segmentation import from_json, parse_segmentation, rasterise, to_json, union_mask
from ris_cache.errors import DataError

# pycocotools is the oracle here; its decode warns under numpy 2.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")

SQUARE = [1.0, 1.0, 5.0, 1.0, 5.0, 5.0, 1.0, 5.0]
TRIANGLE = [0.0, 0.0, 8.0, 0.0, 0.0, 8.0]


def star(rng: np.random.Generator, size: tuple[int, int], num_points: int = 12) -> list[float]:
    """A simple polygon that fits the frame: one vertex per direction, at a random distance."""
    height, width = size
    angles = np.linspace(0, 2 * np.pi, num_points, endpoint=False)
    radii = rng.uniform(0.3, 0.48, num_points)
    points = np.stack(
        [width / 2 + radii * np.cos(angles) * width, height / 2 + radii * np.sin(angles) * height], axis=1
    )
    return [float(number) for number in points.ravel()]


def inside(polygon: list[float], size: tuple[int, int]) -> np.ndarray:
    """Even-odd rule at pixel centres: count the edges that a ray to the right crosses."""
    height, width = size
    y, x = np.mgrid[0:height, 0:width] + 0.5
    crossed = np.zeros(size, dtype=bool)
    points = np.reshape(polygon, (-1, 2))
    for (x0, y0), (x1, y1) in zip(points, np.roll(points, -1, axis=0), strict=True):
        with np.errstate(divide="ignore", invalid="ignore"):
            crossed ^= ((y0 > y) != (y1 > y)) & (x < (x1 - x0) * (y - y0) / (y1 - y0) + x0)
    return crossed


def iou(a: np.ndarray, b: np.ndarray) -> float:
    return float((a & b).sum() / (a | b).sum())


# Parsing.


def test_polygons_keep_their_numbers_as_floats() -> None:
    assert parse_segmentation([[1, 2, 3, 4.5, 5, 6]], (10, 10)) == ((1.0, 2.0, 3.0, 4.5, 5.0, 6.0),)


@pytest.mark.parametrize(
    "value",
    [
        [],
        [[]],
        [[1.0, 1.0, 5.0, 5.0]],
        [[1.0, 1.0, 5.0]],
        [[1.0, 1.0, 5.0, 1.0, 5.0, 5.0, 1.0]],
        [[1.0, 1.0], [2.0, 2.0, 3.0, 3.0]],
        {"size": [4, 3], "counts": [12]},
        [{"size": [4, 3], "counts": [12]}, {"size": [4, 3], "counts": [12, 0]}],
    ],
)
def test_what_encloses_nothing_is_degenerate(value: object) -> None:
    assert parse_segmentation(value, (4, 3)) == ()
    assert not rasterise((), frame_size=(4, 3), grid_size=(8, 8)).any()


def test_only_the_degenerate_polygons_of_an_object_are_dropped() -> None:
    value = [[1.0, 1.0, 5.0, 5.0], SQUARE, [1.0, 1.0], [*TRIANGLE, 1.0], TRIANGLE]
    assert parse_segmentation(value, (10, 10)) == (tuple(SQUARE), tuple(TRIANGLE))


def test_all_three_forms_of_rle_mean_the_same() -> None:
    by_list = parse_segmentation({"size": [3, 4], "counts": [2, 3, 7]}, (3, 4))
    by_text = parse_segmentation({"size": [3, 4], "counts": "237"}, (3, 4))
    by_bytes = parse_segmentation({"size": [3, 4], "counts": b"237"}, (3, 4))
    assert by_list == by_text == by_bytes == Rle(size=(3, 4), counts="237")
    expected = np.zeros(12, dtype=bool)
    expected[2:5] = True
    mask = rasterise(by_list, frame_size=(3, 4), grid_size=(3, 4))
    np.testing.assert_array_equal(mask, expected.reshape(4, 3).T)


def test_a_list_of_rles_is_their_union() -> None:
    first, second = {"size": [3, 4], "counts": [0, 2, 10]}, {"size": [3, 4], "counts": "136"}
    empty = {"size": [3, 4], "counts": [12]}
    parsed = parse_segmentation([first, empty, second | {"counts": [1, 5, 6]}], (3, 4))
    np.testing.assert_array_equal(
        rasterise(parsed, frame_size=(3, 4), grid_size=(3, 4)).ravel(order="F"), [True] * 6 + [False] * 6
    )


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, "neither a list of polygons nor an RLE"),
        ("[[1,2,3,4,5,6]]", "neither"),
        (7, "neither"),
        ([1.0, 2.0, 3.0, 4.0, 5.0, 6.0], "not a list of coordinates"),
        ([SQUARE, {"size": [10, 10], "counts": [100]}], "not a list of coordinates"),
        ([["1", "2", "3", "4", "5", "6"]], "not a number"),
        ([[True, 1, 2, 3, 4, 5]], "not a number"),
        ([[[1, 2], [3, 4], [5, 6]]], "not a number"),
        ([[None] * 6], "not a number"),
        ([[math.nan, 1, 2, 3, 4, 5]], "not finite"),
        ([[1, 1, 2, 3, 4, math.inf]], "not finite"),
        ([[1, 1, 2, 3, math.inf, -math.inf]], "not finite"),
        ([[10**400, 1, 2, 3, 4, 5]], "not finite"),
        ([[1, 1, 101, 1, 5, 5]], "image sizes away"),
        ([[1, 1, 5, -1e9, 5, 5]], "image sizes away"),
        ({"counts": [100]}, "size is not"),
        ({"size": [10], "counts": [100]}, "size is not"),
        ({"size": "10", "counts": [100]}, "size is not"),
        ({"size": [10.0, 10.0], "counts": [100]}, "size is not"),
        ({"size": [10, 9], "counts": [90]}, r"another size than its image of \(10, 10\)"),
        ({"size": [10, 10]}, "neither a list nor text"),
        ({"size": [10, 10], "counts": [50, 49]}, "do not add up to the 100 pixels"),
        ({"size": [10, 10], "counts": [50, 51]}, "do not add up"),
        ({"size": [10, 10], "counts": []}, "do not add up"),
        ({"size": [10, 10], "counts": [-1, 101]}, "not whole numbers"),
        ({"size": [10, 10], "counts": [50.0, 50.0]}, "not whole numbers"),
        ({"size": [10, 10], "counts": ["50", "50"]}, "not whole numbers"),
        ({"size": [10, 10], "counts": ""}, "do not add up"),
        ({"size": [10, 10], "counts": "23"}, "do not add up"),
        ({"size": [10, 10], "counts": "T"}, "end within a number"),
        ({"size": [10, 10], "counts": "2é"}, "COCO's code lacks"),
        ({"size": [10, 10], "counts": b"2\xff"}, "COCO's code lacks"),
        ({"size": [10, 10], "counts": "O"}, "negative length"),
        ({"size": [10, 10], "counts": "\ud800"}, "COCO's code lacks"),
        ({"size": [10, 10], "counts": "o" * 12 + "0"}, "longer than any image"),
    ],
)
def test_malformed_values_are_data_errors(value: object, text: str) -> None:
    with pytest.raises(DataError, match=text) as caught:
        parse_segmentation(value, (10, 10))
    assert "found" in caught.value.facts


def coded(number: int) -> str:
    """One number in COCO's code."""
    text = ""
    while True:
        group, number = number & 31, number >> 5
        is_last = number == (-1 if group & 16 else 0)
        text += chr(48 + group + 32 * (not is_last))
        if is_last:
            return text


def test_runs_whose_sum_overflows_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """32 runs of 2⁵⁹ pixels add up to 2⁶⁴, which int64 takes for 0, so one of 100 more would seem to fit.

    With runs below 2⁴⁰ it takes 2²⁵ of them, which is too many for a test.
    """
    monkeypatch.setattr(segmentation, "_MAX_GROUPS", 13)
    counts = coded(2**59) * 3 + coded(0) * 29 + coded(100 - 2**59)
    with pytest.raises(DataError, match="do not add up to the 100 pixels"):
        parse_segmentation({"size": [10, 10], "counts": counts}, (10, 10))


def test_a_wrong_rle_never_reaches_the_decoder() -> None:
    short = Rle(size=(3, 4), counts="23")
    with pytest.raises(DataError, match="add up to the 12 pixels"):
        rasterise(short, frame_size=(3, 4), grid_size=(3, 4))
    with pytest.raises(DataError, match="another size"):
        rasterise(Rle(size=(3, 4), counts="237"), frame_size=(4, 3), grid_size=(4, 3))


@pytest.mark.parametrize(
    "polygon", [(1.0, 1.0, 5.0, 5.0), (1.0, 1.0, 5.0), (1.0, 1.0, 2.0, 2.0, 3.0, 3.0, 4.0)]
)
def test_unparsed_polygons_are_refused_rather_than_misread(polygon: tuple[float, ...]) -> None:
    with pytest.raises(DataError, match="fewer than three points or with half a point"):
        rasterise((polygon,), frame_size=(9, 9), grid_size=(9, 9))


# Rasterising.


@pytest.mark.parametrize("frame", [(64, 48), (480, 640), (37, 91)])
@pytest.mark.parametrize("grid", [None, (128, 128), (480, 480), (20, 30)])
def test_polygons_equal_pycocotools_on_scaled_coordinates(
    frame: tuple[int, int], grid: tuple[int, int] | None
) -> None:
    rng = np.random.default_rng(0)
    grid = grid or frame
    polygons = [star(rng, frame) for _ in range(3)]
    scaled = [[n * (grid[1 - i % 2] / frame[1 - i % 2]) for i, n in enumerate(part)] for part in polygons]
    planes = coco_mask.decode(coco_mask.frPyObjects(scaled, *grid))
    mask = rasterise(parse_segmentation(polygons, frame), frame_size=frame, grid_size=grid)
    assert mask.dtype == np.bool_
    assert mask.flags.c_contiguous
    np.testing.assert_array_equal(mask, planes.any(axis=2))


def test_polygons_agree_with_a_point_in_polygon_test_and_with_pillow() -> None:
    rng = np.random.default_rng(1)
    for frame in ((120, 160), (200, 90)):
        polygon = star(rng, frame)
        mask = rasterise(parse_segmentation([polygon], frame), frame_size=frame, grid_size=frame)
        canvas = Image.new("1", (frame[1], frame[0]))
        ImageDraw.Draw(canvas).polygon([(x - 0.5, y - 0.5) for x, y in np.reshape(polygon, (-1, 2))], fill=1)
        assert iou(mask, inside(polygon, frame)) > 0.98
        assert iou(mask, np.asarray(canvas)) > 0.95


def test_an_axis_aligned_square_covers_the_pixels_it_says() -> None:
    mask = rasterise((tuple(SQUARE),), frame_size=(8, 8), grid_size=(8, 8))
    expected = np.zeros((8, 8), dtype=bool)
    expected[1:5, 1:5] = True
    np.testing.assert_array_equal(mask, expected)


def test_doubling_the_grid_doubles_the_square() -> None:
    mask = rasterise((tuple(SQUARE),), frame_size=(8, 8), grid_size=(16, 24))
    expected = np.zeros((16, 24), dtype=bool)
    expected[2:10, 3:15] = True
    np.testing.assert_array_equal(mask, expected)


def test_overlapping_parts_are_foreground() -> None:
    shifted = tuple(number + 2 for number in SQUARE)
    mask = rasterise((tuple(SQUARE), shifted), frame_size=(10, 10), grid_size=(10, 10))
    assert mask[3:5, 3:5].all()
    assert mask.sum() == 16 + 16 - 4


def test_vertices_outside_the_image_are_clipped() -> None:
    mask = rasterise(((-5.0, -5.0, 20.0, -5.0, 20.0, 4.0, -5.0, 4.0),), frame_size=(8, 8), grid_size=(8, 8))
    np.testing.assert_array_equal(mask, np.arange(8)[:, None].repeat(8, axis=1) < 4)


def test_a_sliver_may_cover_no_pixel() -> None:
    segmentation = parse_segmentation([[1.0, 1.0, 2.0, 2.0, 3.0, 3.0]], (8, 8))
    assert segmentation
    assert not rasterise(segmentation, frame_size=(8, 8), grid_size=(8, 8)).any()


@settings(max_examples=60, deadline=None)
@given(
    frame=st.tuples(st.integers(1, 24), st.integers(1, 24)),
    grid=st.tuples(st.integers(1, 40), st.integers(1, 40)),
    seed=st.integers(0, 2**32 - 1),
)
def test_rle_decodes_as_pycocotools_and_resizes_as_pillow(
    frame: tuple[int, int], grid: tuple[int, int], seed: int
) -> None:
    original = np.random.default_rng(seed).random(frame) < 0.4
    encoded = coco_mask.encode(np.asfortranarray(original, dtype=np.uint8))
    segmentation = parse_segmentation({"size": list(frame), "counts": encoded["counts"]}, frame)
    np.testing.assert_array_equal(rasterise(segmentation, frame_size=frame, grid_size=frame), original)
    assert not original.any() or segmentation == Rle(size=frame, counts=encoded["counts"].decode())
    resized = np.asarray(
        Image.fromarray(original.astype(np.uint8)).resize(grid[::-1], Image.Resampling.NEAREST)
    ).astype(bool)
    # Where a grid pixel's centre falls between two frame pixels, Pillow's running sum may round down.
    is_clear = [(2 * np.arange(g) + 1) * f % (2 * g) != 0 for f, g in zip(frame, grid, strict=True)]
    mask = rasterise(segmentation, frame_size=frame, grid_size=grid)
    np.testing.assert_array_equal(mask[np.ix_(*is_clear)], resized[np.ix_(*is_clear)])


def test_long_runs_survive_the_compressed_form() -> None:
    runs = [0, 100_000, 1, 7, 40_000, 31, 32, 1023, 1024, 157_882]
    frame = (500, 600)
    segmentation = parse_segmentation({"size": list(frame), "counts": runs}, frame)
    flat = np.repeat(np.arange(len(runs)) % 2 == 1, runs)
    mask = rasterise(segmentation, frame_size=frame, grid_size=frame)
    np.testing.assert_array_equal(mask.ravel(order="F"), flat)


def test_the_union_of_polygons_and_rle_covers_both() -> None:
    polygon = parse_segmentation([SQUARE], (8, 8))
    rle = parse_segmentation({"size": [8, 8], "counts": [56, 8]}, (8, 8))
    sizes: dict[str, Any] = {"frame_size": (8, 8), "grid_size": (16, 16)}
    both = union_mask([polygon, (), rle], **sizes)
    np.testing.assert_array_equal(both, rasterise(polygon, **sizes) | rasterise(rle, **sizes))
    assert both.sum() == 4 * (16 + 8)
    assert not union_mask([], **sizes).any()


@settings(max_examples=200, deadline=None)
@given(st.text(alphabet=[chr(code) for code in range(48, 113)], max_size=12))
def test_any_counts_decode_as_pycocotools_or_are_refused(counts: str) -> None:
    try:
        segmentation = parse_segmentation({"size": [5, 4], "counts": counts}, (5, 4))
    except DataError:
        return
    mask = rasterise(segmentation, frame_size=(5, 4), grid_size=(5, 4))
    np.testing.assert_array_equal(mask, coco_mask.decode({"size": [5, 4], "counts": counts}))


# JSON.


COORDINATES = st.floats(allow_nan=False, allow_infinity=False)


@given(st.lists(st.lists(COORDINATES, min_size=1, max_size=9).map(tuple), max_size=4).map(tuple))
def test_polygons_survive_json_bit_for_bit(polygons: tuple[tuple[float, ...], ...]) -> None:
    back = from_json(to_json(polygons))
    assert back == polygons
    assert repr(back) == repr(polygons)


@settings(max_examples=60, deadline=None)
@given(st.tuples(st.integers(1, 20), st.integers(1, 20)), st.integers(0, 2**32 - 1))
def test_rle_survives_json(size: tuple[int, int], seed: int) -> None:
    mask = np.random.default_rng(seed).random(size) < 0.5
    counts = coco_mask.encode(np.asfortranarray(mask, dtype=np.uint8))["counts"].decode()
    rle = Rle(size=size, counts=counts)
    assert from_json(to_json(rle)) == rle


def test_json_is_the_form_of_coco() -> None:
    assert json.loads(to_json((tuple(SQUARE),))) == [SQUARE]
    assert json.loads(to_json(Rle(size=(3, 4), counts="237"))) == {"size": [3, 4], "counts": "237"}
    assert from_json("[]") == ()


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("", "is not JSON"),
        ("[[1,2", "is not JSON"),
        ("[" * 100_000, "is not JSON"),
        ("3", "neither a list"),
        ('{"size": [3, 4]}', "not text"),
        ('{"size": [3], "counts": "237"}', "size is not"),
        ('{"size": [3, 4], "counts": "23"}', "add up to the 12 pixels"),
        ('[["1", "2"]]', "not a number"),
        ("[[NaN]]", "not finite"),
        ("[1, 2]", "not a list of coordinates"),
    ],
)
def test_damaged_json_is_a_data_error(text: str, problem: str) -> None:
    with pytest.raises(DataError, match=problem):
        from_json(text)


def test_numbers_that_json_lacks_are_not_written() -> None:
    with pytest.raises(DataError, match="not finite"):
        to_json(((math.nan, 1.0),))

"""How many parts cover each pixel, and masks resized as Pillow resizes them."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from pycocotools import mask as coco_mask

from ris_cache.datasets.segmentation import parse_segmentation, part_count, resize_nearest, union_mask
from ris_cache.errors import DataError

# pycocotools is the oracle here; its decode warns under numpy 2.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")

SQUARE = [1.0, 1.0, 5.0, 1.0, 5.0, 5.0, 1.0, 5.0]


def star(rng: np.random.Generator, size: tuple[int, int], num_points: int = 12) -> list[float]:
    """A simple polygon that fits the frame: one vertex per direction, at a random distance."""
    height, width = size
    angles = np.linspace(0, 2 * np.pi, num_points, endpoint=False)
    radii = rng.uniform(0.3, 0.48, num_points)
    points = np.stack(
        [width / 2 + radii * np.cos(angles) * width, height / 2 + radii * np.sin(angles) * height], axis=1
    )
    return [float(number) for number in points.ravel()]


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.integers(0, 5), max_size=4),
    st.integers(0, 2**32 - 1),
    st.sampled_from([(20, 30), (31, 17)]),
    st.sampled_from([None, (16, 16), (45, 33)]),
)
def test_every_part_that_covers_a_pixel_is_counted(
    num_parts: list[int], seed: int, frame: tuple[int, int], grid: tuple[int, int] | None
) -> None:
    rng = np.random.default_rng(seed)
    grid = grid or frame
    objects = [[star(rng, frame) for _ in range(parts)] for parts in num_parts]
    expected = np.zeros(grid, dtype=int)
    for part in (part for parts in objects for part in parts):
        scaled = [n * (grid[1 - i % 2] / frame[1 - i % 2]) for i, n in enumerate(part)]
        expected += coco_mask.decode(coco_mask.frPyObjects([scaled], *grid))[:, :, 0]
    segmentations = [parse_segmentation(parts, frame) for parts in objects]
    counted = part_count(segmentations, frame_size=frame, grid_size=grid)
    assert counted.dtype == np.uint16
    assert counted.flags.c_contiguous
    np.testing.assert_array_equal(counted, expected)
    np.testing.assert_array_equal(counted > 0, union_mask(segmentations, frame_size=frame, grid_size=grid))


def test_an_rle_is_one_part_beside_polygons() -> None:
    polygons = parse_segmentation([SQUARE, SQUARE], (8, 8))
    rle = parse_segmentation({"size": [8, 8], "counts": [0, 32, 32]}, (8, 8))  # the left four columns
    counted = part_count([polygons, rle], frame_size=(8, 8), grid_size=(8, 8))
    expected = np.zeros((8, 8), dtype=int)
    expected[:, :4] += 1
    expected[1:5, 1:5] += 2
    np.testing.assert_array_equal(counted, expected)
    assert part_count([rle], frame_size=(8, 8), grid_size=(16, 24)).sum() == 16 * 12
    assert not part_count([(), ()], frame_size=(8, 8), grid_size=(4, 4)).any()


def test_a_sliver_and_a_square_at_the_border_are_counted() -> None:
    """Runs of no pixels, and a run that ends with the last pixel of the mask."""
    corner = (4.0, 4.0, 8.0, 4.0, 8.0, 8.0, 4.0, 8.0)
    segmentation = ((1.0, 1.0, 2.0, 2.0, 3.0, 3.0), corner, (0.0, 0.0, 8.0, 0.0, 8.0, 8.0, 0.0, 8.0))
    counted = part_count([segmentation], frame_size=(8, 8), grid_size=(8, 8))
    assert counted[:4, :].max() == counted.min() == 1
    assert (counted[4:, 4:] == 2).all()


def test_parts_that_cannot_be_drawn_are_refused_when_counted() -> None:
    with pytest.raises(DataError, match="fewer than three points"):
        part_count([((1.0, 1.0, 5.0, 5.0),)], frame_size=(9, 9), grid_size=(9, 9))


@pytest.mark.parametrize("grid", [(480, 480), (1024, 1024), (37, 640)])
@pytest.mark.parametrize("frame", [(480, 640), (640, 427), (426, 640), (612, 612), (333, 500), (96, 160)])
def test_nearest_is_pillows_nearest_at_the_sizes_of_photographs(
    frame: tuple[int, int], grid: tuple[int, int]
) -> None:
    mask = np.random.default_rng(0).random(frame) < 0.5
    expected = np.asarray(Image.fromarray(mask.astype(np.uint8)).resize(grid[::-1], Image.Resampling.NEAREST))
    resized = resize_nearest(mask, grid)
    assert resized.dtype == np.bool_
    assert resized.flags.c_contiguous
    np.testing.assert_array_equal(resized, expected.astype(bool))


@settings(max_examples=200, deadline=None)
@given(st.integers(1, 900), st.integers(1, 1100))
def test_nearest_takes_the_pixel_that_pillow_takes(source: int, target: int) -> None:
    line = Image.fromarray(np.arange(source, dtype=np.int32)[None])
    expected = np.asarray(line.resize((target, 1), Image.Resampling.NEAREST))[0]
    taken = np.array([resize_nearest(plane[None], (1, target))[0] for plane in bits(source)])
    np.testing.assert_array_equal((taken * (1 << np.arange(10))[:, None]).sum(axis=0), expected)


def bits(source: int) -> np.ndarray:
    """The numbers 0 to source − 1, one plane for each of ten bits: bool[10, source]."""
    return (np.arange(source) >> np.arange(10)[:, None] & 1).astype(bool)

"""The boundary tracer, against scipy's components and COCO's own rasteriser."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from numpy.typing import NDArray
from pycocotools import mask as coco_mask
from scipy import ndimage

from ris_cache.datasets.shapes.trace import signed_area, trace_loops

EIGHT_NEIGHBOURS = np.ones((3, 3), dtype=int)
masks = hnp.arrays(np.bool_, st.tuples(st.integers(1, 11), st.integers(1, 11)))


def rasterised(loops: tuple[tuple[tuple[int, int], ...], ...], height: int, width: int) -> NDArray[np.bool_]:
    polygons = [[float(value) for point in loop for value in point] for loop in loops]
    mask: NDArray[np.uint8] = coco_mask.decode(
        coco_mask.merge(coco_mask.frPyObjects(polygons, height, width))
    )
    return mask.astype(bool)


def test_one_pixel_is_walked_clockwise_around_its_four_corners() -> None:
    mask = np.zeros((3, 4), dtype=bool)
    mask[1, 2] = True
    (loop,) = trace_loops(mask)
    assert set(loop) == {(2, 1), (3, 1), (3, 2), (2, 2)}
    assert signed_area(loop) == 1.0


def test_straight_runs_keep_their_ends_only() -> None:
    mask = np.zeros((6, 9), dtype=bool)
    mask[1:4, 2:8] = True
    (loop,) = trace_loops(mask)
    assert set(loop) == {(2, 1), (8, 1), (8, 4), (2, 4)}
    assert len(loop) == 4


def test_pixels_that_touch_at_a_corner_are_separate_parts() -> None:
    loops = trace_loops(np.eye(2, dtype=bool))
    assert sorted(signed_area(loop) for loop in loops) == [1.0, 1.0]


def test_a_hole_is_a_loop_of_negative_area() -> None:
    mask = np.ones((3, 3), dtype=bool)
    mask[1, 1] = False
    assert sorted(signed_area(loop) for loop in trace_loops(mask)) == [-1.0, 9.0]


def test_an_empty_mask_has_no_loops() -> None:
    assert trace_loops(np.zeros((4, 4), dtype=bool)) == ()


@given(masks)
def test_signed_areas_add_up_to_the_number_of_pixels(mask: NDArray[np.bool_]) -> None:
    assert sum(signed_area(loop) for loop in trace_loops(mask)) == mask.sum()


@given(masks)
def test_loops_are_as_many_as_components_and_holes(mask: NDArray[np.bool_]) -> None:
    areas = [signed_area(loop) for loop in trace_loops(mask)]
    num_components = ndimage.label(mask)[1]
    num_backgrounds = ndimage.label(np.pad(~mask, 1, constant_values=True), EIGHT_NEIGHBOURS)[1]
    assert sum(area > 0 for area in areas) == num_components
    assert sum(area < 0 for area in areas) == num_backgrounds - 1


@given(masks)
def test_coco_rasterises_the_polygons_back_to_the_mask(mask: NDArray[np.bool_]) -> None:
    filled = ndimage.binary_fill_holes(mask, EIGHT_NEIGHBOURS)
    loops = trace_loops(filled)
    if loops:
        np.testing.assert_array_equal(rasterised(loops, *filled.shape), filled)

"""Ground truth as each view draws it, compared with pycocotools and Pillow used directly."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as coco_mask

from ris_cache.datasets.records import Rle, Segmentation
from ris_cache.errors import ConfigError
from ris_train.scoring.rules import RULES
from ris_train.scoring.views import VIEWS, truth_mask

FRAME = (90, 130)

# pycocotools' own decode warns under numpy 2.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")


def blob(rng: np.random.Generator) -> tuple[float, ...]:
    """A polygon around a random point, of twelve vertices, some beyond the frame."""
    angles = np.sort(rng.uniform(0, 2 * np.pi, 12))
    radii = rng.uniform(10, 50, 12)
    centre = rng.uniform((0, 0), FRAME)
    points = np.stack([centre[1] + radii * np.cos(angles), centre[0] + radii * np.sin(angles)], axis=1)
    return tuple(points.ravel().tolist())


@pytest.fixture(params=range(4))
def objects(request) -> list[tuple[tuple[float, ...], ...]]:
    """Two objects of three parts each, which overlap."""
    rng = np.random.default_rng(request.param)
    return [tuple(blob(rng) for _ in range(3)) for _ in range(2)]


def planes(objects: list[tuple[tuple[float, ...], ...]], grid: tuple[int, int]) -> np.ndarray:
    """How many parts cover each pixel of the grid."""
    height, width = grid[0] / FRAME[0], grid[1] / FRAME[1]
    parts = [
        [n * (height if i % 2 else width) for i, n in enumerate(part)] for parts in objects for part in parts
    ]
    return coco_mask.decode(coco_mask.frPyObjects(parts, *grid)).astype(int).sum(axis=2)


def resized(mask: np.ndarray) -> np.ndarray:
    picture = Image.fromarray(mask.astype(np.uint8)).resize((480, 480), Image.Resampling.NEAREST)
    return np.asarray(picture).astype(bool)


@pytest.mark.parametrize("name", VIEWS)
def test_every_view_draws_what_its_evaluators_draw(name: str, objects: list) -> None:
    expected = {
        "original": lambda: planes(objects, FRAME) > 0,
        "original-one": lambda: planes(objects, FRAME) == 1,
        "original-p35": lambda: planes(objects, FRAME) > 0,
        "1024": lambda: planes(objects, (1024, 1024)) > 0,
        "480": lambda: planes(objects, (480, 480)) > 0,
        "480-nearest": lambda: resized(planes(objects, FRAME) > 0),
        "480-nearest-one": lambda: resized(planes(objects, FRAME) == 1),
    }
    mask = truth_mask(objects, VIEWS[name], frame_size=FRAME)
    assert mask.dtype == np.bool_
    assert mask.flags.c_contiguous
    assert mask.shape == VIEWS[name].grid_size(FRAME)
    np.testing.assert_array_equal(mask, expected[name]())


def test_the_views_of_overlapping_parts_differ(objects: list) -> None:
    drawn = {name: truth_mask(objects, view, frame_size=FRAME) for name, view in VIEWS.items()}
    assert (drawn["original"] & ~drawn["original-one"]).any()
    assert not (drawn["original-one"] & ~drawn["original"]).any()
    assert (drawn["480"] != drawn["480-nearest"]).any()


@pytest.mark.parametrize("view", VIEWS.values(), ids=VIEWS)
def test_no_targets_are_an_empty_mask(view) -> None:
    mask = truth_mask([], view, frame_size=FRAME)
    assert mask.shape == view.grid_size(FRAME)
    assert not mask.any()


@pytest.mark.parametrize("view", VIEWS.values(), ids=VIEWS)
def test_an_rle_is_drawn_on_every_view(view) -> None:
    half = np.zeros(FRAME, dtype=np.uint8, order="F")
    half[:45] = 1
    rle: Segmentation = Rle(size=FRAME, counts=coco_mask.encode(half)["counts"].decode())
    mask = truth_mask([rle], view, frame_size=FRAME)
    height = view.grid_size(FRAME)[0]
    np.testing.assert_array_equal(mask.all(axis=1), np.arange(height) < height // 2)


def test_views_are_named_as_they_are_found_and_all_are_in_use() -> None:
    assert all(view.name == name for name, view in VIEWS.items())
    assert {rules.view.name for rules in RULES.values()} == set(VIEWS)
    assert all(VIEWS[rules.view.name] is rules.view for rules in RULES.values())
    assert VIEWS["original-p35"].threshold == 0.35
    assert {view.threshold for name, view in VIEWS.items() if name != "original-p35"} == {0.5}


@pytest.mark.parametrize("threshold", [0.0, 1.0, -1.0, float("nan")])
def test_a_threshold_that_is_no_probability_is_refused(threshold: float) -> None:
    with pytest.raises(ConfigError, match="between 0 and 1"):
        replace(VIEWS["original"], threshold=threshold)

"""Whether the drawn dataset tells the truth: masks against pixels, and every sentence against the image.

The oracle below knows nothing of how scenes are made. It reads the written files alone: colours from the
JPEG, centroids and areas from masks that pycocotools decodes, the claim from the words.
"""

from __future__ import annotations

import json
import math
import pickle
import re
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image
from pycocotools import mask as coco_mask

from ris_cache.datasets.shapes import KINDS, ComposedImage, ShapesSummary, compose_image, write_shapes_dataset
from ris_cache.datasets.shapes.language import Kind
from ris_cache.datasets.shapes.paint import paint

NUM_IMAGES = {"train": 60, "val": 12, "testA": 12, "testB": 12}
NAMED_COLOURS = {
    "red": (210, 40, 40),
    "green": (45, 155, 65),
    "blue": (45, 90, 215),
    "yellow": (245, 215, 45),
    "purple": (140, 60, 180),
    "orange": (245, 130, 30),
    "white": (245, 245, 245),
    "black": (25, 25, 30),
}
SHAPE_NAMES = ("circle", "square", "triangle", "star", "cross", "heart")
HORIZONTAL = {"left": -1, "leftmost": -1, "right": 1, "rightmost": 1}
VERTICAL = {"top": -1, "upper": -1, "highest": -1, "bottom": 1, "lower": 1, "lowest": 1}
SIZE = {
    "big": 1,
    "large": 1,
    "biggest": 1,
    "largest": 1,
    "small": -1,
    "little": -1,
    "smallest": -1,
    "tiny": -1,
}
HEADINGS = {"right of": 0, "below": 1, "under": 1, "left of": 2, "above": 3, "over": 3}
FILLERS = {"the", "thing", "object", "shape", "one", "that", "is"}
FILLERS |= {"on", "at", "far", "very", "side"}


@dataclass(frozen=True)
class Seen:
    """One object as the files show it; x and y as shares of width and height."""

    ann_id: int
    colour: str
    shape: str
    area: float
    x: float
    y: float


@dataclass(frozen=True)
class View:
    """One image as the files show it."""

    width: int
    height: int
    objects: tuple[Seen, ...]


def decode(segmentation: list[list[float]], height: int, width: int) -> NDArray[np.bool_]:
    parts: NDArray[np.uint8] = coco_mask.decode(coco_mask.frPyObjects(segmentation, height, width))
    whole: NDArray[np.bool_] = np.logical_or.reduce(parts, axis=2)
    return whole


def nearest_colour(pixels: NDArray[np.uint8]) -> str:
    median = np.median(pixels, axis=0)
    return min(NAMED_COLOURS, key=lambda name: math.dist(NAMED_COLOURS[name], median))


def described(words: list[str], view: View) -> list[Seen]:
    """Objects of the named colour and shape; words of place and size are for the caller."""
    known = {*NAMED_COLOURS, *SHAPE_NAMES, *FILLERS, *HORIZONTAL, *VERTICAL, *SIZE}
    assert known.issuperset(words), f"words without meaning: {set(words) - known}"
    colours = [word for word in words if word in NAMED_COLOURS] or list(NAMED_COLOURS)
    shapes = [word for word in words if word in SHAPE_NAMES] or list(SHAPE_NAMES)
    return [thing for thing in view.objects if thing.colour in colours and thing.shape in shapes]


def heading(view: View, anchor: Seen, other: Seen) -> int:
    """The quarter of the compass, clockwise from the right, in which `other` lies as seen from `anchor`."""
    angle = math.atan2((other.y - anchor.y) * view.height, (other.x - anchor.x) * view.width)
    return round(angle / (math.pi / 2)) % 4


def answers(sentence: str, view: View) -> list[Seen]:
    """Resolve a sentence by its plain meaning."""
    related = re.fullmatch(r"(.+?) (?:to the )?(left of|right of|above|over|below|under) the (.+)", sentence)
    if related:
        (anchor,) = described(related[3].split(), view)
        candidates = described(related[1].split(), view)
        wanted = HEADINGS[related[2]]
        return [thing for thing in candidates if thing != anchor and heading(view, anchor, thing) == wanted]
    words = sentence.split()
    found = described(words, view)
    across = [HORIZONTAL[word] for word in words if word in HORIZONTAL]
    down = [VERTICAL[word] for word in words if word in VERTICAL]
    sizes = [SIZE[word] for word in words if word in SIZE]
    if across:
        return [max(found, key=lambda o: o.x * across[0])]
    if down:
        return [max(found, key=lambda o: o.y * down[0])]
    if sizes:
        return [max(found, key=lambda o: o.area * sizes[0])]
    return found


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, ShapesSummary]:
    root = tmp_path_factory.mktemp("drawn")
    return root, write_shapes_dataset(root, num_images=NUM_IMAGES, seed=11)


@pytest.fixture(scope="module")
def document(written: tuple[Path, ShapesSummary]) -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads((written[0] / "refcoco" / "instances.json").read_text())
    return loaded


@pytest.fixture(scope="module")
def refs(written: tuple[Path, ShapesSummary]) -> list[dict[str, Any]]:
    loaded: list[dict[str, Any]] = pickle.loads((written[0] / "refcoco" / "refs(unc).p").read_bytes())
    return loaded


@pytest.fixture(scope="module")
def views(written: tuple[Path, ShapesSummary], document: dict[str, Any]) -> dict[int, View]:
    names = {category["id"]: category["name"] for category in document["categories"]}
    found: dict[int, View] = {}
    for image in document["images"]:
        height, width = image["height"], image["width"]
        with Image.open(written[0] / "images" / "train2014" / image["file_name"]) as picture:
            pixels = np.asarray(picture)
        objects = []
        for annotation in document["annotations"]:
            if annotation["image_id"] != image["id"]:
                continue
            mask = decode(annotation["segmentation"], height, width)
            rows, columns = np.nonzero(mask)
            objects.append(
                Seen(
                    ann_id=annotation["id"],
                    colour=nearest_colour(pixels[mask]),
                    shape=names[annotation["category_id"]],
                    area=float(mask.sum()),
                    x=float(columns.mean() + 0.5) / width,
                    y=float(rows.mean() + 0.5) / height,
                )
            )
        found[image["id"]] = View(width=width, height=height, objects=tuple(objects))
    return found


@pytest.fixture(scope="module")
def composed() -> list[ComposedImage]:
    return [compose_image(seed=11, name="refcoco", split="train", index=index) for index in range(40)]


def test_every_sentence_is_true_of_its_object_and_of_no_other(
    refs: list[dict[str, Any]], views: dict[int, View]
) -> None:
    for ref in refs:
        for sentence in ref["sentences"]:
            found = [thing.ann_id for thing in answers(sentence["sent"], views[ref["image_id"]])]
            assert found == [ref["ann_id"]], sentence["sent"]


def test_every_sentence_stays_true_when_all_objects_are_moved_a_little(
    refs: list[dict[str, Any]], views: dict[int, View]
) -> None:
    rng = np.random.default_rng(0)
    for ref in refs:
        view = views[ref["image_id"]]
        reach = 0.02 * min(view.height, view.width)
        moved = replace(
            view,
            objects=tuple(
                replace(
                    thing,
                    x=thing.x + rng.uniform(-reach, reach) / view.width,
                    y=thing.y + rng.uniform(-reach, reach) / view.height,
                )
                for thing in view.objects
            ),
        )
        for sentence in ref["sentences"]:
            found = [thing.ann_id for thing in answers(sentence["sent"], moved)]
            assert found == [ref["ann_id"]], sentence["sent"]


def test_every_kind_of_expression_occurs_about_as_often_as_intended() -> None:
    kinds = Counter(
        expression.constraints.kind
        for split, count in NUM_IMAGES.items()
        for index in range(count)
        for ref in compose_image(seed=11, name="refcoco", split=split, index=index).refs
        for expression in ref.expressions
    )
    total = sum(kinds.values())
    intended: dict[Kind, float] = {
        "colour+shape": 0.46,
        "colour": 0.36,
        "shape": 0.02,
        "size": 0.04,
        "position": 0.08,
        "relation": 0.04,
    }
    assert set(kinds) == set(KINDS)
    for kind, share in intended.items():
        assert abs(kinds[kind] / total - share) < 0.05, kind


def test_most_referents_share_their_colour_or_shape_with_another_object(
    refs: list[dict[str, Any]], views: dict[int, View]
) -> None:
    shared = 0
    for ref in refs:
        objects = views[ref["image_id"]].objects
        (target,) = (thing for thing in objects if thing.ann_id == ref["ann_id"])
        shared += any(
            thing.colour == target.colour or thing.shape == target.shape
            for thing in objects
            if thing is not target
        )
    assert shared > 0.5 * len(refs)


def test_polygons_rasterise_to_exactly_the_visible_pixels(composed: list[ComposedImage]) -> None:
    for image in composed:
        labels = image.drawing.labels
        for index, loops in enumerate(image.drawing.boundaries):
            polygons = [[float(value) for point in loop for value in point] for loop in loops]
            np.testing.assert_array_equal(decode(polygons, *labels.shape), labels == index)


def test_masks_lie_where_the_paint_is(composed: list[ComposedImage]) -> None:
    paint_outside, mask_unpainted = [], []
    for image in composed:
        painted = np.asarray(paint(image.drawing, np.random.default_rng(5))).astype(int)
        bare_drawing = replace(image.drawing, placements=())
        bare = np.asarray(paint(bare_drawing, np.random.default_rng(5))).astype(int)
        changed = abs(painted - bare).max(axis=2) > 20
        masked = image.drawing.labels >= 0
        paint_outside.append((changed & ~masked).sum() / masked.sum())
        mask_unpainted.append((masked & ~changed).sum() / masked.sum())
    # Antialiasing paints a little outside; masks shifted by two pixels would give 0.06 and 0.05.
    assert np.mean(paint_outside) < 0.025
    assert np.mean(mask_unpainted) < 0.015


def test_boxes_and_areas_equal_those_of_the_decoded_masks(
    document: dict[str, Any], views: dict[int, View]
) -> None:
    for annotation in document["annotations"]:
        view = views[annotation["image_id"]]
        mask = decode(annotation["segmentation"], view.height, view.width)
        encoded = coco_mask.encode(np.asfortranarray(mask.astype(np.uint8)))
        assert annotation["bbox"] == coco_mask.toBbox(encoded).tolist()
        assert annotation["area"] == float(coco_mask.area(encoded))


def test_objects_overlap_regularly_but_stay_mostly_visible(composed: list[ComposedImage]) -> None:
    num_overlapping = 0
    for image in composed:
        drawing = image.drawing
        shares = [
            (drawing.labels == index).sum() / (math.pi / 4 * placement.diameter**2)
            for index, placement in enumerate(drawing.placements)
        ]
        # Half-covered pixels count as covered, which rounds the area by a few per cent.
        assert min(shares) > 0.65 - 0.05
        assert max(shares) < 1.06
        num_overlapping += min(shares) < 0.93
    assert 0.3 * len(composed) < num_overlapping < len(composed)


def test_objects_are_large_enough_for_a_coarse_grid(views: dict[int, View]) -> None:
    for view in views.values():
        for thing in view.objects:
            assert thing.area / (view.height * view.width) * 64 * 64 > 8


def test_backgrounds_resemble_no_named_colour(composed: list[ComposedImage]) -> None:
    for image in composed:
        background = np.asarray(image.picture)[image.drawing.labels < 0][::7].astype(float)
        for name, colour in NAMED_COLOURS.items():
            distances = np.linalg.norm(background - np.array(colour), axis=1)
            # Antialiased edges belong to neither side.
            assert np.quantile(distances, 0.05) > 50, name

"""The rows of the annotation files: COCO's instances, and refs as each dataset writes them.

A ref row is a plain dict of lists, text and whole numbers, in the field order of the published files.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from ris_cache.datasets.shapes.compose import POOLS, SPLITS, ComposedImage
from ris_cache.datasets.shapes.mixture import Ref
from ris_cache.datasets.shapes.objects import CATEGORY_IDS
from ris_cache.datasets.shapes.trace import signed_area

MAX_IMAGES_PER_SPLIT = 999_999

_SPLIT_ORDER = (*SPLITS, "test")
_IDS_PER_SPLIT = 1_000_000
_SPLITS_PER_POOL = 4
_ANNOTATIONS_PER_IMAGE = 10

Row = dict[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """Where an image stands: its pool, the pool's split, and the position there from 0."""

    pool: str
    split: str
    index: int

    @property
    def image_id(self) -> int:
        """Unique over all pools and beyond COCO's largest id."""
        pool, split = tuple(POOLS).index(self.pool), POOLS[self.pool].index(self.split)
        return (pool * _SPLITS_PER_POOL + split + 1) * _IDS_PER_SPLIT + self.index

    @property
    def folder(self) -> str:
        """train2014, or val2014 for every third image of Ref-ZOM's own."""
        return "val2014" if self.pool == "ref-zom" and self.index % 3 == 1 else "train2014"

    @property
    def file_name(self) -> str:
        """The image's name as COCO writes it."""
        return f"COCO_{self.folder}_{self.image_id:012d}.jpg"


@dataclass(frozen=True, slots=True, kw_only=True)
class SplitCounts:
    """How much one split holds; instances count unreferred objects too.

    Attributes:
        none, one, many: number of expressions by how many objects they refer to.
    """

    images: int
    instances: int
    refs: int
    none: int
    one: int
    many: int

    @property
    def expressions(self) -> int:
        """All of them."""
        return self.none + self.one + self.many


def image_row(composed: ComposedImage, place: Place) -> Row:
    """One entry of `images` in instances.json."""
    scene = composed.drawing.scene
    return {
        "id": place.image_id,
        "file_name": place.file_name,
        "height": scene.height,
        "width": scene.width,
        "license": 1,
    }


def annotation_rows(composed: ComposedImage, place: Place) -> list[Row]:
    """The entries of `annotations` in instances.json, one per object of the scene."""
    return [
        {
            "id": _ann_id(place, index),
            "image_id": place.image_id,
            "category_id": CATEGORY_IDS[composed.drawing.scene.objects[index].shape],
            "segmentation": polygons_of(composed, index),
            "bbox": _bbox(composed, index),
            "area": sum(signed_area(loop) for loop in composed.drawing.boundaries[index]),
            "iscrowd": 0,
        }
        for index in range(len(composed.drawing.scene.objects))
    ]


def polygons_of(composed: ComposedImage, index: int) -> list[list[float]]:
    """Polygon parts of one object, each flat [x0, y0, x1, y1, …] in pixels."""
    return [
        [float(value) for point in loop for value in point] for loop in composed.drawing.boundaries[index]
    ]


def instances_document(title: str, images: list[Row], annotations: list[Row], seed: int) -> Row:
    """The whole of instances.json."""
    return {
        "info": {"description": f"Drawn shapes in the format of {title}", "version": "1", "seed": seed},
        "images": images,
        "licenses": [{"id": 1, "name": "Drawn by ris; no rights reserved", "url": ""}],
        "annotations": annotations,
        "categories": [
            {"supercategory": "shape", "id": category_id, "name": shape}
            for shape, category_id in CATEGORY_IDS.items()
        ],
    }


@dataclass(frozen=True, slots=True, kw_only=True)
class RefFacts:
    """One ref with its ids, before it takes a dataset's form.

    Attributes:
        ref_id: unique in the file.
        first_sent_id: id of its first sentence; the others follow.
    """

    ref: Ref
    composed: ComposedImage
    place: Place
    split: str
    ref_id: int
    first_sent_id: int

    @property
    def sent_ids(self) -> list[int]:
        """One id per sentence."""
        return list(range(self.first_sent_id, self.first_sent_id + len(self.ref.sentences)))

    @property
    def ann_ids(self) -> list[int]:
        """Of the objects referred to."""
        return [_ann_id(self.place, index) for index in self.ref.object_indices]

    @property
    def category_ids(self) -> list[int]:
        """Of the same objects."""
        objects = self.composed.drawing.scene.objects
        return [CATEGORY_IDS[objects[index].shape] for index in self.ref.object_indices]

    @property
    def file_name(self) -> str:
        """With an object suffix, as in the real files, and so the name of no image on disk."""
        suffix = self.ref.object_indices[0] if self.ref.object_indices else self.ref_id
        return f"{self.place.file_name.removesuffix('.jpg')}_{suffix}.jpg"

    @property
    def sentences(self) -> list[Row]:
        """The sentence rows."""
        return [
            {"tokens": each.sent.split(), "raw": each.raw, "sent_id": sent_id, "sent": each.sent}
            for each, sent_id in zip(self.ref.sentences, self.sent_ids, strict=True)
        ]


RefForm = Callable[[RefFacts], Row]
"""How a dataset writes a ref."""


def refer_row(facts: RefFacts) -> Row:
    """A ref of RefCOCO, RefCOCO+ and RefCOCOg: exactly one target."""
    (ann_id,), (category_id,) = facts.ann_ids, facts.category_ids
    return {
        "ref_id": facts.ref_id,
        "ann_id": ann_id,
        "image_id": facts.place.image_id,
        "category_id": category_id,
        "file_name": facts.file_name,
        "split": facts.split,
        "sent_ids": facts.sent_ids,
        "sentences": facts.sentences,
    }


def grefcoco_row(facts: RefFacts) -> Row:
    """A ref of gRefCOCO: lists of targets and categories, [-1] where there is none."""
    return {
        "ref_id": facts.ref_id,
        "ann_id": facts.ann_ids or [-1],
        "image_id": facts.place.image_id,
        "category_id": facts.category_ids or [-1],
        "file_name": facts.file_name,
        "split": facts.split,
        "sent_ids": facts.sent_ids,
        "sentences": facts.sentences,
        "no_target": not facts.ann_ids,
    }


def ref_zom_row(facts: RefFacts) -> Row:
    """A ref of Ref-ZOM: an id for one target, a list for many, an empty list for none; and a source."""
    single = len(facts.ann_ids) == 1
    return {
        "ref_id": facts.ref_id,
        "ann_id": facts.ann_ids[0] if single else facts.ann_ids,
        "image_id": facts.place.image_id,
        "category_id": facts.category_ids[0] if single else facts.category_ids,
        "file_name": facts.file_name,
        "split": facts.split,
        "sent_ids": facts.sent_ids,
        "sentences": facts.sentences,
        "source": "one" if single else "many" if facts.ann_ids else "zero",
    }


def num_targets(row: Row) -> int:
    """How many objects a ref row of any form refers to."""
    ann_ids = row["ann_id"] if isinstance(row["ann_id"], list) else [row["ann_id"]]
    return sum(ann_id != -1 for ann_id in ann_ids)


def count_splits(rows: Sequence[Row], annotations: Sequence[Row]) -> dict[str, SplitCounts]:
    """Count by split: train, val, testA, testB, test, as far as present."""
    instances: dict[int, int] = {}
    for annotation in annotations:
        instances[annotation["image_id"]] = instances.get(annotation["image_id"], 0) + 1
    found: dict[str, SplitCounts] = {}
    for split in sorted({row["split"] for row in rows}, key=_SPLIT_ORDER.index):
        mine = [row for row in rows if row["split"] == split]
        images = {row["image_id"] for row in mine}
        by_kind = [0, 0, 0]
        for row in mine:
            by_kind[min(num_targets(row), 2)] += len(row["sentences"])
        found[split] = SplitCounts(
            images=len(images),
            instances=sum(instances[image_id] for image_id in images),
            refs=len(mine),
            none=by_kind[0],
            one=by_kind[1],
            many=by_kind[2],
        )
    return found


def _bbox(composed: ComposedImage, index: int) -> list[float]:
    loops = composed.drawing.boundaries[index]
    columns = [x for loop in loops for x, _ in loop]
    rows = [y for loop in loops for _, y in loop]
    left, top = min(columns), min(rows)
    return [float(left), float(top), float(max(columns) - left), float(max(rows) - top)]


def _ann_id(place: Place, object_index: int) -> int:
    assert object_index < _ANNOTATIONS_PER_IMAGE
    return place.image_id * _ANNOTATIONS_PER_IMAGE + object_index

"""Read `instances.json`, the COCO annotations that come with every published dataset."""

from __future__ import annotations

from collections.abc import Set
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from ris_cache.datasets.fields import Record, described, index_records, read_json, shown
from ris_cache.datasets.records import Category, ImageRecord, InstanceRecord
from ris_cache.datasets.segmentation import parse_segmentation
from ris_cache.errors import DataError

_NAMES: Final = (
    "person, bicycle, car, motorcycle, airplane, bus, train, truck, boat, traffic light, fire "
    "hydrant, stop sign, parking meter, bench, bird, cat, dog, horse, sheep, cow, elephant, bear, "
    "zebra, giraffe, backpack, umbrella, handbag, tie, suitcase, frisbee, skis, snowboard, sports "
    "ball, kite, baseball bat, baseball glove, skateboard, surfboard, tennis racket, bottle, wine "
    "glass, cup, fork, knife, spoon, bowl, banana, apple, sandwich, orange, broccoli, carrot, hot "
    "dog, pizza, donut, cake, chair, couch, potted plant, bed, dining table, toilet, tv, laptop, "
    "mouse, remote, keyboard, cell phone, microwave, oven, toaster, sink, refrigerator, book, clock, "
    "vase, scissors, teddy bear, hair drier, toothbrush"
)
_UNUSED_IDS: Final = frozenset({12, 26, 29, 30, 45, 66, 68, 69, 71, 83})

_MAX_CATEGORY_ID: Final = 2**31 - 1
"""As the cache's tables hold it; -1 stands for none there."""
_MAX_PIXELS: Final = 100_000_000
"""More than Pillow decodes, and a mask is drawn before any image is."""

COCO_CATEGORIES: Final = tuple(
    Category(category_id=category_id, name=name)
    for category_id, name in zip(
        (i for i in range(1, 91) if i not in _UNUSED_IDS), _NAMES.split(", "), strict=True
    )
)
"""COCO's 80 object categories with their ids, 1 to 90 with gaps."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CocoInstances:
    """The referred images with every instance on them, by id and in file order."""

    images: dict[int, ImageRecord]
    instances: dict[int, InstanceRecord]
    categories: tuple[Category, ...]


def read_instances(path: Path, referred: Set[int]) -> CocoInstances:
    """Read what concerns the referred images; the rest is only checked for unique ids.

    Raises:
        DataError: the file is missing, damaged, malformed or contradicts itself; the message names the
            annotation, image or category, and the field.
    """
    content = read_json(path)
    if not isinstance(content, dict):
        raise DataError(
            f"{path} should hold a JSON object, not {described(content)}. Download it again.",
            path=path,
            found=type(content).__name__,
        )
    tables = {}
    for key, id_fact in (("images", "image_id"), ("annotations", "ann_id"), ("categories", "category_id")):
        if not isinstance(content.get(key), list):
            raise DataError(
                f"{path} lacks the list {key!r}. Download it again.",
                path=path,
                field=key,
                found=sorted(content),
            )
        tables[key] = index_records(content[key], path, "id", id_fact)
    images = {
        image_id: _image(record) for image_id, record in tables["images"].items() if image_id in referred
    }
    categories = tuple(_category(category_id, record) for category_id, record in tables["categories"].items())
    instances = {
        ann_id: _instance(record, images[image_id], tables["categories"])
        for ann_id, record in tables["annotations"].items()
        if (image_id := record.get("image_id", int)) in images
    }
    return CocoInstances(images=images, instances=instances, categories=categories)


def _category(category_id: int, record: Record) -> Category:
    if not 0 <= category_id <= _MAX_CATEGORY_ID:
        raise record.error("id", f"should be from 0 to {_MAX_CATEGORY_ID}", found=category_id)
    return Category(category_id=category_id, name=record.get("name", str))


def _image(record: Record) -> ImageRecord:
    height, width = (record.get(name, int) for name in ("height", "width"))
    if height < 1 or width < 1:
        raise record.error("height", f"and `width` should be positive, not {height} and {width}")
    if height * width > _MAX_PIXELS:
        raise record.error("height", f"times `width` is more than {_MAX_PIXELS}: {height} times {width}")
    return ImageRecord(
        image_id=record.get("id", int),
        file_name=record.get("file_name", str),
        height=height,
        width=width,
    )


def _instance(record: Record, image: ImageRecord, categories: dict[int, Record]) -> InstanceRecord:
    category_id = record.get("category_id", int)
    if category_id not in categories:
        raise record.error("category_id", f"is {category_id}, which `categories` lacks", found=category_id)
    is_crowd = record.fields.get("iscrowd", 0)
    if is_crowd not in (0, 1):
        raise record.error("iscrowd", f"should be 0 or 1, not {shown(is_crowd)}", found=is_crowd)
    try:
        segmentation = parse_segmentation(record.fields.get("segmentation"), (image.height, image.width))
    except DataError as error:
        raise record.error("segmentation", f"is malformed: {error}", **error.facts) from error
    return InstanceRecord(
        ann_id=record.get("id", int),
        image_id=image.image_id,
        category_id=category_id,
        segmentation=segmentation,
        is_crowd=bool(is_crowd),
    )

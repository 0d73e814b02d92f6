"""Write a drawn dataset in RefCOCO's own files, so that it takes every path that the real one takes.

    <root>/refcoco/refs(unc).p                                   pickled list of refs, plain values only
    <root>/refcoco/instances.json                                COCO instances: every object, referred or not
    <root>/images/train2014/COCO_train2014_<12 digits>.jpg

Image ids start beyond COCO's largest, so a root that holds the real images too loses none of them.
"""

from __future__ import annotations

import io
import json
import pickle
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ris_cache.datasets.shapes.compose import (
    KIND_WEIGHTS,
    SPLITS,
    ComposedImage,
    ReferredObject,
    compose_image,
)
from ris_cache.datasets.shapes.language import KINDS, Kind
from ris_cache.datasets.shapes.objects import CATEGORY_IDS
from ris_cache.datasets.shapes.trace import signed_area
from ris_cache.errors import ConfigError, DataError

MAX_IMAGES_PER_SPLIT = 999_999

_IDS_PER_SPLIT = 1_000_000
_ANNOTATIONS_PER_IMAGE = 10
_JPEG_QUALITY = 92
_PICKLE_PROTOCOL = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class SplitCounts:
    """How much one split holds; instances count unreferred objects too."""

    images: int
    instances: int
    refs: int
    expressions: int


@dataclass(frozen=True, slots=True, kw_only=True)
class ShapesSummary:
    """What was written.

    Attributes:
        splits: counts by split, only splits with images.
        kinds: number of expressions of each kind, over all splits.
    """

    refs_path: Path
    instances_path: Path
    images_dir: Path
    splits: dict[str, SplitCounts]
    kinds: dict[Kind, int]


def write_shapes_dataset(
    root: Path,
    *,
    name: str = "refcoco",
    num_images: Mapping[str, int],
    seed: int,
    progress: Callable[[int], None] | None = None,
) -> ShapesSummary:
    """Draw a referring dataset of coloured shapes and write it as RefCOCO's files.

    As in RefCOCO, testA and testB differ by the kind of referent: testA refers to round shapes (circle,
    heart), testB to the others; train and val to any. Every expression singles out its object with
    a margin (see `language`). The same arguments give the same bytes; the order of `num_images` is
    immaterial, and an image does not change when its split grows.

    Args:
        root: data root; directories are made as needed.
        name: "refcoco", or "refcoco+" for expressions without location words; one root can hold both.
        num_images: split → number of images; splits left out are empty.
        seed: not negative.
        progress: called after each image with the number of images written so far.

    Raises:
        ConfigError: unknown name or split, a negative number, or no image at all.
        DataError: the root holds a dataset of this name already, or is a file.
    """
    _check_arguments(name, num_images, seed)
    if root.exists() and not root.is_dir():
        raise DataError(f"{root} is a file. Name a directory for the dataset, new or existing.", path=root)
    dataset_dir, images_dir = root / name, root / "images" / "train2014"
    refs_path, instances_path = dataset_dir / "refs(unc).p", dataset_dir / "instances.json"
    for path in (refs_path, instances_path):
        if path.exists():
            raise DataError(
                f"A dataset exists already: {path} is there. Choose another directory, or remove it.",
                path=path,
            )
    dataset_dir.mkdir(parents=True, exist_ok=True)
    images_dir.mkdir(parents=True, exist_ok=True)

    tables = _Tables()
    for split in SPLITS:
        for index in range(num_images.get(split, 0)):
            composed = compose_image(seed=seed, name=name, split=split, index=index)
            image_id = _image_id(name, split, index)
            encoded = io.BytesIO()
            composed.picture.save(encoded, "JPEG", quality=_JPEG_QUALITY, subsampling=0)
            _replace(images_dir / _image_file_name(image_id), encoded.getvalue())
            tables.add(composed, split=split, image_id=image_id)
            if progress is not None:
                progress(len(tables.images))

    # Annotations go last, so that their presence means that every image is there.
    _replace(instances_path, json.dumps(tables.instances_document(seed)).encode())
    _replace(refs_path, pickle.dumps(tables.refs, protocol=_PICKLE_PROTOCOL))
    return ShapesSummary(
        refs_path=refs_path,
        instances_path=instances_path,
        images_dir=images_dir,
        splits=tables.split_counts(),
        kinds={kind: tables.kinds[kind] for kind in KINDS},
    )


class _Tables:
    """The rows of both annotation files as they grow, in file order."""

    def __init__(self) -> None:
        self.images: list[dict[str, Any]] = []
        self.annotations: list[dict[str, Any]] = []
        self.refs: list[dict[str, Any]] = []
        self.kinds: Counter[Kind] = Counter()
        self._num_sentences = 0
        self._counts: dict[str, Counter[str]] = {}

    def add(self, composed: ComposedImage, *, split: str, image_id: int) -> None:
        scene = composed.drawing.scene
        self.images.append(
            {
                "id": image_id,
                "file_name": _image_file_name(image_id),
                "height": scene.height,
                "width": scene.width,
                "license": 1,
            }
        )
        for index in range(len(scene.objects)):
            self.annotations.append(_annotation(composed, index, image_id))
        for ref in composed.refs:
            self._add_ref(ref, category=scene.objects[ref.object_index].shape, split=split, image_id=image_id)
        self._counts.setdefault(split, Counter()).update(
            images=1,
            instances=len(scene.objects),
            refs=len(composed.refs),
            expressions=sum(len(ref.expressions) for ref in composed.refs),
        )

    def _add_ref(self, ref: ReferredObject, *, category: str, split: str, image_id: int) -> None:
        sentences = [
            {
                "tokens": expression.sent.split(),
                "raw": expression.raw,
                "sent_id": self._num_sentences + offset,
                "sent": expression.sent,
            }
            for offset, expression in enumerate(ref.expressions)
        ]
        stem = _image_file_name(image_id).removesuffix(".jpg")
        self.refs.append(
            {
                "ref_id": len(self.refs),
                "ann_id": _ann_id(image_id, ref.object_index),
                "image_id": image_id,
                "category_id": CATEGORY_IDS[category],
                # The real file's names carry an object suffix too, and so name no image on disk.
                "file_name": f"{stem}_{ref.object_index}.jpg",
                "split": split,
                "sent_ids": [sentence["sent_id"] for sentence in sentences],
                "sentences": sentences,
            }
        )
        self._num_sentences += len(sentences)
        self.kinds.update(expression.constraints.kind for expression in ref.expressions)

    def split_counts(self) -> dict[str, SplitCounts]:
        return {split: SplitCounts(**counts) for split, counts in self._counts.items()}

    def instances_document(self, seed: int) -> dict[str, Any]:
        return {
            "info": {"description": "Drawn shapes in the format of RefCOCO", "version": "1", "seed": seed},
            "images": self.images,
            "licenses": [{"id": 1, "name": "Drawn by ris; no rights reserved", "url": ""}],
            "annotations": self.annotations,
            "categories": [
                {"supercategory": "shape", "id": category_id, "name": shape}
                for shape, category_id in CATEGORY_IDS.items()
            ],
        }


def _annotation(composed: ComposedImage, index: int, image_id: int) -> dict[str, Any]:
    loops = composed.drawing.boundaries[index]
    columns = [x for loop in loops for x, _ in loop]
    rows = [y for loop in loops for _, y in loop]
    left, top = min(columns), min(rows)
    return {
        "id": _ann_id(image_id, index),
        "image_id": image_id,
        "category_id": CATEGORY_IDS[composed.drawing.scene.objects[index].shape],
        "segmentation": [[float(value) for point in loop for value in point] for loop in loops],
        "bbox": [float(left), float(top), float(max(columns) - left), float(max(rows) - top)],
        "area": sum(signed_area(loop) for loop in loops),
        "iscrowd": 0,
    }


def _image_id(name: str, split: str, index: int) -> int:
    block = tuple(KIND_WEIGHTS).index(name) * len(SPLITS) + SPLITS.index(split) + 1
    return block * _IDS_PER_SPLIT + index


def _ann_id(image_id: int, object_index: int) -> int:
    assert object_index < _ANNOTATIONS_PER_IMAGE
    return image_id * _ANNOTATIONS_PER_IMAGE + object_index


def _image_file_name(image_id: int) -> str:
    return f"COCO_train2014_{image_id:012d}.jpg"


def _replace(path: Path, content: bytes) -> None:
    """Write to a temporary name, then rename, so that the name never stands for half a file."""
    partial = path.with_name(f"{path.name}.partial")
    partial.write_bytes(content)
    partial.replace(path)


def _check_arguments(name: str, num_images: Mapping[str, int], seed: int) -> None:
    if name not in KIND_WEIGHTS:
        raise ConfigError(
            f"No drawn dataset is called {name!r}. Use one of: {', '.join(KIND_WEIGHTS)}.",
            name=name,
            known=tuple(KIND_WEIGHTS),
        )
    unknown = sorted(set(num_images) - set(SPLITS))
    if unknown:
        raise ConfigError(
            f"Unknown split {unknown[0]!r} in num_images. Use any of: {', '.join(SPLITS)}.",
            split=unknown[0],
            known=SPLITS,
        )
    for split, count in num_images.items():
        if not 0 <= count <= MAX_IMAGES_PER_SPLIT:
            raise ConfigError(
                f"num_images asks for {count} images of split {split!r}. "
                f"Ask for 0 to {MAX_IMAGES_PER_SPLIT}.",
                split=split,
                count=count,
            )
    if not any(num_images.values()):
        raise ConfigError(
            f"num_images asks for no image. Give at least one of {', '.join(SPLITS)} a positive number.",
            num_images=dict(num_images),
        )
    if seed < 0:
        raise ConfigError(f"seed is {seed}. Use a number from 0 upwards.", seed=seed)

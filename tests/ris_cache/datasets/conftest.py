"""Small published datasets on disk, one of each layout, open to changes before they are loaded."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from ris_cache.datasets.load import load_dataset
from ris_cache.datasets.records import ReferringDataset

SQUARE = [10.0, 10.0, 20.0, 10.0, 20.0, 20.0, 10.0, 20.0]
TRIANGLE = [30.0, 5.0, 50.0, 5.0, 50.0, 25.0]
CROWD = {"size": [40, 60], "counts": [0, 100, 2300]}
REFS_NAMES = {
    ("grefcoco", "unc"): "grefs(unc).json",
    ("ref-zom", "final"): "Ref-ZOM(final).p",
}


@dataclass
class Published:
    """One dataset of two images and five objects.

    Objects on image 10 (40 × 60): 1 a person, 2 a dog, 3 a crowd of people, 4 a person of which nothing can
    be drawn. Object 5 is a dog on image 11, a train2014 image but for Ref-ZOM, whose is from val2014.
    """

    root: Path
    name: str
    split_by: str
    refs_name: str
    refs: Any = field(default_factory=list)
    instances: dict[str, Any] = field(default_factory=dict)
    folder: str = ""

    @property
    def directory(self) -> Path:
        return self.root / (self.folder or self.name)

    @property
    def refs_path(self) -> Path:
        return self.directory / self.refs_name

    def ref(self, ref_id: int, ann_ids: list[int], *texts: str, **changes: Any) -> dict[str, Any]:
        """A ref in the dataset's own form, on image 10; its sentences count up from 10 × ref_id."""
        made: dict[str, Any] = {
            "ref_id": ref_id,
            "image_id": 10,
            "file_name": f"COCO_train2014_000000000010_{ref_id}.jpg",
            "split": "train",
            "sent_ids": [10 * ref_id + i for i in range(len(texts))],
            "sentences": [
                {"sent_id": 10 * ref_id + i, "raw": text, "sent": text.lower(), "tokens": text.split()}
                for i, text in enumerate(texts)
            ],
        }
        category_ids = [{1: 1, 2: 18, 3: 1, 4: 1, 5: 18}.get(ann_id, 1) for ann_id in ann_ids]
        if self.name == "grefcoco":
            made |= {
                "ann_id": ann_ids or [-1],
                "category_id": category_ids or [-1],
                "no_target": not ann_ids,
            }
        elif self.name == "ref-zom" and len(ann_ids) != 1:
            source = "many" if ann_ids else "zero"
            made |= {"ann_id": ann_ids, "category_id": category_ids, "source": source}
        else:
            made |= {"ann_id": ann_ids[0], "category_id": category_ids[0]}
            if self.name == "ref-zom":
                made["source"] = "one"
        return made | changes

    def write(self) -> None:
        self.directory.mkdir(parents=True, exist_ok=True)
        as_json = self.refs_name.endswith(".json")
        self.refs_path.write_bytes(json.dumps(self.refs).encode() if as_json else pickle.dumps(self.refs, 2))
        (self.directory / "instances.json").write_text(json.dumps(self.instances))

    def load(self, **options: Any) -> ReferringDataset:
        self.write()
        return self.load_as_is(**options)

    def load_as_is(self, **options: Any) -> ReferringDataset:
        return load_dataset(self.root, self.name, self.split_by, **options)


@pytest.fixture
def published(tmp_path: Path) -> Callable[[str], Published]:
    """Make the files of a dataset by its name; gRefCOCO and Ref-ZOM also refer to nothing and to several."""

    def make(text: str) -> Published:
        name, _, split_by = text.partition("/")
        split_by = split_by or {"refcocog": "umd", "ref-zom": "final"}.get(name, "unc")
        refs_name = REFS_NAMES.get((name, split_by), f"refs({split_by}).p")
        made = Published(root=tmp_path, name=name, split_by=split_by, refs_name=refs_name)
        made.refs = [
            made.ref(1, [1], "THE MAN", "man w dog"),
            made.ref(2, [2], "dog"),
            made.ref(3, [5], "left dog", image_id=11, split="test" if name == "ref-zom" else "testA"),
        ]
        if name in ("grefcoco", "ref-zom"):
            made.refs += [made.ref(4, [], "the cat"), made.ref(5, [2, 1], "both", "man and dog")]
        coco_part = "val" if name == "ref-zom" else "train"
        made.instances = {
            "images": [
                {"id": 10, "file_name": "COCO_train2014_000000000010.jpg", "height": 40, "width": 60},
                {"id": 11, "file_name": f"COCO_{coco_part}2014_000000000011.jpg", "height": 30, "width": 30},
            ],
            "annotations": [
                {"id": 1, "image_id": 10, "category_id": 1, "segmentation": [SQUARE], "iscrowd": 0},
                {"id": 2, "image_id": 10, "category_id": 18, "segmentation": [TRIANGLE], "iscrowd": 0},
                {"id": 3, "image_id": 10, "category_id": 1, "segmentation": CROWD, "iscrowd": 1},
                {"id": 4, "image_id": 10, "category_id": 1, "segmentation": [[1.0, 1.0]], "iscrowd": 0},
                {"id": 5, "image_id": 11, "category_id": 18, "segmentation": [SQUARE], "iscrowd": 0},
            ],
            "categories": [{"id": 1, "name": "person"}, {"id": 18, "name": "dog"}],
        }
        return made

    return make

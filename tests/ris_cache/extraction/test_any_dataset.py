"""Datasets whose expressions lack a target or a category extract like any, and are mended like any."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from ris_cache.datasets import parse_selections
from ris_cache.datasets.load import load_dataset
from ris_cache.encoders.frozen import FrozenEncoders
from ris_cache.errors import DataError
from ris_cache.extraction.repair import repair
from ris_cache.extraction.run import Layout, extract
from ris_cache.store.cache import FeatureCache
from ris_cache.store.tables import NO_CATEGORY
from ris_cache.store.verify import verify

SQUARE = [1.0, 1.0, 20.0, 1.0, 20.0, 20.0]


def picture(path: Path, seed: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (30, 40, 3), np.uint8)
    Image.fromarray(pixels).save(path)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A data root with gRefCOCO on two images, of which one has no object, and three custom datasets."""
    root = tmp_path / "data"
    names = [f"COCO_train2014_{i:012d}.jpg" for i in (1, 2)]
    for seed, name in enumerate(names):
        picture(root / "images/train2014" / name, seed)
    refs = [
        {
            "ref_id": ref_id,
            "image_id": image_id,
            "ann_id": ann_ids,
            "category_id": [1] * len(ann_ids) if ann_ids != [-1] else [-1],
            "no_target": ann_ids == [-1],
            "split": "val",
            "sent_ids": [ref_id],
            "sentences": [{"sent_id": ref_id, "raw": text, "sent": text, "tokens": []}],
        }
        for ref_id, image_id, ann_ids, text in (
            (1, 1, [7, 8], "both"),
            (2, 1, [-1], "a cat"),
            (3, 2, [-1], "the one that is not there"),
        )
    ]
    instances = {
        "images": [
            {"id": i, "file_name": name, "height": 30, "width": 40} for i, name in enumerate(names, start=1)
        ],
        "annotations": [
            {"id": i, "image_id": 1, "category_id": 1, "segmentation": [SQUARE], "iscrowd": 0} for i in (7, 8)
        ],
        "categories": [{"id": 1, "name": "person"}, {"id": 18, "name": "dog"}],
    }
    (root / "grefcoco").mkdir()
    (root / "grefcoco/grefs(unc).json").write_text(json.dumps(refs))
    (root / "grefcoco/instances.json").write_text(json.dumps(instances))
    for number in range(3):
        picture(root / f"custom/pictures/{number}.png", 10 + number)
    line = {"image": "pictures/0.png", "expression": "a Bird", "split": "dawn"}
    write = {
        "named": [line | {"polygons": [SQUARE], "category": "wren"}, line | {"polygons": [SQUARE]}, line],
        "unnamed": [line | {"image": f"pictures/{i}.png", "polygons": [SQUARE]} for i in range(3)],
        "empty": [line, line | {"split": "dusk", "expression": " ", "image": "pictures/1.png"}],
    }
    for name, lines in write.items():
        (root / f"custom/{name}.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return root


@pytest.fixture
def extracted(root: Path, encoders: FrozenEncoders) -> Callable[..., Path]:
    def extracted(split: str, **options: Any) -> Path:
        cache_root = root.parent / "feats"
        extract(
            parse_selections(split),
            data_root=root,
            cache_root=cache_root,
            encoders=encoders,
            batch_size=2,
            layout=Layout(shard_rows=2),
            **options,
        )
        return cache_root

    return extracted


@pytest.mark.parametrize(
    ("dataset", "split_by"),
    [("grefcoco", "unc"), ("custom", "named"), ("custom", "unnamed"), ("custom", "empty")],
)
def test_a_cache_holds_what_was_loaded_and_a_predicted_category_of_every_expression(
    dataset: str, split_by: str, root: Path, extracted: Callable[..., Path]
) -> None:
    cache_root = extracted(f"{dataset}/{split_by}", strict=True)
    loaded = load_dataset(root, dataset, split_by)
    cache = FeatureCache.open(cache_root)
    found = cache.expressions(f"{dataset}.{split_by}")
    kept = ("split", "sent_id", "ann_ids", "category_ids", "is_no_target", "target_kind", "is_degenerate")
    assert [[getattr(e, name) for name in kept] for e in found] == [
        [getattr(e, name) for name in kept] for e in loaded.expressions
    ]
    categories = cache.categories(f"{dataset}.{split_by}")
    assert {e.clip_category_id for e in found} <= set(categories.ids)
    assert all(e.category_id == (e.category_ids[0] if e.category_ids else NO_CATEGORY) for e in found)
    assert cache.instances(f"{dataset}.{split_by}") == loaded.instances
    assert verify(cache_root).is_sound


def test_coco_and_custom_images_share_a_cache_that_can_grow_and_be_mended(
    root: Path, extracted: Callable[..., Path], encoders: FrozenEncoders
) -> None:
    extracted("grefcoco")
    cache_root = extracted("custom/unnamed")
    assert len(FeatureCache.open(cache_root)) == 5
    manifest = FeatureCache.open(cache_root).manifest
    before = {cache_root / file: (cache_root / file).read_bytes() for file in manifest.files}
    lost = [path for path in before if path != cache_root / manifest.images.file]
    for path in lost:
        path.unlink()

    report = repair(
        cache_root,
        verify(cache_root).findings,
        data_root=root,
        load_encoders=lambda: encoders,
        batch_size=2,
    )

    assert (report.failures, report.not_rebuilt) == ({}, {})
    assert verify(cache_root).is_sound
    assert {path: path.read_bytes() for path in lost} == {path: before[path] for path in lost}


def test_a_custom_image_that_is_missing_is_named_before_anything_is_computed(
    root: Path, extracted: Callable[..., Path]
) -> None:
    (root / "custom/pictures/1.png").unlink()
    with pytest.raises(DataError, match=r"1 of 3 images are missing, for example custom/pictures/1\.png"):
        extracted("custom/unnamed")
    assert not (root.parent / "feats").exists()

"""A cache with the tables of a whole dataset, over few features: what starting up has to read.

Images, expressions and instances are as many as one asks for, with texts and polygons of the usual length.
Their features are those of a small cache, one shard of them, linked for every further shard.
"""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ris_cache import FeatureCache
from ris_cache.datasets.records import ExpressionRecord, InstanceRecord
from ris_cache.store.backends import make_backend
from ris_cache.store.draft import CacheDraft, Recipe
from ris_cache.store.manifest import FileEntry
from ris_cache.store.rows import row_checksums
from ris_cache.store.tables import CachedImage

EXPRESSIONS_PER_IMAGE = 7
"""As RefCOCO: 142,210 on 19,994 images."""
EXPRESSIONS_PER_INSTANCE = 3
"""As RefCOCO: on 50,000 objects."""
VAL_SHARE = 13
"""One image in so many is for validation."""
_POLYGON_POINTS = 30
_SHARD_ROWS = 64
_FRAME = (480, 640)
_WORDS = (
    "man",
    "woman",
    "left",
    "right",
    "red",
    "blue",
    "standing",
    "behind",
    "small",
    "table",
    "near",
    "of",
)


def write_large_cache(source: FeatureCache, root: Path, *, num_expressions: int, table_name: str) -> None:
    """Write the cache.

    Args:
        source: gives features, category set, SAM's heads and everything that a fingerprint names.
        root: where the new cache goes; linked files need one file system.
        num_expressions: of splits `train` and `val` together.
        table_name: `dataset.split_by` of the one dataset.
    """
    root.mkdir(parents=True)
    draft = CacheDraft.begin(root, replace(Recipe.of(source.manifest), shard_rows=_SHARD_ROWS))
    num_images = -(-num_expressions // EXPRESSIONS_PER_IMAGE)
    _add_images(draft, source, root, num_images)
    first_entry = next(iter(source.manifest.datasets.values()))
    categories = source.categories(first_entry.category_set)
    instances = _instances(num_expressions // EXPRESSIONS_PER_INSTANCE + 1, num_images, categories.ids)
    expressions = _expressions(num_expressions, instances)
    draft.write_categories(first_entry.category_set, categories)
    draft.write_sam_heads(source.sam_heads())
    draft.write_tables(
        table_name,
        expressions,
        instances,
        clip_category_ids=[expression.category_ids[0] for expression in expressions],
        category_set=first_entry.category_set,
    )
    draft.commit()


def _add_images(draft: CacheDraft, source: FeatureCache, root: Path, num_images: int) -> None:
    recipe = replace(Recipe.of(source.manifest), shard_rows=_SHARD_ROWS)
    backend = make_backend(recipe.backend, root, recipe.arrays, _SHARD_ROWS)
    known = source.image_ids
    stored = source.read(known[np.arange(_SHARD_ROWS) % len(known)].tolist()).stored
    checksums = row_checksums([stored[array.name] for array in recipe.arrays])
    digests = list(backend.write_shard(0, np.arange(_SHARD_ROWS), stored).items())
    for shard in range(-(-num_images // _SHARD_ROWS)):
        entries = {}
        for path, (first_path, digest) in zip(backend.shard_files(shard), digests, strict=True):
            entries[path] = FileEntry.of(digest)
            if shard > 0:
                (root / path).parent.mkdir(parents=True, exist_ok=True)
                os.link(root / first_path, root / path)
        first_row = shard * _SHARD_ROWS
        draft.add_shard(
            shard,
            entries,
            [_image(row, checksums) for row in range(first_row, min(first_row + _SHARD_ROWS, num_images))],
        )


def _image(row: int, checksums: list[tuple[int, ...]]) -> CachedImage:
    return CachedImage(
        image_id=row,
        namespace="coco",
        row=row,
        file_name=f"COCO_train2014_{row:012}.jpg",
        height=_FRAME[0],
        width=_FRAME[1],
        sha256=f"{row:064x}",
        reason=None,
        crc32c=checksums[row % _SHARD_ROWS],
    )


def _instances(number: int, num_images: int, category_ids: tuple[int, ...]) -> list[InstanceRecord]:
    generator = np.random.default_rng(0)
    angles = np.arange(_POLYGON_POINTS) * (2 * np.pi / _POLYGON_POINTS)
    circle = np.stack([np.cos(angles), np.sin(angles)], axis=1)
    centres = generator.uniform(120, 360, (number, 1, 2))
    radii = generator.uniform(20, 100, (number, _POLYGON_POINTS, 1))
    outlines: npt.NDArray[Any] = (centres + radii * circle).round(2).reshape(number, -1)
    return [
        InstanceRecord(
            ann_id=index,
            image_id=index * num_images // number,
            category_id=category_ids[index % len(category_ids)],
            segmentation=(tuple(outlines[index].tolist()),),
            is_crowd=False,
        )
        for index in range(number)
    ]


def _expressions(number: int, instances: list[InstanceRecord]) -> list[ExpressionRecord]:
    generator = np.random.default_rng(1)
    words = generator.integers(0, len(_WORDS), (number, 4)).tolist()
    expressions = []
    for index in range(number):
        instance = instances[index // EXPRESSIONS_PER_INSTANCE]
        text = " ".join(_WORDS[word] for word in words[index])
        expressions.append(
            ExpressionRecord(
                split="train" if instance.image_id % VAL_SHARE else "val",
                ref_id=instance.ann_id,
                sent_id=index,
                sent_index=index % EXPRESSIONS_PER_INSTANCE,
                image_id=instance.image_id,
                raw=text.capitalize(),
                sent=text,
                ann_ids=(instance.ann_id,),
                category_ids=(instance.category_id,),
                is_degenerate=False,
            )
        )
    return expressions

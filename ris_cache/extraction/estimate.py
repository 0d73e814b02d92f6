"""What an extraction would do and how long it would take, without writing anything."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ris_cache.datasets import Selection
from ris_cache.encoders.frozen import FrozenEncoders
from ris_cache.extraction.pipeline import BufferPool, Pipeline
from ris_cache.extraction.run import Layout, default_workers, make_recipe
from ris_cache.extraction.sources import Sources, load_sources
from ris_cache.store.draft import Recipe
from ris_cache.store.journal import Journal, Plan, PlannedImage
from ris_cache.store.manifest import Manifest
from ris_cache.store.opening import require_files
from ris_cache.store.planning import is_carried_out, load_base, require_same_making
from ris_cache.store.refusals import free_bytes
from ris_cache.store.tables import IMAGES, CachedImage, read_images, read_table


@dataclass(frozen=True, slots=True, kw_only=True)
class Estimate:
    """What an extraction would do.

    Attributes:
        num_images: to compute.
        num_present: that need no computing, also those of shards that an interrupted extraction committed.
        num_missing: of those to compute, without an image file; they would be quarantined.
        num_expressions: whose predicted category is to be computed.
        num_categories: whose embedding is to be computed.
        images_per_second: measured on the first images; 0 if there is nothing to do.
        seconds: `num_images` at this speed.
    """

    num_images: int
    num_present: int
    num_missing: int
    num_shards: int
    num_bytes: int
    free_bytes: int
    num_expressions: int
    num_categories: int
    backend: str
    dtype: str
    batch_size: int
    images_per_second: float
    seconds: float

    def as_dict(self) -> dict[str, Any]:
        """Return the values by name."""
        return asdict(self)


def estimate(
    selections: Sequence[Selection],
    *,
    data_root: Path,
    cache_root: Path,
    encoders: FrozenEncoders,
    batch_size: int,
    layout: Layout,
    limit: int | None = None,
    workers: int | None = None,
) -> Estimate:
    """Plan an extraction and time one batch of it.

    Args:
        selections, data_root, cache_root, encoders, batch_size, layout, limit, workers: as for `extract`.

    Raises:
        DataError, FingerprintMismatchError, CacheError: as `extract` would.
    """
    sources = load_sources(selections, data_root, limit=limit)
    recipe = make_recipe(encoders, cache_root, layout)
    manifest, plan = load_base(cache_root), Journal(cache_root).read_plan()
    require_same_making(cache_root, recipe, manifest, plan)
    if manifest is not None:
        require_files(cache_root, manifest)
    known = _known_images(cache_root, manifest, plan)
    wanted = [image.image_id for image in sources.needing_features(known, cache_root)]
    new_texts, new_categories = _new_texts(sources, manifest)
    speed = _measure(sources, wanted, recipe, encoders, batch_size, workers or default_workers())
    return Estimate(
        num_images=len(wanted),
        num_present=len(sources.images) - len(wanted),
        num_missing=sum(sources.paths[image_id] is None for image_id in wanted),
        num_shards=-(-len(wanted) // recipe.shard_rows),
        num_bytes=len(wanted) * recipe.image_bytes,
        free_bytes=free_bytes(cache_root),
        num_expressions=new_texts,
        num_categories=new_categories,
        backend=recipe.backend,
        dtype=recipe.dtype,
        batch_size=batch_size,
        images_per_second=speed,
        seconds=len(wanted) / speed if speed else 0.0,
    )


def _known_images(cache_root: Path, manifest: Manifest | None, plan: Plan | None) -> dict[int, CachedImage]:
    known: dict[int, CachedImage] = {}
    if manifest is not None:
        table = read_table(cache_root / manifest.images.file, IMAGES)
        known = {image.image_id: image for image in read_images(table)}
    if plan is not None and not is_carried_out(plan, cache_root, manifest):
        shards = plan.shards()
        for record in Journal(cache_root).records(sorted(shards)):
            recorded = {image.image_id: image for image in record.images}
            for image in shards[record.shard]:
                found = recorded[image.image_id]
                known[image.image_id] = CachedImage(
                    **image.model_dump(), sha256=found.sha256, reason=found.reason, crc32c=found.crc32c
                )
    return known


def _new_texts(sources: Sources, manifest: Manifest | None) -> tuple[int, int]:
    """Count expressions and categories that are not in the cache's tables."""
    num_texts = num_categories = 0
    for part in sources.parts:
        entry = manifest.datasets.get(part.table_name) if manifest else None
        sizes: dict[str, int] = {}
        for expression in part.expressions:
            sizes[expression.split] = sizes.get(expression.split, 0) + 1
        for split, size in sizes.items():
            known = entry.splits[split].expressions if entry and split in entry.splits else 0
            num_texts += size if known < size else 0
        if manifest is None or part.table_name not in manifest.category_sets:
            num_categories += len(part.dataset.categories)
    return num_texts, num_categories


@dataclass(frozen=True, slots=True)
class _Trial:
    images: Sequence[PlannedImage]


def _measure(
    sources: Sources,
    wanted: Sequence[int],
    recipe: Recipe,
    encoders: FrozenEncoders,
    batch_size: int,
    workers: int,
) -> float:
    """Return images per second, decoding included, of a second batch; the first one warms up."""
    readable = [image_id for image_id in wanted if sources.paths[image_id] is not None][:batch_size]
    if not readable:
        return 0.0
    trial = _Trial([_planned(sources.images, image_id) for image_id in readable])
    pipeline = Pipeline(
        encoders=encoders,
        paths=sources.paths,
        dtype=recipe.dtype,
        batch_size=batch_size,
        workers=workers,
        strict=False,
    )
    pool = BufferPool(recipe.arrays, len(readable), 1)
    seconds = 0.0
    for _ in range(2):
        start = time.perf_counter()
        for shard in pipeline.compute([trial], pool):
            pool.give_back(shard.buffers)
        seconds = time.perf_counter() - start
    return len(readable) / seconds


def _planned(images: Mapping[int, Any], image_id: int) -> PlannedImage:
    record = images[image_id]
    return PlannedImage(
        image_id=image_id,
        namespace="coco",
        row=0,
        file_name=record.file_name,
        height=record.height,
        width=record.width,
    )

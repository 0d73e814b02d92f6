"""Copying images of caches into shards of another: what converting, merging and collecting share.

Features travel as they are stored wherever both sides have the same precision; otherwise they are decoded to
float32 and encoded anew. The target grows through a `CacheWriter`, so a copy that is killed goes on with the
shards that are not committed, and several processes share them.

Memory: one shard of the target and, where precisions differ, a few images in float32.
"""

from __future__ import annotations

import contextlib
import itertools
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ris_cache.errors import NonFiniteError, StoppedError
from ris_cache.progress import Progress, Silent
from ris_cache.store.batch import FeatureBatch
from ris_cache.store.cache import FeatureCache
from ris_cache.store.draft import CacheDraft, Recipe
from ris_cache.store.files import SAM_HEADS_NAME
from ris_cache.store.manifest import Manifest
from ris_cache.store.planning import NewImage
from ris_cache.store.precision import encode
from ris_cache.store.refusals import explained, require_space
from ris_cache.store.tables import CachedImage
from ris_cache.store.writer import CacheWriter, Outcome, ShardClaim

_ENCODED_AT_ONCE = 16
_POLL_SECONDS = 0.25


@dataclass(frozen=True, slots=True, kw_only=True)
class Origin:
    """Where an image is copied from."""

    cache: FeatureCache
    image: CachedImage


def origins(caches: Iterable[FeatureCache]) -> dict[int, Origin]:
    """Return the origin of every image by image_id: the first cache with its features, or that knows it."""
    found: dict[int, Origin] = {}
    for cache in caches:
        for image_id, image in cache.images.items():
            known = found.get(image_id)
            if known is None or (known.image.is_quarantined and not image.is_quarantined):
                found[image_id] = Origin(cache=cache, image=image)
    return found


def as_new(image: CachedImage, *, row: int | None = None) -> NewImage:
    """Return the request for an image's place in another cache, or in the same one anew.

    Args:
        row: the row it must get; None leaves it to the plan.
    """
    return NewImage(
        image_id=image.image_id,
        file_name=image.file_name,
        height=image.height,
        width=image.width,
        namespace=image.namespace,
        row=row,
    )


def transfer(
    root: Path,
    recipe: Recipe,
    *,
    purpose: str,
    request: Mapping[str, Any],
    choose: Callable[[Mapping[int, CachedImage]], Sequence[NewImage]],
    origin_of: Callable[[int], Origin],
    edit: Callable[[CacheDraft], None],
    progress: Progress | None = None,
    should_stop: Callable[[], bool] = lambda: False,
) -> tuple[int, Manifest]:
    """Copy images into a cache, alone or together with other processes, and put its next manifest in place.

    Args:
        root: of the cache that grows, or comes into being.
        recipe, purpose, request, choose: as for `CacheWriter.open`.
        origin_of: of a planned image, by image_id; not asked before `choose` was.
        edit: as for `CacheWriter.finish`.
        progress: who watches.
        should_stop: looked at after each shard.

    Returns:
        How many images this process copied, and the manifest.

    Raises:
        NonFiniteError: a value that the precision of the target cannot hold.
        CorruptShardError: damage in an origin.
        CacheError, DiskFullError: too little space; what was committed stays.
        StoppedError: `should_stop` said so; the shard at hand was committed.
    """
    watcher = progress or Silent()
    writer = CacheWriter.open(
        root,
        recipe,
        purpose=purpose,
        request=request,
        choose=choose,
        on_wait=watcher.say,
        should_stop=should_stop,
    )
    with contextlib.closing(writer), explained(root):
        num_copied = _copy_shards(writer, root, recipe, origin_of, watcher, should_stop)
        return num_copied, writer.finish(edit)


def copy_annotations(draft: CacheDraft, cache: FeatureCache) -> None:
    """Add category sets, tables and SAM's heads of a cache to a draft; what the draft has is kept.

    Raises:
        DataError: the draft has other content by the same names.
        CacheMissError: an expression's image is not in the draft.
        CorruptShardError: damage in the cache.
    """
    for name in cache.manifest.category_sets:
        draft.write_categories(name, cache.categories(name))
    for name, entry in cache.manifest.datasets.items():
        expressions = cache.expressions(name)
        draft.write_tables(
            name,
            expressions,
            cache.instances(name).values(),
            clip_category_ids=[expression.clip_category_id for expression in expressions],
            category_set=entry.category_set,
            incomplete_splits=frozenset(
                split for split, counts in entry.splits.items() if not counts.is_complete
            ),
        )
    if SAM_HEADS_NAME in cache.manifest.files:
        draft.write_sam_heads(cache.sam_heads())


def _copy_shards(
    writer: CacheWriter,
    root: Path,
    recipe: Recipe,
    origin_of: Callable[[int], Origin],
    progress: Progress,
    should_stop: Callable[[], bool],
) -> int:
    """Copy until every shard is committed, by whichever process; returns how many images this one copied."""
    total = sum(len(images) for images in writer.shards.values())
    num_left = total - writer.num_committed
    require_space(root, num_left, num_left * recipe.image_bytes)
    largest = max(map(len, writer.shards.values()), default=0)
    buffers = FeatureBatch.allocate(recipe.arrays, largest, dtype=recipe.dtype, pinned=False)
    num_copied = 0
    progress.start(total=total, done=writer.num_committed)
    try:
        while not writer.is_done():
            for claim in writer.free_claims(should_stop):
                try:
                    _copy_shard(claim, origin_of, buffers)
                finally:
                    claim.release()
                num_copied += len(claim.images)
                for _ in claim.images:
                    progress.advance(None)
            if writer.is_done():
                break
            if should_stop():
                done = writer.num_committed
                raise StoppedError(
                    f"Stopped after a whole shard; {done} of {total} images are done. The same command goes "
                    "on from there.",
                    done=done,
                    total=total,
                )
            time.sleep(_POLL_SECONDS)  # the rest is in other processes' hands
    finally:
        progress.stop()
    return num_copied


def _copy_shard(claim: ShardClaim, origin_of: Callable[[int], Origin], buffers: FeatureBatch) -> None:
    found = [origin_of(image.image_id) for image in claim.images]
    num_rows = 0
    with_features = [origin for origin in found if not origin.image.is_quarantined]
    for _, neighbours in itertools.groupby(with_features, key=lambda origin: id(origin.cache)):
        run = list(neighbours)
        _read(run[0].cache, [origin.image for origin in run], buffers.rows(num_rows, num_rows + len(run)))
        num_rows += len(run)
    claim.commit(
        buffers.rows(0, num_rows).stored,
        [Outcome(sha256=origin.image.sha256, reason=origin.image.reason) for origin in found],
    )


def _read(cache: FeatureCache, images: Sequence[CachedImage], out: FeatureBatch) -> None:
    """Read images in the precision of `out`, which has as many rows."""
    if cache.manifest.dtype == out.dtype:
        cache.read([image.image_id for image in images], out=out)
        return
    import torch

    for start in range(0, len(images), _ENCODED_AT_ONCE):
        block = images[start : start + _ENCODED_AT_ONCE]
        features = cache.read([image.image_id for image in block]).decoded()
        encoded = encode(out.dtype, {name: torch.from_numpy(array) for name, array in features.items()})
        for position, problem in encoded.problems.items():
            image = block[position]
            raise NonFiniteError(
                f"Image {image.image_id} ({image.file_name}) of {cache.root} cannot be stored as "
                f"{out.dtype}: {problem}.",
                image_id=image.image_id,
                path=cache.root,
                dtype=out.dtype,
                reason=problem,
            )
        for name, tensor in encoded.arrays.items():
            out.stored[name][start : start + len(block)] = tensor.numpy()

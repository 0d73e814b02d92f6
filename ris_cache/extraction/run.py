"""One extraction from start to end."""

from __future__ import annotations

import contextlib
import logging
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch

from ris_cache.datasets import Selection
from ris_cache.encoders.batch_size import find_batch_size
from ris_cache.encoders.frozen import FrozenEncoders
from ris_cache.errors import DataError, StoppedError
from ris_cache.extraction.annotations import write_annotations
from ris_cache.extraction.pipeline import BufferPool, ComputedShard, Pipeline
from ris_cache.extraction.sources import Sources, load_sources
from ris_cache.progress import Progress, Silent
from ris_cache.store.draft import SHARD_ROWS, CacheDraft, Recipe
from ris_cache.store.fingerprint import cache_fingerprint
from ris_cache.store.journal import Journal
from ris_cache.store.manifest import Manifest
from ris_cache.store.planning import NewImage, load_base
from ris_cache.store.precision import DEFAULT_DTYPE
from ris_cache.store.refusals import explained, require_space
from ris_cache.store.tables import CachedImage
from ris_cache.store.writer import CacheWriter, ShardClaim

logger = logging.getLogger(__name__)

_POLL_SECONDS = 0.25


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """How features are to be stored; None takes what the cache has, or the default where there is none."""

    backend: str | None = None
    dtype: str | None = None
    shard_rows: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class ExtractionReport:
    """What one process did in an extraction.

    Attributes:
        manifest: of the finished cache.
        added: images whose features this process computed.
        present: images that were there before, or that other processes computed.
        quarantined: reason by image_id, of the images asked for that have no features.
        warnings: what was odd in the datasets.
    """

    manifest: Manifest
    added: int
    present: int
    quarantined: dict[int, str]
    warnings: tuple[str, ...]


def extract(
    selections: Sequence[Selection],
    *,
    data_root: Path,
    cache_root: Path,
    encoders: FrozenEncoders,
    batch_size: int | None = None,
    layout: Layout | None = None,
    strict: bool = False,
    workers: int | None = None,
    limit: int | None = None,
    progress: Progress | None = None,
    should_stop: Callable[[], bool] = lambda: False,
) -> ExtractionReport:
    """Bring a cache to hold the features and tables of the selected expressions.

    Images that the cache has are not computed again, but for quarantined ones whose file has changed. An
    extraction that was cut off goes on with the shards that are not committed. Several processes may do this
    at once: they share the shards.

    Args:
        selections: what to extract.
        data_root: holds `<dataset>/refs(<split_by>).p`, `<dataset>/instances.json` and the images.
        cache_root: new, empty, or a cache made by the same encoders.
        encoders: loaded.
        batch_size: images per forward pass; by default that of the extraction under way or cut off, or what
            fits the device. Features of another batch size may differ in their last bits.
        layout: how to store features.
        strict: whether an image that cannot be read or stored is an error; otherwise it is quarantined and
            reported.
        workers: decoding threads; by default one per processor, at most 8.
        limit: extract the first so many images only.
        progress: who watches.
        should_stop: looked at after each shard.

    Raises:
        DataError: annotations that are missing or contradict each other; an image whose size is not the
            annotated one, since the masks would not fit it.
        FingerprintMismatchError: the cache was made by other encoders, or in another precision.
        CacheError: too little space on the disk, or a cache in another layout than asked for.
        StoppedError: `should_stop` said so; the shard at hand was committed.
    """
    watcher = progress or Silent()
    sources = load_sources(selections, data_root, limit=limit)
    with explained(cache_root):
        recipe = make_recipe(encoders, cache_root, layout or Layout())

    def choose(known: Mapping[int, CachedImage]) -> list[NewImage]:
        if strict:
            sources.require_readable(known)
        return sources.needing_features(known, cache_root)

    own_batch_size = batch_size or find_batch_size(encoders)
    with explained(cache_root):
        writer = CacheWriter.open(
            cache_root,
            recipe,
            purpose="extract",
            request=_request(selections, limit),
            choose=choose,
            agreed={"batch_size": own_batch_size},
            on_wait=watcher.say,
            should_stop=should_stop,
        )
    agreed_size = writer.agreed.get("batch_size", own_batch_size)
    if batch_size is not None and batch_size != agreed_size:
        watcher.say(
            f"This extraction began with batches of {agreed_size}; with {batch_size}, features may differ in "
            "their last bits from an uninterrupted one's."
        )
    pipeline = Pipeline(
        encoders=encoders,
        paths=sources.paths,
        dtype=recipe.dtype,
        batch_size=batch_size or agreed_size,
        workers=workers or default_workers(),
        strict=strict,
        on_image=watcher.advance,
        should_stop=should_stop,
    )

    def edit(draft: CacheDraft) -> None:
        for part in sources.parts:
            write_annotations(draft, part, encoders, should_stop)
        draft.write_sam_heads({name: tensor.numpy() for name, tensor in encoders.sam_heads().items()})

    with contextlib.closing(writer), explained(cache_root):
        num_left = sum(len(images) for images in writer.shards.values()) - writer.num_committed
        require_space(cache_root, num_left, num_left * recipe.image_bytes)
        added = compute_features(writer, pipeline, recipe, watcher, should_stop)
        manifest = writer.finish(edit)
    report = _report(manifest, sources, cache_root, added)
    if strict and report.quarantined:  # by a run without it, of which this one went on
        raise DataError(
            f"{len(report.quarantined)} images were quarantined before --strict was asked for, for example: "
            f"{next(iter(report.quarantined.values()))} Repair the files and run the command again, or leave "
            "out --strict.",
            quarantined=report.quarantined,
        )
    return report


def default_workers() -> int:
    """Return how many threads decode: one per processor, at most 8."""
    return min(8, os.cpu_count() or 1)


def make_recipe(encoders: FrozenEncoders, cache_root: Path, layout: Layout) -> Recipe:
    """Return the recipe of a cache, in the layout that it has already where `layout` leaves it open."""
    found = load_base(cache_root) or Journal(cache_root).read_plan()
    dtype = layout.dtype or (found.dtype if found else DEFAULT_DTYPE)
    weights = {role: record.as_dict() for role, record in encoders.weights.items()}
    return Recipe(
        fingerprint=cache_fingerprint(encoders.spec, weights, arithmetic=encoders.arithmetic, dtype=dtype),
        preset=encoders.spec.preset,
        weights={role: record.label for role, record in encoders.weights.items()},
        shapes=encoders.spec.feature_shapes(),
        dtype=dtype,
        backend=layout.backend or (found.backend if found else "zarr"),
        shard_rows=layout.shard_rows or (found.shard_rows if found else SHARD_ROWS),
        libraries={"torch": torch.__version__} | ({"torch.compile": "yes"} if encoders.compiled else {}),
    )


def compute_features(
    writer: CacheWriter,
    pipeline: Pipeline,
    recipe: Recipe,
    progress: Progress,
    should_stop: Callable[[], bool],
) -> int:
    """Compute and commit shards until all are done, by whichever process.

    Args:
        writer: open, not yet finished.
        pipeline: for the images of the plan.

    Returns:
        How many images this process computed.

    Raises:
        StoppedError: `should_stop` said so.
    """
    total = sum(len(images) for images in writer.shards.values())
    progress.start(total=total, done=writer.num_committed)
    num_added = 0
    pool = BufferPool(recipe.arrays, recipe.shard_rows, 2)
    try:
        while not writer.is_done():
            with _released_at_end(writer.free_claims(should_stop)) as claims:
                for count in _commit_each(pipeline.compute(claims, pool), pool):
                    num_added += count
            if should_stop():
                done = writer.num_committed
                raise StoppedError(
                    f"Stopped after a whole shard; {done} of {total} images are done. The same command goes "
                    "on from there.",
                    done=done,
                    total=total,
                )
            if not writer.is_done():
                time.sleep(_POLL_SECONDS)  # the rest is in other processes' hands
    finally:
        progress.stop()
    return num_added


def _commit_each(shards: Iterator[ComputedShard[ShardClaim]], pool: BufferPool) -> Iterator[int]:
    """Commit shards on a thread while the next ones are computed; yields the images of each."""

    def commit(shard: ComputedShard[ShardClaim]) -> int:
        try:
            shard.work.commit(shard.arrays, shard.outcomes)
        finally:
            pool.give_back(shard.buffers)
        return len(shard.arrays[next(iter(shard.arrays))])

    with ThreadPoolExecutor(max_workers=1, thread_name_prefix="commit") as thread:
        pending: list[Future[int]] = []
        for shard in shards:
            pending.append(thread.submit(commit, shard))
            while len(pending) > 1:  # so that a failure ends the extraction one shard later at most
                yield pending.pop(0).result()
        for future in pending:
            yield future.result()


@contextlib.contextmanager
def _released_at_end(claims: Iterator[ShardClaim]) -> Iterator[Iterator[ShardClaim]]:
    """Hand out claims, and give back at the end those that were not committed."""
    taken: list[ShardClaim] = []

    def recorded() -> Iterator[ShardClaim]:
        for claim in claims:
            taken.append(claim)
            yield claim

    try:
        yield recorded()
    finally:
        for claim in taken:
            claim.release()


def _request(selections: Sequence[Selection], limit: int | None) -> dict[str, str | int]:
    named = [
        f"{selection.dataset}/{selection.split_by}" + (f":{selection.split}" if selection.split else "")
        for selection in selections
    ]
    request: dict[str, str | int] = {"--split": ",".join(sorted(named))}
    return request if limit is None else {**request, "--limit": limit}


def _report(manifest: Manifest, sources: Sources, cache_root: Path, added: int) -> ExtractionReport:
    images = CacheDraft.of(cache_root).images
    quarantined = {
        image_id: reason for image_id in sources.images if (reason := images[image_id].reason) is not None
    }
    return ExtractionReport(
        manifest=manifest,
        added=added,
        present=len(sources.images) - len(quarantined) - added,
        quarantined=quarantined,
        warnings=sources.warnings,
    )

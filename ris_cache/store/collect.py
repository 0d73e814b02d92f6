"""Making a cache smaller: forgetting datasets, and reclaiming what nobody refers to any more.

`remove` only changes the manifest, so it is quick, and until `collect` has run an extraction of the same
dataset finds its features again. `collect` reclaims space. Rows never move within a shard: a shard that is
mostly dead is given up, and its survivors are copied into new shards at the end. The manifest changes once,
when all copies are in place, and files are removed after it; so a process that is killed leaves a usable
cache at any instant.
"""

from __future__ import annotations

import contextlib
import difflib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from ris_cache.errors import CacheError, CacheMissError, ConfigError
from ris_cache.progress import Progress
from ris_cache.store import files, tables
from ris_cache.store.backends import make_backend
from ris_cache.store.cache import FeatureCache
from ris_cache.store.draft import CacheDraft, Recipe, remove_unlisted
from ris_cache.store.journal import Journal
from ris_cache.store.layout import ABSENT, Backend
from ris_cache.store.locks import FileLock
from ris_cache.store.manifest import Manifest, load_manifest
from ris_cache.store.opening import find_manifest, read_listed_table
from ris_cache.store.planning import NewImage, is_carried_out
from ris_cache.store.tables import CachedImage
from ris_cache.store.transfer import Origin, as_new, origins, transfer
from ris_cache.store.verify import unlisted_files

PURPOSE = "cache gc"


@dataclass(frozen=True, slots=True, kw_only=True)
class Removal:
    """What forgetting datasets leaves behind.

    Attributes:
        datasets: that are forgotten.
        category_sets: that no other dataset uses.
        num_images: that no expression of what stays refers to.
        num_bytes: of their features.
    """

    datasets: tuple[str, ...]
    category_sets: tuple[str, ...]
    num_images: int
    num_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Garbage:
    """What of a cache is dead.

    Attributes:
        dropped: image_ids that no expression refers to.
        moved: survivors of shards that are given up, by row.
        num_unused_shards: that are removed because they hold no image that anybody refers to.
        num_sparse_shards: that are removed because at most half of their rows are alive.
        leftover: size by path of files that the manifest does not name.
        num_bytes: that would be reclaimed, less what the copies of survivors take.
    """

    dropped: tuple[int, ...]
    moved: tuple[CachedImage, ...]
    num_unused_shards: int
    num_sparse_shards: int
    leftover: Mapping[str, int]
    num_bytes: int


def remove(root: Path, names: Sequence[str], *, dry_run: bool = False) -> Removal:
    """Forget datasets of a cache; their features stay until `collect`.

    Their tables, and features, may be lost or damaged.

    Args:
        names: `<dataset>.<split_by>`, `<dataset>/<split_by>`, or the dataset alone where the cache has it
            with one split_by only.
        dry_run: change nothing.

    Raises:
        CacheMissError: a dataset that the cache does not have.
        ConfigError: a name that stands for several.
        CacheError: no finished cache, or `collect` was cut off or is under way.
        CorruptShardError: the manifest, the table of images or a table of what stays is damaged.
    """
    manifest = find_manifest(root)
    chosen = tuple(dict.fromkeys(_find_dataset(root, name, manifest.datasets) for name in names))
    kept = [name for name in manifest.datasets if name not in chosen]
    # Counted without the tables of what is removed: they may be what is damaged.
    images = read_listed_table(root, manifest, manifest.images.file, tables.IMAGES)
    unused = pc.invert(pc.is_in(images.column("image_id"), value_set=_referred_ids(root, manifest, kept)))
    num_with_features = pc.sum(pc.and_(unused, pc.equal(images.column("status"), tables.OK))).as_py() or 0
    used_sets = {manifest.datasets[name].category_set for name in kept}
    removal = Removal(
        datasets=chosen,
        category_sets=tuple(
            dict.fromkeys(
                entry.category_set
                for name, entry in manifest.datasets.items()
                if name in chosen and entry.category_set not in used_sets
            )
        ),
        num_images=pc.sum(unused).as_py() or 0,
        num_bytes=num_with_features * Recipe.of(manifest).image_bytes,
    )
    # An extraction that is under way goes on with its plan; a collection would keep what is dead by now.
    _require_no_plan(root, manifest, lambda purpose: purpose == PURPOSE)
    if not dry_run:
        with FileLock(root / files.LOCK_NAME):
            _require_no_plan(root, load_manifest(root), lambda purpose: purpose == PURPOSE)
            draft = CacheDraft.begin(root, Recipe.of(manifest))
            for name in chosen:
                draft.drop_dataset(name)
            draft.commit()
    return removal


def find_garbage(root: Path) -> Garbage:
    """Say what `collect` would reclaim; nothing is written.

    Raises:
        CacheError: no finished cache, or an extraction into it is unfinished.
        CorruptShardError: damage in what has to be read for that.
    """
    cache = FeatureCache.open(root)
    _require_no_plan(root, cache.manifest, lambda purpose: purpose != PURPOSE)
    return _survey(cache)


def collect(
    root: Path,
    *,
    progress: Progress | None = None,
    should_stop: Callable[[], bool] = lambda: False,
) -> tuple[Garbage, int]:
    """Reclaim space: of images that no expression refers to, and of files that no manifest names.

    Whoever has the cache open keeps reading images whose shard stays; others are found again after opening it
    anew. A collection that was cut off goes on; several processes share the copying.

    Returns:
        What was found dead, and by how many bytes the cache is smaller now.

    Raises:
        CacheError: no finished cache, or an extraction into it is unfinished.
        CorruptShardError: damage in what has to be read; repair the cache first.
        DiskFullError, StoppedError: as `transfer`.
    """
    manifest = find_manifest(root)
    bytes_before = _num_bytes(root)
    garbage: list[Garbage] = []
    found: dict[int, Origin] = {}

    def choose(known: Mapping[int, CachedImage]) -> list[NewImage]:
        cache = FeatureCache.open(root)
        _require_no_plan(root, cache.manifest, lambda purpose: purpose != PURPOSE)
        garbage[:] = [_survey(cache)]
        found.update(origins([cache]))
        return [as_new(image) for image in garbage[0].moved]

    def edit(draft: CacheDraft) -> None:
        cache = FeatureCache.open(root)
        referred = _referred(cache, cache.manifest.datasets)
        dropped = [image_id for image_id in draft.images if image_id not in referred]
        alive = [image for image_id, image in draft.images.items() if image_id in referred]
        dead_files = [path for paths in _unused_shards(cache, alive).values() for path in paths]
        if dropped or dead_files:
            _require_no_plan(root, cache.manifest, lambda purpose: purpose != PURPOSE)
            draft.drop_images(dropped)
            draft.drop_files(dead_files)

    transfer(
        root,
        Recipe.of(manifest),
        purpose=PURPOSE,
        request={},
        choose=choose,
        origin_of=found.__getitem__,
        edit=edit,
        progress=progress,
        should_stop=should_stop,
    )
    with FileLock(root / files.LOCK_NAME):
        if not Journal(root).exists:  # otherwise some of them are what another process has just written
            remove_unlisted(root, load_manifest(root))
    return garbage[0], bytes_before - _num_bytes(root)


def _survey(cache: FeatureCache) -> Garbage:
    manifest = cache.manifest
    backend = _backend(cache)
    referred = _referred(cache, manifest.datasets)
    dropped = tuple(image_id for image_id in cache.images if image_id not in referred)
    alive = sorted(
        (image for image_id, image in cache.images.items() if image_id in referred),
        key=lambda image: image.row,
    )
    by_shard: dict[int, list[CachedImage]] = {}
    for image in alive:
        by_shard.setdefault(image.row // manifest.shard_rows, []).append(image)
    sparse = {shard: images for shard, images in by_shard.items() if _is_sparse(backend, shard, images)}
    moved = [image for images in sparse.values() for image in images]
    unused = _unused_shards(cache, alive)
    listed = manifest.shard_files()
    given_up = {path for paths in unused.values() for path in paths}
    given_up |= {path for shard in sparse for path in backend.shard_files(shard)}
    leftover = unlisted_files(manifest, backend)
    num_copied = sum(not image.is_quarantined for image in moved)
    return Garbage(
        dropped=dropped,
        moved=tuple(moved),
        num_unused_shards=len(unused),
        num_sparse_shards=len(sparse),
        leftover=leftover,
        num_bytes=sum(listed[path].bytes for path in given_up)
        + sum(leftover.values())
        - num_copied * Recipe.of(manifest).image_bytes,
    )


def _is_sparse(backend: Backend, shard: int, alive: Sequence[CachedImage]) -> bool:
    """Whether at most half of the rows in a shard are alive, so that copying these frees more."""
    places = backend.locate(shard)
    if places is None:  # laid out by another tool: it can be read, but nothing can be added beside it
        return False
    num_present = int(np.count_nonzero(places[backend.arrays[0].name].offsets != ABSENT))
    num_alive = sum(not image.is_quarantined for image in alive)
    return num_alive < num_present and 2 * num_alive <= num_present


def _unused_shards(cache: FeatureCache, alive: Iterable[CachedImage]) -> dict[int, list[str]]:
    """Return the listed files of each shard that no living image has its row in."""
    manifest, backend = cache.manifest, _backend(cache)
    listed = manifest.shard_files()
    used = {image.row // manifest.shard_rows for image in alive}
    unused = {}
    for shard in range(manifest.rows // manifest.shard_rows):
        paths = [path for path in backend.shard_files(shard) if path in listed]
        if shard not in used and paths:
            unused[shard] = paths
    return unused


def _referred(cache: FeatureCache, datasets: Iterable[str]) -> set[int]:
    """Return the image_ids that expressions of some datasets refer to."""
    return {expression.image_id for name in datasets for expression in cache.expressions(name)}


def _referred_ids(root: Path, manifest: Manifest, datasets: Iterable[str]) -> Any:
    """Return the image_ids that expressions of some datasets refer to, as an Arrow array with repeats."""
    columns = [
        read_listed_table(root, manifest, manifest.datasets[name].expressions_file, tables.EXPRESSIONS)
        .column("image_id")
        .combine_chunks()
        for name in datasets
    ]
    return pa.concat_arrays([pa.array([], pa.int64()), *columns])


def _backend(cache: FeatureCache) -> Backend:
    manifest = cache.manifest
    return make_backend(manifest.backend, cache.root, manifest.stored_arrays(), manifest.shard_rows)


def _num_bytes(root: Path) -> int:
    num_bytes = 0
    for path in files.all_files(root).values():
        with contextlib.suppress(FileNotFoundError):  # another process may be removing files
            num_bytes += path.stat().st_size
    return num_bytes


def _require_no_plan(root: Path, manifest: Manifest, is_refused: Callable[[str], bool]) -> None:
    """Refuse to go on while a plan of some purpose is still to be carried out."""
    plan = Journal(root).read_plan()
    if plan is None or not is_refused(plan.purpose) or is_carried_out(plan, root, manifest):
        return
    described = "".join(f" {name} {value}" for name, value in plan.request.items())
    raise CacheError(
        f"{root} holds an unfinished `ris {plan.purpose}`, cut off or still at work. Finish it first with "
        f"the same command (`ris {plan.purpose}{described}`), or give it up by removing "
        f"{root / files.EXTRACTION_NAME}. Nothing was changed.",
        path=root,
        purpose=plan.purpose,
        request=dict(plan.request),
    )


def _find_dataset(root: Path, name: str, known: Iterable[str]) -> str:
    known = tuple(known)
    wanted = name.replace("/", ".")
    if wanted in known:
        return wanted
    same_dataset = [table_name for table_name in known if table_name.rpartition(".")[0] == wanted]
    if len(same_dataset) == 1:
        return same_dataset[0]
    if same_dataset:
        raise ConfigError(
            f"{name!r} stands for {' and '.join(same_dataset)} in {root}. Name which.",
            name=name,
            known=tuple(same_dataset),
        )
    nearest = difflib.get_close_matches(wanted, known, n=1)
    raise CacheMissError(
        f"{root} has no dataset {name!r}; it has {', '.join(known) or 'none'}."
        + (f" Did you mean {nearest[0]!r}?" if nearest else ""),
        name=name,
        known=known,
    )

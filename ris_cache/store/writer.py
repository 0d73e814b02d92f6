"""Writing a cache, alone or together with other processes.

Every process that extends a cache opens a `CacheWriter`. The first one plans: which image gets which row. The
others join that plan if they ask for the same, and wait for its end if they ask for something else. Shards
are claimed one by one through locks that a killed process cannot keep, computed, and committed; the claims
of a dead process go to whoever looks next. When all shards are committed, the first process that gets there
writes tables and manifest.

Nothing that a manifest in place speaks of is ever changed, so readers need no lock.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np

from ris_cache.datasets.records import ImageRecord
from ris_cache.errors import CacheError, ConfigError, DataError, StoppedError
from ris_cache.store import files, manifest, tables
from ris_cache.store.backends import make_backend
from ris_cache.store.draft import CacheDraft, Recipe
from ris_cache.store.fingerprint import Fingerprint, require_match
from ris_cache.store.journal import (
    Journal,
    Plan,
    PlannedImage,
    RecordedImage,
    ShardRecord,
    assign_rows,
)
from ris_cache.store.layout import Array, Backend
from ris_cache.store.locks import FileLock
from ris_cache.store.manifest import ArrayEntry, FileEntry, Manifest, StoredFingerprint
from ris_cache.store.rows import row_checksums
from ris_cache.store.tables import CachedImage

_POLL_SECONDS = 0.25


@dataclass(frozen=True, slots=True, kw_only=True)
class NewImage(ImageRecord):
    """An image that is to get features.

    Attributes:
        namespace: whose ids `image_id` is one of.
        row: the row it must get; None leaves it to the plan.
    """

    namespace: str = "coco"
    row: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What became of one image of a shard.

    Attributes:
        sha256: of the image file, lower-case hex; None if it could not be read at all.
        reason: why it has no features; None if it has.
    """

    sha256: str | None
    reason: str | None = None


class ShardClaim:
    """One shard that this process, and no other, works on until `commit` or `release`."""

    def __init__(
        self, shard: int, images: tuple[PlannedImage, ...], backend: Backend, journal: Journal, lock: FileLock
    ) -> None:
        """For `CacheWriter.free_claims` only."""
        self.shard = shard
        self.images = images
        self._backend = backend
        self._journal = journal
        self._lock = lock

    def commit(self, arrays: Mapping[str, Array], outcomes: Sequence[Outcome]) -> None:
        """Write the shard and record that it is done.

        Args:
            arrays: [n, ...] of every stored array: the rows of the images without a reason, in their order.
            outcomes: of every image of `images`.

        Raises:
            ShapeError: arrays that do not fit.
            OSError: the disk is full, say; the shard stays to do.
        """
        assert self._lock.is_held, "the claim was given back"
        first_row = self.shard * self._backend.shard_rows
        kept = [i for i, outcome in enumerate(outcomes) if outcome.reason is None]
        positions = np.array([self.images[i].row - first_row for i in kept], np.int64)
        digests = self._backend.write_shard(self.shard, positions, arrays)
        checksums = iter(row_checksums([arrays[array.name] for array in self._backend.arrays]))
        self._journal.commit(
            ShardRecord(
                shard=self.shard,
                files={path: FileEntry.of(digest) for path, digest in digests.items()},
                images=tuple(
                    RecordedImage(
                        image_id=image.image_id,
                        sha256=outcome.sha256,
                        reason=outcome.reason,
                        crc32c=next(checksums) if outcome.reason is None else (),
                    )
                    for image, outcome in zip(self.images, outcomes, strict=True)
                ),
            )
        )
        self.release()

    def release(self) -> None:
        """Leave the shard to others, done or not."""
        self._lock.release()


class CacheWriter:
    """One process's part in extending a cache: `open`, `free_claims` until `is_done`, `finish`."""

    def __init__(self, root: Path, recipe: Recipe, plan: Plan | None, activity: FileLock | None) -> None:
        """For `open` only."""
        self._root = root
        self._recipe = recipe
        self._plan = plan
        self._activity = activity
        self._journal = Journal(root)
        self._backend = make_backend(recipe.backend, root, recipe.arrays, recipe.shard_rows)
        self._shards = plan.shards() if plan else {}
        self._identity = self._journal.identity() if plan else None
        self._done: set[int] = set()

    @classmethod
    def open(
        cls,
        root: Path,
        recipe: Recipe,
        *,
        purpose: str,
        request: Mapping[str, Any],
        choose: Callable[[Mapping[int, CachedImage]], Sequence[NewImage]],
        on_wait: Callable[[str], None] = lambda reason: None,
        should_stop: Callable[[], bool] = lambda: False,
    ) -> Self:
        """Plan an extension of the cache, or join the one under way.

        Args:
            recipe: its backend and shard_rows must be those of the cache where there is one.
            purpose: the command, for messages.
            request: JSON values that say what is asked for, so that who asks for the same works together.
            choose: given the images that the cache has, returns those that need features, in an order that
                depends on nothing else.
            on_wait: told once why there is nothing to do yet.
            should_stop: looked at while waiting.

        Raises:
            ConfigError: `root` is a file, or a directory that holds something else.
            FingerprintMismatchError: a cache, or a cut-off extraction, of another making.
            CacheError: another backend than the cache's.
            StoppedError: `should_stop` said so while waiting.
        """
        _require_cache_directory(root)
        files.make_directories(root)
        lock, journal = FileLock(root / files.LOCK_NAME), Journal(root)
        told = False
        while True:
            with lock:
                base = load_base(root)
                require_same_making(root, recipe, base, journal.read_plan())
                plan = _plan_in_place(journal, root, base)
                draft = CacheDraft.begin(root, recipe)
                wanted = choose(draft.images)
                activity = journal.activity_lock() if plan or wanted or base is None else None
                if plan is None and activity is not None:
                    plan = _make_plan(recipe, base, wanted, purpose=purpose, request=request)
                    journal.start(plan, keep_records=False)
                elif plan is not None and not _asks_for(plan, request, wanted):
                    assert activity is not None
                    if activity.acquire(wait=False):
                        plan = _make_plan(
                            recipe, base, wanted, purpose=purpose, request=request, after=(plan, journal)
                        )
                        journal.start(plan, keep_records=True)
                    else:
                        activity = None
                if activity is not None:
                    activity.acquire(shared=True)
                if plan is None or activity is not None:
                    return cls(root, recipe, plan, activity)
                reason = f"another `ris {plan.purpose}` is at work on {root} ({_described(plan.request)})"
            if not told:
                on_wait(f"{reason}; waiting for it to end")
                told = True
            if should_stop():
                raise StoppedError(f"Stopped while {reason}.", path=root)
            time.sleep(_POLL_SECONDS)

    @property
    def shards(self) -> dict[int, tuple[PlannedImage, ...]]:
        """The images of each planned shard, by row; shards that are done too."""
        return self._shards

    @property
    def num_committed(self) -> int:
        """How many of the planned images lie in shards that are done, by whichever process."""
        return sum(len(images) for shard, images in self._shards.items() if self._is_done(shard))

    def free_claims(self, should_stop: Callable[[], bool] = lambda: False) -> Iterator[ShardClaim]:
        """Claim one after another the shards that are neither done nor claimed, until none is left.

        Never waits, so a process may claim its next shard while it still computes one. A shard whose process
        was killed is free again. What is not committed must be released.
        """
        for shard in sorted(self._shards):
            if should_stop() or not self._is_in_place():
                return
            if self._is_done(shard):
                continue
            lock = self._journal.claim_lock(shard)
            try:
                is_ours = lock.acquire(wait=False)
            except FileNotFoundError:  # another process has just finished the plan and removed the journal
                return
            if not is_ours:
                continue
            # Looked at again under the lock: once the journal is gone, finished shards look like ones to do.
            if self._is_done(shard) or not self._is_in_place():
                lock.release()
            else:
                yield ShardClaim(shard, self._shards[shard], self._backend, self._journal, lock)

    def is_done(self) -> bool:
        """Whether every shard is committed, or another process has finished the plan already."""
        return all(self._is_done(shard) for shard in self._shards) or not self._is_in_place()

    def _is_done(self, shard: int) -> bool:
        if shard not in self._done and self._journal.record(shard) is not None:
            self._done.add(shard)
        return shard in self._done

    def finish(self, edit: Callable[[CacheDraft], None]) -> Manifest:
        """Make the result visible: features, then what `edit` adds to the draft, then the manifest.

        To be called once `is_done`. Waits while another process finishes; whoever comes later than the first
        finds the work done, and `edit` sees it in the draft.

        Raises:
            CacheError: a shard is not done, since it was neither committed by us nor by anybody else.
        """
        with FileLock(self._root / files.LOCK_NAME):
            draft = CacheDraft.begin(self._root, self._recipe)
            is_ours_to_finish = self._plan is not None and self._is_in_place()
            if is_ours_to_finish:
                self._add_shards(draft)
            edit(draft)
            finished = draft.commit()
            if is_ours_to_finish or not self._journal.exists:
                self._remove_leftovers(finished)
                self._journal.discard()
        self.close()
        return finished

    def close(self) -> None:
        """End this process's part; what it committed stays."""
        if self._activity is not None:
            self._activity.release()

    def _is_in_place(self) -> bool:
        return self._plan is not None and self._journal.identity() == self._identity

    def _add_shards(self, draft: CacheDraft) -> None:
        for shard, planned in self._shards.items():
            record = self._journal.record(shard)
            if record is None:
                raise CacheError(
                    f"Shard {shard} of {self._root} is not done. Run the command again to compute it.",
                    path=self._root,
                    shard=shard,
                )
            recorded = {image.image_id: image for image in record.images}
            draft.add_shard(
                shard,
                record.files,
                [
                    CachedImage(
                        **image.model_dump(),
                        sha256=recorded[image.image_id].sha256,
                        reason=recorded[image.image_id].reason,
                        crc32c=recorded[image.image_id].crc32c,
                    )
                    for image in planned
                ],
            )

    def _remove_leftovers(self, finished: Manifest) -> None:
        """Remove what cut-off processes left: temporary files, and shards of a plan that was given up."""
        listed = finished.shard_files()
        features = tuple(f"{name}/" for name in files.FEATURE_DIRECTORIES)
        left = [
            relative
            for relative in files.all_files(self._root)
            if files.is_temporary(relative)
            or (relative.startswith(features) and relative not in listed and "zarr.json" not in relative)
        ]
        files.remove_files(self._root, left)


def require_same_image(known: CachedImage, record: ImageRecord, namespace: str, root: Path) -> None:
    """Refuse an image that the cache knows with another name, size or namespace.

    Raises:
        DataError: naming both.
    """
    expected = (known.namespace, known.file_name, known.height, known.width)
    found = (namespace, record.file_name, record.height, record.width)
    if expected != found:
        raise DataError(
            f"Image {record.image_id} is {found} here, but {expected} (namespace, file, height, width) in "
            f"{root}. One cache holds one image per image_id: extract into another directory.",
            image_id=record.image_id,
            expected=expected,
            found=found,
        )


def _require_cache_directory(root: Path) -> None:
    if root.exists() and not root.is_dir():
        raise ConfigError(f"{root} is a file; name a directory for the cache.", path=root)
    own = {files.MANIFEST_NAME, files.LOCK_NAME, files.EXTRACTION_NAME}
    if root.exists() and any(root.iterdir()) and not any((root / name).exists() for name in own):
        raise ConfigError(
            f"{root} holds files but no feature cache. Name a new or empty directory for the cache; nothing "
            "was changed.",
            path=root,
        )


def load_base(root: Path) -> Manifest | None:
    """Return the manifest of the cache in `root`; None if there is no finished one."""
    return manifest.load_manifest(root) if (root / files.MANIFEST_NAME).exists() else None


def require_same_making(root: Path, recipe: Recipe, base: Manifest | None, interrupted: Plan | None) -> None:
    """Refuse a recipe that is not that of the cache, or of the extraction that was cut off before the first.

    Raises:
        FingerprintMismatchError: naming the fields that differ.
        CacheError: another backend or shard size.
    """
    found = base or interrupted
    if found is None:
        return
    stored = Fingerprint.of(found.fingerprint.fields)
    require_match(recipe.fingerprint, stored, where=str(root))
    if (found.backend, found.shard_rows) != (recipe.backend, recipe.shard_rows):
        raise CacheError(
            f"{root} is stored as {found.backend} in shards of {found.shard_rows}, not as {recipe.backend} "
            f"in shards of {recipe.shard_rows}. Leave these options out to add to it, or name another "
            "directory.",
            path=root,
            expected=(recipe.backend, recipe.shard_rows),
            found=(found.backend, found.shard_rows),
        )


def _plan_in_place(journal: Journal, root: Path, base: Manifest | None) -> Plan | None:
    """Return the plan that is still to be carried out."""
    plan = journal.read_plan()
    if plan is None or not is_carried_out(plan, root, base):
        return plan
    # Whoever finished it was cut off before it could remove the journal.
    journal.discard()
    return None


def is_carried_out(plan: Plan, root: Path, base: Manifest | None) -> bool:
    """Whether the manifest in place holds what was planned.

    Another digest alone does not say so: a process that has only tables to add needs no plan, and may add
    them while others carry out theirs.
    """
    if base is None or plan.base == base.digest:
        return base is None and plan.base is not None
    images = tables.read_images(tables.read_table(root / base.images.file, tables.IMAGES))
    rows = {image.image_id: image.row for image in images}
    return all(rows.get(image.image_id) == image.row for image in plan.images)


def _asks_for(plan: Plan, request: Mapping[str, Any], wanted: Sequence[NewImage]) -> bool:
    if plan.request != request:
        return False
    planned = {image.image_id for image in plan.images}
    return {image.image_id for image in wanted} <= planned


def _make_plan(
    recipe: Recipe,
    base: Manifest | None,
    wanted: Sequence[NewImage],
    *,
    purpose: str,
    request: Mapping[str, Any],
    after: tuple[Plan, Journal] | None = None,
) -> Plan:
    kept: list[PlannedImage] = []
    taken: set[int] = set()
    if after is not None:
        old_plan, journal = after
        shards = old_plan.shards()
        taken = journal.committed(shards)
        kept = [image for shard in sorted(taken) for image in shards[shard]]
    known = {image.image_id for image in kept}
    images = [image for image in wanted if image.image_id not in known]
    rows = assign_rows(
        len(images), first_row=base.rows if base else 0, shard_rows=recipe.shard_rows, taken=taken
    )
    planned = [
        PlannedImage(
            image_id=image.image_id,
            namespace=image.namespace,
            row=row if image.row is None else image.row,
            file_name=image.file_name,
            height=image.height,
            width=image.width,
        )
        for image, row in zip(images, rows, strict=True)
    ]
    return Plan(
        version=1,
        purpose=purpose,
        request=dict(request),
        fingerprint=StoredFingerprint(digest=recipe.fingerprint.digest, fields=recipe.fingerprint.fields),
        backend="hdf5" if recipe.backend == "hdf5" else "zarr",
        dtype=recipe.dtype,
        arrays=tuple(ArrayEntry.of(array) for array in recipe.arrays),
        shard_rows=recipe.shard_rows,
        base=base.digest if base else None,
        images=tuple(sorted((*kept, *planned), key=lambda image: image.row)),
    )


def _described(request: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in request.items())

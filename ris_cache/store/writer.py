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
from types import MappingProxyType
from typing import Any, Self

import numpy as np

from ris_cache.errors import CacheError, StoppedError
from ris_cache.store import files
from ris_cache.store.backends import make_backend
from ris_cache.store.draft import CacheDraft, Recipe
from ris_cache.store.journal import (
    Journal,
    Plan,
    PlannedImage,
    RecordedImage,
    ShardRecord,
)
from ris_cache.store.layout import Array, Backend
from ris_cache.store.locks import FileLock
from ris_cache.store.manifest import FileEntry, Manifest
from ris_cache.store.opening import has_files, require_files
from ris_cache.store.planning import (
    NewImage,
    asks_for,
    described,
    load_base,
    make_plan,
    plan_in_place,
    require_cache_directory,
    require_same_making,
)
from ris_cache.store.rows import row_checksums
from ris_cache.store.tables import CachedImage

_POLL_SECONDS = 0.25


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
        agreed: Mapping[str, int] = MappingProxyType({}),
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
            agreed: settings that all who work on the plan should share; those of a plan in place win, see
                `agreed`.
            on_wait: told once why there is nothing to do yet.
            should_stop: looked at while waiting.

        Raises:
            ConfigError: `root` is a file, or a directory that holds something else.
            FingerprintMismatchError: a cache, or a cut-off extraction, of another making.
            CacheError: another backend than the cache's.
            CorruptShardError: the cache lacks files of its manifest, or they are cut short.
            StoppedError: `should_stop` said so while waiting.
        """
        require_cache_directory(root)
        files.make_directories(root)
        lock, journal = FileLock(root / files.LOCK_NAME), Journal(root)
        told, checked = False, None
        while True:
            with lock:
                base = load_base(root)
                require_same_making(root, recipe, base, journal.read_plan())
                if base is not None and base != checked:
                    require_files(root, base)  # adding to a damaged cache would call it complete
                    checked = base
                plan = plan_in_place(journal, root, base)
                draft = CacheDraft.begin(root, recipe)
                wanted = choose(draft.images)
                activity = journal.activity_lock() if plan or wanted or base is None else None
                if plan is None and activity is not None:
                    plan = make_plan(recipe, base, wanted, purpose=purpose, request=request, agreed=agreed)
                    journal.start(plan, keep_records=False)
                elif plan is not None and not asks_for(plan, request, wanted):
                    assert activity is not None
                    if activity.acquire(wait=False):
                        plan = make_plan(
                            recipe,
                            base,
                            wanted,
                            purpose=purpose,
                            request=request,
                            agreed=agreed,
                            after=(plan, journal),
                        )
                        journal.start(plan, keep_records=True)
                    else:
                        activity = None
                if activity is not None:
                    activity.acquire(shared=True)
                if plan is None or activity is not None:
                    return cls(root, recipe, plan, activity)
                reason = f"another `ris {plan.purpose}` is at work on {root} ({described(plan.request)})"
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
    def agreed(self) -> Mapping[str, int]:
        """The settings of the plan; empty where there is nothing to write."""
        return self._plan.agreed if self._plan else {}

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
        if shard not in self._done:
            record = self._journal.record(shard)
            # What was cut short or lost since it was committed is computed again.
            if record is not None and has_files(self._root, record.files):
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

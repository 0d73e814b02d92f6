"""What an extraction has planned and done so far: the directory `extraction/` of a cache.

    extraction/plan.json          which image gets which row; written once, before any feature
    extraction/shards/00012.json  the commit record of a shard; its files were whole before it was written
    extraction/claims/00012.lock  locked by the process that computes the shard
    extraction/active.lock        locked, shared, by every process that works on the plan

The directory exists from the first plan until the manifest that holds its result is in place. Every file in
it is written atomically, so a process can be killed at any instant: what has a record is done, all else is
to do. Plan and records end with a digest of themselves, since what they say goes into the manifest. Plans
change only under the cache's own lock (`.lock`).
"""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError, field_validator

from ris_cache.errors import CorruptShardError
from ris_cache.store.files import EXTRACTION_NAME, is_safe_relative, make_directories, write_atomically
from ris_cache.store.locks import FileLock
from ris_cache.store.manifest import ArrayEntry, Count, Digest, FileEntry, StoredFingerprint

_ATTEMPTS = 10


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class PlannedImage(_Strict):
    """One image that gets features, and the row they go to."""

    image_id: int
    namespace: str
    row: Count
    file_name: str
    height: int
    width: int


class Plan(_Strict):
    """Everything that processes must agree on to write one extension of a cache together.

    Attributes:
        purpose: the command, for messages: extract, convert, merge, gc.
        request: what was asked for; a process that asks for the same joins the plan.
        agreed: settings that every process must share for the bytes to be those of one process alone, such
            as the batch size; whoever joins takes them over.
        base: digest of the manifest that the plan extends; None where there was none.
        images: by ascending row.
    """

    version: Literal[1]
    purpose: str
    request: dict[str, Any]
    agreed: dict[str, Count]
    fingerprint: StoredFingerprint
    backend: Literal["zarr", "hdf5"]
    dtype: str
    arrays: tuple[ArrayEntry, ...]
    shard_rows: Count
    base: Digest | None
    images: tuple[PlannedImage, ...]

    def shards(self) -> dict[int, tuple[PlannedImage, ...]]:
        """Return the images of each shard, both by ascending row."""
        shards: dict[int, list[PlannedImage]] = {}
        for image in self.images:
            shards.setdefault(image.row // self.shard_rows, []).append(image)
        return {shard: tuple(images) for shard, images in shards.items()}


class RecordedImage(_Strict):
    """What became of one planned image: checksums of its rows, or the reason why it has none.

    Attributes:
        sha256: of the image file; None if it could not be read at all.
        crc32c: of its row in every array, in the plan's order; empty if there is a reason.
    """

    image_id: int
    sha256: Digest | None
    reason: str | None
    crc32c: tuple[Count, ...]


class ShardRecord(_Strict):
    """The commit record of one shard: its files and its images, by row."""

    shard: Count
    files: dict[str, FileEntry]
    images: tuple[RecordedImage, ...]

    @field_validator("files")
    @classmethod
    def _paths_are_safe(cls, value: dict[str, FileEntry]) -> dict[str, FileEntry]:
        if not all(is_safe_relative(relative) for relative in value):
            raise ValueError("a path leads out of the cache")
        return value


class Journal:
    """The directory `extraction/` of one cache."""

    def __init__(self, root: Path) -> None:
        self._directory = root / EXTRACTION_NAME
        self._plan_path = self._directory / "plan.json"
        self._records = self._directory / "shards"
        self._claims = self._directory / "claims"

    @property
    def exists(self) -> bool:
        """Whether an extraction is under way or was cut off."""
        return self._plan_path.is_file()

    def read_plan(self) -> Plan | None:
        """Return the plan, None if there is none.

        Raises:
            CorruptShardError: it is damaged.
        """
        try:
            return Plan.model_validate_json(_unseal(self._plan_path.read_bytes()))
        except (FileNotFoundError, NotADirectoryError):
            return None
        except (ValidationError, ValueError) as error:
            raise CorruptShardError(
                f"{self._plan_path} is damaged, so it is not known what the interrupted extraction has done. "
                f"Remove {self._directory} to give up what it did, and run `ris extract` again.",
                path=self._plan_path,
            ) from error

    def start(self, plan: Plan, *, keep_records: bool) -> None:
        """Put a plan in place.

        Args:
            keep_records: the plan takes over the shards that were committed under the one before.
        """
        if not keep_records and self._records.is_dir():
            shutil.rmtree(self._records)
        make_directories(self._records)
        make_directories(self._claims)
        write_atomically(self._plan_path, _seal(plan.model_dump_json(indent=1).encode("utf-8")))

    def discard(self) -> None:
        """Remove the directory, the plan first: without it the rest is of no use to anybody."""
        self._plan_path.unlink(missing_ok=True)
        # A process that has not noticed yet may put one more lock into a folder that is being removed.
        for _ in range(_ATTEMPTS):
            shutil.rmtree(self._directory, ignore_errors=True)
            if not self._directory.exists():
                return
        shutil.rmtree(self._directory)

    def commit(self, record: ShardRecord) -> None:
        """Record that a shard is done."""
        write_atomically(self._record_path(record.shard), _seal(record.model_dump_json().encode("utf-8")))

    def record(self, shard: int) -> ShardRecord | None:
        """Return the record of a shard; None if it is not done, or its record is damaged."""
        try:
            return ShardRecord.model_validate_json(_unseal(self._record_path(shard).read_bytes()))
        except (FileNotFoundError, NotADirectoryError, ValueError):
            return None

    def committed(self, shards: Collection[int]) -> set[int]:
        """Return those of some shards that are done."""
        return {shard for shard in shards if self.record(shard) is not None}

    def records(self, shards: Sequence[int]) -> Iterator[ShardRecord]:
        """Yield the records of shards that are done."""
        for shard in shards:
            record = self.record(shard)
            if record is not None:
                yield record

    def claim_lock(self, shard: int) -> FileLock:
        """Return the lock of a shard, not yet taken."""
        return FileLock(self._claims / f"{shard:05d}.lock")

    def activity_lock(self) -> FileLock:
        """Return the lock that every process at work on the plan shares, not yet taken."""
        make_directories(self._directory)
        return FileLock(self._directory / "active.lock")

    def identity(self) -> tuple[int, int, int] | None:
        """Return what changes whenever another plan is put in place; None without a plan."""
        try:
            found = self._plan_path.stat()
        except (FileNotFoundError, NotADirectoryError):
            return None
        return found.st_ino, found.st_mtime_ns, found.st_size

    def _record_path(self, shard: int) -> Path:
        return self._records / f"{shard:05d}.json"


def assign_rows(num_images: int, *, first_row: int, shard_rows: int, taken: Collection[int]) -> list[int]:
    """Give rows to images, in their order, whole shards at a time.

    Args:
        first_row: rows before it belong to the cache already.
        taken: shards past it that belong to a plan before.

    Returns:
        Ascending rows; each shard but the last is full.
    """
    rows: list[int] = []
    shard = -(-first_row // shard_rows)
    while len(rows) < num_images:
        if shard not in taken:
            start = shard * shard_rows
            rows += range(start, start + min(shard_rows, num_images - len(rows)))
        shard += 1
    return rows


def _seal(document: bytes) -> bytes:
    """Add to a JSON object, as its last field, the SHA-256 of what it was without."""
    return document[:-1] + b',"digest":"' + hashlib.sha256(document).hexdigest().encode("ascii") + b'"}\n'


_SEAL_BYTES = len(_seal(b"}"))


def _unseal(sealed: bytes) -> bytes:
    """Return the object that was sealed.

    Raises:
        ValueError: it was changed since.
    """
    document = sealed[:-_SEAL_BYTES] + b"}"
    if _seal(document) != sealed:
        raise ValueError("its digest is not that of its content")
    return document

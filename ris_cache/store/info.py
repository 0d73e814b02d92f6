"""What a cache is: who made it of what, what it holds, what it takes, and what more would take."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ris_cache.errors import CacheError
from ris_cache.store import files, tables
from ris_cache.store.collect import find_garbage
from ris_cache.store.draft import Recipe
from ris_cache.store.journal import Journal, Plan
from ris_cache.store.manifest import Manifest
from ris_cache.store.opening import find_manifest, read_listed_table
from ris_cache.store.planning import is_carried_out
from ris_cache.store.tables import CachedImage


@dataclass(frozen=True, slots=True, kw_only=True)
class Unfinished:
    """An extension of the cache that is under way or was cut off.

    Attributes:
        purpose: the command.
        request: what was asked for.
        num_images: planned, in `num_shards`, of which `num_shards_done` are committed, with
            `num_images_done`.
    """

    purpose: str
    request: Mapping[str, Any]
    num_images: int
    num_shards: int
    num_shards_done: int
    num_images_done: int

    @property
    def command(self) -> str:
        """What was run, as far as the request says it."""
        return " ".join(("ris", self.purpose, *(f"{name} {value}" for name, value in self.request.items())))


@dataclass(frozen=True, slots=True, kw_only=True)
class BegunCache:
    """A cache whose first extraction, or conversion, has not finished: nobody can read it yet.

    Attributes:
        preset: name of the encoder preset; None if the plan does not say.
        num_bytes: of all its files so far.
    """

    root: Path
    unfinished: Unfinished
    preset: str | None
    backend: str
    dtype: str
    shard_rows: int
    num_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Reclaimable:
    """What `ris cache gc` would free.

    Attributes:
        num_images: that no expression refers to.
        num_files: that belong to nothing.
    """

    num_images: int
    num_files: int
    num_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class CacheInfo:
    """What a cache is.

    Attributes:
        images: every image by image_id.
        unfinished: None if nothing is.
        reclaimable: None if it cannot be told; `unclear` says why.
        unclear: empty if all is clear.
    """

    root: Path
    manifest: Manifest
    images: Mapping[int, CachedImage]
    unfinished: Unfinished | None
    reclaimable: Reclaimable | None
    unclear: str

    @property
    def num_shards(self) -> int:
        """Shards that hold rows."""
        return len({image.row // self.manifest.shard_rows for image in self.images.values()})

    @property
    def image_bytes(self) -> int:
        """Bytes of features per image."""
        return Recipe.of(self.manifest).image_bytes

    @property
    def feature_bytes(self) -> int:
        """Bytes of all shards."""
        return sum(entry.bytes for entry in self.manifest.shard_files().values())

    @property
    def total_bytes(self) -> int:
        """Bytes of all files listed."""
        return sum(entry.bytes for entry in self.manifest.files.values())

    @property
    def quarantined(self) -> dict[int, str]:
        """Why an image has no features, by image_id."""
        return {image_id: image.reason for image_id, image in self.images.items() if image.reason is not None}


@dataclass(frozen=True, slots=True, kw_only=True)
class Growth:
    """What adding more to a cache would take.

    Attributes:
        num_images: whose features are to be computed.
        num_present: that the cache has.
        num_bytes: of features.
    """

    num_images: int
    num_present: int
    num_shards: int
    num_bytes: int


def find_begun(root: Path) -> BegunCache | None:
    """Describe what has been begun in a directory without a finished cache; None if nothing has.

    Raises:
        CorruptShardError: the plan of it is damaged.
    """
    root = root.absolute()
    if (root / files.MANIFEST_NAME).exists():
        return None
    journal = Journal(root)
    plan = journal.read_plan()
    if plan is None:
        return None
    encoders = plan.fingerprint.fields.get("encoders")
    preset = encoders.get("preset") if isinstance(encoders, dict) else None
    num_bytes = 0
    for path in files.all_files(root).values():
        with contextlib.suppress(FileNotFoundError):  # a temporary file that has just got its name
            num_bytes += path.stat().st_size
    return BegunCache(
        root=root,
        unfinished=_progress_of(plan, journal),
        preset=None if preset is None else str(preset),
        backend=plan.backend,
        dtype=plan.dtype,
        shard_rows=plan.shard_rows,
        num_bytes=num_bytes,
    )


def describe(root: Path) -> CacheInfo:
    """Describe a finished cache; features are neither read nor checked.

    Raises:
        CacheMissError, IncompleteCacheError: there is no finished cache.
        CacheError: it is something else, in a newer format, or may not be read.
        CorruptShardError: the manifest or the table of images is damaged.
    """
    root = root.absolute()
    manifest = find_manifest(root)
    unclear = ""
    unfinished: Unfinished | None = None
    reclaimable: Reclaimable | None = None
    try:
        unfinished = _find_unfinished(root, manifest)
        found = find_garbage(root)
        reclaimable = Reclaimable(
            num_images=len(found.dropped), num_files=len(found.leftover), num_bytes=found.num_bytes
        )
    except CacheError as error:
        unclear = str(error)
    return CacheInfo(
        root=root,
        manifest=manifest,
        images=_read_images(root, manifest),
        unfinished=unfinished,
        reclaimable=reclaimable,
        unclear=unclear,
    )


def growth(manifest: Manifest, *, num_images: int, num_present: int) -> Growth:
    """Say what adding images would take.

    Args:
        num_images: new ones.
        num_present: that need no computing.
    """
    return Growth(
        num_images=num_images,
        num_present=num_present,
        num_shards=-(-num_images // manifest.shard_rows),
        num_bytes=num_images * Recipe.of(manifest).image_bytes,
    )


def flat_fields(fields: Mapping[str, Any], path: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the values of a fingerprint by dotted path, in its order."""
    for name, value in fields.items():
        if isinstance(value, Mapping) and value:
            yield from flat_fields(value, f"{path}{name}.")
        else:
            yield f"{path}{name}", value


def _find_unfinished(root: Path, manifest: Manifest) -> Unfinished | None:
    journal = Journal(root)
    plan = journal.read_plan()
    if plan is None or is_carried_out(plan, root, manifest):
        return None
    return _progress_of(plan, journal)


def _progress_of(plan: Plan, journal: Journal) -> Unfinished:
    shards = plan.shards()
    done = journal.committed(shards)
    return Unfinished(
        purpose=plan.purpose,
        request=dict(plan.request),
        num_images=len(plan.images),
        num_shards=len(shards),
        num_shards_done=len(done),
        num_images_done=sum(len(shards[shard]) for shard in done),
    )


def _read_images(root: Path, manifest: Manifest) -> dict[int, CachedImage]:
    table = read_listed_table(root, manifest, manifest.images.file, tables.IMAGES)
    return {image.image_id: image for image in tables.read_images(table)}

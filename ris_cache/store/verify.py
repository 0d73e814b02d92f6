"""Checking a whole cache: is every file there and as written, and do manifest, tables and shards agree?

Nothing is changed, and the first problem does not end it: each becomes a `Finding`.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ris_cache.ahead import map_ahead
from ris_cache.errors import CorruptShardError
from ris_cache.store import files
from ris_cache.store.backends import make_backend
from ris_cache.store.draft import metadata_paths
from ris_cache.store.findings import Finding, bad_shards, error_finding, finding, no_file
from ris_cache.store.journal import Journal
from ris_cache.store.layout import Backend
from ris_cache.store.manifest import Manifest
from ris_cache.store.opening import find_manifest
from ris_cache.store.verify_shards import ShardChecker
from ris_cache.store.verify_tables import Annotations

__all__ = ["Finding", "VerifyReport", "unlisted_files", "verify", "wrong_metadata"]

_MAX_WORKERS = 4
_TABLES = ("images/", "expressions/", "instances/")
_EMPTY: tuple[Any, ...] = (None, [], {})


@dataclass(frozen=True, slots=True, kw_only=True)
class VerifyReport:
    """What was looked at, and what is wrong with it.

    Attributes:
        manifest: None if it is damaged; nothing else could be checked then.
        is_fast: no features were read.
        num_shards: looked at.
        num_files: looked at.
        num_bytes: read and compared with their SHA-256.
        findings: everything wrong.
        notes: what is odd and harms nobody.
    """

    root: Path
    manifest: Manifest | None
    is_fast: bool
    num_shards: int
    num_files: int
    num_bytes: int
    findings: tuple[Finding, ...]
    notes: tuple[str, ...]

    @property
    def is_sound(self) -> bool:
        """Whether nothing is wrong."""
        return not self.findings

    @property
    def bad_shards(self) -> tuple[int, ...]:
        """Shards whose features are to be computed again, ascending."""
        return bad_shards(self.findings)


def verify(
    root: Path,
    *,
    fast: bool = False,
    shards: Collection[int] | None = None,
    workers: int | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> VerifyReport:
    """Check a finished cache.

    What lies beside the features is always compared with its SHA-256, and tables, counts, category sets,
    `zarr.json` and the shards' own indexes with each other. Without `fast`, so is every file of features, and
    every row with its CRC-32C; rows of floats are searched for NaN and infinity.

    Memory is that of the tables, and a few rows per thread.

    Args:
        fast: read no features.
        shards: the shards to look at; all by default.
        workers: threads; by default one per processor, at most 4.
        progress: called after each shard with how many are done, and of how many.

    Raises:
        CacheMissError, IncompleteCacheError: there is no finished cache.
        CacheError: it is something else, or in a newer format.
    """
    root = root.absolute()
    try:
        manifest = find_manifest(root)
    except CorruptShardError as error:
        return VerifyReport(
            root=root,
            manifest=None,
            is_fast=fast,
            num_shards=0,
            num_files=1,
            num_bytes=0,
            findings=(error_finding(files.MANIFEST_NAME, error),),
            notes=(),
        )
    backend = make_backend(manifest.backend, root, manifest.stored_arrays(), manifest.shard_rows)
    annotations = Annotations(root, manifest)
    metadata = list(wrong_metadata(manifest, backend))
    checker = ShardChecker(
        root,
        manifest,
        backend,
        annotations.images,
        fast=fast,
        # Wrong metadata misleads the backend; the files' own checksums still tell.
        can_locate=not metadata,
    )
    chosen = [
        shard for shard in range(manifest.rows // manifest.shard_rows) if shards is None or shard in shards
    ]
    workers = workers or min(_MAX_WORKERS, os.cpu_count() or 1)
    of_shards: list[Finding] = []
    num_unused = 0
    for done, state in enumerate(map_ahead(checker.check, chosen, workers=workers, depth=2 * workers), 1):
        of_shards += state.findings
        num_unused += state.num_unused
        progress(done, len(chosen))
    features = manifest.shard_files()
    looked_at = features.keys() & {path for shard in chosen for path in backend.shard_files(shard)}
    others = manifest.files.keys() - features.keys()
    return VerifyReport(
        root=root,
        manifest=manifest,
        is_fast=fast,
        num_shards=len(chosen),
        num_files=len(looked_at) + len(others),
        num_bytes=sum(manifest.files[path].bytes for path in (others if fast else others | looked_at)),
        findings=(*annotations.findings, *_strays(manifest, backend), *metadata, *of_shards),
        notes=tuple(_notes(root, manifest, backend, num_unused)),
    )


def wrong_metadata(manifest: Manifest, backend: Backend) -> Iterator[Finding]:
    """Yield what is wrong with the metadata files beside the shards.

    An array may be longer than the manifest says: an extraction that was cut off leaves it so, and nobody
    reads beyond what the manifest says.
    """
    for path, expected in backend.metadata_files(manifest.rows).items():
        if (backend.root / path).is_dir():
            yield no_file(path)
            continue
        problem = _problem_of_metadata(backend.root / path, json.loads(expected))
        if problem is not None:
            yield finding(path, problem, kind="metadata")


def _problem_of_metadata(path: Path, expected: dict[str, Any]) -> str | None:
    try:
        found = json.loads(path.read_bytes())
    except FileNotFoundError:
        return "is missing"
    except OSError as error:
        return f"cannot be read ({error.strerror or error})"
    except (ValueError, RecursionError) as error:
        return f"is not JSON ({error})"
    wrong = _differing_keys(expected, found)
    return f"contradicts the manifest in {', '.join(wrong)}" if wrong else None


def _differing_keys(expected: dict[str, Any], found: Any) -> list[str]:
    if not isinstance(found, dict):
        return list(expected)
    return [
        key
        for key in sorted(expected.keys() | found.keys())
        if not _agrees(key, expected.get(key), found.get(key))
    ]


def _agrees(key: str, ours: Any, theirs: Any) -> bool:
    if ours == theirs or (ours in _EMPTY and theirs in _EMPTY):  # versions of zarr-python differ in these
        return True
    match ours, theirs:
        case [rows, *shape], [int(found), *found_shape] if key == "shape":
            return found >= rows and found_shape == shape
        case None | dict(), dict() if key == "attributes":  # others may add their own
            return (ours or {}).items() <= theirs.items()
    return False


def unlisted_files(manifest: Manifest, backend: Backend) -> dict[str, int]:
    """Return the sizes of files that belong to nothing in a cache, by path relative to it.

    Files of an extraction that is under way, or was cut off, are not among them.

    Raises:
        CorruptShardError: the plan of such an extraction is damaged.
    """
    kept = {*manifest.files, *metadata_paths(manifest)}
    plan = Journal(backend.root).read_plan()
    if plan is not None:
        kept.update(path for shard in plan.shards() for path in backend.shard_files(shard))
    sizes = {}
    for path, place in files.all_files(backend.root).items():
        if path not in kept:
            with contextlib.suppress(FileNotFoundError):  # a collection may be removing it
                sizes[path] = place.lstat().st_size
    return sizes


def _strays(manifest: Manifest, backend: Backend) -> Iterator[Finding]:
    """Yield files that the manifest lists as features but that are no shard's."""
    shards = range(manifest.rows // manifest.shard_rows)
    of_shards = {path for shard in shards for path in backend.shard_files(shard)}
    for path in manifest.shard_files():
        if path not in of_shards:
            yield finding(
                files.MANIFEST_NAME, f"lists {path}, which belongs to no shard of {manifest.rows} rows"
            )


def _notes(root: Path, manifest: Manifest, backend: Backend, num_unused: int) -> Iterator[str]:
    if Journal(root).exists:
        yield "An extraction is under way or was cut off; what it has written was not looked at."
    try:
        unlisted = unlisted_files(manifest, backend)
    except CorruptShardError as error:  # of the plan of that extraction, which is no part of the cache yet
        yield str(error)
        unlisted = {}
    superseded = {path: size for path, size in unlisted.items() if _is_table(path)}
    others = {path: size for path, size in unlisted.items() if path not in superseded}
    if superseded:
        one = len(superseded) == 1
        yield (
            f"{'1 table' if one else f'{len(superseded)} tables'} ({sum(superseded.values())} bytes) "
            f"{'is' if one else 'are'} of earlier states of the cache; `ris cache gc` removes "
            f"{'it' if one else 'them'}."
        )
    if others:
        one = len(others) == 1
        yield (
            f"{'1 file' if one else f'{len(others)} files'} ({sum(others.values())} bytes) "
            f"{'belongs' if one else 'belong'} to nothing, for example {min(others)}; `ris cache gc` removes "
            f"{'it' if one else 'them'}."
        )
    if num_unused:
        rows = "1 row holds" if num_unused == 1 else f"{num_unused} rows hold"
        yield f"{rows} features that no image refers to any more."


def _is_table(path: str) -> bool:
    """Whether a file that is not listed was a table of the cache before it grew or shrank."""
    return path.startswith(_TABLES) and path.endswith(".parquet") and not files.is_temporary(path)

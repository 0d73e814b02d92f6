"""What is checked of a cache when it is opened, before any feature is read."""

from __future__ import annotations

import os
import stat
from collections.abc import Mapping
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np

from ris_cache.errors import CacheError, CacheMissError, CorruptShardError, IncompleteCacheError
from ris_cache.store import files, tables
from ris_cache.store.checking import Integrity
from ris_cache.store.manifest import FileEntry, Manifest, load_manifest
from ris_cache.store.shard_files import unreadable

_MAX_LISTED = 10
_MEND = "Mend the cache with `ris cache verify --repair --data DIR`, or restore {} from a copy."


def find_manifest(root: Path) -> Manifest:
    """Return the manifest of a finished cache, or say what the directory is instead.

    Raises:
        CacheMissError, IncompleteCacheError, CacheError, CorruptShardError: as `FeatureCache.open`.
    """
    try:
        return _find_manifest(root)
    except PermissionError as error:
        raise unreadable(Path(error.filename or root), error) from error


def _find_manifest(root: Path) -> Manifest:
    if not root.exists():
        raise CacheMissError(f"There is no cache at {root}. Make one with `ris extract`.", path=root)
    if not root.is_dir():
        raise CacheError(f"{root} is a file, not a cache directory as `ris extract` makes.", path=root)
    if (root / files.MANIFEST_NAME).exists():
        return load_manifest(root)
    if (root / files.EXTRACTION_NAME).exists():
        raise IncompleteCacheError(
            f"The extraction into {root} has not finished. Run `ris extract` again: it goes on where it was.",
            path=root,
        )
    if not any(path.name != files.LOCK_NAME for path in root.iterdir()):
        raise IncompleteCacheError(f"{root} is empty. Make a cache there with `ris extract`.", path=root)
    raise CacheError(
        f"{root} is not a cache: it holds files, but no {files.MANIFEST_NAME}. Point --cache at a directory "
        "that `ris extract` made.",
        path=root,
    )


def require_files(root: Path, manifest: Manifest) -> None:
    """Check that every file listed is there and as long as listed.

    Raises:
        CorruptShardError: naming the files that are not.
    """
    required = [manifest.images.file]
    for entry in manifest.datasets.values():
        required += [entry.expressions_file, entry.instances_file]
    for name in manifest.category_sets:
        required += [f"categories/{name}.safetensors", f"categories/{name}.json"]
    missing = [relative for relative in required if relative not in manifest.files]
    for relative, expected in manifest.files.items():
        try:
            found = os.stat(files.safe_join(root, relative))  # noqa: PTH116 - a third of the time
        except (FileNotFoundError, NotADirectoryError):
            missing.append(relative)
            continue
        if not stat.S_ISREG(found.st_mode):
            raise CorruptShardError(
                f"{root / relative} is not a file. Remove it; then: {_MEND.format('the file')}",
                path=root / relative,
            )
        if found.st_size != expected.bytes:
            raise CorruptShardError(
                f"{root / relative} has {found.st_size} bytes, but the manifest says {expected.bytes}. "
                + _MEND.format("the file"),
                path=root / relative,
                expected=expected.bytes,
                found=found.st_size,
            )
    if missing:
        more = f" and {len(missing) - _MAX_LISTED} more" if len(missing) > _MAX_LISTED else ""
        raise CorruptShardError(
            f"{root} lacks files of its manifest: {', '.join(missing[:_MAX_LISTED])}{more}. "
            + _MEND.format("them"),
            path=root,
            missing=missing,
        )


def has_files(root: Path, entries: Mapping[str, FileEntry]) -> bool:
    """Whether files are there and as long as their entries say."""
    try:
        return all((root / relative).stat().st_size == entry.bytes for relative, entry in entries.items())
    except (FileNotFoundError, NotADirectoryError):
        return False


def read_file(root: Path, manifest: Manifest, relative: str, integrity: Integrity) -> bytes:
    """Read a file whole and compare it with its digest.

    Raises:
        CorruptShardError: it is missing, damaged, or not listed in the manifest.
        CacheError: it may not be read.
    """
    path = files.safe_join(root, relative)
    try:
        content = path.read_bytes()
    except FileNotFoundError as error:
        raise CorruptShardError(
            f"{path} is missing. If `ris cache gc` ran since the cache was opened, open it again; otherwise "
            "restore the file from a copy.",
            path=path,
        ) from error
    except OSError as error:
        raise unreadable(path, error) from error
    entry = manifest.files.get(relative)
    if integrity != "off" and (entry is None or files.digest_of(content).sha256 != entry.sha256):
        raise CorruptShardError(
            f"{path} is damaged: its SHA-256 is not that of the manifest. {_MEND.format('the file')}",
            path=path,
        )
    return content


def read_listed_table(root: Path, manifest: Manifest, relative: str, schema: Any) -> Any:
    """Read a table that a manifest lists.

    Raises:
        CorruptShardError, CacheError: as `read_file`, and a table with other columns.
    """
    content = read_file(root, manifest, relative, "first-open")
    return tables.read_table(BytesIO(content), schema, name=root / relative)


def require_sound_images(path: Path, manifest: Manifest, table: Any) -> None:
    """Check that the table of images makes sense as a map from images to rows."""
    ids, rows = (table.column(name).to_numpy() for name in ("image_id", "row"))
    lengths = table.column("crc32c").combine_chunks().value_lengths().to_numpy()
    present = np.asarray(table.column("status").to_numpy(zero_copy_only=False) == tables.OK)
    problem = None
    if len(np.unique(ids)) < len(ids) or len(np.unique(rows)) < len(rows):
        problem = "names an image or a row twice"
    elif len(rows) and not (rows.min() >= 0 and rows.max() < manifest.rows):
        problem = f"names rows outside 0 to {manifest.rows - 1}"
    elif not (lengths[present] == len(manifest.arrays)).all():
        problem = f"does not give {len(manifest.arrays)} checksums for every image"
    if problem:
        raise CorruptShardError(
            f"{path} {problem}. Restore it from a copy, or extract the cache again into another directory "
            "with `ris extract`.",
            path=path,
        )

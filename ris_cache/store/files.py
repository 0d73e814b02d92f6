"""Files of a cache: atomic writes, digests, paths that cannot leave the directory, and whole updates.

An update of a cache touches several files, and a rename replaces only one. So every file that changes is
first written whole into `pending/`, the manifest last; that manifest is the promise that the update is
complete. `commit_pending` then moves the files into place, the manifest last again, and can be repeated
after a crash at any instant.
"""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import BinaryIO

from ris_cache.errors import ConfigError, CorruptShardError

MANIFEST_NAME = "manifest.json"
PENDING_NAME = "pending"
FEATURES_NAME = "features.zarr"
IMAGES_NAME = "images.parquet"
SAM_HEADS_NAME = "sam_heads.safetensors"
MARKER_NAME = "extraction.json"
_DIRECTORIES = (FEATURES_NAME, PENDING_NAME, "expressions", "instances", "categories")
_BLOCK_BYTES = 1 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class FileDigest:
    """Size in bytes and SHA-256 (lower-case hex) of one file's content."""

    num_bytes: int
    sha256: str


def write_atomically(path: Path, content: bytes | Callable[[BinaryIO], object]) -> None:
    """Write a file so that `path` holds either its old content or all of the new, even after a power cut.

    Args:
        content: the bytes, or a function that writes them to the open file it is given.
    """
    make_directories(path.parent)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            if callable(content):
                content(file)
            else:
                file.write(content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync_directory(path.parent)


def sha256_file(path: Path) -> FileDigest:
    """Digest a file of any size without loading it whole."""
    digest = hashlib.sha256()
    num_bytes = 0
    with path.open("rb") as file:
        while block := file.read(_BLOCK_BYTES):
            digest.update(block)
            num_bytes += len(block)
    return FileDigest(num_bytes=num_bytes, sha256=digest.hexdigest())


def sync_directory(path: Path) -> None:
    """Make renames and new names in a directory survive a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def make_directories(path: Path) -> None:
    """Create a directory and its missing parents, durably."""
    missing: list[Path] = []
    while not path.is_dir():
        missing.append(path)
        path = path.parent
    for directory in reversed(missing):
        directory.mkdir(exist_ok=True)
        sync_directory(directory.parent)


def is_safe_relative(relative: str) -> bool:
    """Say whether a posix path stays below its root: no root, drive, `..`, `.` or backslash in it."""
    if not relative or "\\" in relative or ":" in relative or "\0" in relative:
        return False
    return all(part not in ("", ".", "..") for part in relative.split("/"))


def safe_join(root: Path, relative: str) -> Path:
    """Return the path of a cache's file, refusing any that lies outside the cache.

    Args:
        relative: posix path as the manifest writes it.

    Raises:
        CorruptShardError: the path is not relative and plain, or a symbolic link leads it out of `root`.
    """
    if not is_safe_relative(relative):
        raise CorruptShardError(
            f"The manifest of {root} names the file {relative!r}, which is not a plain relative path. The "
            "manifest is damaged or was not written by ris; extract the cache again with `ris extract`.",
            path=root,
            relative=relative,
        )
    path = root.joinpath(*PurePosixPath(relative).parts)
    if not path.resolve().is_relative_to(root.resolve()):
        raise CorruptShardError(
            f"{path} leads out of the cache {root} through a symbolic link, to {path.resolve()}. A cache "
            "must hold its own files: put the file itself there, or link the whole cache directory instead.",
            path=root,
            relative=relative,
        )
    return path


def has_pending(root: Path) -> bool:
    """Say whether a complete update waits in `root` to be moved into place."""
    return (root / PENDING_NAME / MANIFEST_NAME).is_file()


def commit_pending(root: Path) -> None:
    """Move a complete update from `root/pending` into place, its manifest last."""
    pending = root / PENDING_NAME
    assert has_pending(root), f"{pending} holds no complete update"
    # In order of path: the feature arrays grow before the image table names their new rows.
    for source in sorted(path for path in pending.rglob("*") if path.is_file()):
        relative = source.relative_to(pending)
        if relative.as_posix() != MANIFEST_NAME:
            make_directories((root / relative).parent)
            source.replace(root / relative)
            sync_directory((root / relative).parent)
    (pending / MANIFEST_NAME).replace(root / MANIFEST_NAME)
    sync_directory(root)
    discard_pending(root)


def discard_pending(root: Path) -> None:
    """Remove what is left of an update."""
    pending = root / PENDING_NAME
    if pending.is_dir():
        shutil.rmtree(pending)


def prepare_fresh(root: Path) -> None:
    """Make a directory with the marker of an unfinished extraction, removing what an earlier one left there.

    Raises:
        ConfigError: the directory holds something else.
    """
    if (root / MARKER_NAME).exists():
        for name in _DIRECTORIES:
            if (root / name).is_dir():
                shutil.rmtree(root / name)
    elif root.exists() and any(root.iterdir()):
        raise ConfigError(
            f"{root} holds files but no feature cache. Name a new or empty directory for the cache; nothing "
            "was changed.",
            path=root,
        )
    write_atomically(root / MARKER_NAME, b'{"status": "unfinished"}\n')

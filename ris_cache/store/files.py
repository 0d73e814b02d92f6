"""Files of a cache: their names, atomic writes, digests, and paths that cannot leave the directory."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import BinaryIO

from ris_cache.errors import CorruptShardError

MANIFEST_NAME = "manifest.json"
LOCK_NAME = ".lock"
EXTRACTION_NAME = "extraction"
SAM_HEADS_NAME = "sam_heads.safetensors"
FEATURE_DIRECTORIES = ("features.zarr", "features")
DIRECTORIES = (*FEATURE_DIRECTORIES, "images", "expressions", "instances", "categories")
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


def is_temporary(relative: str) -> bool:
    """Whether a path is that of a file that `write_atomically` has not finished."""
    name = relative.rpartition("/")[2]
    return name.startswith(".") and name.endswith(".tmp")


def sha256_file(path: Path) -> FileDigest:
    """Digest a file of any size without loading it whole."""
    digest = hashlib.sha256()
    num_bytes = 0
    with path.open("rb") as file:
        while block := file.read(_BLOCK_BYTES):
            digest.update(block)
            num_bytes += len(block)
    return FileDigest(num_bytes=num_bytes, sha256=digest.hexdigest())


def digest_of(content: bytes) -> FileDigest:
    """Digest the content of a file."""
    return FileDigest(num_bytes=len(content), sha256=hashlib.sha256(content).hexdigest())


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


def table_file(kind: str, name: str, content: bytes) -> str:
    """Return the path of a table, `<kind>/<name>.<digest>.parquet`, relative to the cache.

    The name holds part of the content's digest, so another content never replaces a file that a reader of an
    older manifest may still open.
    """
    return f"{kind}/{name}.{hashlib.sha256(content).hexdigest()[:12]}.parquet"


def all_files(root: Path) -> dict[str, Path]:
    """Return every file that belongs into a cache's directories, by posix path relative to `root`.

    Locks, manifest and what a running extraction keeps are left out.
    """
    found = {
        path.name: path
        for path in sorted(root.glob("*"))
        if path.name == SAM_HEADS_NAME or is_temporary(path.name)
    }
    for name in DIRECTORIES:
        for directory, _, names in os.walk(root / name):
            for file in (Path(directory, name) for name in sorted(names)):
                found[file.relative_to(root).as_posix()] = file
    return found


def remove_files(root: Path, relatives: Iterable[str]) -> None:
    """Remove files of a cache and the directories that this leaves empty; absent files are passed over."""
    for relative in relatives:
        path = root / relative
        path.unlink(missing_ok=True)
        for parent in path.parents:
            if parent == root or not _remove_if_empty(parent):
                break


def _remove_if_empty(directory: Path) -> bool:
    try:
        directory.rmdir()
    except OSError:  # not empty, or already gone with its own parent
        return False
    return True

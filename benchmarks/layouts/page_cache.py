"""The operating system's page cache: what of a file is in it, and how to empty it of a file."""

from __future__ import annotations

import ctypes
import mmap
import os
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from ris_cache.errors import ConfigError

_BLOCK_BYTES = 8 << 20


def files_below(directory: Path) -> list[Path]:
    """Return every file of a directory tree."""
    return sorted(path for path in directory.rglob("*") if path.is_file())


def write_back(paths: Iterable[Path]) -> None:
    """Wait until files are on the disk."""
    for path in paths:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def drop(paths: Iterable[Path]) -> None:
    """Empty the page cache of files, as far as the file system allows.

    Pages that any process maps stay: close every memory map of the files first.

    Raises:
        ConfigError: the operating system has no such call.
    """
    if not hasattr(os, "posix_fadvise"):
        raise ConfigError("Cold reads are measured with posix_fadvise, which this system lacks; use Linux.")
    for path in paths:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)  # pages not yet written would stay
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(descriptor)


def resident_share(paths: Iterable[Path]) -> float:
    """Return the share of the files' pages that are in the page cache, 1 if they have none.

    Raises:
        OSError: the kernel does not tell.
    """
    resident = total = 0
    for path in paths:
        if path.stat().st_size:
            flags = _pages_in_memory(path)
            resident += int(np.count_nonzero(flags & 1))
            total += len(flags)
    return resident / total if total else 1.0


def fill(paths: Iterable[Path]) -> None:
    """Bring files into the page cache whole, where they are not; some systems evict what lies idle."""
    block = memoryview(bytearray(_BLOCK_BYTES))
    for path in paths:
        if resident_share([path]) < 1:
            with path.open("rb", buffering=0) as file:
                while file.readinto(block):
                    pass


def _pages_in_memory(path: Path) -> np.ndarray[tuple[int], np.dtype[np.uint8]]:
    libc = ctypes.CDLL(None, use_errno=True)
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
        flags = np.zeros(-(-len(mapped) // mmap.PAGESIZE), np.uint8)
        content = np.frombuffer(mapped, np.uint8)
        failed = libc.mincore(
            ctypes.c_void_p(content.ctypes.data), ctypes.c_size_t(len(content)), flags.ctypes
        )
        code = ctypes.get_errno()
        del content  # the map cannot close under a view of it
    if failed:
        raise OSError(code, os.strerror(code), str(path))
    return flags

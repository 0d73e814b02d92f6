"""How much memory there is, and keeping what the process has freed.

glibc serves large blocks by mmap and unmaps them when freed, so each step of a CPU model pays for faulting
the same pages in again. Telling it to keep them makes a training step of the `tiny` preset several times
faster; the price is that resident memory stays at its peak.
"""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Final

_PROC: Final = Path("/proc")
_CGROUPS: Final = Path("/sys/fs/cgroup")
_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_MAX = -1, -2, -4  # from <malloc.h>
_TOP_PAD_BYTES = 64 << 20


def keep_freed_memory() -> bool:
    """Change the allocator's policy for this process; does nothing where the C library is not glibc.

    Returns:
        Whether the policy was changed.
    """
    if not sys.platform.startswith("linux"):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    settings = ((_M_MMAP_MAX, 0), (_M_TRIM_THRESHOLD, 2**31 - 1), (_M_TOP_PAD, _TOP_PAD_BYTES))
    return all(mallopt(option, value) == 1 for option, value in settings)


def return_freed_memory() -> None:
    """Give back to the system what was freed and kept: by Arrow, if it is loaded, and by glibc.

    Reading the tables of a large dataset passes through ten times the memory that is held of them in the end.
    """
    arrow = sys.modules.get("pyarrow")
    if arrow is not None:
        arrow.default_memory_pool().release_unused()
    if sys.platform.startswith("linux"):
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if trim is not None:
            trim(0)


def own_memory() -> int:
    """Return the bytes resident for this process alone; 0 where the system is not Linux.

    What is mapped of files is not counted: it belongs to the page cache.
    """
    try:
        lines = (_PROC / "self" / "status").read_text().splitlines()
    except OSError:  # no Linux
        return 0
    return sum(int(line.split()[1]) << 10 for line in lines if line.startswith("RssAnon:"))


def available_memory() -> int:
    """Return the bytes that programs and page cache can still take.

    On Linux that is what the kernel estimates, or less where a cgroup (version 2) limits this process.
    Elsewhere it is all memory there is.
    """
    free = _values(_PROC / "meminfo").get("MemAvailable:")
    available = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if free is None else free << 10
    return max(0, min([available, *_left_to_cgroups()]))


def _left_to_cgroups() -> Iterator[int]:
    """Yield what is left to the process' cgroup and to those around it, where they have a limit."""
    try:
        lines = (_PROC / "self" / "cgroup").read_text().splitlines()
    except OSError:  # no Linux
        return
    for line in lines:
        if line.startswith("0::"):
            own = _CGROUPS / line.removeprefix("0::").lstrip("/")
            for directory in (own, *own.parents):
                try:
                    limit = (directory / "memory.max").read_text().strip()
                    used = int((directory / "memory.current").read_text())
                except OSError:  # the root has no limit
                    continue
                if limit != "max":
                    # The page cache counts as used, but makes room for whatever comes.
                    files = _values(directory / "memory.stat")
                    cached = files.get("active_file", 0) + files.get("inactive_file", 0)
                    yield int(limit) - used + cached


def _values(path: Path) -> dict[str, int]:
    """Read a file of names and whole numbers, one pair a line; nothing if there is none."""
    try:
        pairs = [line.split() for line in path.read_text().splitlines()]
    except OSError:
        return {}
    return {name: int(value) for name, value, *_ in pairs}

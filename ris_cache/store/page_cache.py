"""Reading files past the page cache.

The disk then writes into the reader's own memory: no processor copies anything, and whatever else lies in
the page cache stays there. It asks for offsets, lengths and addresses that are multiples of `ALIGNMENT`; not
every file system allows it, and where it does not, the file is read as usual.

What is in the page cache already is asked of cachestat(2), or of mincore(2) where the kernel lacks that: it
looks at one page after another, 0.1 ms for a row of 2 MiB. A read with RWF_NOWAIT would tell as well, but on
newer Linux it also starts reading the file ahead into the page cache.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import functools
import mmap
import os
from collections.abc import Callable
from typing import Any, Final

import numpy as np
import numpy.typing as npt

ALIGNMENT: Final = 4096
_CACHESTAT: Final = 451
"""Number of the system call, the same on every architecture but Alpha, which glibc has no name for."""
_O_DIRECT: Final[int] = getattr(os, "O_DIRECT", 0)
"""0 where the operating system has no such flag."""
_REFUSALS: Final = frozenset({errno.EINVAL, errno.EOPNOTSUPP, errno.EFAULT})
"""What a file system or a driver answers that cannot read past the page cache into this memory."""


def may_bypass(offset: int, target: npt.NDArray[Any]) -> bool:
    """Return whether a read is aligned as reading past the page cache asks, on a system that can."""
    return _O_DIRECT != 0 and (offset | target.nbytes | target.ctypes.data) % ALIGNMENT == 0


def read_whole(
    descriptor: int, target: npt.NDArray[np.uint8], offset: int, *, past_page_cache: bool = False
) -> bool:
    """Fill `target` from an open file; what it holds is undefined where the file ends before.

    Args:
        descriptor: used by no one else meanwhile; its flags may change.
        past_page_cache: as far as the file system allows; `may_bypass` must hold then.

    Returns:
        Whether the file was long enough.

    Raises:
        OSError: the disk refuses.
    """
    is_direct = past_page_cache and _set_direct(descriptor, True)
    num_read = 0
    while num_read < len(target):
        try:
            count = os.preadv(descriptor, [target.data[num_read:]], offset + num_read)
        except OSError as error:
            if not is_direct or error.errno not in _REFUSALS:
                raise
            is_direct = False
            _set_direct(descriptor, False)
            continue
        if count == 0:
            return False
        num_read += count
    return True


def count_cached_pages(descriptor: int, start: int, stop: int) -> int | None:
    """Return how many pages of a range of an open file the page cache holds; None if the kernel tells not.

    It tells who owns the file or may write to it, from Linux 6.5 on.
    """
    asked = (ctypes.c_uint64 * 2)(start, stop - start)
    found = (ctypes.c_uint64 * 5)()  # cached, dirty, under write-back, evicted, recently evicted
    failed = _system_call()(_CACHESTAT, descriptor, asked, found, 0)
    return None if failed else found[0]


def is_in_memory(content: npt.NDArray[np.uint8], start: int, stop: int) -> bool:
    """Return whether the page cache holds a range of a mapped file whole; touches no page of it.

    The kernel answers so only to who owns the file or may write to it; all others hear that all is there.

    Args:
        content: uint8[bytes of the file], a view of the map.
    """
    first = start // mmap.PAGESIZE * mmap.PAGESIZE
    flags = np.zeros(-(-(stop - first) // mmap.PAGESIZE), np.uint8)
    failed = _mincore()(content.ctypes.data + first, stop - first, flags.ctypes.data)
    return not failed and bool((flags & 1).all())


def _set_direct(descriptor: int, is_direct: bool) -> bool:
    """Turn reading past the page cache on or off; return whether the file system allowed it."""
    flags = fcntl.fcntl(descriptor, fcntl.F_GETFL)
    try:
        fcntl.fcntl(descriptor, fcntl.F_SETFL, flags | _O_DIRECT if is_direct else flags & ~_O_DIRECT)
    except OSError as error:
        if error.errno not in _REFUSALS:
            raise
        return False
    return True


@functools.cache
def _mincore() -> Callable[[int, int, int], int]:
    function = ctypes.CDLL(None).mincore
    function.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_void_p)
    function.restype = ctypes.c_int
    called: Callable[[int, int, int], int] = function
    return called


@functools.cache
def _system_call() -> Callable[..., int]:
    # PyDLL keeps the interpreter's lock: the answer takes microseconds, getting the lock back longer.
    function = ctypes.PyDLL(None).syscall
    function.argtypes = (ctypes.c_long, ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint)
    function.restype = ctypes.c_long
    called: Callable[..., int] = function
    return called

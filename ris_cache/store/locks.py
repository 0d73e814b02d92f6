"""Locks between processes that end with the process: a killed holder never blocks anybody."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
from pathlib import Path
from types import TracebackType
from typing import Self

from ris_cache.errors import CacheError

_NO_LOCKS = (errno.ENOTSUP, errno.ENOSYS, errno.EINVAL, errno.ENOLCK)
"""What file systems without locks answer; ENOLCK is that of NFS whose server keeps none."""


class FileLock:
    """An advisory lock (flock) on a file, which is created if need be and never removed by this class.

    The kernel drops it when the holder ends, however it ends. Between machines it holds where the file
    system passes flock on (local disks, NFS of Linux 2.6.12 and later, CephFS, Lustre mounted with `flock`).
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._descriptor: int | None = None

    @property
    def is_held(self) -> bool:
        """Whether this object holds the lock."""
        return self._descriptor is not None

    def acquire(self, *, shared: bool = False, wait: bool = True) -> bool:
        """Take the lock, or change it between shared and exclusive.

        Args:
            shared: together with other shared holders.
            wait: until it is free; otherwise try once.

        Returns:
            Whether it is held now.

        Raises:
            CacheError: the file system knows no locks, or the directory may not be written to.
        """
        descriptor = self._descriptor
        if descriptor is None:
            descriptor = self._open()
        operation = (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | (0 if wait else fcntl.LOCK_NB)
        try:
            fcntl.flock(descriptor, operation)
        except BaseException as error:
            os.close(descriptor)
            self._descriptor = None
            if isinstance(error, BlockingIOError):
                return False
            if isinstance(error, OSError) and error.errno in _NO_LOCKS:
                raise CacheError(
                    f"The file system of {self._path.parent} knows no file locks, which keep two writers "
                    "apart. Make the cache on a local disk and copy it, or mount with locks enabled.",
                    path=self._path,
                ) from error
            raise
        self._descriptor = descriptor
        return True

    def _open(self) -> int:
        try:
            return os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        except OSError as error:
            if error.errno not in (errno.EACCES, errno.EPERM, errno.EROFS):
                raise
            raise CacheError(
                f"{self._path.parent} cannot be written to ({error.strerror}). Ask its owner for permission, "
                "or name another directory; reading a cache needs none.",
                path=self._path.parent,
            ) from error

    def release(self) -> None:
        """Give the lock back; nothing happens if it is not held."""
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None

    def __enter__(self) -> Self:
        self.acquire()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.release()

    def __del__(self) -> None:
        with contextlib.suppress(OSError):
            self.release()

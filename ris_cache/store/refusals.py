"""What the operating system refuses a writer, in words that say what to do."""

from __future__ import annotations

import contextlib
import errno
import shutil
from collections.abc import Iterator
from pathlib import Path

from ris_cache.errors import CacheError, DiskFullError


def free_bytes(root: Path) -> int:
    """Return the free space where a cache lies, or would lie."""
    absolute = root.absolute()
    return shutil.disk_usage(next(path for path in (absolute, *absolute.parents) if path.exists())).free


def require_space(root: Path, num_images: int, needed: int) -> None:
    """Refuse to begin what cannot fit.

    Args:
        needed: bytes of the features of so many images.

    Raises:
        CacheError: fewer bytes are free than needed.
    """
    free = free_bytes(root)
    if needed > free:
        unit, name = (2**30, "GiB") if needed >= 2**30 else (2**20, "MiB")
        raise CacheError(
            f"{num_images} images need {needed / unit:.1f} {name} in {root}, where {free / unit:.1f} {name} "
            "are free. Free some space, name a directory on another disk, or ask for fewer.",
            path=root,
            needed=needed,
            free=free,
        )


@contextlib.contextmanager
def explained(root: Path) -> Iterator[None]:
    """Turn a full disk and missing permissions, met while writing a cache, into errors that explain them.

    Raises:
        DiskFullError: no space is left.
        CacheError: a file may not be read or written.
    """
    try:
        yield
    except OSError as error:
        if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
            raise CacheError(
                f"{error.filename or root} may not be read or written ({error.strerror}). Ask its owner for "
                "permission, or name another --cache.",
                path=error.filename,
            ) from error
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        free = free_bytes(root)
        raise DiskFullError(
            f"No space is left for {root} ({free / 2**20:.0f} MiB free). Shards that were finished are kept: "
            "free some space and run the same command again, it goes on from there.",
            path=root,
            free=free,
        ) from error

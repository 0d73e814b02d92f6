"""What backends share: checks of what is written, whole files, errors about shards.

Axes: S rows per shard, n rows present in one shard; what follows the row axis is the array's own.
"""

from __future__ import annotations

import errno
import hashlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import BinaryIO, Final

import numpy as np
import numpy.typing as npt

from ris_cache.errors import CacheError, ConfigError, CorruptShardError, ShapeError
from ris_cache.store.files import FileDigest, is_safe_relative, write_atomically
from ris_cache.store.layout import Array, StoredArray

DTYPE_ATTRIBUTE: Final = "ris:dtype"
"""Attribute that tells other readers of the format what the bits of a uint16 array mean."""

_RESTORE: Final = (
    "Recompute it with `ris cache verify --repair --data DIR`, or restore the file from a copy of the cache."
)


class ShardBackend:
    """What every backend is told of a cache; it touches no file and holds none open."""

    def __init__(
        self, root: Path, arrays: tuple[StoredArray, ...], shard_rows: int, *, reserved: str
    ) -> None:
        """Describe the arrays.

        Args:
            reserved: a name that the format keeps for itself.

        Raises:
            ConfigError: arrays that cannot be laid out.
        """
        check_arrays(arrays, shard_rows, reserved=reserved)
        self._root = root.absolute()
        self._arrays = {array.name: array for array in arrays}
        self._shard_rows = shard_rows

    @property
    def root(self) -> Path:
        """The cache directory, absolute."""
        return self._root

    @property
    def arrays(self) -> tuple[StoredArray, ...]:
        """Every array."""
        return tuple(self._arrays.values())

    @property
    def shard_rows(self) -> int:
        """S."""
        return self._shard_rows


def check_arrays(arrays: tuple[StoredArray, ...], shard_rows: int, reserved: str | None = None) -> None:
    """Refuse arrays that cannot be laid out.

    Args:
        reserved: a name that the format keeps for itself.

    Raises:
        ConfigError: no rows per shard, no array, a name twice or unfit for a file, or an empty row.
    """
    if shard_rows < 1:
        raise ConfigError(f"A shard must have at least 1 row; got {shard_rows}.", shard_rows=shard_rows)
    names = [array.name for array in arrays]
    if not names or len(set(names)) < len(names):
        raise ConfigError(f"A cache needs arrays with names of their own; got {names}.", names=names)
    for array in arrays:
        if "/" in array.name or not is_safe_relative(array.name) or array.name == reserved:
            raise ConfigError(f"{array.name!r} cannot be the name of an array.", name=array.name)
        if any(size < 1 for size in array.shape):
            raise ConfigError(
                f"{array.name}: rows of shape {list(array.shape)} hold nothing.",
                name=array.name,
                shape=array.shape,
            )


def check_content(
    stored: tuple[StoredArray, ...],
    shard_rows: int,
    positions: npt.NDArray[np.int64],
    arrays: Mapping[str, Array],
) -> None:
    """Refuse what does not fit into a shard.

    Args:
        positions: int64[n], as `Backend.write_shard` takes them.
        arrays: [n, ...] of every array.

    Raises:
        ShapeError: positions that do not ascend within the shard; arrays missing, unknown, or of another
            shape, dtype or order.
    """
    ascending = positions.ndim == 1 and bool((np.diff(positions) > 0).all())
    if not ascending or (len(positions) > 0 and not 0 <= positions[0] <= positions[-1] < shard_rows):
        raise ShapeError(
            f"Positions in a shard of {shard_rows} rows must ascend from 0 to at most {shard_rows - 1}; got "
            f"{positions.tolist()}.",
            positions=positions.tolist(),
        )
    names = sorted(array.name for array in stored)
    if names != sorted(arrays):
        raise ShapeError(f"A shard needs the arrays {names}; got {sorted(arrays)}.", found=sorted(arrays))
    for array in stored:
        check_buffer(array, arrays[array.name], len(positions))


def check_buffer(array: StoredArray, buffer: Array, num_rows: int) -> None:
    """Refuse a buffer whose bytes are not those of `num_rows` rows.

    Raises:
        ShapeError: another shape or dtype, or not C-contiguous.
    """
    expected = (num_rows, *array.shape)
    is_contiguous = buffer.flags.c_contiguous
    if buffer.shape != expected or buffer.dtype != array.numpy_dtype or not is_contiguous:
        raise ShapeError(
            f"{array.name}: the buffer must be a C-contiguous {array.dtype}{list(expected)}; got "
            f"{buffer.dtype.str if buffer.dtype.byteorder == '>' else buffer.dtype.name}"
            f"{list(buffer.shape)}{'' if is_contiguous else ', not contiguous'}.",
            name=array.name,
            expected=expected,
            found=buffer.shape,
        )


def as_bytes(array: Array) -> memoryview:
    """View a C-contiguous array as its bytes, without a copy."""
    return array.reshape(-1).view(np.uint8).data


def write_parts(path: Path, parts: Iterable[bytes | memoryview]) -> FileDigest:
    """Write the parts one after another into a file, atomically, and digest them on the way.

    Raises:
        OSError: the disk is full, say; the file is as it was before.
    """
    digest = hashlib.sha256()
    num_bytes = 0

    def write(file: BinaryIO) -> None:
        nonlocal num_bytes
        for part in parts:
            file.write(part)
            digest.update(part)
            num_bytes += len(part)

    write_atomically(path, write)
    return FileDigest(num_bytes=num_bytes, sha256=digest.hexdigest())


def damaged(path: Path, problem: str, **facts: object) -> CorruptShardError:
    """Return the error for a file that contradicts the format; `problem` continues its name."""
    return CorruptShardError(f"{path} {problem}. {_RESTORE}", path=path, problem=problem, **facts)


def unreadable(path: Path, error: OSError, **facts: object) -> CacheError:
    """Return the error for a file that cannot be opened: damage, unless it is the process that may not."""
    if error.errno in (errno.EACCES, errno.EPERM):
        return CacheError(
            f"{path} may not be read ({error.strerror}). Ask its owner for permission to read the cache.",
            path=path,
            **facts,
        )
    if error.errno in (errno.EMFILE, errno.ENFILE):
        return CacheError(
            f"{path} cannot be opened ({error.strerror}). Raise the limit with `ulimit -n`, or read with "
            "fewer files open at once.",
            path=path,
            **facts,
        )
    return damaged(path, f"cannot be opened ({error.strerror or error})", **facts)

"""What the store's parts agree on: stored arrays, shards of rows, and what a backend does.

Axes: S rows per shard, n rows present in one shard; what follows the row axis is the array's own.

A cache holds several arrays with the same rows; row r of each belongs to one image. Shard k holds the rows
k·S to k·S + S - 1. A backend turns one shard of every array into files and says where each row's bytes lie
in them; it knows nothing of images.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal, Protocol

import numpy as np
import numpy.typing as npt

from ris_cache.store.files import FileDigest

Array = npt.NDArray[Any]
ElementType = Literal["float16", "float32", "uint16", "int8"]
Way = Literal["map", "file", "disk"]
"""How rows are read: copied out of memory maps, from the file through the page cache, or past it."""

ABSENT: Final = -1
"""Stands in `RowPlaces.offsets` for a row that the shard does not hold."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredArray:
    """One array of a cache.

    Attributes:
        shape: per row.
        dtype: element type; uint16 holds the bits of bfloat16.
    """

    name: str
    shape: tuple[int, ...]
    dtype: ElementType

    @property
    def numpy_dtype(self) -> np.dtype[Any]:
        """Element type, little-endian."""
        return np.dtype(self.dtype).newbyteorder("<")

    @property
    def row_bytes(self) -> int:
        """Bytes of one row."""
        return math.prod(self.shape) * self.numpy_dtype.itemsize


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class RowPlaces:
    """Where the rows of one array lie in one shard.

    Attributes:
        path: the file.
        offsets: int64[S], first byte of each row in the file, `ABSENT` where there is none. The bytes of a
            row are its elements in C order, little-endian, uncompressed.
    """

    path: Path
    offsets: npt.NDArray[np.int64]


class Backend(Protocol):
    """One way to lay shards out as files. Holds no open file, so it may cross threads, forks and pickles."""

    @property
    def root(self) -> Path:
        """The cache directory."""
        ...

    @property
    def arrays(self) -> tuple[StoredArray, ...]:
        """Every array."""
        ...

    @property
    def shard_rows(self) -> int:
        """S."""
        ...

    def shard_files(self, shard: int) -> tuple[str, ...]:
        """Return the files that a shard consists of, as posix paths relative to the cache."""
        ...

    def write_shard(
        self, shard: int, positions: npt.NDArray[np.int64], arrays: Mapping[str, Array]
    ) -> dict[str, FileDigest]:
        """Write one shard of every array, each file whole and atomically, replacing what is there.

        The same content gives the same bytes. A shard without rows has files too.

        Args:
            positions: int64[n], ascending, in [0, S): row i of every array becomes row
                `shard * S + positions[i]`.
            arrays: [n, ...] of every array, in its dtype, C-contiguous.

        Returns:
            The digest of each of `shard_files`.

        Raises:
            ShapeError: positions or arrays that do not fit.
            OSError: the disk is full, say; whatever was there before is intact.
        """
        ...

    def metadata_files(self, rows: int) -> dict[str, bytes]:
        """Return the files beside the shards that other readers of the format need, for a number of rows.

        By posix path relative to the cache; `rows` is a multiple of S.
        """
        ...

    def locate(self, shard: int) -> dict[str, RowPlaces] | None:
        """Say where the rows of a shard lie, by array name.

        Returns:
            None if rows cannot be read by offset (compressed, say): then only `read_row` can.

        Raises:
            CorruptShardError: a file that is missing, cut short or contradicts itself; the places returned
                lie inside their files.
        """
        ...

    def read_row(self, name: str, row: int) -> Array | None:
        """Read one row through the format's own library: slow; the reference, and the way to compressed rows.

        Returns:
            A new array, or None if the shard does not hold the row.

        Raises:
            CorruptShardError: a file that the library cannot read.
        """
        ...


class FeatureStore(Protocol):
    """What a cache reads from: rows copied into the caller's buffers."""

    def read_rows(
        self,
        rows: Sequence[int] | npt.NDArray[np.int64],
        out: Mapping[str, Array],
        *,
        seen: npt.NDArray[np.int64] | None = None,
        way: Way = "map",
    ) -> npt.NDArray[np.int64]:
        """Copy rows into buffers.

        A file is opened by the first read that needs it and is kept open for later ones. Each opening has a
        number that no other opening has, in this process or in the one that it was forked from.

        Args:
            rows: B rows in any order, repeats allowed.
            out: the arrays wanted, by name: C-contiguous [B, ...] in the array's dtype, filled in place.
            seen: int64[B, arrays], what reading the same rows returned before, 0 for what was never read.
                By `map`, what was read from the same opening is copied out of memory maps, the fastest way to
                what is in the page cache; the rest is read from files, the faster way to what is not. By
                default all is copied out of memory maps.
            way: other than `map`, all is read from files: `file` through the page cache, `disk` past it.

        Returns:
            int64[B, arrays], the opening that each row of each array, as the backend lists them, came from; 0
            for arrays that are not in `out`.

        Raises:
            ShapeError: a buffer that does not fit.
            CacheMissError: an unknown array, a negative row, or a row that holds no image.
            CorruptShardError: a damaged shard.
        """
        ...

    def advise(self, rows: Sequence[int] | npt.NDArray[np.int64], names: Sequence[str]) -> None:
        """Ask the operating system to read rows ahead; returns at once and never fails on a damaged shard."""
        ...

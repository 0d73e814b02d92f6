"""How one feature array lies on disk as Zarr v3, down to the byte.

Axes: R rows of the cache, S rows per shard; what follows the row axis is the feature's own.

In the plain layout one shard is S rows, one inner chunk is one row, and nothing is compressed. A shard file
is the chunks of its present rows in row order, then its index:

    S × (uint64 offset, uint64 bytes), little-endian; both 2**64 - 1 where the row is absent
    uint32 crc32c of the index, little-endian

So a row's bytes lie at an offset known after one small read. Any Zarr reader opens the same files; an absent
row reads there as the fill value, NaN, never as zeros.
"""

from __future__ import annotations

import json
import math
import mmap
import os
import struct
from pathlib import Path
from typing import Any, Final

import google_crc32c
import numpy as np
import numpy.typing as npt

from ris_cache.errors import CacheMissError, CorruptShardError, NonFiniteError, ShapeError

Array = npt.NDArray[Any]
METADATA_NAME: Final = "zarr.json"
ABSENT: Final = 2**64 - 1
_CRC_BYTES: Final = 4
_BLOCK_ELEMENTS: Final = 1 << 20
_BYTES_CODEC: Final = {"name": "bytes", "configuration": {"endian": "little"}}


class ArrayLayout:
    """One array's layout, from its `zarr.json`.

    Attributes:
        path: the array's directory.
        name: the array's name.
        rows: R.
        shape: per row.
        dtype: element type, little-endian.
        shard_rows: S.
        row_bytes: size of one uncompressed row.
        is_plain: whether rows may be read at their offsets; if not, only zarr-python knows how.
    """

    def __init__(self, path: Path) -> None:
        """Read the metadata in an array's directory.

        Raises:
            CorruptShardError: it is missing or damaged.
        """
        self.path = path
        self.name = path.name
        try:
            self._document: dict[str, Any] = json.loads((path / METADATA_NAME).read_bytes())
            self.rows, *shape = (int(size) for size in self._document["shape"])
            self.shape = tuple(shape)
            self.dtype = np.dtype(self._document["data_type"]).newbyteorder("<")
            if self.dtype.kind != "f":
                raise ValueError(f"{self.dtype.name} instead of floating point")
            self.shard_rows = int(self._document["chunk_grid"]["configuration"]["chunk_shape"][0])
        except (OSError, ValueError, TypeError, KeyError, IndexError) as error:
            raise CorruptShardError(
                f"{path / METADATA_NAME} is missing or does not describe an array ({error}). Restore it "
                "from a copy, or extract the cache again with `ris extract`.",
                path=path / METADATA_NAME,
            ) from error
        self.row_bytes = math.prod(self.shape) * self.dtype.itemsize
        self._index_bytes = 16 * self.shard_rows + _CRC_BYTES
        self.is_plain = self._is_plain()

    def _is_plain(self) -> bool:
        document = self._document
        sharding = {
            "chunk_shape": [1, *self.shape],
            "codecs": [_BYTES_CODEC],
            "index_codecs": [_BYTES_CODEC, {"name": "crc32c"}],
            "index_location": "end",
        }
        grid = {"name": "regular", "configuration": {"chunk_shape": [self.shard_rows, *self.shape]}}
        return (
            document.get("zarr_format") == 3
            and document.get("data_type") in ("float16", "float32")
            and document.get("chunk_grid") == grid
            and document.get("chunk_key_encoding") == {"name": "default", "configuration": {"separator": "/"}}
            and document.get("codecs") == [{"name": "sharding_indexed", "configuration": sharding}]
            and not document.get("storage_transformers")
        )

    def shard_name(self, shard_index: int) -> str:
        """Return a shard's posix path relative to the array."""
        return "/".join(["c", str(shard_index), *("0" for _ in self.shape)])

    def metadata(self, rows: int) -> bytes:
        """Return the `zarr.json` of the same array with another number of rows."""
        document = {**self._document, "shape": [rows, *self.shape]}
        return json.dumps(document, indent=2).encode("ascii")

    def absent(self, row: int) -> CacheMissError:
        """Return the error for a row that is not there."""
        return CacheMissError(f"Row {row} of {self.path} holds no image.", path=self.path, row=row)

    def to_stored(self, array: Array, present: npt.NDArray[np.bool_], first_row: int) -> Array:
        """Return the present rows as they are stored.

        Args:
            array: float[n, ...], n ≤ S.
            present: bool[n].
            first_row: row of the cache that array[0] is, for messages.

        Raises:
            NonFiniteError: a present row is not finite, or would not be once stored.
            ShapeError: `array` does not fit.
        """
        num_rows = len(present)
        if array.shape != (num_rows, *self.shape) or not num_rows <= self.shard_rows:
            raise ShapeError(
                f"{self.name}: a shard takes [n ≤ {self.shard_rows}, {', '.join(map(str, self.shape))}] "
                f"with n equal for all arrays and `valid`; got {list(array.shape)} with {num_rows} rows.",
                name=self.name,
                shape=array.shape,
            )
        with np.errstate(over="ignore"):
            stored = np.ascontiguousarray(array if present.all() else array[present], self.dtype)
        for position, row in enumerate(np.flatnonzero(present)):
            if not _is_finite(stored[position]):
                overflows = bool(np.isfinite(array[row]).all())
                largest = float(np.abs(array[row]).max())
                problem = (
                    f"reaches {largest:g}; {self.dtype.name} holds at most {np.finfo(self.dtype).max:g}"
                    if overflows
                    else "holds infinite values or NaN"
                )
                raise NonFiniteError(
                    f"{self.name}: row {first_row + int(row)} {problem}. Nothing of its shard was written. "
                    "Quarantine the image, or "
                    + ("store features as float32." if overflows else "check the encoder and its weights."),
                    name=self.name,
                    row=first_row + int(row),
                    is_overflow=overflows,
                )
        return stored

    def encode_index(self, present: npt.NDArray[np.bool_]) -> bytes:
        """Return the index, checksum included, of a shard that begins with its present rows, in order.

        Args:
            present: bool[n], n ≤ S.
        """
        index = np.full((self.shard_rows, 2), ABSENT, "<u8")
        rows = np.flatnonzero(present)
        index[rows, 0] = np.arange(len(rows), dtype=np.uint64) * self.row_bytes
        index[rows, 1] = self.row_bytes
        content = index.tobytes()
        return content + struct.pack("<I", google_crc32c.value(content))

    def map_shard(self, shard_index: int) -> npt.NDArray[np.uint8]:
        """Map a shard file into memory, read-only; it closes when the last view of it is gone.

        Raises:
            CorruptShardError: missing, unreadable or shorter than its index.
        """
        path = self.path / self.shard_name(shard_index)
        try:
            with path.open("rb") as file:
                if os.fstat(file.fileno()).st_size < self._index_bytes:
                    raise self._corrupt(shard_index, "is shorter than its index")
                return np.frombuffer(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ), np.uint8)
        except OSError as error:
            raise self._corrupt(shard_index, f"cannot be opened ({error.strerror})") from error

    def decode_index(self, shard: npt.NDArray[np.uint8], shard_index: int) -> list[int]:
        """Return the offset of each row of a mapped shard, `ABSENT` where there is none.

        Raises:
            CorruptShardError: the index contradicts its checksum or points outside the chunks.
        """
        content = shard[-self._index_bytes : -_CRC_BYTES].tobytes()
        (stored_crc,) = struct.unpack("<I", shard[-_CRC_BYTES:].tobytes())
        if google_crc32c.value(content) != stored_crc:
            raise self._corrupt(shard_index, "has an index that contradicts its checksum")
        offsets, sizes = np.frombuffer(content, "<u8").reshape(self.shard_rows, 2).T
        present = ~((offsets == ABSENT) & (sizes == ABSENT))
        end_of_chunks = len(shard) - self._index_bytes
        starts_inside = offsets <= max(0, end_of_chunks - self.row_bytes)
        if not (starts_inside & (sizes == self.row_bytes))[present].all() or (
            present.any() and end_of_chunks < self.row_bytes
        ):
            raise self._corrupt(shard_index, "has an index that points outside its rows")
        return [int(offset) for offset in offsets]

    def check_buffer(self, buffer: Array, num_rows: int) -> None:
        """Refuse a buffer that rows cannot be copied into byte by byte.

        Raises:
            ShapeError: another shape or dtype, or not C-contiguous.
        """
        expected = (num_rows, *self.shape)
        if buffer.shape != expected or buffer.dtype != self.dtype or not buffer.flags.c_contiguous:
            raise ShapeError(
                f"The buffer for {self.name} must be a C-contiguous {self.dtype.name}{list(expected)}; got "
                f"{buffer.dtype.name}{list(buffer.shape)}"
                f"{'' if buffer.flags.c_contiguous else ', not contiguous'}.",
                name=self.name,
                expected=expected,
                found=buffer.shape,
            )

    def _corrupt(self, shard_index: int, problem: str) -> CorruptShardError:
        path = self.path / self.shard_name(shard_index)
        return CorruptShardError(
            f"The shard {path} {problem}. Restore the file from a copy, or extract the cache again into "
            "another directory with `ris extract`.",
            path=path,
            shard_index=shard_index,
        )


def read_layouts(path: Path) -> dict[str, ArrayLayout]:
    """Read the layout of every array in a Zarr group, by name.

    Raises:
        CorruptShardError: the group holds no array, or one is damaged.
    """
    directories = sorted(child.parent for child in path.glob(f"*/{METADATA_NAME}"))
    layouts = {directory.name: ArrayLayout(directory) for directory in directories}
    if not layouts:
        raise CorruptShardError(
            f"{path} holds no feature arrays. Restore it from a copy, or extract the cache again "
            "with `ris extract`.",
            path=path,
        )
    return layouts


def _is_finite(row: Array) -> bool:
    """Whether a float16 or float32 row is finite throughout; looked at in blocks that stay in cache."""
    is_half = row.dtype.itemsize == 2
    exponent = 0x7C00 if is_half else 0x7F800000  # all ones only in infinities and NaN
    bits: npt.NDArray[np.uint16 | np.uint32] = row.reshape(-1).view(np.uint16 if is_half else np.uint32)
    blocks = (bits[start : start + _BLOCK_ELEMENTS] for start in range(0, len(bits), _BLOCK_ELEMENTS))
    return not any(((block & exponent) == exponent).any() for block in blocks)

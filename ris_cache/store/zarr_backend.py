"""The Zarr backend: plain Zarr v3 arrays whose rows lie uncompressed at known offsets.

Axes: S rows per shard, n rows present in one shard; what follows the row axis is the array's own.

Shard k of an array is the file `features.zarr/<array>/c/<k>/0/…/0`: its present rows in order, one inner
chunk each, and then its index:

    S × (uint64 offset, uint64 bytes), little-endian; both 2**64 - 1 where the row is absent
    uint32 crc32c of the index, little-endian

So a row's bytes lie at an offset known after one small read. Any Zarr reader opens the same files; an absent
row reads there as the fill value: NaN, or 0 in int8 arrays.

Arrays in any other layout that zarr-python reads (compressed by another tool, say) can be read row by row
but not written. There zarr-python tells neither an absent row nor a missing file from rows of the fill value,
so a row that is the fill value throughout counts as absent. Features are never NaN, so this is exact but for
int8 rows of zeros.
"""

from __future__ import annotations

import json
import math
import os
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import google_crc32c
import numpy as np
import numpy.typing as npt

from ris_cache.errors import ConfigError, CorruptShardError
from ris_cache.store.files import FileDigest
from ris_cache.store.layout import ABSENT, Array, RowPlaces, StoredArray
from ris_cache.store.shard_files import (
    DTYPE_ATTRIBUTE,
    ShardBackend,
    as_bytes,
    check_content,
    damaged,
    unreadable,
    write_parts,
)

GROUP_NAME: Final = "features.zarr"
METADATA_NAME: Final = "zarr.json"
_NO_CHUNK: Final = 2**64 - 1
_CRC_BYTES: Final = 4
_BYTES_CODEC: Final = {"name": "bytes", "configuration": {"endian": "little"}}
_FILL: Final[dict[str, float | int]] = {
    "float16": math.nan,
    "float32": math.nan,
    "uint16": 0x7FC0,  # NaN as bfloat16
    "int8": 0,
}


class ZarrBackend(ShardBackend):
    """Shards as files of Zarr v3 arrays; see `Backend` for what each method does."""

    def __init__(self, root: Path, arrays: tuple[StoredArray, ...], shard_rows: int) -> None:
        """Describe the arrays; no file is touched.

        Raises:
            ConfigError: arrays that cannot be laid out.
        """
        super().__init__(root, arrays, shard_rows, reserved=METADATA_NAME)
        self._index_bytes = 16 * shard_rows + _CRC_BYTES
        self._is_plain: dict[str, bool] = {}

    def __reduce__(self) -> tuple[type[ZarrBackend], tuple[Path, tuple[StoredArray, ...], int]]:
        return ZarrBackend, (self._root, self.arrays, self._shard_rows)

    def shard_files(self, shard: int) -> tuple[str, ...]:
        """Return one file per array."""
        return tuple(self._shard_file(array, shard) for array in self.arrays)

    def write_shard(
        self, shard: int, positions: npt.NDArray[np.int64], arrays: Mapping[str, Array]
    ) -> dict[str, FileDigest]:
        """Write one shard of every array.

        Raises:
            ConfigError: the arrays on disk have another layout, which plain shards would contradict.
            ShapeError: positions or arrays that do not fit.
            OSError: the disk is full, say.
        """
        check_content(self.arrays, self._shard_rows, positions, arrays)
        for array in self.arrays:
            path = self._metadata_path(array)
            if path.is_file() and not self._has_plain_layout(array):
                raise ConfigError(
                    f"{path.parent} is not laid out as ris writes it, so nothing can be added to it. Convert "
                    "the cache with `ris cache convert`, or extract into another directory.",
                    path=path.parent,
                )
        return {
            self._shard_file(array, shard): write_parts(
                self._root / self._shard_file(array, shard),
                (as_bytes(arrays[array.name]), self._encode_index(array, positions)),
            )
            for array in self.arrays
        }

    def metadata_files(self, rows: int) -> dict[str, bytes]:
        """Return the `zarr.json` of the group and of each array."""
        assert rows % self._shard_rows == 0, f"{rows} rows are no whole shards of {self._shard_rows}"
        import zarr  # half a second that reading need not spend

        documents: dict[str, Any] = {}
        group = zarr.create_group(zarr.storage.MemoryStore(documents), zarr_format=3)
        for array in self.arrays:
            group.create_array(
                array.name,
                shape=(rows, *array.shape),
                chunks=(1, *array.shape),
                shards=(self._shard_rows, *array.shape),
                dtype=array.dtype,
                filters=None,
                compressors=None,
                fill_value=_FILL[array.dtype],
                attributes={DTYPE_ATTRIBUTE: "bfloat16"} if array.dtype == "uint16" else None,
            )
        return {f"{GROUP_NAME}/{name}": documents[name].to_bytes() for name in sorted(documents)}

    def locate(self, shard: int) -> dict[str, RowPlaces] | None:
        """Read the shard's indexes, and once the arrays' metadata.

        Returns:
            None if an array has another layout than the plain one.

        Raises:
            CorruptShardError: a file that is missing, cut short or contradicts itself.
            CacheError: a file that may not be opened.
        """
        if not all(self._has_plain_layout(array) for array in self.arrays):
            return None
        return {
            array.name: RowPlaces(
                path=self._root / self._shard_file(array, shard), offsets=self._read_index(array, shard)
            )
            for array in self.arrays
        }

    def read_row(self, name: str, row: int) -> Array | None:
        """Read one row through zarr-python.

        Returns:
            None if the row is absent; in a layout that is not the plain one, if it is the fill value
            throughout.

        Raises:
            CorruptShardError: a file that is missing or that zarr-python cannot read.
            CacheError: a file that may not be opened.
        """
        import zarr

        array = self._arrays[name]
        shard, position = divmod(row, self._shard_rows)
        is_plain = self._has_plain_layout(array)
        if is_plain and self._read_index(array, shard)[position] == ABSENT:
            return None
        path = self._metadata_path(array).parent
        try:
            stored = zarr.open_array(path, mode="r")
            if row >= stored.shape[0]:
                if is_plain:
                    raise ValueError(f"{METADATA_NAME} declares {stored.shape[0]} rows")
                return None
            values = np.ascontiguousarray(stored[row], array.numpy_dtype).reshape(array.shape)
            is_fill = np.array_equal(values, np.full_like(values, stored.fill_value), equal_nan=True)
        # What zarr-python and its codecs raise on damage is not one family.
        except (ValueError, TypeError, RuntimeError, LookupError, OSError, ArithmeticError) as error:
            raise damaged(path, f"cannot be read at row {row} ({error})", shard=shard, row=row) from error
        return None if is_fill and not is_plain else values

    def _shard_file(self, array: StoredArray, shard: int) -> str:
        return "/".join([GROUP_NAME, array.name, "c", str(shard), *("0" for _ in array.shape)])

    def _metadata_path(self, array: StoredArray) -> Path:
        return self._root / GROUP_NAME / array.name / METADATA_NAME

    def _encode_index(self, array: StoredArray, positions: npt.NDArray[np.int64]) -> bytes:
        index = np.full((self._shard_rows, 2), _NO_CHUNK, "<u8")
        index[positions, 0] = np.arange(len(positions), dtype=np.uint64) * array.row_bytes
        index[positions, 1] = array.row_bytes
        content = index.tobytes()
        return content + struct.pack("<I", google_crc32c.value(content))

    def _read_index(self, array: StoredArray, shard: int) -> npt.NDArray[np.int64]:
        """Return the offset of each row, `ABSENT` where there is none; every row lies before the index."""
        path = self._root / self._shard_file(array, shard)
        try:
            with path.open("rb") as file:
                end_of_rows = os.fstat(file.fileno()).st_size - self._index_bytes
                if end_of_rows < 0:
                    raise damaged(path, "is shorter than its index", shard=shard)
                tail = os.pread(file.fileno(), self._index_bytes, end_of_rows)
        except OSError as error:
            raise unreadable(path, error, shard=shard) from error
        if google_crc32c.value(tail[:-_CRC_BYTES]) != int.from_bytes(tail[-_CRC_BYTES:], "little"):
            raise damaged(path, "has an index that contradicts its checksum", shard=shard)
        offsets, sizes = np.frombuffer(tail[:-_CRC_BYTES], "<u8").reshape(self._shard_rows, 2).T
        present = ~((offsets == _NO_CHUNK) & (sizes == _NO_CHUNK))
        has_room = end_of_rows >= array.row_bytes
        is_inside = (sizes == array.row_bytes) & (offsets <= max(0, end_of_rows - array.row_bytes))
        if present.any() and not (has_room and is_inside[present].all()):
            raise damaged(path, "has an index that points outside its rows", shard=shard)
        return np.where(present, offsets.astype(np.int64), ABSENT)

    def _has_plain_layout(self, array: StoredArray) -> bool:
        """Whether the array's metadata on disk is what `metadata_files` writes; looked at once."""
        known = self._is_plain.get(array.name)
        if known is None:
            known = self._is_plain[array.name] = self._compare_metadata(array)
        return known

    def _compare_metadata(self, array: StoredArray) -> bool:
        path = self._metadata_path(array)
        try:
            document = json.loads(path.read_bytes())
            shape, dtype = tuple(document["shape"][1:]), document["data_type"]
        except OSError as error:
            raise unreadable(path, error) from error
        except (ValueError, TypeError, LookupError, RecursionError) as error:
            raise damaged(path, f"does not describe an array ({type(error).__name__}: {error})") from error
        if shape != array.shape or dtype != array.dtype:
            raise CorruptShardError(
                f"{path} describes rows of {dtype}{list(shape)}; the cache holds {array.dtype}"
                f"{list(array.shape)}. Restore the file from a copy of the cache.",
                path=path,
                expected=(array.dtype, array.shape),
                found=(dtype, shape),
            )
        sharding = {
            "chunk_shape": [1, *array.shape],
            "codecs": [{"name": "bytes"} if array.dtype == "int8" else _BYTES_CODEC],
            "index_codecs": [_BYTES_CODEC, {"name": "crc32c"}],
            "index_location": "end",
        }
        grid = {"name": "regular", "configuration": {"chunk_shape": [self._shard_rows, *array.shape]}}
        return (
            document.get("zarr_format") == 3
            and document.get("chunk_grid") == grid
            and document.get("chunk_key_encoding") == {"name": "default", "configuration": {"separator": "/"}}
            and document.get("codecs") == [{"name": "sharding_indexed", "configuration": sharding}]
            and not document.get("storage_transformers")
        )

"""The Zarr v3 backend: shards written whole, rows read straight from the shard files.

Axes: R rows of the cache, S rows per shard, B rows asked for; what follows the row axis is the feature's own.

The files are those of `zarr_layout.py`, so reading a row is a copy out of a memory map: no decoding, and no
memory but the caller's.
"""

from __future__ import annotations

import hashlib
import math
import os
import resource
import shutil
import threading
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO, Final

import numpy as np
import numpy.typing as npt

from ris_cache.errors import CacheMissError, ConfigError, CorruptShardError, ShapeError
from ris_cache.store.files import FileDigest, write_atomically
from ris_cache.store.zarr_layout import ABSENT, METADATA_NAME, Array, ArrayLayout, read_layouts

_MAX_OPEN: Final = 4096


class ZarrShardWriter:
    """Writes shards of every feature array; one writer per directory.

    New shards stay invisible until the arrays' metadata grows over them: `resized_metadata` says what it
    would become, `resize` writes it.
    """

    def __init__(self, path: Path) -> None:
        """Open existing arrays; use `create` for new ones."""
        self._path = path
        self._layouts = read_layouts(path)
        for name, layout in self._layouts.items():
            if not layout.is_plain:
                raise ConfigError(
                    f"{path / name} is not laid out as ris writes it, so nothing can be added to it. Extract "
                    "into another directory.",
                    path=path / name,
                )

    @classmethod
    def create(
        cls, path: Path, shapes: Mapping[str, tuple[int, ...]], dtype: str, shard_rows: int
    ) -> ZarrShardWriter:
        """Make the group and its empty arrays.

        Args:
            shapes: shape per image by array name.
            dtype: float16 or float32.
        """
        import zarr  # half a second that readers of plain arrays need not spend

        if dtype not in ("float16", "float32"):
            raise ConfigError(
                f"Features cannot be stored as {dtype!r}; choose float16 or float32.", dtype=dtype
            )
        group = zarr.create_group(path, zarr_format=3)
        for name, shape in shapes.items():
            group.create_array(
                name,
                shape=(0, *shape),
                chunks=(1, *shape),
                shards=(shard_rows, *shape),
                dtype=dtype,
                filters=None,
                compressors=None,
                fill_value=math.nan,
            )
        return cls(path)

    @property
    def rows(self) -> int:
        """R that the metadata on disk declares."""
        return next(iter(self._layouts.values())).rows

    @property
    def shard_rows(self) -> int:
        """S."""
        return next(iter(self._layouts.values())).shard_rows

    def write_shard(
        self, shard_index: int, arrays: Mapping[str, Array], valid: npt.NDArray[np.bool_] | None = None
    ) -> dict[str, FileDigest]:
        """Write one shard of every array, each file whole and atomically.

        Args:
            arrays: float[n, ...] of every array, n ≤ S; row i becomes row shard_index · S + i.
            valid: bool[n], false where the row holds no image; such rows, and those past n, stay absent.

        Returns:
            The digest of each file written, by its posix path relative to the group.

        Raises:
            NonFiniteError: a valid row is, or would be stored as, infinite or not a number somewhere; nothing
                was written.
            ShapeError: an array of another shape, or arrays missing.
        """
        if arrays.keys() != self._layouts.keys():
            raise ShapeError(
                f"A shard needs the arrays {sorted(self._layouts)}; got {sorted(arrays)}.",
                found=sorted(arrays),
            )
        present = np.ones(len(next(iter(arrays.values()))), np.bool_) if valid is None else valid
        stored = {
            name: self._layouts[name].to_stored(array, present, shard_index * self.shard_rows)
            for name, array in arrays.items()
        }
        digests: dict[str, FileDigest] = {}
        for name, chunks in stored.items():
            relative = self._layouts[name].shard_name(shard_index)
            index = self._layouts[name].encode_index(present)
            digest = hashlib.sha256(chunks.data)
            digest.update(index)

            def write(file: BinaryIO, chunks: Array = chunks, index: bytes = index) -> None:
                file.write(chunks.data)
                file.write(index)

            write_atomically(self._path / name / relative, write)
            digests[f"{name}/{relative}"] = FileDigest(
                num_bytes=chunks.nbytes + len(index), sha256=digest.hexdigest()
            )
        return digests

    def resized_metadata(self, rows: int) -> dict[str, bytes]:
        """Return the arrays' metadata files for more rows, by posix path relative to the group.

        Args:
            rows: a multiple of S, not fewer than now.
        """
        if rows % self.shard_rows or rows < self.rows:
            raise ConfigError(
                f"{self._path} has {self.rows} rows and grows by whole shards of {self.shard_rows}; {rows} "
                "is no such number.",
                rows=rows,
            )
        return {f"{name}/{METADATA_NAME}": layout.metadata(rows) for name, layout in self._layouts.items()}

    def resize(self, rows: int) -> None:
        """Grow every array to `rows`, a multiple of S."""
        for relative, content in self.resized_metadata(rows).items():
            write_atomically(self._path / relative, content)
        self._layouts = read_layouts(self._path)

    def discard_beyond(self, rows: int) -> None:
        """Delete shards past `rows`, left by a writer that never finished."""
        for name in self._layouts:
            for directory in (self._path / name / "c").glob("*"):
                if directory.name.isdigit() and int(directory.name) * self.shard_rows >= rows:
                    shutil.rmtree(directory)


class ZarrShardReader:
    """Reads rows into the caller's buffers; safe to share between threads, processes and pickles.

    Nothing is opened before the first read, and nothing opened crosses a fork. Arrays in the plain layout are
    copied out of memory maps; any other layout (compressed, say) goes through zarr-python, slower.
    """

    def __init__(self, path: Path, max_open: int | None = None) -> None:
        """Read the metadata of every array.

        Args:
            max_open: most shard files mapped at once; by default half of the files the process may open.
        """
        self._path = path.absolute()
        self._layouts = read_layouts(self._path)
        self._max_open = max_open
        self._process: _ProcessState | None = None

    def __reduce__(self) -> tuple[type[ZarrShardReader], tuple[Path, int | None]]:
        return ZarrShardReader, (self._path, self._max_open)

    @property
    def rows(self) -> int:
        """R, rows of every array."""
        return next(iter(self._layouts.values())).rows

    @property
    def dtype(self) -> np.dtype[Any]:
        """Element type of every array, little-endian."""
        dtype: np.dtype[Any] = next(iter(self._layouts.values())).dtype
        return dtype

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape per row by array name."""
        return {name: layout.shape for name, layout in self._layouts.items()}

    @property
    def num_open(self) -> int:
        """Shard files mapped in this process now."""
        return len(self._state().maps)

    def read_rows(self, rows: Sequence[int] | npt.NDArray[np.int64], out: Mapping[str, Array]) -> None:
        """Copy rows into buffers.

        Args:
            rows: B rows in any order, repeats allowed.
            out: the arrays wanted: C-contiguous [B, ...] of the stored dtype each, filled in place.

        Raises:
            ShapeError: a buffer that does not fit.
            CacheMissError: a row outside the arrays, or one that holds no image.
            CorruptShardError: a shard that is missing, cut short, or contradicts its checksum.
        """
        state = self._state()
        numbers = [int(row) for row in rows]
        for row in numbers:
            if not 0 <= row < self.rows:
                raise CacheMissError(f"{self._path} has no row {row}; it has {self.rows}.", row=row)
        for name, buffer in out.items():
            layout = self._layouts.get(name)
            if layout is None:
                raise CacheMissError(
                    f"{self._path} has no array {name!r}; known: {sorted(self._layouts)}.", name=name
                )
            layout.check_buffer(buffer, len(numbers))
            if not layout.is_plain:
                self._read_through_zarr(state, layout, numbers, buffer)
                continue
            flat = buffer.reshape(len(numbers), math.prod(layout.shape)).view(np.uint8)
            for position, row in enumerate(numbers):
                shard, offset = state.locate(layout, row)
                np.copyto(flat[position], shard[offset : offset + layout.row_bytes])

    def _read_through_zarr(
        self, state: _ProcessState, layout: ArrayLayout, rows: list[int], buffer: Array
    ) -> None:
        for position, row in enumerate(rows):
            try:
                buffer[position] = state.open_with_zarr(layout)[row]
            except (ValueError, TypeError, RuntimeError, OSError) as error:
                raise CorruptShardError(
                    f"{layout.path} cannot be read at row {row}: {error}. Restore the file from a copy.",
                    path=layout.path,
                    row=row,
                ) from error
            # zarr-python fills in absent rows; finite values are all a writer ever stores.
            if np.isnan(buffer[position]).all():
                raise layout.absent(row)

    def _state(self) -> _ProcessState:
        if self._process is None or self._process.pid != os.getpid():
            self._process = _ProcessState(self._max_open)
        return self._process


class _ProcessState:
    """What one process has opened: shard indexes (kept) and memory maps (the most recently used)."""

    def __init__(self, max_open: int | None) -> None:
        self.pid = os.getpid()
        self._max_open = max_open or _default_max_open()
        self._lock = threading.Lock()
        self._indexes: dict[tuple[str, int], list[int]] = {}
        self._zarr_arrays: dict[str, Any] = {}
        self.maps: OrderedDict[tuple[str, int], npt.NDArray[np.uint8]] = OrderedDict()

    def locate(self, layout: ArrayLayout, row: int) -> tuple[npt.NDArray[np.uint8], int]:
        """Return the bytes of a row's shard and the row's offset in them."""
        shard_index, position = divmod(row, layout.shard_rows)
        key = (layout.name, shard_index)
        with self._lock:
            shard = self.maps.get(key)
            if shard is None:
                shard = layout.map_shard(shard_index)
                # A map dropped here closes once the last thread that copies from it lets go.
                while len(self.maps) >= self._max_open:
                    self.maps.popitem(last=False)
                self.maps[key] = shard
            else:
                self.maps.move_to_end(key)
            index = self._indexes.get(key)
            if index is None:
                index = self._indexes[key] = layout.decode_index(shard, shard_index)
        offset = index[position]
        if offset == ABSENT:
            raise layout.absent(row)
        return shard, offset

    def open_with_zarr(self, layout: ArrayLayout) -> Any:
        with self._lock:
            if layout.name not in self._zarr_arrays:
                import zarr

                self._zarr_arrays[layout.name] = zarr.open_array(layout.path, mode="r")
            return self._zarr_arrays[layout.name]


def _default_max_open() -> int:
    """Half of the files that the process may open: each map holds a descriptor, and others need some too."""
    limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return _MAX_OPEN if limit == resource.RLIM_INFINITY else max(1, min(_MAX_OPEN, limit // 2))

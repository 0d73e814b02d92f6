"""The HDF5 backend: one plain HDF5 file per shard, its rows uncompressed at known offsets.

Axes: S rows per shard, n rows present in one shard; what follows the row axis is the array's own.

Shard k is the file `features/<k as five digits>.h5`. It holds one contiguous data set [n, ...] per array, the
present rows packed in order, and `rows`, int64[n]: the row of the cache that each is. The data sets begin at
multiples of the page size. Any HDF5 reader since 1.8 opens the file.

The library lays the file out and writes everything but the rows; the rows are then written between its parts.
So a full disk is an ordinary error of one write, not of closing a file inside the library, and no copy of the
rows is made. The format of HDF5 1.8 is asked for because it puts a checksum on every piece of metadata; and
`rows` lies in that metadata, as long as it fits.

Data sets in another storage layout (repacked with chunks or compression) can be read row by row.
"""

from __future__ import annotations

import io
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import h5py
import numpy as np
import numpy.typing as npt
from h5py import h5d, h5f, h5fd, h5p, h5s, h5t

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

DIRECTORY_NAME: Final = "features"
ROWS_NAME: Final = "rows"
FORMAT: Final = b"ris-features"
_SIGNATURE: Final = b"\x89HDF\r\n\x1a\n"
_PAGE_BYTES: Final = 4096
_MAX_COMPACT_BYTES: Final = 1 << 15  # HDF5 allows just under 64 KiB in an object's header


class Hdf5Backend(ShardBackend):
    """Shards as HDF5 files; see `Backend` for what each method does."""

    def __init__(self, root: Path, arrays: tuple[StoredArray, ...], shard_rows: int) -> None:
        """Describe the arrays; no file is touched.

        Raises:
            ConfigError: arrays that cannot be laid out.
        """
        super().__init__(root, arrays, shard_rows, reserved=ROWS_NAME)

    def __reduce__(self) -> tuple[type[Hdf5Backend], tuple[Path, tuple[StoredArray, ...], int]]:
        return Hdf5Backend, (self._root, self.arrays, self._shard_rows)

    def shard_files(self, shard: int) -> tuple[str, ...]:
        """Return the one file of a shard."""
        return (f"{DIRECTORY_NAME}/{shard:05d}.h5",)

    def write_shard(
        self, shard: int, positions: npt.NDArray[np.int64], arrays: Mapping[str, Array]
    ) -> dict[str, FileDigest]:
        """Write one shard of every array.

        Raises:
            ShapeError: positions or arrays that do not fit.
            OSError: the disk is full, say.
        """
        check_content(self.arrays, self._shard_rows, positions, arrays)
        skeleton, offsets = self._lay_out(shard, positions)
        (relative,) = self.shard_files(shard)
        return {relative: write_parts(self._root / relative, _fill(skeleton, offsets, arrays))}

    def metadata_files(self, rows: int) -> dict[str, bytes]:
        """Return nothing: each shard describes itself."""
        assert rows % self._shard_rows == 0, f"{rows} rows are no whole shards of {self._shard_rows}"
        return {}

    def locate(self, shard: int) -> dict[str, RowPlaces] | None:
        """Read the shard's metadata.

        Returns:
            None if a data set has another storage layout than the contiguous one.

        Raises:
            CorruptShardError: a file that is missing, cut short or contradicts itself.
            CacheError: a file that may not be opened.
        """
        with self._open(shard) as opened:
            places = {}
            for array in self.arrays:
                data_set = opened.data_sets[array.name]
                if data_set.id.get_create_plist().get_layout() != h5d.CONTIGUOUS:
                    return None
                start = data_set.id.get_offset() if len(opened.positions) else 0
                num_bytes = len(opened.positions) * array.row_bytes
                if start is None or not 0 <= start <= opened.num_bytes - num_bytes:
                    raise ValueError(f"the rows of {array.name} lie outside the file")
                offsets = np.full(self._shard_rows, ABSENT, np.int64)
                offsets[opened.positions] = start + np.arange(len(opened.positions)) * array.row_bytes
                places[array.name] = RowPlaces(path=opened.path, offsets=offsets)
            return places

    def read_row(self, name: str, row: int) -> Array | None:
        """Read one row through h5py.

        Raises:
            CorruptShardError: a file that is missing or that h5py cannot read.
            CacheError: a file that may not be opened.
        """
        array = self._arrays[name]
        shard, position = divmod(row, self._shard_rows)
        with self._open(shard) as opened:
            (found,) = np.nonzero(opened.positions == position)
            if not len(found):
                return None
            values = opened.data_sets[name][int(found[0])]
            return np.asarray(values, array.numpy_dtype).reshape(array.shape)

    def _lay_out(
        self, shard: int, positions: npt.NDArray[np.int64]
    ) -> tuple[_WrittenParts, list[tuple[int, str]]]:
        """Let the library write a shard without its rows.

        Returns:
            All that it wrote, and where the rows of each array go, ascending.
        """
        skeleton = _WrittenParts()
        access = h5p.create(h5p.FILE_ACCESS)
        access.set_fileobj_driver(h5fd.fileobj_driver, skeleton)
        access.set_libver_bounds(h5f.LIBVER_V18, h5f.LIBVER_V18)
        access.set_alignment(1, _PAGE_BYTES)
        creation = h5p.create(h5p.FILE_CREATE)
        creation.set_obj_track_times(False)
        offsets = []
        with h5py.File(h5f.create(b"shard", h5f.ACC_TRUNC, creation, access)) as file:
            # Numpy's bytes are stored with a fixed length; a longer kind would lie where no checksum is.
            file.attrs["format"] = np.bytes_(FORMAT)
            file.attrs["shard"] = np.int64(shard)
            file.attrs["shard_rows"] = np.int64(self._shard_rows)
            is_small = positions.nbytes <= _MAX_COMPACT_BYTES
            rows = _create(
                file, ROWS_NAME, positions.shape, np.dtype("<i8"), h5d.COMPACT if is_small else h5d.CONTIGUOUS
            )
            rows[...] = shard * self._shard_rows + positions
            for array in self.arrays:
                shape = (len(positions), *array.shape)
                data_set = _create(file, array.name, shape, array.numpy_dtype, h5d.CONTIGUOUS)
                if array.dtype == "uint16":
                    data_set.attrs[DTYPE_ATTRIBUTE] = np.bytes_(b"bfloat16")
                if len(positions):
                    offsets.append((data_set.id.get_offset(), array.name))
        return skeleton, sorted(offsets)

    @contextmanager
    def _open(self, shard: int) -> Iterator[_OpenShard]:
        """Open and check a shard; what h5py raises on the way and inside becomes a `CorruptShardError`."""
        path = self._root / self.shard_files(shard)[0]
        try:
            with path.open("rb") as plain:
                signature = plain.read(len(_SIGNATURE))
                num_bytes = plain.seek(0, io.SEEK_END)
        except OSError as error:
            raise unreadable(path, error, shard=shard) from error
        if signature != _SIGNATURE:
            raise damaged(path, "is not an HDF5 file", shard=shard)
        try:
            # Shards are replaced, never changed, so there is nothing to lock; some file systems cannot.
            with h5py.File(path, "r", locking=False) as file:
                yield self._check(shard, path, num_bytes, file)
        except (OSError, RuntimeError, LookupError, ValueError, TypeError, ArithmeticError) as error:
            raise damaged(path, f"cannot be read ({error})", shard=shard) from error

    def _check(self, shard: int, path: Path, num_bytes: int, file: Any) -> _OpenShard:
        """Read what a shard says of itself.

        Raises:
            ValueError: it is not what `write_shard` writes; h5py raises others.
        """
        found = tuple(file.attrs[name] for name in ("format", "shard", "shard_rows"))
        if found != (FORMAT, shard, self._shard_rows):
            raise ValueError(f"it is shard {found[1]} of {found[2]} rows in the format {found[0]!r}")
        rows = _data_set(file, ROWS_NAME)
        if rows.ndim != 1 or rows.dtype != np.dtype("<i8") or not len(rows) <= self._shard_rows:
            raise ValueError(f"{ROWS_NAME} is {rows.dtype}{list(rows.shape)}")
        positions = rows[...] - shard * self._shard_rows
        if len(positions) and not (
            (np.diff(positions) > 0).all() and 0 <= positions[0] <= positions[-1] < self._shard_rows
        ):
            raise ValueError(f"{ROWS_NAME} does not ascend within the shard")
        data_sets = {name: _data_set(file, name) for name in self._arrays}
        for name, array in self._arrays.items():
            expected = (len(positions), *array.shape)
            if data_sets[name].shape != expected or data_sets[name].dtype != array.numpy_dtype:
                raise ValueError(
                    f"{name} is {data_sets[name].dtype}{list(data_sets[name].shape)}; the cache holds "
                    f"{array.dtype}{list(expected)}"
                )
        return _OpenShard(path=path, num_bytes=num_bytes, positions=positions, data_sets=data_sets)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _OpenShard:
    """A shard whose metadata has been checked, while its file is open.

    Attributes:
        num_bytes: of the file.
        positions: int64[n], place in the shard of each present row.
        data_sets: h5py data sets by array name, [n, ...] each.
    """

    path: Path
    num_bytes: int
    positions: npt.NDArray[np.int64]
    data_sets: dict[str, Any]


class _WrittenParts(io.RawIOBase):
    """A file in memory that keeps only what is written to it; between the parts lie zeros.

    Attributes:
        num_bytes: length of the file.
    """

    def __init__(self) -> None:
        self.num_bytes = 0
        self._parts: list[tuple[int, bytes]] = []  # later ones lie over earlier ones
        self._cursor = 0

    def content(self, start: int, stop: int) -> bytes:
        """Return the bytes from `start` to before `stop`."""
        window = bytearray(stop - start)
        for offset, part in self._parts:
            first, last = max(start, offset), min(stop, offset + len(part))
            if first < last:
                window[first - start : last - start] = part[first - offset : last - offset]
        return bytes(window)

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._cursor, io.SEEK_END: self.num_bytes}[whence]
        self._cursor = base + offset
        return self._cursor

    def tell(self) -> int:
        return self._cursor

    def write(self, content: Any) -> int:
        part = bytes(content)
        self._parts.append((self._cursor, part))
        self._cursor += len(part)
        self.num_bytes = max(self.num_bytes, self._cursor)
        return len(part)

    def readinto(self, buffer: Any) -> int:
        stop = max(self._cursor, min(self._cursor + len(buffer), self.num_bytes))
        buffer[: stop - self._cursor] = self.content(self._cursor, stop)
        num_read, self._cursor = stop - self._cursor, stop
        return num_read

    def truncate(self, size: int | None = None) -> int:
        self.num_bytes = self._cursor if size is None else size
        return self.num_bytes


def _fill(
    skeleton: _WrittenParts, offsets: list[tuple[int, str]], arrays: Mapping[str, Array]
) -> Iterator[bytes | memoryview]:
    """Yield a file from its first byte to its last, the rows of the arrays in their places."""
    position = 0
    for offset, name in offsets:
        assert offset >= position, f"{name} would lie over what comes before it"
        assert offset % _PAGE_BYTES == 0, f"{name} would lie at {offset}"
        yield skeleton.content(position, offset)
        yield as_bytes(arrays[name])
        position = offset + arrays[name].nbytes
    if position < skeleton.num_bytes:
        yield skeleton.content(position, skeleton.num_bytes)


def _create(file: Any, name: str, shape: tuple[int, ...], dtype: np.dtype[Any], layout: int) -> Any:
    """Make a data set whose space is set aside at once and holds nothing yet."""
    creation = h5p.create(h5p.DATASET_CREATE)
    creation.set_layout(layout)
    creation.set_alloc_time(h5d.ALLOC_TIME_EARLY)
    creation.set_fill_time(h5d.FILL_TIME_NEVER)
    creation.set_obj_track_times(False)
    space = h5s.create_simple(shape)
    return h5py.Dataset(h5d.create(file.id, name.encode(), h5t.py_create(dtype), space, creation))


def _data_set(file: Any, name: str) -> Any:
    """Return a data set that lies in the file itself."""
    if name not in file:
        raise ValueError(f"{name} is missing")
    if not isinstance(file.get(name, getlink=True), h5py.HardLink):
        raise ValueError(f"{name} is only a link")
    data_set = file[name]
    if not isinstance(data_set, h5py.Dataset):
        raise ValueError(f"{name} is no data set")
    if data_set.id.get_create_plist().get_external_count() or data_set.is_virtual:
        raise ValueError(f"the values of {name} lie in other files")
    return data_set

"""Reading rows out of the shard files: out of memory maps, or at the places that the maps tell of.

Axes: S rows per shard, B rows asked for; what follows the row axis is the array's own.

Once a backend has said where the rows of a shard lie, reading one is a copy from the page cache to the
caller's buffer: no decoding, no library call, and no memory but the caller's. Rows that a backend cannot
locate (compressed, say) are read through the format's own library, slower.
"""

from __future__ import annotations

import itertools
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from typing import Final

import numpy as np
import numpy.typing as npt

from ris_cache.errors import CacheMissError, ShapeError
from ris_cache.store.layout import ABSENT, Array, Backend, StoredArray, Way
from ris_cache.store.maps import (
    MappedFile,
    ProcessState,
    default_max_open,
    next_opening,
    raise_file_limit,
    with_room,
)
from ris_cache.store.shard_files import check_buffer

_MAX_HELD: Final = 64


class MappedReader:
    """A `FeatureStore` over the files of any backend; safe to share between threads, processes and pickles.

    Nothing is opened before the first read, and nothing opened crosses a fork. A shard that is replaced
    while it is mapped keeps its old bytes in this reader until its map is dropped. All readers of a process
    together map no more than half of the files that it may open; the least recently used maps go first.
    """

    def __init__(self, backend: Backend, max_open: int | None = None) -> None:
        """Read nothing yet.

        Args:
            max_open: most shard files that this reader maps at once; by default as many as all may.
        """
        raise_file_limit()
        self._backend = backend
        self._arrays = {array.name: array for array in backend.arrays}
        self._max_open = max_open
        self._process: ProcessState | None = None

    def __reduce__(self) -> tuple[type[MappedReader], tuple[Backend, int | None]]:
        return MappedReader, (self._backend, self._max_open)

    @property
    def backend(self) -> Backend:
        """What lays the files out."""
        return self._backend

    @property
    def num_open(self) -> int:
        """Shard files mapped in this process now."""
        return len(self._state().maps)

    def read_rows(
        self,
        rows: Sequence[int] | npt.NDArray[np.int64],
        out: Mapping[str, Array],
        *,
        seen: npt.NDArray[np.int64] | None = None,
        way: Way = "map",
    ) -> npt.NDArray[np.int64]:
        """Copy rows into buffers.

        Args:
            rows: B rows in any order, repeats allowed.
            out: the arrays wanted, by name: C-contiguous [B, ...] in the array's dtype, filled in place.
            seen: int64[B, arrays], what reading the same rows returned before, 0 for what was never read;
                only `map` looks at it. What was read from the same opening is copied out of its map, by
                default all is; the rest is read as `file` does.
            way: `map` copies fastest what is in the page cache, but fetches what is not page by page. `file`
                fetches that in one piece, and costs a little more where all is there. `disk` takes rows that
                the page cache holds from there and reads the others past it, leaving nothing in it; rows or
                buffers not aligned to 4096 bytes it reads as `file` does.

        Returns:
            int64[B, arrays], the opening that each row of each array of the backend came from; 0 for arrays
            that are not in `out`. Reading through the format's library is an opening each time.

        Raises:
            ShapeError: a buffer that does not fit.
            CacheMissError: an unknown array, a negative row, or a row that holds no image.
            CorruptShardError: a damaged shard, or one that is not there.
            CacheError: a file that may not be opened.
        """
        state = self._state()
        numbers = self._numbers(rows)
        targets = [self._target(name, buffer, len(numbers)) for name, buffer in out.items()]
        openings = np.zeros((len(numbers), len(self._arrays)), np.int64)
        seen_openings = None if seen is None else seen.tolist()
        past_page_cache = way == "disk"
        shard_rows = self._backend.shard_rows
        max_held = min(_MAX_HELD, default_max_open() // 8)
        held: dict[tuple[int, str], tuple[MappedFile, npt.NDArray[np.int64]] | None] = {}
        for position, row in enumerate(numbers):
            shard, place = divmod(row, shard_rows)
            if len(held) > max_held:  # what is held here stays open, even if it is dropped meanwhile
                held.clear()
            for column, array, buffer, flat in targets:
                key = shard, array.name
                if key not in held:
                    held[key] = state.find(*key)
                found = held[key]
                if found is None:
                    with_room(self._read_through_library, array, row, buffer[position : position + 1])
                    openings[position, column] = next_opening()
                    continue
                mapped, offsets = found
                offset = offsets.item(place)
                if offset == ABSENT:
                    raise self._absent(row)
                openings[position, column] = mapped.opening
                through_map = way == "map" and (
                    seen_openings is None or seen_openings[position][column] == mapped.opening
                )
                if through_map or not mapped.read(offset, flat[position], past_page_cache=past_page_cache):
                    np.copyto(flat[position], mapped.content[offset : offset + flat.shape[1]])
        return openings

    def advise(self, rows: Sequence[int] | npt.NDArray[np.int64], names: Sequence[str]) -> None:
        """Ask the operating system to read rows ahead; it does so while this process goes on.

        Damaged shards and absent rows are passed over: reading them is what reports them.

        Raises:
            CacheMissError: an unknown array or a negative row.
        """
        state = self._state()
        arrays = [self._array(name) for name in names]
        by_shard = sorted(divmod(row, self._backend.shard_rows) for row in set(self._numbers(rows)))
        for shard, places in itertools.groupby(by_shard, key=lambda place: place[0]):
            state.advise(shard, [place for _, place in places], arrays)

    def _target(
        self, name: str, buffer: Array, num_rows: int
    ) -> tuple[int, StoredArray, Array, npt.NDArray[np.uint8]]:
        """Return the array's place among all, the array, its buffer, and the same as [B, bytes of a row]."""
        array = self._array(name)
        check_buffer(array, buffer, num_rows)
        if not buffer.flags.writeable:
            raise ShapeError(f"{name}: the buffer must be writable.", name=name)
        flat = buffer.reshape(num_rows, math.prod(array.shape)).view(np.uint8)
        return list(self._arrays).index(name), array, buffer, flat

    def _read_through_library(self, array: StoredArray, row: int, target: Array) -> None:
        values = self._backend.read_row(array.name, row)
        if values is None:
            raise self._absent(row)
        np.copyto(target, values)

    def _array(self, name: str) -> StoredArray:
        array = self._arrays.get(name)
        if array is None:
            raise CacheMissError(
                f"{self._backend.root} has no array {name!r}; known: {sorted(self._arrays)}.", name=name
            )
        return array

    def _numbers(self, rows: Iterable[int] | npt.NDArray[np.int64]) -> list[int]:
        numbers = [int(row) for row in rows]
        for row in numbers:
            if row < 0:
                raise CacheMissError(f"{self._backend.root} has no row {row}.", row=row)
        return numbers

    def _absent(self, row: int) -> CacheMissError:
        return CacheMissError(
            f"Row {row} of {self._backend.root} holds no image.", path=self._backend.root, row=row
        )

    def _state(self) -> ProcessState:
        if self._process is None or self._process.pid != os.getpid():
            self._process = ProcessState(self._backend, self._max_open)
        return self._process

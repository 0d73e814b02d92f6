"""Reading rows out of memory maps of the shard files.

Axes: S rows per shard, B rows asked for; what follows the row axis is the array's own.

Once a backend has said where the rows of a shard lie, reading one is a copy from the page cache to the
caller's buffer: no decoding, no library call, and no memory but the caller's. Rows that a backend cannot
locate (compressed, say) are read through the format's own library, slower.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import itertools
import math
import mmap
import os
import resource
import threading
import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final, NamedTuple, TypeVar

import numpy as np
import numpy.typing as npt

from ris_cache.errors import CacheError, CacheMissError, ShapeError
from ris_cache.store.backends import check_buffer, damaged, unreadable
from ris_cache.store.layout import ABSENT, Array, Backend, StoredArray

_T = TypeVar("_T")
_MAX_OPEN: Final = 4096
_MAX_HELD: Final = 64
_ATTEMPTS: Final = 10
_ADVISED_BYTES: Final = 1 << 17
"""Linux reads ahead no more than the device's window for one call, however long; this is the usual window."""


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
        _raise_file_limit()
        self._backend = backend
        self._arrays = {array.name: array for array in backend.arrays}
        self._max_open = max_open
        self._process: _ProcessState | None = None

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
    ) -> npt.NDArray[np.int64]:
        """Copy rows into buffers.

        Args:
            rows: B rows in any order, repeats allowed.
            out: the arrays wanted, by name: C-contiguous [B, ...] in the array's dtype, filled in place.
            seen: int64[B, arrays], what reading the same rows returned before, 0 for what was never read.
                What was read from the same opening is copied out of its map, by default all is. A map fetches
                what is not in memory page by page; reading the file fetches it in one piece, but costs a
                little more where all is there.

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
        shard_rows = self._backend.shard_rows
        max_held = min(_MAX_HELD, _default_max_open() // 8)
        held: dict[tuple[int, str], tuple[_MappedFile, npt.NDArray[np.int64]] | None] = {}
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
                    _with_room(self._read_through_library, array, row, buffer[position : position + 1])
                    openings[position, column] = next(_openings)
                    continue
                mapped, offsets = found
                offset = offsets.item(place)
                if offset == ABSENT:
                    raise self._absent(row)
                openings[position, column] = mapped.opening
                through_map = seen_openings is None or seen_openings[position][column] == mapped.opening
                if through_map or not mapped.read(offset, flat[position]):
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

    def _state(self) -> _ProcessState:
        if self._process is None or self._process.pid != os.getpid():
            self._process = _ProcessState(self._backend, self._max_open)
        return self._process


class _Identity(NamedTuple):
    """What tells a file from another one that takes its name."""

    device: int
    inode: int
    num_bytes: int
    modified_ns: int


@dataclass(slots=True, kw_only=True, eq=False)
class _MappedFile:
    """A file in memory, read-only; it closes when the last view of it is gone.

    Attributes:
        content: uint8[bytes of the file], a view of `mapping`.
        identity: of the file that was mapped.
        opening: number of this map; later ones have higher ones.
        last_use: number of its last use among those of all maps; the one thing here that changes.
    """

    path: Path
    mapping: mmap.mmap
    content: npt.NDArray[np.uint8]
    identity: _Identity
    opening: int
    last_use: int = 0

    def read(self, offset: int, target: npt.NDArray[np.uint8]) -> bool:
        """Fill `target` from the file instead of the map.

        Returns:
            Whether that was possible: not if the path leads to another file by now.

        Raises:
            CorruptShardError: the disk refuses.
        """
        # Opened each time, since a descriptor per map would halve how many files may be mapped.
        try:
            descriptor = os.open(self.path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError:
            return False
        try:
            if _identity(os.fstat(descriptor)) != self.identity:
                return False
            num_read = 0
            while num_read < len(target):
                count = os.preadv(descriptor, [target.data[num_read:]], offset + num_read)
                if count == 0:
                    return False
                num_read += count
            return True
        except OSError as error:
            raise unreadable(self.path, error) from error
        finally:
            os.close(descriptor)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Place:
    """Where one array of one shard lies.

    Attributes:
        offsets: as in `RowPlaces`.
        identity: of the file that the offsets belong to; None if it was not there a moment before.
    """

    path: str
    offsets: npt.NDArray[np.int64]
    identity: _Identity | None


class _ProcessState:
    """What one process knows and has opened: places (kept) and memory maps (the most recently used).

    The lock, shared by all readers, guards the two tables alone. Files are opened outside it, so a thread
    that opens one never keeps others from copying; if two open the same file, the first map stays.

    Attributes:
        maps: by path, the least recently used first.
    """

    def __init__(self, backend: Backend, max_open: int | None) -> None:
        self.pid = os.getpid()
        self.maps: OrderedDict[str, _MappedFile] = OrderedDict()
        self._backend = backend
        self._max_open = max_open
        self._places: dict[int, dict[str, _Place]] = {}  # empty: only the library can read the shard
        self._lock = _open_maps.lock
        with self._lock:
            _open_maps.states.add(self)

    def find(self, shard: int, name: str) -> tuple[_MappedFile, npt.NDArray[np.int64]] | None:
        """Return the map of an array's shard and the offsets in it; None if only the library can read it."""
        for _ in range(_ATTEMPTS):
            mapped = None
            with self._lock:
                places = self._places.get(shard)
                if places:
                    mapped = self.maps.get(places[name].path)
                    if mapped is not None:
                        self.maps.move_to_end(places[name].path)
                        mapped.last_use = next(_uses)
            if places is None:
                places = self._locate(shard)
            if not places:
                return None
            place = places[name]
            if mapped is None:
                mapped = self._map(place.path, shard)
            # A file cut short in place would end this process with SIGBUS; asking its size costs little.
            if mapped.identity == place.identity and mapped.mapping.size() == place.identity.num_bytes:
                return mapped, place.offsets
            # The file was replaced after its rows were located, or changed under its map: look again.
            with self._lock:
                self._places.pop(shard, None)
                self.maps.pop(place.path, None)
        raise damaged(Path(place.path), "keeps changing while it is read", shard=shard)

    def advise(self, shard: int, positions: Sequence[int], arrays: Iterable[StoredArray]) -> None:
        """Ask for the pages of rows of one shard."""
        ranges: dict[_MappedFile, list[tuple[int, int]]] = {}
        for array in arrays:
            try:
                found = self.find(shard, array.name)
            except CacheError:
                continue
            if found is not None:
                mapped, offsets = found
                starts = [start for start in offsets[list(positions)].tolist() if start != ABSENT]
                ranges.setdefault(mapped, []).extend((start, start + array.row_bytes) for start in starts)
        for mapped, spans in ranges.items():
            for start, stop in _advised_pieces(spans):
                # Only advice: where it cannot be followed, reading is slower and no less correct.
                with contextlib.suppress(OSError):
                    mapped.mapping.madvise(mmap.MADV_WILLNEED, start, stop - start)

    def _locate(self, shard: int) -> dict[str, _Place]:
        paths = [self._backend.root / relative for relative in self._backend.shard_files(shard)]
        # Taken first: if a file is replaced meanwhile, its map will be of another one, which `find` notices.
        identities = {path: _identify(path) for path in paths}
        located = _with_room(self._backend.locate, shard) or {}
        places = {
            name: _Place(path=str(place.path), offsets=place.offsets, identity=identities[place.path])
            for name, place in located.items()
        }
        with self._lock:
            return self._places.setdefault(shard, places)

    def _map(self, path: str, shard: int) -> _MappedFile:
        opened = _with_room(_open_mapped, Path(path), shard)
        with self._lock:
            mapped = self.maps.setdefault(path, opened)
            self.maps.move_to_end(path)
            mapped.last_use = next(_uses)
            # A map dropped here closes once the last thread that copies from it lets go.
            while self._max_open is not None and len(self.maps) > self._max_open:
                self.maps.popitem(last=False)
            _open_maps.drop(_default_max_open())
        return mapped


class _OpenMaps:
    """The maps of all readers in this process, which share the files that it may open."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.states: weakref.WeakSet[_ProcessState] = weakref.WeakSet()

    def drop(self, most: int) -> None:
        """Drop the least recently used maps until at most so many are left; under the lock."""
        states = [state for state in self.states if state.maps]
        num_open = sum(len(state.maps) for state in states)
        for _ in range(num_open - most):
            oldest = min(states, key=lambda state: next(iter(state.maps.values())).last_use)
            oldest.maps.popitem(last=False)
            if not oldest.maps:
                states.remove(oldest)

    def drop_half(self) -> bool:
        """Drop half of all maps, rounded up, and return whether there were any."""
        with self.lock:
            num_open = sum(len(state.maps) for state in self.states)
            self.drop(num_open // 2)
        return num_open > 0

    def forget(self) -> None:
        """Close what a forked child has inherited; its readers open their own."""
        for state in list(self.states):
            state.maps.clear()
        self.lock = threading.Lock()  # another thread may have held the old one when the process forked
        self.states = weakref.WeakSet()


_open_maps = _OpenMaps()
os.register_at_fork(after_in_child=_open_maps.forget)
# A forked child goes on where its parent was, so no opening of its own has a number that the parent has seen.
_openings = itertools.count(1)
_uses = itertools.count(1)


def _with_room(act: Callable[..., _T], *arguments: object) -> _T:
    """Do what opens files; where the process has no more to open, drop maps and try again."""
    while True:
        try:
            return act(*arguments)
        except CacheError as error:
            if not _is_short_of_files(error) or not _open_maps.drop_half():
                raise


def _is_short_of_files(error: CacheError) -> bool:
    # Looked at in a function of its own: a variable beside `act` would keep alive the frames that the error
    # went through, in a circle, and with them the maps that the reader holds.
    cause = error.__cause__
    return isinstance(cause, OSError) and cause.errno in (errno.EMFILE, errno.ENFILE)


def _open_mapped(path: Path, shard: int) -> _MappedFile:
    """Map a file into memory.

    Raises:
        CorruptShardError: missing or empty.
        CacheError: it may not be opened.
    """
    try:
        with path.open("rb") as file:
            identity = _identity(os.fstat(file.fileno()))
            if identity.num_bytes == 0:
                raise damaged(path, "is empty", shard=shard)
            mapping = mmap.mmap(file.fileno(), identity.num_bytes, access=mmap.ACCESS_READ)
    except OSError as error:
        raise unreadable(path, error, shard=shard) from error
    except ValueError as error:  # cut short between the two calls
        raise damaged(path, f"cannot be mapped ({error})", shard=shard) from error
    content = np.frombuffer(mapping, np.uint8)
    return _MappedFile(
        path=path, mapping=mapping, content=content, identity=identity, opening=next(_openings)
    )


def _identify(path: Path) -> _Identity | None:
    """Return a file's identity, or None if there is no such file now."""
    try:
        return _identity(path.stat())
    except OSError:  # whatever it is, opening the file reports it
        return None


def _identity(status: os.stat_result) -> _Identity:
    return _Identity(status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns)


def _advised_pieces(spans: list[tuple[int, int]]) -> Iterator[tuple[int, int]]:
    """Yield whole pages that cover byte ranges, each page once, in pieces that one call reads ahead in full.

    Args:
        spans: first byte and end of each range, in any order.
    """
    merged: list[tuple[int, int]] = []
    for first, end in sorted(spans):
        start = first // mmap.PAGESIZE * mmap.PAGESIZE
        stop = math.ceil(end / mmap.PAGESIZE) * mmap.PAGESIZE
        if merged and start <= merged[-1][1]:
            last_start, last_stop = merged.pop()
            start, stop = last_start, max(last_stop, stop)
        merged.append((start, stop))
    for start, stop in merged:
        for piece in range(start, stop, _ADVISED_BYTES):
            yield piece, min(piece + _ADVISED_BYTES, stop)


@functools.cache
def _raise_file_limit() -> None:
    """Let this process open as many files as it is allowed to ask for, once."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    # Where it is refused, fewer maps are kept.
    with contextlib.suppress(OSError, ValueError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def _default_max_open() -> int:
    """Half of the files that the process may open: each map holds a descriptor, and others need some too."""
    limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return _MAX_OPEN if limit == resource.RLIM_INFINITY else max(1, min(_MAX_OPEN, limit // 2))

"""Files of shards in memory: which are mapped, what is known of them, and when a map has to go.

Axes: S rows per shard.
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
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final, NamedTuple, TypeVar

import numpy as np
import numpy.typing as npt

from ris_cache.errors import CacheError
from ris_cache.store.layout import ABSENT, Backend, StoredArray
from ris_cache.store.page_cache import count_cached_pages, is_in_memory, may_bypass, read_whole
from ris_cache.store.shard_files import damaged, unreadable

_T = TypeVar("_T")
_MAX_OPEN: Final = 4096
_ATTEMPTS: Final = 10
_ADVISED_BYTES: Final = 1 << 17
"""Linux reads ahead no more than the device's window for one call, however long; this is the usual window."""


class _Identity(NamedTuple):
    """What tells a file from another one that takes its name."""

    device: int
    inode: int
    num_bytes: int
    modified_ns: int


@dataclass(slots=True, kw_only=True, eq=False)
class MappedFile:
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

    def read(self, offset: int, target: npt.NDArray[np.uint8], *, past_page_cache: bool = False) -> bool:
        """Fill `target` from the file instead of the map.

        Args:
            past_page_cache: read what is not in the page cache whole without bringing it there, where offset,
                length, memory and file system allow that.

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
            status = os.fstat(descriptor)
            if _identity(status) != self.identity:
                return False
            bypasses = (
                past_page_cache
                and may_bypass(offset, target)
                and not self._is_in_memory(descriptor, status.st_uid, offset, offset + len(target))
            )
            return read_whole(descriptor, target, offset, past_page_cache=bypasses)
        except OSError as error:
            raise unreadable(self.path, error) from error
        finally:
            os.close(descriptor)

    def _is_in_memory(self, descriptor: int, owner: int, start: int, stop: int) -> bool:
        """Whether the page cache is known to hold a range of whole pages."""
        cached = count_cached_pages(descriptor, start, stop)
        if cached is not None:
            return cached * mmap.PAGESIZE >= stop - start
        # mincore(2) says that all is there to whom it does not tell.
        may_see = owner == os.geteuid() or os.access(self.path, os.W_OK, effective_ids=True)
        return may_see and is_in_memory(self.content, start, stop)


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


class ProcessState:
    """What one process knows and has opened: places (kept) and memory maps (the most recently used).

    The lock, shared by all readers, guards the two tables alone. Files are opened outside it, so a thread
    that opens one never keeps others from copying; if two open the same file, the first map stays.

    Attributes:
        maps: by path, the least recently used first.
    """

    def __init__(self, backend: Backend, max_open: int | None) -> None:
        self.pid = os.getpid()
        self.maps: OrderedDict[str, MappedFile] = OrderedDict()
        self._backend = backend
        self._max_open = max_open
        self._places: dict[int, dict[str, _Place]] = {}  # empty: only the library can read the shard
        self._lock = _open_maps.lock
        with self._lock:
            _open_maps.states.add(self)

    def find(self, shard: int, name: str) -> tuple[MappedFile, npt.NDArray[np.int64]] | None:
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
        ranges: dict[MappedFile, list[tuple[int, int]]] = {}
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
        located = with_room(self._backend.locate, shard) or {}
        places = {
            name: _Place(path=str(place.path), offsets=place.offsets, identity=identities[place.path])
            for name, place in located.items()
        }
        with self._lock:
            return self._places.setdefault(shard, places)

    def _map(self, path: str, shard: int) -> MappedFile:
        opened = with_room(_open_mapped, Path(path), shard)
        with self._lock:
            mapped = self.maps.setdefault(path, opened)
            self.maps.move_to_end(path)
            mapped.last_use = next(_uses)
            # A map dropped here closes once the last thread that copies from it lets go.
            while self._max_open is not None and len(self.maps) > self._max_open:
                self.maps.popitem(last=False)
            _open_maps.drop(default_max_open())
        return mapped


class _OpenMaps:
    """The maps of all readers in this process, which share the files that it may open."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.states: weakref.WeakSet[ProcessState] = weakref.WeakSet()

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


def next_opening() -> int:
    """Return a number that no other opening in this process, or its parents, has."""
    return next(_openings)


def with_room(act: Callable[..., _T], *arguments: object) -> _T:
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


def _open_mapped(path: Path, shard: int) -> MappedFile:
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
    return MappedFile(path=path, mapping=mapping, content=content, identity=identity, opening=next_opening())


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
def raise_file_limit() -> None:
    """Let this process open as many files as it is allowed to ask for, once."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    # Where it is refused, fewer maps are kept.
    with contextlib.suppress(OSError, ValueError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def default_max_open() -> int:
    """Half of the files that the process may open: each map holds a descriptor, and others need some too."""
    limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return _MAX_OPEN if limit == resource.RLIM_INFINITY else max(1, min(_MAX_OPEN, limit // 2))

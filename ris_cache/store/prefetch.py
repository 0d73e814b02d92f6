"""Reading batches ahead of their use, in bounded memory."""

from __future__ import annotations

import itertools
import sys
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from ris_cache.errors import ConfigError
from ris_cache.memory import available_memory

if TYPE_CHECKING:
    from ris_cache.store.batch import FeatureBatch
    from ris_cache.store.cache import FeatureCache

PAGE_CACHE_SHARE: Final = 0.5
"""Largest part of the available memory that features may take to be read through the page cache by default.

Whoever reads the features needs some of it too, and a cache that almost fits is evicted before it is read
again.
"""


def prefetch(
    cache: FeatureCache,
    batches: Iterable[Sequence[int]],
    *,
    depth: int,
    threads: int,
    read_ahead: int,
    pinned: bool | None,
    page_cache: bool | None,
) -> Iterator[FeatureBatch]:
    """Read batches in order on threads; `FeatureCache.prefetch` says the rest.

    Raises:
        ConfigError: a depth, number of threads or read-ahead that is no such number.
    """
    if depth < 1 or threads < 1 or read_ahead < 0:
        raise ConfigError(
            f"Reading ahead needs depth ≥ 1, threads ≥ 1 and read_ahead ≥ 0; got {depth}, {threads} and "
            f"{read_ahead}.",
            depth=depth,
            threads=threads,
            read_ahead=read_ahead,
        )
    if pinned is None:
        pinned = _has_gpu()
    if page_cache is None:
        page_cache = fits_page_cache(_feature_bytes(cache), available_memory())
    return _prefetch(cache, iter(batches), depth, threads, read_ahead, pinned, page_cache)


def fits_page_cache(num_bytes: int, available: int) -> bool:
    """Return whether features of so many bytes should stay in memory once they are read.

    Args:
        available: bytes that programs and page cache can still take.
    """
    return num_bytes <= PAGE_CACHE_SHARE * available


def _prefetch(
    cache: FeatureCache,
    batches: Iterator[Sequence[int]],
    depth: int,
    threads: int,
    read_ahead: int,
    pinned: bool,
    page_cache: bool,
) -> Iterator[FeatureBatch]:
    if not page_cache:
        read_ahead = 0  # it would go to the page cache
    # As many buffers as batches can be alive: `depth` read or being read, and one in the caller's hands.
    free: deque[FeatureBatch | None] = deque([None] * (depth + 1))
    upcoming: deque[Sequence[int]] = deque()
    reading: deque[_Reading] = deque()

    def look_ahead() -> None:
        for batch in itertools.islice(batches, max(0, depth + read_ahead - len(upcoming) - len(reading))):
            if page_cache:
                cache.advise(batch)
            upcoming.append(batch)

    def read(image_ids: Sequence[int], part: FeatureBatch) -> None:
        cache.read_into(image_ids, part, way="file" if page_cache else "disk")

    def start(image_ids: Sequence[int], buffer: FeatureBatch | None) -> _Reading:
        size = len(image_ids)
        if buffer is None or len(buffer) < size:
            buffer = cache.allocate(size, pinned=pinned)
        step = max(1, -(-size // threads))
        parts = [
            pool.submit(read, image_ids[first : first + step], buffer.rows(first, min(first + step, size)))
            for first in range(0, size, step)
        ]
        return _Reading(buffer=buffer, size=size, parts=parts)

    with ThreadPoolExecutor(max_workers=threads, thread_name_prefix="prefetch") as pool:
        try:
            while True:
                look_ahead()
                while upcoming and free and len(reading) < depth:
                    reading.append(start(upcoming.popleft(), free.popleft()))
                if not reading:
                    return
                for part in reading[0].parts:
                    part.result()
                batch = reading.popleft()
                yield batch.buffer.first(batch.size)
                batch.buffer.wait_for_copies()
                free.append(batch.buffer)
        finally:
            for batch in reading:
                for part in batch.parts:
                    part.cancel()


@dataclass(frozen=True, slots=True)
class _Reading:
    """A batch on its way: `size` images into the first rows of `buffer`, by several threads."""

    buffer: FeatureBatch
    size: int
    parts: list[Future[None]]


def _feature_bytes(cache: FeatureCache) -> int:
    """Bytes of all images' features, as stored."""
    return len(cache) * sum(array.row_bytes for array in cache.manifest.stored_arrays())


def _has_gpu() -> bool:
    """Whether torch is loaded already and sees a GPU; loading it here would cost seconds."""
    torch = sys.modules.get("torch")
    return torch is not None and bool(torch.cuda.is_available())

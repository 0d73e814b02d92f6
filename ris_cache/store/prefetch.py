"""Reading batches ahead of their use, in bounded memory."""

from __future__ import annotations

import itertools
import sys
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING

from ris_cache.errors import ConfigError

if TYPE_CHECKING:
    from ris_cache.store.batch import FeatureBatch
    from ris_cache.store.cache import FeatureCache


def prefetch(
    cache: FeatureCache,
    batches: Iterable[Sequence[int]],
    *,
    depth: int,
    threads: int,
    read_ahead: int,
    pinned: bool | None,
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
    return _prefetch(
        cache, iter(batches), depth, threads, read_ahead, _has_gpu() if pinned is None else pinned
    )


def _prefetch(
    cache: FeatureCache,
    batches: Iterator[Sequence[int]],
    depth: int,
    threads: int,
    read_ahead: int,
    pinned: bool,
) -> Iterator[FeatureBatch]:
    # As many buffers as batches can be alive: `depth` read or being read, and one in the caller's hands.
    free: deque[FeatureBatch | None] = deque([None] * (depth + 1))
    upcoming: deque[Sequence[int]] = deque()
    reading: deque[Future[FeatureBatch]] = deque()

    def look_ahead() -> None:
        for batch in itertools.islice(batches, max(0, depth + read_ahead - len(upcoming) - len(reading))):
            cache.advise(batch)
            upcoming.append(batch)

    def read(image_ids: Sequence[int], buffer: FeatureBatch | None) -> FeatureBatch:
        if buffer is None or len(buffer) < len(image_ids):
            buffer = cache.allocate(len(image_ids), pinned=pinned)
        cache.read(image_ids, out=buffer)
        return buffer

    with ThreadPoolExecutor(max_workers=threads, thread_name_prefix="prefetch") as pool:
        sizes: deque[int] = deque()
        try:
            while True:
                look_ahead()
                while upcoming and free and len(reading) < depth:
                    image_ids = upcoming.popleft()
                    sizes.append(len(image_ids))
                    reading.append(pool.submit(read, image_ids, free.popleft()))
                if not reading:
                    return
                buffer = reading.popleft().result()
                yield buffer.first(sizes.popleft())
                buffer.wait_for_copies()
                free.append(buffer)
        finally:
            for future in reading:
                future.cancel()


def _has_gpu() -> bool:
    """Whether torch is loaded already and sees a GPU; loading it here would cost seconds."""
    torch = sys.modules.get("torch")
    return torch is not None and bool(torch.cuda.is_available())

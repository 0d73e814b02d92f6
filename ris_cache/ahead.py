"""Work done ahead of its consumer, on threads, in order."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

T = TypeVar("T")
R = TypeVar("R")


def map_ahead(function: Callable[[T], R], items: Iterable[T], *, workers: int, depth: int) -> Iterator[R]:
    """Apply a function to items on threads, at most `depth` of them ahead of the consumer.

    Args:
        function: must be safe to run in `workers` threads at once.
        items: may be endless; taken one by one as results are consumed.
        workers: threads.
        depth: results under way or waiting beyond the one being consumed.

    Yields:
        Results in the order of `items`; an error is raised where its result would have come.
    """
    with ThreadPoolExecutor(max_workers=workers, thread_name_prefix="ahead") as pool:
        pending: deque[Future[R]] = deque()
        try:
            for item in items:
                pending.append(pool.submit(function, item))
                if len(pending) > depth:
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()
        finally:
            for future in pending:
                future.cancel()

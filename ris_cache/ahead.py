"""Work done ahead of its consumer, on threads, in order."""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from typing import Any, Final, TypeVar

T = TypeVar("T")
R = TypeVar("R")
_END: Final[Any] = object()


def map_ahead(
    function: Callable[[T], R], items: Iterable[T], *, workers: int, depth: int
) -> Generator[R, None, None]:
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


def run_ahead(items: Generator[R, None, None], *, depth: int) -> Generator[R, None, None]:
    """Run a generator on a thread, at most `depth` items ahead of the consumer.

    Args:
        items: runs on that thread alone, and is closed when the consumer is done with it, items have run out
            or one has failed.
        depth: items under way or waiting beyond the one being consumed.

    Yields:
        Its items; an error of the generator is raised where its item would have come.
    """
    taken = map_ahead(lambda _: next(items, _END), itertools.count(), workers=1, depth=depth)
    with closing(items), closing(taken):  # the thread first, which may be within the generator
        for item in taken:
            if item is _END:
                return
            yield item

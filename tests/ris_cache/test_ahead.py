"""Work ahead on threads: in order, not too far, and over when the consumer is."""

from __future__ import annotations

import itertools
import signal
import threading
import time
from collections.abc import Generator, Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ris_cache.ahead import map_ahead, run_ahead

DEADLINE = 10.0
"""Seconds after which something that must happen has not."""


@pytest.fixture(autouse=True)
def _no_thread_is_left_behind() -> Iterator[None]:
    before = set(threading.enumerate())
    yield
    assert set(threading.enumerate()) == before


def names_of_threads() -> set[str]:
    return {thread.name for thread in threading.enumerate() if thread.name.startswith("ahead")}


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers()), st.integers(1, 4), st.integers(0, 6))
def test_results_come_in_the_order_of_the_items(items: list[int], workers: int, depth: int) -> None:
    assert list(map_ahead(lambda item: item * 2, items, workers=workers, depth=depth)) == [
        item * 2 for item in items
    ]


def test_an_earlier_item_that_takes_longer_still_comes_first() -> None:
    late = threading.Event()

    def work(item: int) -> int:
        if item == 0:
            assert late.wait(DEADLINE)
        elif item == 2:
            late.set()
        return item

    assert list(map_ahead(work, range(5), workers=2, depth=4)) == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("depth", [0, 1, 3])
def test_no_more_than_depth_items_are_ahead_of_the_consumer(depth: int) -> None:
    taken: list[int] = []

    def watched() -> Iterator[int]:
        for item in itertools.count():
            taken.append(item)
            yield item

    results = map_ahead(lambda item: item, watched(), workers=2, depth=depth)
    assert taken == []
    for consumed in range(1, 10):
        assert next(results) == consumed - 1
        assert len(taken) == consumed + depth
    results.close()  # type: ignore[attr-defined]
    assert len(taken) == 9 + depth


def test_work_goes_on_while_the_consumer_is_busy() -> None:
    done = [threading.Event() for _ in range(4)]

    def work(item: int) -> int:
        done[item].set()
        return item

    results = map_ahead(work, range(4), workers=1, depth=2)
    assert next(results) == 0
    assert done[1].wait(DEADLINE)
    assert done[2].wait(DEADLINE)
    assert not done[3].is_set()
    assert list(results) == [1, 2, 3]


@pytest.mark.parametrize("workers", [1, 3])
def test_so_many_workers_run_at_once(workers: int) -> None:
    """Each item waits until as many as there are workers have started; fewer would never get there."""
    barrier = threading.Barrier(workers, timeout=DEADLINE)

    def work(item: int) -> int:
        barrier.wait()
        return item

    assert list(map_ahead(work, range(2 * workers), workers=workers, depth=workers)) == list(
        range(2 * workers)
    )


def test_an_error_is_raised_where_its_result_would_have_come() -> None:
    def work(item: int) -> float:
        return 6 / (3 - item)

    results = map_ahead(work, range(6), workers=2, depth=5)
    assert [next(results) for _ in range(3)] == [2, 3, 6]
    with pytest.raises(ZeroDivisionError):
        next(results)
    assert list(results) == []


def test_an_error_of_the_items_themselves_reaches_the_consumer() -> None:
    def items() -> Iterator[int]:
        yield 1
        raise LookupError("no more")

    with pytest.raises(LookupError, match="no more"):
        list(map_ahead(lambda item: item, items(), workers=1, depth=0))


def test_an_endless_iterator_is_fine() -> None:
    results = map_ahead(lambda item: item**2, itertools.count(), workers=2, depth=4)
    assert list(itertools.islice(results, 5)) == [0, 1, 4, 9, 16]
    results.close()  # type: ignore[attr-defined]


def test_threads_live_only_while_results_are_consumed() -> None:
    results = map_ahead(lambda item: item, itertools.count(), workers=2, depth=4)
    assert names_of_threads() == set()
    next(results)
    assert names_of_threads()
    results.close()  # type: ignore[attr-defined]
    assert names_of_threads() == set()


def test_a_consumer_that_stops_does_not_wait_for_work_that_has_not_begun() -> None:
    started: list[int] = []
    go_on = threading.Event()

    def work(item: int) -> int:
        started.append(item)
        if item == 1:
            assert go_on.wait(DEADLINE)
        return item

    results = map_ahead(work, itertools.count(), workers=1, depth=8)
    assert next(results) == 0
    closed = threading.Thread(target=results.close)  # type: ignore[attr-defined]
    closed.start()
    time.sleep(0.05)  # long enough for `close` to cancel what waits
    go_on.set()
    closed.join(DEADLINE)
    assert not closed.is_alive()
    assert set(started) <= {0, 1}


def numbers(closed: list[str], count: int = 1_000_000) -> Generator[int, None, None]:
    """Counts, and notes the thread that it is closed from or ends in."""
    try:
        yield from range(count)
    finally:
        closed.append(threading.current_thread().name)


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 9), st.integers(0, 4))
def test_a_generator_run_ahead_gives_its_items_and_ends(count: int, depth: int) -> None:
    closed: list[str] = []
    assert list(run_ahead(numbers(closed, count), depth=depth)) == list(range(count))
    assert len(closed) == 1


@pytest.mark.parametrize("depth", [0, 1, 3])
def test_a_generator_runs_on_a_thread_of_its_own_and_not_too_far_ahead(depth: int) -> None:
    made: list[str] = []

    def items() -> Generator[int, None, None]:
        for item in itertools.count():
            made.append(threading.current_thread().name)
            yield item

    results = run_ahead(items(), depth=depth)
    assert next(results) == 0
    assert next(results) == 1
    results.close()
    assert len(made) <= 2 + depth
    assert {name.rpartition("_")[0] for name in made} == {"ahead"}


def test_a_consumer_that_stops_early_closes_the_generator() -> None:
    closed: list[str] = []
    results = run_ahead(numbers(closed), depth=2)
    assert next(results) == 0
    assert closed == []
    results.close()
    assert len(closed) == 1


def test_an_error_of_a_generator_comes_after_what_it_gave_before() -> None:
    def items() -> Generator[int, None, None]:
        yield 1
        raise LookupError("no more")

    results = run_ahead(items(), depth=3)
    assert next(results) == 1
    with pytest.raises(LookupError, match="no more"):
        next(results)
    assert list(results) == []


def test_ctrl_c_while_waiting_ends_thread_and_generator() -> None:
    """The thread is in the middle of an item when the signal comes, and is waited for."""
    asked, go_on, closed = threading.Event(), threading.Event(), threading.Event()

    def items() -> Generator[int, None, None]:
        try:
            asked.set()
            assert go_on.wait(DEADLINE)
            yield 1
        finally:
            closed.set()

    def interrupt() -> None:
        assert asked.wait(DEADLINE)
        time.sleep(0.05)  # until the main thread waits for the item
        signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)
        time.sleep(0.05)
        go_on.set()

    interrupting = threading.Thread(target=interrupt)
    interrupting.start()
    with pytest.raises(KeyboardInterrupt):
        next(run_ahead(items(), depth=0))
    interrupting.join(DEADLINE)
    assert closed.is_set()

"""Reading ahead: the same batches as reading, in bounded memory, and nothing left behind."""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ris_cache.errors import CacheMissError, ConfigError, CorruptShardError
from ris_cache.store.batch import FeatureBatch
from ris_cache.store.cache import FeatureCache
from ris_cache.store.layout import Way
from ris_cache.store.prefetch import PAGE_CACHE_SHARE, fits_page_cache

pytestmark = [
    pytest.mark.usefixtures("no_waiting_for_the_disk", "threads_end"),
    pytest.mark.filterwarnings("error"),
]

IMAGE_IDS = list(range(20))


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory, drawing: Any) -> Path:
    path: Path = tmp_path_factory.mktemp("prefetch") / "feats"
    drawing.extract(path, IMAGE_IDS)
    return path


@pytest.fixture
def cache(root: Path) -> FeatureCache:
    return FeatureCache.open(root)


def require_same(cache: FeatureCache, found: FeatureBatch, image_ids: Sequence[int]) -> None:
    expected = cache.read(image_ids)
    assert found.image_ids.tolist() == list(image_ids)
    for name, array in expected.stored.items():
        np.testing.assert_array_equal(found.stored[name], array)


class Recorded:
    """Counts what prefetching asks of a cache."""

    def __init__(self, cache: FeatureCache, monkeypatch: pytest.MonkeyPatch) -> None:
        self.allocated: list[int] = []
        self.read: list[tuple[int, ...]] = []
        self.advised: list[tuple[int, ...]] = []
        self.reading_at_once: list[int] = []
        self.ways: set[Way] = set()
        self._now = 0
        self._lock = threading.Lock()
        real_allocate, real_read = FeatureCache.allocate, FeatureCache.read_into

        def allocate(cache: FeatureCache, batch_size: int, *, pinned: bool = False) -> FeatureBatch:
            self.allocated.append(batch_size)
            assert not pinned
            return real_allocate(cache, batch_size, pinned=pinned)

        def read(
            cache: FeatureCache, ids: Sequence[int], out: FeatureBatch | None, *, way: Way
        ) -> FeatureBatch:
            self.ways.add(way)
            with self._lock:
                self._now += 1
                self.reading_at_once.append(self._now)
            time.sleep(0.002)
            try:
                self.read.append(tuple(ids))
                return real_read(cache, ids, out, way=way)
            finally:
                with self._lock:
                    self._now -= 1

        monkeypatch.setattr(FeatureCache, "allocate", allocate)
        monkeypatch.setattr(FeatureCache, "read_into", read)
        monkeypatch.setattr(FeatureCache, "advise", lambda cache, ids: self.advised.append(tuple(ids)))


@given(
    batches=st.lists(st.lists(st.sampled_from(IMAGE_IDS), max_size=6), max_size=8),
    depth=st.integers(1, 4),
    threads=st.integers(1, 3),
    read_ahead=st.integers(0, 3),
    page_cache=st.sampled_from([None, True, False]),
)
@settings(max_examples=40, deadline=None)
def test_batches_are_those_of_reading_in_order(
    root: Path, batches: list[list[int]], depth: int, threads: int, read_ahead: int, page_cache: bool | None
) -> None:
    cache = FeatureCache.open(root)
    found = cache.prefetch(
        batches, depth=depth, threads=threads, read_ahead=read_ahead, page_cache=page_cache
    )
    for image_ids, batch in itertools.zip_longest(batches, found):
        require_same(cache, batch, image_ids)


@pytest.mark.parametrize("threads", [1, 3])
def test_a_batch_stays_intact_until_the_next_is_asked_for(cache: FeatureCache, threads: int) -> None:
    """The readers run ahead meanwhile, so whatever they could overwrite they would."""
    batches = [[number % 20, (number * 7) % 20] for number in range(30)]
    for image_ids, batch in zip(batches, cache.prefetch(batches, depth=3, threads=threads), strict=True):
        time.sleep(0.003)
        require_same(cache, batch, image_ids)


@pytest.mark.parametrize("depth", [1, 2, 4])
def test_memory_is_one_buffer_more_than_the_depth(
    cache: FeatureCache, monkeypatch: pytest.MonkeyPatch, depth: int
) -> None:
    recorded = Recorded(cache, monkeypatch)
    seen = {
        batch.sam.__array_interface__["data"][0]
        for batch in cache.prefetch([[number % 20] for number in range(40)], depth=depth, threads=2)
    }
    assert len(recorded.allocated) == len(seen) == depth + 1


def test_buffers_grow_to_the_largest_batch_and_stay(
    cache: FeatureCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    recorded = Recorded(cache, monkeypatch)
    sizes = [2, 5, 1, 5, 3, 2, 5, 1, 0, 4, 5]
    found = [len(batch) for batch in cache.prefetch([IMAGE_IDS[:size] for size in sizes], depth=2)]
    assert found == sizes
    assert max(recorded.allocated) == 5
    assert len(recorded.allocated) <= 3 + 2  # three buffers, of which the small ones are replaced once


def test_the_disk_is_asked_in_advance_and_no_further_than_said(
    cache: FeatureCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    recorded = Recorded(cache, monkeypatch)
    taken = 0

    def endless() -> Iterator[list[int]]:
        nonlocal taken
        for number in itertools.count():
            taken += 1
            yield [number % 20]

    batches = cache.prefetch(endless(), depth=2, read_ahead=3)
    next(batches)
    assert taken == len(recorded.advised) == 2 + 3
    next(batches)
    assert taken == len(recorded.advised) == 2 + 3 + 1
    assert recorded.advised == [(number,) for number in range(6)]
    batches.close()  # type: ignore[attr-defined]
    assert len(recorded.read) <= 3


@pytest.mark.parametrize("page_cache", [True, False])
def test_past_the_page_cache_nothing_is_asked_for_in_advance(
    cache: FeatureCache, monkeypatch: pytest.MonkeyPatch, page_cache: bool
) -> None:
    recorded = Recorded(cache, monkeypatch)
    taken = itertools.count()
    batches = cache.prefetch(([next(taken)] for _ in range(9)), depth=2, read_ahead=3, page_cache=page_cache)
    next(batches)
    batches.close()  # type: ignore[attr-defined]
    assert recorded.ways == {"file" if page_cache else "disk"}
    assert len(recorded.advised) == (5 if page_cache else 0)
    assert next(taken) == (5 if page_cache else 2)


@pytest.mark.parametrize(("factor", "way"), [(0.99, "disk"), (1.01, "file")])
def test_by_default_a_cache_that_does_not_fit_in_memory_is_read_past_the_page_cache(
    cache: FeatureCache, monkeypatch: pytest.MonkeyPatch, factor: float, way: Way
) -> None:
    recorded = Recorded(cache, monkeypatch)
    num_bytes = 20 * 2 * (2 * 3 * 3 + 4 * 2 + 5)
    asked = []

    def available_memory() -> int:
        asked.append(None)
        return round(num_bytes / PAGE_CACHE_SHARE * factor)

    monkeypatch.setattr("ris_cache.store.prefetch.available_memory", available_memory)
    for _ in cache.prefetch([[1], [2], [3]]):
        pass
    assert recorded.ways == {way}
    assert len(asked) == 1


def test_features_that_take_up_to_half_of_the_available_memory_stay_in_it() -> None:
    cases = [(50, 100, True), (51, 100, False), (0, 0, True), (1, 0, False)]
    assert [fits_page_cache(num_bytes, available) for num_bytes, available, _ in cases] == [
        fits for *_, fits in cases
    ]


@pytest.mark.parametrize("threads", [1, 2])
def test_as_many_threads_read_as_asked_for(
    cache: FeatureCache, monkeypatch: pytest.MonkeyPatch, threads: int
) -> None:
    recorded = Recorded(cache, monkeypatch)
    for _ in cache.prefetch([[number] for number in range(20)], depth=4, threads=threads):
        pass
    assert max(recorded.reading_at_once) == threads


def test_nothing_is_read_before_the_first_batch_is_asked_for(
    cache: FeatureCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    recorded = Recorded(cache, monkeypatch)
    cache.prefetch([[1], [2]])
    assert recorded.read == recorded.advised == []


def test_an_unknown_image_fails_where_its_batch_would_have_come(cache: FeatureCache) -> None:
    batches = cache.prefetch([[1], [2], [3, 77], [4]], depth=3, threads=2)
    for image_ids in ([1], [2]):
        require_same(cache, next(batches), image_ids)
    with pytest.raises(CacheMissError, match="images 77"):
        next(batches)
    assert list(batches) == []


def test_damage_fails_where_its_batch_would_have_come(drawing: Any, tmp_path: Path) -> None:
    drawing.extract(tmp_path, range(8))
    shard = tmp_path / "features.zarr" / "sam" / "c" / "1" / "0" / "0" / "0"
    content = bytearray(shard.read_bytes())
    content[0] ^= 1  # image 4
    shard.write_bytes(content)
    cache = FeatureCache.open(tmp_path)
    batches = cache.prefetch([[0], [1], [4], [5]], depth=4)
    require_same(cache, next(batches), [0])
    require_same(cache, next(batches), [1])
    with pytest.raises(CorruptShardError, match="Image 4"):
        next(batches)


def test_leaving_early_ends_the_threads(cache: FeatureCache) -> None:
    """`threads_end` looks."""
    for batch in cache.prefetch(([number % 20] for number in itertools.count()), depth=4, threads=3):
        if batch.image_ids[0] == 5:
            break


def test_leaving_early_does_not_wait_for_batches_that_were_not_begun(
    cache: FeatureCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    recorded = Recorded(cache, monkeypatch)
    batches = cache.prefetch([[number] for number in range(20)], depth=16)
    next(batches)
    batches.close()  # type: ignore[attr-defined]
    assert len(recorded.read) < 16


def test_an_error_in_the_loop_ends_the_threads(cache: FeatureCache) -> None:
    def use() -> None:
        for batch in cache.prefetch(([number % 20] for number in itertools.count()), threads=3):
            raise ValueError(f"cannot use {batch.image_ids}")

    with pytest.raises(ValueError, match="cannot use"):
        use()


def test_no_batches_give_none(cache: FeatureCache) -> None:
    assert list(cache.prefetch([])) == []


def test_several_may_run_on_one_cache(cache: FeatureCache) -> None:
    one = cache.prefetch([[number] for number in range(10)], threads=2)
    other = cache.prefetch([[19 - number] for number in range(10)], threads=2)
    for number, (first, second) in enumerate(zip(one, other, strict=True)):
        require_same(cache, first, [number])
        require_same(cache, second, [19 - number])


@pytest.mark.parametrize("wrong", [{"depth": 0}, {"threads": 0}, {"read_ahead": -1}, {"depth": -3}])
def test_numbers_that_make_no_sense_are_refused_at_once(cache: FeatureCache, wrong: dict[str, int]) -> None:
    with pytest.raises(ConfigError, match=r"needs depth ≥ 1, threads ≥ 1 and read_ahead ≥ 0") as caught:
        cache.prefetch([[1]], **wrong)  # type: ignore[arg-type]
    assert caught.value.facts.items() >= wrong.items()


def test_copies_to_a_gpu_are_waited_for_before_a_buffer_is_used_again(cache: FeatureCache) -> None:
    class Event:
        def synchronize(self) -> None:
            waited.append(self)

    waited: list[Event] = []
    event = Event()
    batches = cache.prefetch([[1], [2], [3]])
    next(batches).copies.append(event)
    assert waited == []
    next(batches)
    assert waited == [event]
    batches.close()  # type: ignore[attr-defined]


def test_an_error_of_whoever_names_the_batches_is_passed_on(cache: FeatureCache) -> None:
    def names() -> Iterator[list[int]]:
        yield [1]
        raise LookupError("no more names")

    with pytest.raises(LookupError, match="no more names"):
        list(cache.prefetch(names(), threads=2))

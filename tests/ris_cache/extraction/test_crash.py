"""An extraction that is killed at any instant and run again ends like one that was not.

What must be equal is every byte of the cache. What was committed before a kill is not computed again: its
images are not even opened.
"""

from __future__ import annotations

import random
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

STORES = ("zarr", "hdf5")
CALLS = ("fsync", "replace", "open", "mkdir", "unlink", "rmdir", "flock", "write")
SMALL = 12  # images, so three shards
POINTS_PER_CALL = 3
GROWTH_POINTS_PER_CALL = 2


class Victim:
    """A cache whose extraction is killed and run again until it is done."""

    def __init__(
        self, cache: Path, trials: Any, committed: Callable[[Path], set[str]], **extract: Any
    ) -> None:
        self.cache = cache
        self.is_done = False
        self.num_kills = 0
        self._trials = trials
        self._committed = committed
        self._extract = extract
        self._log = cache.with_name(f"{cache.name}.log")
        self._before: set[str] = set()

    def trial(self, **terms: Any) -> dict[str, Any]:
        """Describe the next run."""
        self._before = self._committed(self.cache)
        self._log.write_text("")
        return dict(self._trials.trial(self.cache, log=str(self._log), **self._extract, **terms))

    def check(self, ending: Any) -> None:
        """Look at what the run left."""
        decoded = self._log.read_text().split()
        assert len(set(decoded)) == len(decoded), "an image was decoded twice in one run"
        assert not self._before & set(decoded), "an image was decoded that had been committed before"
        if ending.signal is None:
            assert ending.exit_code == 0, ending
            assert ending.encoded == ending.added == len(decoded)
            self.is_done = True
        else:
            assert ending.signal == 9, ending
            assert (
                self._before <= self._committed(self.cache)
                or not (self.cache / "extraction/plan.json").exists()
            )
            self.num_kills += 1


def run_to_the_end(trials: Any, victims: list[Victim], terms: Iterator[dict[str, Any]]) -> None:
    """Run all victims side by side, each time on terms of their own, until all are done."""
    while left := [victim for victim in victims if not victim.is_done]:
        for victim, ending in zip(
            left, trials.run(*(victim.trial(**next(terms)) for victim in left)), strict=True
        ):
            victim.check(ending)


@pytest.mark.parametrize("pair", range(10))
def test_an_extraction_killed_at_random_instants_ends_like_one_that_was_not(
    pair, tmp_path, trials, straight, content, committed
):
    generator = random.Random(pair)
    seconds = min(straight("refcoco", store=store)[1].seconds for store in STORES)
    victims = [Victim(tmp_path / store, trials, committed, options={"store": store}) for store in STORES]
    reach = 1.0
    while not all(victim.num_kills for victim in victims):
        for victim in victims:
            if not victim.num_kills:  # it was faster than the measured one: once more, from the start
                shutil.rmtree(victim.cache, ignore_errors=True)
                victim.is_done = False
        run_to_the_end(trials, victims, some_kills(generator, reach * seconds))
        reach *= 0.8

    for victim, store in zip(victims, STORES, strict=True):
        assert content(victim.cache) == content(straight("refcoco", store=store)[0])


def some_kills(generator: random.Random, seconds: float) -> Iterator[dict[str, Any]]:
    """Kill each victim once for certain, anywhere in the time that it takes, and then now and then."""
    for _ in STORES:
        yield {"kill_after": generator.uniform(0, seconds)}
    while True:
        yield {"kill_after": generator.uniform(0, seconds)} if generator.random() < 0.3 else {}


def points(call: str, count: int) -> list[tuple[str, int, str]]:
    """Every point in the n-th use of a system call at which a process can be killed."""
    whens = ("before", "middle", "after") if call == "write" else ("before", "after")
    return [(call, n, when) for n in range(1, count + 1) for when in whens]


def sample(call: str, count: int, size: int) -> list[tuple[str, int, str]]:
    """Choose points: in the last use of a call and in the first, since these are of plan and manifest, then any."""
    when = "middle" if call == "write" else "before"
    ends = [(call, count, when), (call, 1, when)][:size]
    others = [point for point in points(call, count) if point not in ends]
    return [*ends, *random.Random(call).sample(others, size - len(ends))]


def check_points(chosen, store, tmp_path, trials, straight, content, committed):
    expected = content(straight("refcoco", store=store, limit=SMALL)[0])
    for first in range(0, len(chosen), 2):
        victims = []
        for call, n, when in chosen[first : first + 2]:
            cache = tmp_path / f"{call}-{n}-{when}"
            victims.append(Victim(cache, trials, committed, options={"store": store, "limit": SMALL}))
        kills = [{"kill_at": point} for point in chosen[first : first + 2]]
        run_to_the_end(trials, victims, iter([*kills, *({} for _ in victims)]))
        for victim in victims:
            assert victim.num_kills == 1, f"{victim.cache.name} was never reached"
            assert content(victim.cache) == expected, victim.cache.name
            shutil.rmtree(victim.cache)


@pytest.mark.parametrize("call", CALLS)
def test_a_kill_beside_a_system_call_loses_nothing(call, tmp_path, trials, straight, content, committed):
    store = STORES[CALLS.index(call) % 2]
    chosen = sample(call, straight("refcoco", store=store, limit=SMALL)[1].calls[call], POINTS_PER_CALL)

    check_points(chosen, store, tmp_path, trials, straight, content, committed)


@pytest.mark.exhaustive
@pytest.mark.parametrize("store", STORES)
@pytest.mark.parametrize("call", CALLS)
def test_a_kill_beside_any_system_call_loses_nothing(
    call, store, tmp_path, trials, straight, content, committed
):
    count = straight("refcoco", store=store, limit=SMALL)[1].calls[call]

    check_points(points(call, count), store, tmp_path, trials, straight, content, committed)


def check_growth(chosen, store, tmp_path, trials, straight, content, read_everything, committed):
    old, _ = straight("refcoco:val", store=store)
    old_content = read_everything(old)
    expected = content(straight("refcoco:val", "refcoco+", store=store)[0])
    for first in range(0, len(chosen), 2):
        victims = []
        for call, n, when in chosen[first : first + 2]:
            cache = tmp_path / f"{call}-{n}-{when}"
            shutil.copytree(old, cache)
            victims.append(Victim(cache, trials, committed, split="refcoco+"))
        kills = [{"kill_at": point} for point in chosen[first : first + 2]]
        endings = trials.run(*(victim.trial(**kill) for victim, kill in zip(victims, kills, strict=True)))
        for victim, ending in zip(victims, endings, strict=True):
            victim.check(ending)
            found = read_everything(victim.cache)
            if (
                "refcoco+.unc" not in found["expressions"]
            ):  # else it was killed after the manifest was replaced
                assert found == old_content, victim.cache.name
        run_to_the_end(trials, victims, iter([{} for _ in victims]))
        for victim in victims:
            assert victim.num_kills == 1, f"{victim.cache.name} was never reached"
            assert content(victim.cache) == expected, victim.cache.name
            shutil.rmtree(victim.cache)


@pytest.mark.parametrize("call", CALLS)
def test_a_cache_killed_while_it_grows_stays_what_it_was_until_the_growth_is_done(
    call, tmp_path, trials, straight, content, read_everything, committed
):
    store = STORES[(CALLS.index(call) + 1) % 2]
    count = straight("refcoco:val", "refcoco+", store=store)[1].calls[call]
    chosen = sample(call, count, GROWTH_POINTS_PER_CALL)

    check_growth(chosen, store, tmp_path, trials, straight, content, read_everything, committed)


@pytest.mark.exhaustive
@pytest.mark.parametrize("store", STORES)
@pytest.mark.parametrize("call", CALLS)
def test_a_cache_killed_anywhere_while_it_grows_stays_what_it_was(
    call, store, tmp_path, trials, straight, content, read_everything, committed
):
    count = straight("refcoco:val", "refcoco+", store=store)[1].calls[call]

    check_growth(points(call, count), store, tmp_path, trials, straight, content, read_everything, committed)


def test_a_cache_that_is_moved_between_kill_and_resume_goes_on(
    tmp_path, trials, straight, content, committed
):
    victim = Victim(tmp_path / "here", trials, committed)
    victim.check(trials.run(victim.trial(kill_at=["fsync", 100, "after"]))[0])
    assert committed(victim.cache)
    moved = Victim(tmp_path / "elsewhere" / "there", trials, committed)
    moved.cache.parent.mkdir()
    victim.cache.rename(moved.cache)

    run_to_the_end(trials, [moved], iter([{}]))

    assert content(moved.cache) == content(straight("refcoco")[0])


def test_a_torn_commit_record_means_that_its_shard_is_to_do(tmp_path, trials, straight, content):
    """Renames are atomic, but a disk that lies may leave a file of zeros behind one."""
    cache = tmp_path / "feats"
    trials.run(trials.trial(cache, kill_at=["fsync", 100, "after"]))
    records = sorted((cache / "extraction/shards").glob("*.json"))
    assert len(records) >= 2
    records[0].write_bytes(b"\0" * records[0].stat().st_size)
    records[1].write_bytes(b"")

    ending = trials.extract(cache)

    assert ending.added == 52 - 4 * (len(records) - 2)
    assert content(cache) == content(straight("refcoco")[0])

"""Several processes that write one cache: they share a plan, or wait for each other."""

from __future__ import annotations

import multiprocessing
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ris_cache.errors import StoppedError
from ris_cache.store.cache import FeatureCache
from ris_cache.store.journal import Journal
from ris_cache.store.writer import CacheWriter

pytestmark = pytest.mark.usefixtures("no_waiting_for_the_disk")

FORK = multiprocessing.get_context("fork")


def content_of(root: Path) -> dict[str, bytes]:
    return {
        path.relative_to(root).as_posix(): path.read_bytes() for path in root.rglob("*") if path.is_file()
    }


def test_those_who_ask_for_the_same_share_the_plan(drawing: Any, tmp_path: Path) -> None:
    first, second = drawing.open(tmp_path, range(12)), drawing.open(tmp_path, range(12))
    assert first.shards == second.shards
    mine, theirs = first.free_claims(), second.free_claims()
    claims = [next(mine), next(theirs), next(mine)]
    assert [claim.shard for claim in claims] == [0, 1, 2]
    assert list(theirs) == []
    claims[1].release()
    again = list(second.free_claims())
    assert [claim.shard for claim in again] == [1]
    for claim in (claims[0], claims[2], *again):
        drawing.commit(claim)
    assert first.is_done()
    assert second.is_done()
    done = first.finish(drawing.edit(range(12), "val"))
    assert list(second.free_claims()) == []
    assert second.is_done()
    assert second.finish(drawing.edit(range(12), "val")) == done
    drawing.require_whole(tmp_path)


def test_who_holds_a_plan_that_is_gone_claims_nothing_of_the_next(drawing: Any, tmp_path: Path) -> None:
    first, late = drawing.open(tmp_path, range(8)), drawing.open(tmp_path, range(8))
    drawing.commit_all(first)
    first.finish(lambda draft: None)
    next_one = drawing.open(tmp_path, range(20), {"--split": "testA"})
    assert list(late.free_claims()) == []
    assert late.is_done()
    late.finish(lambda draft: None)
    assert drawing.commit_all(next_one) == [2, 3, 4]
    next_one.finish(lambda draft: None)
    assert len(drawing.require_whole(tmp_path)) == 20


@pytest.mark.parametrize("when", ["before it looks", "while it looks"])
def test_a_journal_that_goes_while_a_claim_is_made_ends_the_claims(
    drawing: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, when: str
) -> None:
    """Between two looks at the journal, another process may finish the plan and remove it."""
    first, late = drawing.open(tmp_path, range(4)), drawing.open(tmp_path, range(4))
    drawing.commit_all(first)
    real_lock, real_record = Journal.claim_lock, Journal.record

    def finish() -> None:
        with monkeypatch.context() as patch:
            patch.setattr(Journal, "record", real_record)
            first.finish(lambda draft: None)

    def record(journal: Journal, shard: int) -> Any:
        if when == "before it looks" and not (tmp_path / "manifest.json").exists():
            finish()
        elif not (tmp_path / "manifest.json").exists():
            return None
        return real_record(journal, shard)

    def claim_lock(journal: Journal, shard: int) -> Any:
        lock = real_lock(journal, shard)
        if when == "while it looks":
            lock.acquire()
            finish()
        return lock

    monkeypatch.setattr(Journal, "record", record)
    monkeypatch.setattr(Journal, "claim_lock", claim_lock)
    assert list(late.free_claims()) == []
    monkeypatch.undo()
    late.finish(lambda draft: None)
    drawing.require_whole(tmp_path)


def test_tables_alone_may_be_added_while_others_compute(drawing: Any, tmp_path: Path) -> None:
    """No plan is needed for that, and the plan under way stays good for who joins or resumes it."""
    drawing.extract(tmp_path, range(4), "val")
    busy = drawing.open(tmp_path, range(12), {"--split": "train"})
    drawing.commit(next(busy.free_claims()))
    busy.close()
    # As `open` leaves it if the plan begins right after it looked.
    tables_only = CacheWriter(tmp_path, drawing.recipe, None, None)
    tables_only.finish(drawing.edit(range(2), "testA"))
    assert list(FeatureCache.open(tmp_path).manifest.datasets["refcoco.unc"].splits) == ["val", "testA"]
    resumed = drawing.open(tmp_path, range(12), {"--split": "train"})
    assert resumed.num_committed == 4
    assert drawing.commit_all(resumed) == [2]
    resumed.finish(drawing.edit(range(12), "train"))
    cache = drawing.require_whole(tmp_path)
    assert len(cache) == 12
    assert list(cache.manifest.datasets["refcoco.unc"].splits) == ["val", "testA", "train"]


class Waiting:
    """Opens a writer on a thread, and records what it is told meanwhile."""

    def __init__(self, open_writer: Callable[..., CacheWriter]) -> None:
        self.told: list[str] = []
        self.writer: CacheWriter | None = None
        self._thread = threading.Thread(target=self._open, args=(open_writer,))
        self._thread.start()

    def _open(self, open_writer: Callable[..., CacheWriter]) -> None:
        self.writer = open_writer(on_wait=self.told.append)

    def result(self) -> CacheWriter:
        self._thread.join(timeout=30)
        assert self.writer is not None, "still waiting"
        return self.writer


@pytest.fixture
def quick_polls(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ris_cache.store.writer._POLL_SECONDS", 0.01)


@pytest.mark.usefixtures("quick_polls", "threads_end")
def test_another_request_waits_and_then_adds_what_is_still_missing(drawing: Any, tmp_path: Path) -> None:
    first = drawing.open(tmp_path, range(6), {"--split": "val", "--limit": 6})
    waiting = Waiting(lambda **options: drawing.open(tmp_path, range(4, 9), {"--split": "testA"}, **options))
    time.sleep(0.1)
    assert waiting.writer is None
    assert waiting.told == [
        f"another `ris extract` is at work on {tmp_path} (--split val, --limit 6); waiting for it to end"
    ]
    drawing.commit_all(first)
    first.finish(drawing.edit(range(6), "val"))
    second = waiting.result()
    assert [image.image_id for image in second.shards[2]] == [6, 7, 8]
    drawing.commit_all(second)
    second.finish(drawing.edit(range(4, 9), "testA"))
    assert len(waiting.told) == 1
    assert len(drawing.require_whole(tmp_path)) == 9


@pytest.mark.usefixtures("quick_polls", "threads_end")
def test_another_request_takes_over_what_an_abandoned_plan_has_done(
    either_drawing: Any, tmp_path: Path
) -> None:
    first = either_drawing.open(tmp_path, range(12), {"--split": "val"})
    claims = first.free_claims()
    next(claims).release()
    either_drawing.commit(next(claims))  # shard 1: images 4 to 7
    waiting = Waiting(
        lambda **options: either_drawing.open(tmp_path, range(6, 14), {"--split": "testA"}, **options)
    )
    time.sleep(0.05)
    assert waiting.told
    first.close()
    second = waiting.result()
    # The committed shard stays with all its images; the numbers of the others are used again.
    assert {shard: [image.image_id for image in images] for shard, images in second.shards.items()} == {
        0: [8, 9, 10, 11],
        1: [4, 5, 6, 7],
        2: [12, 13],
    }
    assert second.num_committed == 4
    assert either_drawing.commit_all(second) == [0, 2]
    second.finish(either_drawing.edit(range(6, 14), "testA"))
    assert sorted(either_drawing.require_whole(tmp_path).image_ids.tolist()) == list(range(4, 14))


@pytest.mark.usefixtures("quick_polls")
def test_waiting_can_be_stopped(drawing: Any, tmp_path: Path) -> None:
    first = drawing.open(tmp_path, range(4))
    stops = iter([False, False, True])
    with pytest.raises(StoppedError, match="Stopped while another `ris extract` is at work") as caught:
        drawing.open(tmp_path, range(8), {"--split": "testA"}, should_stop=lambda: next(stops))
    assert caught.value.exit_code == 130
    drawing.commit_all(first)
    first.finish(lambda draft: None)
    drawing.require_whole(tmp_path)


def test_other_numbers_of_images_for_the_same_request_are_another_plan(drawing: Any, tmp_path: Path) -> None:
    """Annotations edited between two runs give the same request, but images that nobody planned."""
    first = drawing.open(tmp_path, range(6))
    drawing.commit(next(first.free_claims()))
    first.close()
    second = drawing.open(tmp_path, range(9))
    assert sorted(image.image_id for images in second.shards.values() for image in images) == list(range(9))
    assert second.num_committed == 4


@pytest.mark.usefixtures("quick_polls")
def test_processes_that_share_a_plan_write_what_one_alone_writes(either_drawing: Any, tmp_path: Path) -> None:
    alone, shared = tmp_path / "alone", tmp_path / "shared"
    either_drawing.extract(alone, range(40), request={"--split": "val"})
    log, all_here = tmp_path / "log", FORK.Barrier(3)

    def work() -> None:
        writer = either_drawing.open(shared, range(40))
        all_here.wait(timeout=60)
        while not writer.is_done():
            for claim in writer.free_claims():
                either_drawing.commit(claim)
                with log.open("a") as file:
                    file.write(f"{os.getpid()} {claim.shard}\n")
                time.sleep(0.02)
            time.sleep(0.005)
        writer.finish(either_drawing.edit(range(40), "val"))

    processes = [FORK.Process(target=work) for _ in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(timeout=60)
    assert [process.exitcode for process in processes] == [0, 0, 0]
    done = [line.split() for line in log.read_text().splitlines()]
    assert sorted(int(shard) for _, shard in done) == list(range(10))
    assert len({pid for pid, _ in done}) > 1
    either_drawing.require_whole(shared)
    one, other = content_of(alone), content_of(shared)
    del one["manifest.json"], other["manifest.json"]  # it says when
    assert one == other
    manifests = [FeatureCache.open(root).manifest for root in (alone, shared)]
    assert manifests[0].files == manifests[1].files

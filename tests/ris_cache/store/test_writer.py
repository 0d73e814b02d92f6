"""Writing a cache: planning, sharing a plan, and what is left when a process dies in between."""

from __future__ import annotations

import contextlib
import itertools
import json
import multiprocessing
import os
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import zarr

from ris_cache.errors import (
    CacheError,
    ConfigError,
    CorruptShardError,
    DataError,
    FingerprintMismatchError,
    IncompleteCacheError,
    ShapeError,
    StoppedError,
)
from ris_cache.store import files
from ris_cache.store.cache import FeatureCache
from ris_cache.store.journal import Journal
from ris_cache.store.writer import CacheWriter, Outcome, require_same_image

pytestmark = pytest.mark.usefixtures("no_waiting_for_the_disk")

FORK = multiprocessing.get_context("fork")


def content_of(root: Path) -> dict[str, bytes]:
    return {
        path.relative_to(root).as_posix(): path.read_bytes() for path in root.rglob("*") if path.is_file()
    }


def record_path(root: Path, shard: int) -> Path:
    return root / "extraction" / "shards" / f"{shard:05}.json"


def run_in_child(function: Callable[[], None]) -> int:
    """Run a function in a forked process; returns its exit code, negative for a signal."""
    process = FORK.Process(target=function)
    process.start()
    process.join(timeout=60)
    assert process.exitcode is not None, "the child hangs"
    return process.exitcode


# What a finished cache holds.


def test_a_finished_cache_holds_what_was_written(any_drawing: Any, tmp_path: Path) -> None:
    root = tmp_path / "feats"
    any_drawing.extract(root, range(6), "val", bad=(1,))
    cache = any_drawing.require_whole(root)
    manifest = cache.manifest
    assert (manifest.rows, manifest.shard_rows, manifest.dtype) == (8, 4, any_drawing.dtype)
    assert (manifest.images.ok, manifest.images.quarantined) == (5, 1)
    assert manifest.to_fingerprint() == any_drawing.recipe.fingerprint
    assert manifest.weights == {"sam": "random(seed=0)"}
    assert manifest.recorded.libraries["torch"] == "2.6"
    assert "zarr" in manifest.recorded.libraries
    split = manifest.datasets["refcoco.unc"].splits["val"]
    assert (split.expressions, split.refs, split.images, split.is_complete) == (6, 3, 6, True)
    assert sorted(child.name for child in root.iterdir() if not child.name.startswith("features")) == [
        ".lock", "categories", "expressions", "images", "instances", "manifest.json", "sam_heads.safetensors",
    ]  # fmt: skip


def test_other_readers_need_nothing_of_ours(drawing: Any, tmp_path: Path) -> None:
    drawing.extract(tmp_path, range(6), "val", bad=(1,))
    document = json.loads((tmp_path / "manifest.json").read_bytes())
    images = pq.read_table(tmp_path / document["images"]["file"]).to_pylist()
    assert images[1] == {
        "image_id": 1,
        "namespace": "coco",
        "row": 1,
        "file_name": "000000000001.jpg",
        "height": 31,
        "width": 40,
        "sha256": None,
        "status": "quarantined",
        "reason": "cut off in the middle",
        "crc32c": [],
    }
    group = zarr.open_group(tmp_path / "features.zarr", mode="r")
    for image in images:
        expected = drawing.stored([image["image_id"]])
        for name in document["arrays"]:
            array = group[name["name"]]
            assert isinstance(array, zarr.Array)
            found = np.asarray(array[image["row"]])
            if image["status"] == "ok":
                np.testing.assert_array_equal(found, expected[name["name"]][0])
            else:
                assert np.isnan(found).all()
    entry = document["datasets"]["refcoco.unc"]
    assert pq.read_table(tmp_path / entry["expressions_file"]).to_pylist()[2] == {
        "split": "val",
        "ref_id": 1,
        "sent_id": 2,
        "sent_index": 0,
        "image_id": 2,
        "raw": "A cup",
        "sent": "a cup",
        "ann_ids": [1002],
        "category_ids": [47],
        "is_degenerate": False,
        "no_target": False,
        "category_id": 47,
        "clip_category_id": 1,
    }
    instances = pq.read_table(tmp_path / entry["instances_file"]).to_pylist()
    assert json.loads(instances[0]["segmentation"]) == [[0.0, 0.0, 9.5, 0.0, 9.5, 9.5]]


def test_a_cache_without_images_can_be_finished(either_drawing: Any, tmp_path: Path) -> None:
    writer = either_drawing.open(tmp_path, [])
    assert writer.is_done()
    assert list(writer.free_claims()) == []
    writer.finish(lambda draft: None)
    assert either_drawing.require_whole(tmp_path).manifest.rows == 0


def test_a_shard_of_quarantined_images_has_files_and_no_rows(either_drawing: Any, tmp_path: Path) -> None:
    either_drawing.extract(tmp_path, range(6), bad=(4, 5))
    cache = either_drawing.require_whole(tmp_path)
    assert cache.image_ids.tolist() == [0, 1, 2, 3]
    assert sorted(cache.quarantined) == [4, 5]


# Growing.


def test_adding_computes_only_what_is_missing_and_starts_a_fresh_shard(
    either_drawing: Any, tmp_path: Path
) -> None:
    created = either_drawing.extract(tmp_path, range(6), "val").recorded.created
    writer = either_drawing.open(tmp_path, range(4, 10), {"--split": "testA"})
    assert {shard: [image.image_id for image in images] for shard, images in writer.shards.items()} == {
        2: [6, 7, 8, 9]
    }
    assert writer.num_committed == 0
    assert either_drawing.commit_all(writer) == [2]
    assert writer.num_committed == 4
    writer.finish(either_drawing.edit(range(4, 10), "testA"))
    cache = either_drawing.require_whole(tmp_path)
    assert cache.image_ids.tolist() == list(range(10))
    assert list(cache.manifest.datasets["refcoco.unc"].splits) == ["val", "testA"]
    assert cache.manifest.recorded.created == created


def test_growth_touches_nothing_that_the_old_manifest_names(either_drawing: Any, tmp_path: Path) -> None:
    """A reader of the old state can open each of its files at any time, and finds the same there."""
    old = either_drawing.extract(tmp_path, range(6), "val", bad=(1,))
    reader = FeatureCache.open(tmp_path, integrity="every-read")
    kept = {relative: (tmp_path / relative).read_bytes() for relative in old.files}
    inodes = {relative: (tmp_path / relative).stat().st_ino for relative in old.shard_files()}

    def require_old_state() -> None:
        either_drawing.require_features(reader, [0, 2, 3, 4, 5])
        assert [one.image_id for one in reader.expressions("refcoco.unc")] == list(range(6))
        assert sorted(reader.instances("refcoco.unc")) == list(range(1000, 1006))
        assert reader.categories("coco").ids == (1, 47)
        assert sorted(reader.sam_heads()) == ["mask_tokens", "scale"]
        assert (len(reader), list(reader.quarantined)) == (5, [1])
        assert {relative: (tmp_path / relative).read_bytes() for relative in old.files} == kept
        assert {name: (tmp_path / name).stat().st_ino for name in inodes} == inodes

    writer = either_drawing.open(tmp_path, range(2, 12), {"--split": "testA"})
    for claim in writer.free_claims():
        require_old_state()
        either_drawing.commit(claim)
    require_old_state()
    edit = either_drawing.edit(range(2, 12), "testA")

    def watched(draft: Any) -> None:
        edit(draft)
        require_old_state()

    writer.finish(watched)
    require_old_state()
    either_drawing.extract(tmp_path, range(20, 23), "val", table="refcocog.umd")
    require_old_state()
    late = FeatureCache.open(tmp_path)
    assert (len(late), len(late.expressions("refcoco.unc"))) == (14, 16)


def test_an_extraction_repeated_writes_nothing(either_drawing: Any, tmp_path: Path) -> None:
    either_drawing.extract(tmp_path, range(6), "val", bad=(1,))
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.is_file()}
    content = content_of(tmp_path)
    either_drawing.extract(tmp_path, range(6), "val")
    assert content_of(tmp_path) == content
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.is_file()} == before


def test_an_image_that_gets_features_later_moves_to_another_row(drawing: Any, tmp_path: Path) -> None:
    drawing.extract(tmp_path, range(4), bad=(1,))

    def choose(known: Any) -> list[Any]:
        return [drawing.image(image_id) for image_id, image in known.items() if image.is_quarantined]

    writer = CacheWriter.open(
        tmp_path, drawing.recipe, purpose="extract", request={"retry": 1}, choose=choose
    )
    drawing.commit_all(writer)
    writer.finish(lambda draft: None)
    cache = drawing.require_whole(tmp_path)
    assert cache.quarantined == {}
    assert cache.images[1].row == 4


def test_rows_may_be_asked_for(drawing: Any, tmp_path: Path) -> None:
    writer = CacheWriter.open(
        tmp_path,
        drawing.recipe,
        purpose="convert",
        request={},
        choose=lambda known: [drawing.image(7, row=6), drawing.image(3, row=1)],
    )
    assert {shard: [image.row for image in images] for shard, images in writer.shards.items()} == {
        0: [1],
        1: [6],
    }
    drawing.commit_all(writer)
    writer.finish(lambda draft: None)
    cache = drawing.require_whole(tmp_path)
    assert {image_id: image.row for image_id, image in cache.images.items()} == {3: 1, 7: 6}


# Shards.


def test_a_shard_that_does_not_fit_is_refused_and_stays_to_do(either_drawing: Any, tmp_path: Path) -> None:
    writer = either_drawing.open(tmp_path, range(4))
    (claim,) = writer.free_claims()
    outcomes = [Outcome(sha256="a" * 64)] * 4
    with pytest.raises(ShapeError):
        claim.commit(either_drawing.stored(range(3)), outcomes)
    assert not writer.is_done()
    either_drawing.commit(claim)
    assert writer.is_done()
    writer.finish(either_drawing.edit(range(4), "val"))
    either_drawing.require_whole(tmp_path)


def test_a_full_disk_leaves_the_shard_to_do(
    either_drawing: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    writer = either_drawing.open(tmp_path, range(4))
    (claim,) = writer.free_claims()

    def no_space(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("os.fsync", no_space)
        with pytest.raises(OSError, match="No space left"):
            either_drawing.commit(claim)
    claim.release()
    assert not writer.is_done()
    with pytest.raises(CacheError, match=r"Shard 0 .* is not done"):
        writer.finish(lambda draft: None)
    assert either_drawing.commit_all(writer) == [0]
    writer.finish(lambda draft: None)
    either_drawing.require_whole(tmp_path)


def test_a_shard_that_is_not_done_keeps_the_cache_from_being_finished(drawing: Any, tmp_path: Path) -> None:
    writer = drawing.open(tmp_path, range(8))
    drawing.commit(next(writer.free_claims()))
    with pytest.raises(CacheError, match=r"Shard 1 .* is not done\. Run the command again") as caught:
        writer.finish(lambda draft: None)
    assert caught.value.facts["shard"] == 1
    assert not (tmp_path / "manifest.json").exists()
    with pytest.raises(IncompleteCacheError, match="has not finished"):
        FeatureCache.open(tmp_path)


def test_claims_end_when_asked_to_stop(drawing: Any, tmp_path: Path) -> None:
    writer = drawing.open(tmp_path, range(12))
    asked: list[bool] = []
    claims = writer.free_claims(lambda: bool(asked))
    drawing.commit(next(claims))
    asked.append(True)
    assert list(claims) == []
    assert writer.num_committed == 4


# Several processes.


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
    log = tmp_path / "log"

    def work() -> None:
        writer = either_drawing.open(shared, range(40))
        while not writer.is_done():
            for claim in writer.free_claims():
                either_drawing.commit(claim)
                with log.open("a") as file:
                    file.write(f"{os.getpid()} {claim.shard}\n")
                time.sleep(0.005)
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


# Processes that die.


@pytest.mark.parametrize("has_cache", [False, True])
def test_the_claims_of_a_killed_process_are_free_again(drawing: Any, tmp_path: Path, has_cache: bool) -> None:
    if has_cache:
        drawing.extract(tmp_path, range(100, 104), "train")

    def work() -> None:
        writer = drawing.open(tmp_path, range(12))
        claims = writer.free_claims()
        drawing.commit(next(claims))
        held = [next(claims), next(claims)]
        assert len(held) == 2
        os.kill(os.getpid(), signal.SIGKILL)

    survivor = drawing.open(tmp_path, range(12))
    assert run_in_child(work) == -signal.SIGKILL
    first = 1 if has_cache else 0
    assert survivor.num_committed == 4
    assert drawing.commit_all(survivor) == [first + 1, first + 2]
    survivor.finish(drawing.edit(range(12), "val"))
    drawing.require_whole(tmp_path)


def test_a_killed_process_keeps_nobody_waiting(drawing: Any, tmp_path: Path) -> None:
    def work() -> None:
        writer = drawing.open(tmp_path, range(12), {"--split": "val"})
        drawing.commit(next(writer.free_claims()))
        os.kill(os.getpid(), signal.SIGKILL)

    assert run_in_child(work) == -signal.SIGKILL
    told: list[str] = []
    writer = drawing.open(tmp_path, range(4, 6), {"--split": "testA"}, on_wait=told.append)
    assert not told
    assert writer.num_committed == 4
    drawing.commit_all(writer)
    writer.finish(lambda draft: None)
    assert drawing.require_whole(tmp_path).image_ids.tolist() == [0, 1, 2, 3, 4, 5]


class PowerCut(BaseException):
    """Ends a test's extraction where a real one may be killed."""


@contextlib.contextmanager
def cut_after(renames: int, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Let so many files get their names, and then nothing more happen to the disk."""
    counter = itertools.count()
    real_replace, real_unlink, real_rmtree = Path.replace, Path.unlink, shutil.rmtree

    def replace(source: Path, target: Path) -> Path:
        if next(counter) >= renames:
            raise PowerCut
        return real_replace(source, target)

    def unlink(path: Path, missing_ok: bool = False) -> None:
        if path.suffix != ".tmp":  # removed by the process itself, which a power cut leaves
            if next(counter) >= renames:
                raise PowerCut
            real_unlink(path, missing_ok)

    def rmtree(path: Path, ignore_errors: bool = False) -> None:
        if next(counter) >= renames:
            raise PowerCut
        real_rmtree(path, ignore_errors)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", replace)
        patch.setattr(Path, "unlink", unlink)
        patch.setattr(shutil, "rmtree", rmtree)
        yield


@pytest.mark.parametrize("has_cache", [False, True])
@pytest.mark.parametrize("resumed_as", ["the same", "another"])
def test_a_cut_after_any_change_to_the_disk_can_be_resumed(
    either_drawing: Any,
    tmp_path: Path,
    has_cache: bool,
    resumed_as: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if has_cache:
        either_drawing.extract(tmp_path / "before", range(4), "val")
    old = set(range(4)) if has_cache else set()
    for survived in itertools.count():
        root = tmp_path / f"feats{survived}"
        if has_cache:
            shutil.copytree(tmp_path / "before", root)
        is_cut = False
        with cut_after(survived, monkeypatch):
            try:
                either_drawing.extract(root, range(2, 11), "testA")
            except PowerCut:
                is_cut = True
        if has_cache or (root / "manifest.json").exists():
            cache = FeatureCache.open(root)
            assert set(cache.image_ids.tolist()) in (old, old | set(range(2, 11)))
            either_drawing.require_features(cache, cache.image_ids.tolist())
            for table in cache.manifest.datasets:
                cache.expressions(table)
        elif is_cut and root.exists():
            with pytest.raises(IncompleteCacheError):
                FeatureCache.open(root)
        if resumed_as == "the same":
            either_drawing.extract(root, range(2, 11), "testA")
            expected = old | set(range(2, 11))
        else:
            either_drawing.extract(root, range(8, 15), "train")
            expected = old | set(range(8, 15))
        cache = either_drawing.require_whole(root)
        assert set(cache.image_ids.tolist()) >= expected
        assert list(root.rglob("*.tmp")) == []
        if not is_cut:
            break
    assert survived > 10


def test_a_plan_that_was_carried_out_but_not_removed_is(
    drawing: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    writer = drawing.open(tmp_path, range(4))
    drawing.commit_all(writer)
    with monkeypatch.context() as patch:
        patch.setattr(Journal, "discard", lambda journal: (_ for _ in ()).throw(PowerCut()))
        with pytest.raises(PowerCut):
            writer.finish(drawing.edit(range(4), "val"))
    writer.close()
    assert (tmp_path / "extraction" / "plan.json").exists()
    assert len(FeatureCache.open(tmp_path)) == 4
    again = drawing.open(tmp_path, range(4))
    assert again.shards == {}
    again.finish(drawing.edit(range(4), "val"))
    drawing.require_whole(tmp_path)


@pytest.mark.parametrize("content", [b"", b"\0" * 300, b'{"shard": 0}', b"not json"])
def test_a_damaged_commit_record_means_that_the_shard_is_done_again(
    drawing: Any, tmp_path: Path, content: bytes
) -> None:
    first = drawing.open(tmp_path, range(8))
    drawing.commit_all(first)
    first.close()
    record_path(tmp_path, 1).write_bytes(content)
    second = drawing.open(tmp_path, range(8))
    assert second.num_committed == 4
    assert drawing.commit_all(second) == [1]
    second.finish(lambda draft: None)
    drawing.require_whole(tmp_path)


def test_a_damaged_record_is_noticed_even_at_the_end(drawing: Any, tmp_path: Path) -> None:
    writer = drawing.open(tmp_path, range(8))
    drawing.commit_all(writer)
    assert writer.is_done()
    record_path(tmp_path, 1).write_bytes(b"")
    with pytest.raises(CacheError, match="Shard 1"):
        writer.finish(lambda draft: None)
    assert not (tmp_path / "manifest.json").exists()


@pytest.mark.parametrize("has_cache", [False, True])
def test_a_damaged_plan_says_what_to_remove_and_that_helps(
    drawing: Any, tmp_path: Path, has_cache: bool
) -> None:
    if has_cache:
        drawing.extract(tmp_path, range(100, 104), "train")
    drawing.open(tmp_path, range(8)).close()
    (tmp_path / "extraction" / "plan.json").write_bytes(b'{"version": 1}')
    with pytest.raises(CorruptShardError, match=r"Remove .*/extraction to give up what it did"):
        drawing.open(tmp_path, range(8))
    shutil.rmtree(tmp_path / "extraction")
    drawing.extract(tmp_path, range(8))
    drawing.require_whole(tmp_path)


def test_shards_of_a_plan_that_was_given_up_do_not_stay(drawing: Any, tmp_path: Path) -> None:
    first = drawing.open(tmp_path, range(20))
    drawing.commit_all(first)
    first.close()
    shutil.rmtree(tmp_path / "extraction")
    files.write_atomically(tmp_path / "features.zarr" / "sam" / "c" / "7" / ".0.1234.tmp", b"cut off")
    (tmp_path / ".manifest.json.99.tmp").write_bytes(b"{")
    drawing.extract(tmp_path, range(4))
    drawing.require_whole(tmp_path)
    assert not (tmp_path / ".manifest.json.99.tmp").exists()


# What is refused.


def test_other_settings_are_refused_and_nothing_is_touched(
    drawing: Any, other_drawing: Any, tmp_path: Path
) -> None:
    drawing.extract(tmp_path, range(4))
    before = content_of(tmp_path)
    with pytest.raises(FingerprintMismatchError, match=r"weights\.sam\.seed: expected 1, found 0"):
        other_drawing.open(tmp_path, range(8))
    assert content_of(tmp_path) == before


def test_a_cut_off_extraction_is_not_gone_on_with_by_other_settings(
    drawing: Any, other_drawing: Any, tmp_path: Path
) -> None:
    drawing.open(tmp_path, range(4)).close()
    with pytest.raises(FingerprintMismatchError, match=r"weights\.sam\.seed"):
        other_drawing.open(tmp_path, range(4))


@pytest.mark.parametrize("changes", [{"backend": "hdf5"}, {"shard_rows": 5}])
@pytest.mark.parametrize("is_finished", [False, True])
def test_another_layout_is_refused(
    drawing: Any, tmp_path: Path, changes: dict[str, Any], is_finished: bool
) -> None:
    if is_finished:
        drawing.extract(tmp_path, range(4))
    else:
        drawing.open(tmp_path, range(4)).close()
    other = type(drawing)(**changes)
    with pytest.raises(CacheError, match=r"is stored as zarr in shards of 4, not as") as caught:
        other.open(tmp_path, range(8))
    assert caught.value.facts["found"] == ("zarr", 4)


@pytest.mark.parametrize("name", ["notes.txt", "features.zarr/mine", "images/cat.jpg"])
def test_a_directory_of_somebody_else_is_refused_untouched(drawing: Any, tmp_path: Path, name: str) -> None:
    path = tmp_path / "home" / name
    path.parent.mkdir(parents=True)
    path.write_text("mine")
    with pytest.raises(ConfigError, match="nothing was changed"):
        drawing.open(tmp_path / "home", range(4))
    assert [child for child in (tmp_path / "home").rglob("*") if child.is_file()] == [path]


def test_a_manifest_of_somebody_else_is_refused(drawing: Any, tmp_path: Path) -> None:
    (tmp_path / "manifest.json").write_text('{"name": "a browser extension"}')
    with pytest.raises(CacheError, match="does not describe a feature cache"):
        drawing.open(tmp_path, range(4))
    assert (tmp_path / "manifest.json").read_text() == '{"name": "a browser extension"}'


def test_a_file_is_no_place_for_a_cache(drawing: Any, tmp_path: Path) -> None:
    (tmp_path / "feats").write_text("")
    with pytest.raises(ConfigError, match="is a file"):
        drawing.open(tmp_path / "feats", range(4))


def test_a_damaged_image_table_stops_an_update(drawing: Any, tmp_path: Path) -> None:
    manifest = drawing.extract(tmp_path, range(4))
    (tmp_path / manifest.images.file).write_bytes(b"PAR1")
    with pytest.raises(CorruptShardError, match=r"pool\.[0-9a-f]{12}\.parquet"):
        drawing.open(tmp_path, range(8))


@pytest.mark.parametrize(
    "changes", [{"height": 7}, {"width": 7}, {"file_name": "b.jpg"}, {"namespace": "o365"}]
)
def test_an_image_id_means_one_image(drawing: Any, tmp_path: Path, changes: dict[str, Any]) -> None:
    drawing.extract(tmp_path, range(4))
    known = FeatureCache.open(tmp_path).images[1]
    same, other = drawing.image(1), drawing.image(1, **changes)
    require_same_image(known, same, same.namespace, tmp_path)
    with pytest.raises(DataError, match=r"Image 1 is .* extract into another directory") as caught:
        require_same_image(known, other, other.namespace, tmp_path)
    assert caught.value.facts["image_id"] == 1

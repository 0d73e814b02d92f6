"""Several processes that extract into one cache, at once: nothing is lost and nothing is computed twice."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ris_cache.encoders.spec import TINY
from ris_cache.errors import StoppedError
from ris_cache.store import journal
from ris_cache.store.draft import CacheDraft, Recipe
from ris_cache.store.fingerprint import cache_fingerprint
from ris_cache.store.locks import FileLock
from ris_cache.store.planning import NewImage
from ris_cache.store.writer import CacheWriter, Outcome

NOTED_RANK = """
import os, runpy, sys
import ris_cache.extraction.pipeline as pipeline

plain_decode = pipeline.decode_image

def decode(path, **options):
    with open({log!r}, "a") as log:
        log.write(f"{{os.environ['RANK']}} {{path.name}}\\n")
    return plain_decode(path, **options)

pipeline.decode_image = decode
runpy.run_module("cli", run_name="__main__", alter_sys=True)
"""


@pytest.mark.parametrize("store", ["zarr", "hdf5"])
def test_two_processes_share_the_work_and_write_what_one_would(store, tmp_path, trials, straight, content):
    logs = [tmp_path / "one.log", tmp_path / "other.log"]
    options = {"store": store}

    endings = trials.run(*(trials.trial(tmp_path / "feats", options=options, log=str(log)) for log in logs))

    assert [ending.exit_code for ending in endings] == [0, 0]
    decoded = [log.read_text().split() for log in logs]
    assert all(decoded), "one of the two did everything"
    assert len(set(decoded[0] + decoded[1])) == len(decoded[0] + decoded[1]) == 52
    assert [ending.added for ending in endings] == [len(names) for names in decoded]
    assert content(tmp_path / "feats") == content(straight("refcoco", store=store)[0])


def until_killed(cache: Path, seconds: float, attempt: Callable[[float], list[Any]]) -> list[Any]:
    """Repeat an attempt with ever earlier kills, on a new cache, until none of the killed was faster."""
    for _ in range(5):
        shutil.rmtree(cache, ignore_errors=True)
        endings = attempt(seconds)
        if all(ending.signal == signal.SIGKILL for ending in endings):
            return endings
        seconds /= 2
    pytest.fail("every process ended before it could be killed")


@pytest.mark.parametrize("seed", range(3))
def test_when_one_of_two_is_killed_the_other_does_the_rest_alone(seed, tmp_path, trials, straight, content):
    expected, alone = straight("refcoco")
    cache = tmp_path / "feats"
    left = []

    def attempt(seconds: float) -> list[Any]:
        killed, other = trials.run(trials.trial(cache, kill_after=seconds), trials.trial(cache))
        left.append(other)
        return [killed]

    until_killed(cache, random.Random(seed).uniform(0.2, 0.5) * alone.seconds, attempt)

    assert left[-1].exit_code == 0
    assert content(cache) == content(expected)


def test_when_both_are_killed_a_third_goes_on(tmp_path, trials, straight, content, committed):
    expected, alone = straight("refcoco")
    cache, log = tmp_path / "feats", tmp_path / "log"

    def attempt(seconds: float) -> list[Any]:
        return list(trials.run(*[trials.trial(cache, kill_after=seconds)] * 2))

    until_killed(cache, 0.4 * alone.seconds, attempt)
    done = committed(cache)

    third = trials.extract(cache, log=str(log))

    assert third.added == 52 - len(done)
    assert not done & set(log.read_text().split())
    assert content(cache) == content(expected)


def test_whoever_asks_for_something_else_waits_and_says_so(tmp_path, trials, read_everything, straight):
    cache, outputs = tmp_path / "feats", [tmp_path / "train.txt", tmp_path / "val.txt"]

    waits = [0, 0]
    for _ in range(5):  # on a busy machine one may be through before the other has begun
        shutil.rmtree(cache, ignore_errors=True)
        endings = trials.run(
            trials.command(cache, "refcoco:train", output=str(outputs[0])),
            trials.command(cache, "refcoco:val", output=str(outputs[1])),
        )
        assert [ending.exit_code for ending in endings] == [0, 0]
        waits = [output.read_text().count("; waiting for it to end") for output in outputs]
        if any(waits):
            break

    assert sorted(waits) == [0, 1]
    described = "refcoco/unc:train" if waits[1] else "refcoco/unc:val"
    told = outputs[waits.index(1)].read_text()
    assert f"another `ris extract` is at work on {cache} (--split {described}); waiting" in told
    found = read_everything(cache)
    alone = read_everything(straight("refcoco:train", "refcoco:val")[0])
    assert found["features"] == alone["features"]
    assert found["instances"] == alone["instances"]
    assert set(found["expressions"]["refcoco.unc"]) == set(alone["expressions"]["refcoco.unc"])


def test_the_processes_of_torchrun_share_the_work_and_one_speaks_for_all(tmp_path, data, straight, content):
    cache, log, program = tmp_path / "feats", tmp_path / "log", tmp_path / "noted_rank.py"
    program.write_text(NOTED_RANK.format(log=str(log)))

    ended = subprocess.run(
        [
            *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"),
            *(program, "extract", "--split", "refcoco", "--data", data, "--cache", cache, "--preset", "tiny"),
            *("--random-weights", "--device", "cpu", "--batch-size", "4", "--workers", "1"),
            *("--shard-rows", "4", "--json"),
        ],
        capture_output=True,
        text=True,
        timeout=120,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip

    assert ended.returncode == 0, ended.stderr
    report = json.loads(ended.stdout)  # one document, so one process printed
    assert report["added"] + report["present"] == 52
    images = [line.split()[1] for line in log.read_text().splitlines()]
    assert len(set(images)) == len(images) == 52
    assert content(cache) == content(straight("refcoco")[0])


SHAPES = {"sam": (2, 3, 3), "clip": (4, 2), "clip_pooled": (5,)}


def recipe() -> Recipe:
    return Recipe(
        fingerprint=cache_fingerprint(TINY, {"sam": {"seed": 0}}, arithmetic="float32", dtype="float16"),
        preset="tiny",
        weights={"sam": "random(seed=0)"},
        shapes=SHAPES,
        shard_rows=2,
    )


def images(*image_ids: int) -> list[NewImage]:
    return [NewImage(image_id=i, file_name=f"{i}.jpg", height=3, width=4) for i in image_ids]


def join(root: Path, *image_ids: int, name: str = "some", **terms: Any) -> CacheWriter:
    """Open a writer that wants those of the images that the cache lacks."""
    return CacheWriter.open(
        root,
        recipe(),
        purpose="extract",
        request={"--split": name},
        choose=lambda known: [image for image in images(*image_ids) if image.image_id not in known],
        **terms,
    )


def commit(claim: Any) -> None:
    arrays = {
        name: np.full((len(claim.images), *shape), claim.shard, np.float16) for name, shape in SHAPES.items()
    }
    claim.commit(arrays, [Outcome(sha256="0" * 64) for _ in claim.images])


def commit_all(writer: CacheWriter) -> None:
    for claim in writer.free_claims():
        commit(claim)


def finish(writer: CacheWriter) -> Any:
    return writer.finish(lambda draft: None)


def test_a_shard_is_claimed_by_one_process_at_a_time(tmp_path):
    one, other = join(tmp_path, 1, 2, 3, 4), join(tmp_path, 1, 2, 3, 4)

    taken = next(one.free_claims())
    free = [claim.shard for claim in other.free_claims()]
    taken.release()

    assert (taken.shard, free) == (0, [1])


def test_a_finished_plan_leaves_nothing_to_whoever_was_about_to_claim(tmp_path, monkeypatch):
    """Between its look at the records and its lock, a slow process may miss the whole end of the plan."""
    slow, fast = join(tmp_path, 1, 2), join(tmp_path, 1, 2)
    plain_acquire = FileLock.acquire

    def acquire_late(self: FileLock, **options: Any) -> bool:
        monkeypatch.setattr(FileLock, "acquire", plain_acquire)
        commit_all(fast)
        finish(fast)
        return plain_acquire(self, **options)

    monkeypatch.setattr(FileLock, "acquire", acquire_late)

    assert list(slow.free_claims()) == []
    assert slow.is_done()
    assert finish(slow).images.ok == 2
    assert not (tmp_path / "extraction").exists()


def test_a_lock_that_was_opened_before_the_end_of_the_plan_claims_nothing(tmp_path, monkeypatch):
    """The same, with the journal removed between opening the lock's file and locking it."""
    slow, fast = join(tmp_path, 1, 2), join(tmp_path, 1, 2)
    plain_open = FileLock._open

    def open_early(self: FileLock) -> int:
        descriptor = plain_open(self)
        monkeypatch.setattr(FileLock, "_open", plain_open)
        commit_all(fast)
        finish(fast)
        return descriptor

    monkeypatch.setattr(FileLock, "_open", open_early)

    assert list(slow.free_claims()) == []
    assert finish(slow).images.ok == 2
    assert not (tmp_path / "extraction").exists()


def test_a_lock_put_into_the_journal_while_it_is_removed_does_no_harm(tmp_path, monkeypatch):
    writer = join(tmp_path, 1, 2)
    commit_all(writer)
    plain_rmdir, late = os.rmdir, [tmp_path / "extraction/claims/00000.lock"]

    def rmdir(path: Any, **options: Any) -> None:
        if Path(path).name == "claims" and late:
            late.pop().touch()
        plain_rmdir(path, **options)

    monkeypatch.setattr(os, "rmdir", rmdir)

    assert finish(writer).images.ok == 2
    assert not late
    assert not (tmp_path / "extraction").exists()


def test_tables_added_meanwhile_do_not_end_the_plan_of_others(tmp_path):
    """Who adds only tables needs no plan, and changes the manifest that the plan was made on."""
    first = join(tmp_path, 1, 2)
    commit_all(first)
    finish(first)
    only_tables = join(tmp_path, 1, 2, name="other tables")
    planned = join(tmp_path, 1, 2, 3, 4, 5, 6, name="more images")
    claims = planned.free_claims()
    commit(next(claims))
    only_tables.finish(lambda draft: draft.write_sam_heads({"w": np.zeros(3, np.float32)}))

    joined = join(tmp_path, 1, 2, 3, 4, 5, 6, name="more images")
    assert joined.num_committed == 2, "what was committed is to be computed again"
    commit_all(joined)
    assert list(claims) == []
    finished = finish(planned)

    assert finished.images.ok == 6
    assert "sam_heads.safetensors" in finished.files
    assert finish(joined) == finished
    assert not (tmp_path / "extraction").exists()


def test_a_plan_whose_manifest_is_in_place_is_over(tmp_path, monkeypatch):
    """Killed after the rename of the manifest, before the journal is removed."""
    writer = join(tmp_path, 1, 2)
    commit_all(writer)
    monkeypatch.setattr(journal.Journal, "discard", lambda self: None)
    finished = finish(writer)
    monkeypatch.undo()
    assert (tmp_path / "extraction/plan.json").exists()

    again = join(tmp_path, 1, 2)

    assert again.shards == {}
    assert finish(again) == finished
    assert not (tmp_path / "extraction").exists()


def test_a_plan_cut_off_gives_its_finished_shards_to_another_request(tmp_path):
    writer = join(tmp_path, 1, 2, 3, 4, name="some")
    commit(next(writer.free_claims()))
    writer.close()

    other = join(tmp_path, 2, 3, 9, name="others")
    planned = sorted(image.image_id for images in other.shards.values() for image in images)
    done_before = other.num_committed
    commit_all(other)
    finish(other)

    assert (planned, done_before) == ([1, 2, 3, 9], 2)
    assert sorted(CacheDraft.of(tmp_path).images) == [1, 2, 3, 9]


def test_a_request_to_stop_ends_the_waiting(tmp_path):
    told: list[str] = []
    working = join(tmp_path, 1, 2, name="some")

    with pytest.raises(StoppedError, match="Stopped while another `ris extract` is at work") as caught:
        join(tmp_path, 3, 4, name="others", on_wait=told.append, should_stop=lambda: bool(told))

    assert caught.value.exit_code == 130
    assert told == [f"another `ris extract` is at work on {tmp_path} (--split some); waiting for it to end"]
    commit_all(working)
    finish(working)

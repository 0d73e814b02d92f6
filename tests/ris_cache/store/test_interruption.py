"""Writing that is cut off: whatever a kill or damage leaves of an extraction can be gone on with."""

from __future__ import annotations

import contextlib
import itertools
import multiprocessing
import os
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from ris_cache.errors import CacheError, CorruptShardError, IncompleteCacheError
from ris_cache.store import files
from ris_cache.store.cache import FeatureCache
from ris_cache.store.journal import Journal

pytestmark = pytest.mark.usefixtures("no_waiting_for_the_disk")

FORK = multiprocessing.get_context("fork")


def record_path(root: Path, shard: int) -> Path:
    return root / "extraction" / "shards" / f"{shard:05}.json"


def run_in_child(function: Callable[[], None]) -> int:
    """Run a function in a forked process; returns its exit code, negative for a signal."""
    process = FORK.Process(target=function)
    process.start()
    process.join(timeout=60)
    assert process.exitcode is not None, "the child hangs"
    return process.exitcode


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


@pytest.mark.parametrize(
    ("before", "after"), [(b'"image_id":4', b'"image_id":5'), (b'"bytes":1', b'"bytes":2')]
)
def test_a_record_with_one_wrong_digit_means_that_the_shard_is_done_again(
    drawing: Any, tmp_path: Path, before: bytes, after: bytes
) -> None:
    """Still a record in form; in the manifest, its digits would make a cache that does not open."""
    first = drawing.open(tmp_path, range(8))
    drawing.commit_all(first)
    first.close()
    content = record_path(tmp_path, 1).read_bytes()
    assert before in content
    record_path(tmp_path, 1).write_bytes(content.replace(before, after, 1))
    second = drawing.open(tmp_path, range(8))
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

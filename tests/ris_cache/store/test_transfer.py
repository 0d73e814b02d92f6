"""Converting, merging and collecting, killed at any instant and shared between processes.

What must be equal is every byte of the cache but the times in its manifest.
"""

from __future__ import annotations

import dataclasses
import errno
import json
import os
import random
import shutil
import signal
import sys
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import h5py
import pytest
import torch
import zarr

from ris_cache.errors import CacheError, DiskFullError, IncompleteCacheError
from ris_cache.store import refusals
from ris_cache.store.cache import FeatureCache
from ris_cache.store.collect import collect, remove
from ris_cache.store.convert import convert, plan_conversion
from ris_cache.store.merge import merge, plan_merge
from ris_cache.store.transfer import origins

LIBRARIES = (h5py, torch, zarr)  # so that no fork spends time on importing them
pytestmark = pytest.mark.usefixtures("no_waiting_for_the_disk")

EVENTS = {"open", "os.rename", "os.remove", "os.mkdir", "os.rmdir"}


@dataclass(frozen=True)
class Case:
    """One command on small caches.

    Attributes:
        target: name of the directory that it writes.
        before: makes the caches that it starts from in a directory.
        run: runs it in that directory.
        check: looks at what a kill left there, given what `watch` returned before.
        watch: opens what must go on working.
    """

    target: str
    before: Callable[[Any, Path], object]
    run: Callable[[Path], object]
    watch: Callable[[Path], FeatureCache]
    check: Callable[[Any, Path, FeatureCache], object]


def check_convert(drawing: Any, base: Path, reader: FeatureCache) -> None:
    wide = dataclasses.replace(drawing, dtype="float32")
    wide.require_features(reader, reader.image_ids.tolist())
    try:
        cache = FeatureCache.open(base / "target")
    except (IncompleteCacheError, CacheError):
        return
    assert set(cache.image_ids) == set(reader.image_ids)


def before_merge(drawing: Any, base: Path) -> None:
    drawing.extract(base / "into", range(6), bad=(1,))
    other = dataclasses.replace(drawing, backend="hdf5" if drawing.backend == "zarr" else "zarr")
    other.extract(base / "from", range(12), "testA", bad=(9,))


def check_merge(drawing: Any, base: Path, reader: FeatureCache) -> None:
    for cache in (reader, FeatureCache.open(base / "into")):
        drawing.require_features(cache, [0, 2, 3, 4, 5])
        assert {e.image_id for e in cache.expressions("refcoco.unc") if e.split == "val"} == set(range(6))


def before_collect(drawing: Any, base: Path) -> None:
    drawing.extract(base / "feats", range(10), bad=(5,))
    drawing.extract(base / "feats", range(10, 16), table="refcoco+.unc")
    drawing.extract(base / "feats", [2, 4, 5, 8, 9], table="refcocog.umd")
    remove(base / "feats", ["refcoco.unc", "refcoco+.unc"])


def check_collect(drawing: Any, base: Path, reader: FeatureCache) -> None:
    drawing.require_features(reader, [8, 9])  # their shard stays
    cache = FeatureCache.open(base / "feats")
    drawing.require_features(cache, [2, 4, 8, 9])
    assert list(cache.quarantined) == [5]
    assert len(cache.expressions("refcocog.umd")) == 5


CASES = {
    "convert": Case(
        target="target",
        before=lambda drawing, base: dataclasses.replace(
            drawing, dtype="float32", backend="hdf5" if drawing.backend == "zarr" else "zarr"
        ).extract(base / "source", range(14), bad=(5,)),
        run=lambda base: convert(
            plan_conversion(
                base / "source",
                base / "target",
                dtype="float16",
                backend="zarr" if (base / "source" / "features").exists() else "hdf5",
            )
        ),
        watch=lambda base: FeatureCache.open(base / "source"),
        check=check_convert,
    ),
    "merge": Case(
        target="into",
        before=before_merge,
        run=lambda base: merge(plan_merge(base / "into", [base / "from"])),
        watch=lambda base: FeatureCache.open(base / "into"),
        check=check_merge,
    ),
    "collect": Case(
        target="feats",
        before=before_collect,
        run=lambda base: collect(base / "feats"),
        watch=lambda base: FeatureCache.open(base / "feats"),
        check=check_collect,
    ),
}


def content_of(root: Path) -> dict[str, Any]:
    """Every file of a cache that must not depend on how it came about, and the manifest without its times."""
    assert not (root / "extraction").exists()
    found: dict[str, Any] = {
        path.relative_to(root).as_posix(): path.read_bytes()
        for path in root.rglob("*")
        if path.is_file() and path.name not in (".lock", "manifest.json")
    }
    manifest = json.loads((root / "manifest.json").read_bytes())
    del manifest["recorded"], manifest["digest"]
    return {**found, "manifest.json": manifest}


def start(case: Case, base: Path, kill_at: int | None = None) -> tuple[int, int]:
    """Run a case in a fork that counts its operations on files there, and kills itself at one of them.

    Returns:
        Its process id, and the descriptor from which the count can be read at its end.
    """
    reading, writing = os.pipe()
    pid = os.fork()
    if pid:
        os.close(writing)
        return pid, reading
    count = 0

    def watch(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal count
        if event == "fcntl.flock" or (event in EVENTS and str(arguments[0]).startswith(str(base))):
            count += 1
            if count == kill_at:
                os.kill(os.getpid(), signal.SIGKILL)

    try:
        sys.addaudithook(watch)
        case.run(base)
        os.write(writing, str(count).encode())
        os._exit(0)
    except BaseException:
        traceback.print_exc()
        os._exit(1)


def wait(pid: int, reading: int) -> int | None:
    """Return how many operations a fork did; None if it was killed."""
    _, status = os.waitpid(pid, 0)
    count = os.read(reading, 100)
    os.close(reading)
    if os.WIFSIGNALED(status):
        assert os.WTERMSIG(status) == signal.SIGKILL
        return None
    assert os.WEXITSTATUS(status) == 0
    return int(count)


@pytest.mark.parametrize("name", CASES)
def test_killed_at_random_instants_it_ends_like_one_that_was_not(
    either_drawing: Any, tmp_path: Path, name: str
) -> None:
    case, generator = CASES[name], random.Random(name)
    case.before(either_drawing, tmp_path / "straight")
    shutil.copytree(tmp_path / "straight", tmp_path / "begun")
    num_operations = wait(*start(case, tmp_path / "straight"))
    assert num_operations is not None
    expected = content_of(tmp_path / "straight" / case.target)
    for trial in range(10):
        base = tmp_path / f"trial{trial}"
        shutil.copytree(tmp_path / "begun", base)
        reader = case.watch(base)
        # Once for certain, and then perhaps once more while it makes up for that.
        for kill_at in (generator.randint(1, num_operations), generator.randint(1, 2 * num_operations)):
            ended = wait(*start(case, base, kill_at))
            case.check(either_drawing, base, reader)
            if ended is not None:
                break
        case.run(base)
        assert content_of(base / case.target) == expected, f"killed at {kill_at} of {num_operations}"
        shutil.rmtree(base)


@pytest.mark.exhaustive
@pytest.mark.parametrize("name", CASES)
def test_killed_at_each_operation_it_ends_like_one_that_was_not(
    either_drawing: Any, tmp_path: Path, name: str
) -> None:
    case = CASES[name]
    case.before(either_drawing, tmp_path / "straight")
    shutil.copytree(tmp_path / "straight", tmp_path / "begun")
    num_operations = wait(*start(case, tmp_path / "straight"))
    assert num_operations is not None
    expected = content_of(tmp_path / "straight" / case.target)
    for kill_at in range(1, num_operations + 1):
        base = tmp_path / f"trial{kill_at}"
        shutil.copytree(tmp_path / "begun", base)
        reader = case.watch(base)
        assert wait(*start(case, base, kill_at)) is None
        case.check(either_drawing, base, reader)
        case.run(base)
        assert content_of(base / case.target) == expected, f"killed at {kill_at} of {num_operations}"
        shutil.rmtree(base)


@pytest.mark.parametrize("name", CASES)
def test_three_processes_share_it_and_one_of_them_is_killed(
    either_drawing: Any, tmp_path: Path, name: str
) -> None:
    case, generator = CASES[name], random.Random(name)
    case.before(either_drawing, tmp_path / "straight")
    shutil.copytree(tmp_path / "straight", tmp_path / "begun")
    num_operations = wait(*start(case, tmp_path / "straight"))
    assert num_operations is not None
    for trial in range(3):
        base = tmp_path / f"trial{trial}"
        shutil.copytree(tmp_path / "begun", base)
        kills = [None, None, generator.randint(1, num_operations)]
        forks = [start(case, base, kill_at) for kill_at in kills]
        ended = [wait(*fork) for fork in forks]
        assert None not in ended[:2]
        assert content_of(base / case.target) == content_of(tmp_path / "straight" / case.target)


def test_a_full_disk_is_explained_and_what_is_done_stays(
    drawing: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawing.extract(tmp_path / "source", range(10))
    conversion = plan_conversion(tmp_path / "source", tmp_path / "target", backend="hdf5")
    real, written = Path.replace, []

    def replace(source: Path, target: Path) -> Path:
        if target.suffix == ".h5":
            written.append(target)
            if len(written) == 2:
                raise OSError(errno.ENOSPC, "No space left on device")
        return real(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", replace)
        with pytest.raises(DiskFullError, match="goes on from there"):
            convert(conversion)
    assert convert(conversion)[0] == 6


def test_too_little_space_is_said_before_anything_is_copied(
    drawing: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawing.extract(tmp_path / "source", range(10))
    conversion = plan_conversion(tmp_path / "source", tmp_path / "target", backend="hdf5")
    with monkeypatch.context() as patch:
        patch.setattr(refusals, "free_bytes", lambda root: conversion.num_bytes - 1)
        with pytest.raises(CacheError, match="images need"):
            convert(conversion)
        assert not (tmp_path / "target" / "features").exists()
        patch.setattr(refusals, "free_bytes", lambda root: conversion.num_bytes)
        assert convert(conversion)[0] == 10


def test_an_image_comes_from_the_first_cache_that_has_its_features(drawing: Any, tmp_path: Path) -> None:
    caches = []
    for position, bad in enumerate([(0, 1), (1, 2), (1,)]):
        drawing.extract(tmp_path / str(position), range(4), bad=bad)
        caches.append(FeatureCache.open(tmp_path / str(position)))
    found = origins(caches)
    assert [caches.index(found[image_id].cache) for image_id in range(4)] == [1, 0, 0, 0]
    assert [image_id for image_id in range(4) if found[image_id].image.is_quarantined] == [1]

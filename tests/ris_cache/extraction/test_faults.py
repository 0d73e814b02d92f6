"""A disk that fills up, permissions that are missing, links: what is said, and that nothing is lost."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from ris_cache.datasets.refer import load_refer
from ris_cache.datasets.selection import select_split

IMAGE_KIB = 57.2  # features of one image; 52 images take 2971 KiB, their files a little more
NOBODY = 65534


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Callable[[int], Path]]:
    """Make a file system in memory of some KiB; called again, it resizes it."""
    disk = tmp_path / "disk"
    disk.mkdir()
    is_mounted = False

    def small_disk(kib: int) -> Path:
        nonlocal is_mounted
        options = f"{'remount,' if is_mounted else ''}size={kib}k"
        try:
            ended = subprocess.run(
                ["mount", "-t", "tmpfs", "-o", options, "tmpfs", disk], capture_output=True, text=True
            )
        except FileNotFoundError:
            pytest.skip("there is no mount command to make a small disk with")
        if ended.returncode:
            pytest.skip(f"a small disk cannot be mounted here: {ended.stderr.strip()}")
        is_mounted = True
        return disk

    yield small_disk
    if is_mounted:
        subprocess.run(["umount", disk], check=True)


def said(output: Path) -> str:
    """The one line of an error; progress stands before it."""
    lines = [line for line in output.read_text().splitlines() if not line.startswith("extract: ")]
    assert len(lines) == 1, lines
    return lines[0]


@pytest.mark.parametrize("store", ["zarr", "hdf5"])
@pytest.mark.parametrize(
    ("kib", "num_committed"), [(3040, range(1, 13)), (3600, range(13, 14))], ids=["shards", "tables"]
)
def test_a_disk_that_fills_up_is_named_and_a_larger_one_takes_the_rest(
    store, kib, num_committed, small_disk, tmp_path, trials, straight, content, committed
):
    cache, output, log = small_disk(kib) / "feats", tmp_path / "output", tmp_path / "log"
    command = trials.command(cache, "refcoco", "--store", store, output=str(output), log=str(log))

    (full,) = trials.run(command)

    assert full.exit_code == 1
    assert said(output).startswith(f"error: No space is left for {cache} (")
    assert said(output).endswith(
        "MiB free). Shards that were finished are kept: free some space and run the same command again, it goes "
        "on from there."
    )
    done = committed(cache)
    assert len(done) // 4 in num_committed
    assert not list(cache.rglob("*.tmp"))
    small_disk(8000)
    log.unlink()
    (resumed,) = trials.run(command)
    assert resumed.exit_code == 0
    decoded = log.read_text().split() if log.exists() else []
    assert len(decoded) == 52 - len(done)
    assert not done & set(decoded)
    assert content(cache) == content(straight("refcoco", store=store)[0])


def test_a_growing_cache_that_fills_the_disk_stays_what_it_was(
    small_disk, tmp_path, trials, straight, content, read_everything
):
    cache, output = small_disk(8000) / "feats", tmp_path / "output"
    old = straight("refcoco:val")[0]
    shutil.copytree(old, cache)
    used = sum(path.stat().st_blocks * 512 for path in cache.rglob("*")) // 1024
    small_disk(int(used + 12 * IMAGE_KIB + 40))

    (full,) = trials.run(trials.command(cache, "refcoco+", output=str(output)))

    assert full.exit_code == 1
    assert "No space is left" in said(output)
    assert read_everything(cache) == read_everything(old)
    small_disk(8000)
    trials.extract(cache, "refcoco+")
    assert content(cache) == content(straight("refcoco:val", "refcoco+")[0])


def test_too_little_space_is_noticed_before_any_work(small_disk, tmp_path, trials, straight, content):
    cache, output, log = small_disk(1000) / "feats", tmp_path / "output", tmp_path / "log"
    command = trials.command(cache, "refcoco", output=str(output), log=str(log))

    (refused,) = trials.run(command)

    assert refused.exit_code == 3
    assert said(output).startswith(f"error: 52 images need 2.9 MiB in {cache}, where 1.0 MiB are free. ")
    assert said(output).endswith("Free some space, name a directory on another disk, or ask for fewer.")
    assert log.read_text() == "", "an image was decoded all the same"
    small_disk(8000)
    assert trials.run(command)[0].exit_code == 0
    assert content(cache) == content(straight("refcoco")[0])


def test_a_resumed_extraction_needs_space_for_the_rest_only(
    small_disk, tmp_path, trials, straight, content, committed
):
    cache = small_disk(8000) / "feats"
    trials.run(trials.trial(cache, kill_at=["fsync", 150, "after"]))
    assert len(committed(cache)) >= 16
    used = sum(path.stat().st_blocks * 512 for path in cache.rglob("*")) // 1024
    assert used > 1000
    small_disk(int(used + (52 - len(committed(cache))) * IMAGE_KIB + 1600))

    trials.extract(cache)

    assert content(cache) == content(straight("refcoco")[0])


def test_a_disk_without_any_space_is_named_too(small_disk, tmp_path, trials):
    disk, output = small_disk(64), tmp_path / "output"
    (disk / "filler").write_bytes(b"\1" * (64 << 10))

    (full,) = trials.run(trials.command(disk / "feats", "refcoco", output=str(output)))

    assert full.exit_code == 1
    assert "No space is left" in said(output)


@pytest.fixture
def open_house(data: Path) -> Iterator[Path]:
    """A directory that other users may enter, with a copy of the drawn data in it."""
    if os.geteuid() != 0:
        pytest.skip("only root can run a process as another user")
    with tempfile.TemporaryDirectory() as directory:
        root = Path(directory)
        root.chmod(0o755)
        shutil.copytree(data, root / "data")
        yield root


def as_nobody(trials: Any, root: Path, *options: str, tmp_path: Path) -> tuple[int, str]:
    """Extract as a user without rights; returns the exit code and what was said."""
    output = tmp_path / "output"
    command = trials.command(
        root / "feats", "refcoco:val", *options, data=root / "data", output=str(output), user=NOBODY
    )
    (ending,) = trials.run(command)
    return ending.exit_code, said(output)


def test_a_directory_that_may_not_be_written_to_is_named(open_house, tmp_path, trials):
    code, line = as_nobody(trials, open_house, tmp_path=tmp_path)

    assert code == 3
    assert line == (
        f"error: {open_house}/feats may not be read or written (Permission denied). Ask its owner for permission, "
        "or name another --cache."
    )


def test_a_cache_that_may_only_be_read_is_not_extended_but_read(open_house, tmp_path, trials, straight):
    cache = open_house / "feats"
    shutil.copytree(straight("refcoco:val")[0], cache)

    code, line = as_nobody(trials, open_house, tmp_path=tmp_path)
    (reader,) = trials.run({"read": str(cache), "user": NOBODY})

    assert code == 3
    assert line == (
        f"error: {cache} cannot be written to (Permission denied). Ask its owner for permission, or name another "
        "directory; reading a cache needs none."
    )
    assert reader.exit_code == 0


def test_what_may_not_be_read_is_named(open_house, tmp_path, trials, straight):
    cache = open_house / "feats"
    shutil.copytree(straight("refcoco:val")[0], cache)
    table = next((cache / "images").iterdir())
    for path in (cache, cache / "manifest.json", table, cache / "features.zarr/sam/c/0/0/0/0"):
        mode = path.stat().st_mode
        path.chmod(0o444 if path == cache else 0)
        (reader,) = trials.run({"read": str(cache), "user": NOBODY})
        path.chmod(mode)
        assert (reader.exit_code, reader.error) == (3, "CacheError"), path
        named = cache / "manifest.json" if path == cache else path
        assert reader.message == (
            f"{named} may not be read (Permission denied). Ask its owner for permission to read the cache."
        )


def test_a_cache_that_may_not_be_entered_is_named_by_extract(open_house, tmp_path, trials, straight):
    cache = open_house / "feats"
    shutil.copytree(straight("refcoco:val")[0], cache)
    cache.chmod(0o444)

    code, line = as_nobody(trials, open_house, tmp_path=tmp_path)

    assert code == 3
    assert line == (
        f"error: {cache}/manifest.json may not be read or written (Permission denied). Ask its owner for "
        "permission, or name another --cache."
    )


def test_images_that_may_not_be_read_are_quarantined_and_computed_once_they_may(
    open_house, tmp_path, trials, straight, read_everything
):
    cache, output, log = open_house / "feats", tmp_path / "output", tmp_path / "log"
    cache.mkdir()
    cache.chmod(0o777)
    dataset = load_refer(open_house / "data", "refcoco", "unc")
    names = sorted({dataset.images[e.image_id].file_name for e in select_split(dataset, "val")})
    hidden = [next((open_house / "data").rglob(name)) for name in names[2:5]]
    for path in hidden:
        path.chmod(0)
    terms = {"data": open_house / "data", "output": str(output)}

    (without,) = trials.run(trials.command(cache, "refcoco:val", user=NOBODY, **terms))

    assert without.exit_code == 0, output.read_text()
    assert output.read_text().count("PermissionError") == 3
    for path in hidden:
        path.chmod(0o644)
    (rest,) = trials.run(trials.command(cache, "refcoco:val", log=str(log), **terms))
    assert rest.exit_code == 0
    assert sorted(log.read_text().split()) == names[2:5]
    found, expected = read_everything(cache), read_everything(straight("refcoco:val")[0])
    assert set(found.pop("features")) == set(expected.pop("features"))
    assert found == expected


def test_a_cache_behind_a_symbolic_link_works_like_any(tmp_path, trials, straight, content, read_everything):
    (tmp_path / "elsewhere").mkdir()
    link = tmp_path / "feats"
    link.symlink_to(tmp_path / "elsewhere", target_is_directory=True)
    trials.run(trials.trial(link, kill_at=["fsync", 100, "after"]))

    trials.extract(link)

    assert link.is_symlink()
    assert content(tmp_path / "elsewhere") == content(straight("refcoco")[0])
    assert read_everything(link) == read_everything(straight("refcoco")[0])

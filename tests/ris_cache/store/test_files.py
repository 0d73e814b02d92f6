"""Atomic writes, digests and paths of cache files."""

from __future__ import annotations

import hashlib
import os
import stat
from pathlib import Path
from typing import BinaryIO

import pytest

from ris_cache.errors import ConfigError, CorruptShardError
from ris_cache.store import files


def test_a_write_replaces_the_whole_file(tmp_path: Path) -> None:
    path = tmp_path / "a" / "b" / "file.bin"
    files.write_atomically(path, b"a long first content")
    files.write_atomically(path, lambda file: file.write(b"short"))
    assert path.read_bytes() == b"short"
    assert [child.name for child in path.parent.iterdir()] == ["file.bin"]


def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "file.bin"
    files.write_atomically(path, b"old")

    def fail_half_way(file: BinaryIO) -> None:
        file.write(b"ne")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        files.write_atomically(path, fail_half_way)
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_write_reaches_the_disk_before_it_gets_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "new" / "file.bin"
    seen: list[str] = []
    real_fsync = os.fsync

    def fsync(descriptor: int) -> None:
        seen.append("file" if stat.S_ISREG(os.fstat(descriptor).st_mode) else "directory")
        seen.append("named" if path.exists() else "unnamed")
        real_fsync(descriptor)

    monkeypatch.setattr("os.fsync", fsync)
    files.write_atomically(path, b"content")
    assert seen == ["directory", "unnamed", "file", "unnamed", "directory", "named"]


@pytest.mark.parametrize("size", [0, 1, (1 << 20) - 1, (1 << 20) + 1])
def test_a_digest_covers_every_byte(tmp_path: Path, size: int) -> None:
    content = bytes(position % 251 for position in range(size))
    (tmp_path / "file").write_bytes(content)
    digest = files.sha256_file(tmp_path / "file")
    assert (digest.num_bytes, digest.sha256) == (size, hashlib.sha256(content).hexdigest())


@pytest.mark.parametrize(
    "relative",
    [
        "",
        "/etc/passwd",
        "../x",
        "a/../../x",
        "a//b",
        "./a",
        "a/.",
        "C:/x",
        "C:x",
        "a\\b",
        "..\\x",
        "a\0b",
        "a/",
    ],
)
def test_a_path_out_of_the_cache_is_refused(tmp_path: Path, relative: str) -> None:
    with pytest.raises(CorruptShardError, match="not a plain relative path") as caught:
        files.safe_join(tmp_path, relative)
    assert caught.value.facts["relative"] == relative


def test_plain_paths_are_joined(tmp_path: Path) -> None:
    assert files.safe_join(tmp_path, "expressions/refcoco+.unc.parquet") == (
        tmp_path / "expressions" / "refcoco+.unc.parquet"
    )


def test_a_symbolic_link_out_of_the_cache_is_refused(tmp_path: Path) -> None:
    root = tmp_path / "feats"
    root.mkdir()
    (tmp_path / "outside").mkdir()
    (root / "expressions").symlink_to(tmp_path / "outside")
    with pytest.raises(CorruptShardError, match="symbolic link"):
        files.safe_join(root, "expressions/refcoco.unc.parquet")


def test_a_link_to_the_whole_cache_is_welcome(tmp_path: Path) -> None:
    (tmp_path / "feats").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "feats")
    assert files.safe_join(tmp_path / "link", "images.parquet") == tmp_path / "link" / "images.parquet"


def test_an_update_is_pending_only_once_its_manifest_is_there(tmp_path: Path) -> None:
    files.write_atomically(tmp_path / "pending" / "images.parquet", b"new")
    assert not files.has_pending(tmp_path)
    files.write_atomically(tmp_path / "pending" / "manifest.json", b"{}")
    assert files.has_pending(tmp_path)
    files.commit_pending(tmp_path)
    assert (tmp_path / "images.parquet").read_bytes() == b"new"
    assert sorted(child.name for child in tmp_path.iterdir()) == ["images.parquet", "manifest.json"]


def test_starting_over_removes_what_an_extraction_writes_and_nothing_else(tmp_path: Path) -> None:
    files.prepare_fresh(tmp_path)
    files.write_atomically(tmp_path / "features.zarr" / "sam" / "zarr.json", b"{}")
    (tmp_path / "notes.txt").write_text("mine")
    files.prepare_fresh(tmp_path)
    assert sorted(child.name for child in tmp_path.iterdir()) == ["extraction.json", "notes.txt"]


def test_a_directory_with_other_files_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "features.zarr").mkdir()
    with pytest.raises(ConfigError, match="new or empty directory"):
        files.prepare_fresh(tmp_path)
    assert [child.name for child in tmp_path.iterdir()] == ["features.zarr"]

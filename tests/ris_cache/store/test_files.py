"""Atomic writes, digests and paths of cache files."""

from __future__ import annotations

import hashlib
import os
import stat
from pathlib import Path
from typing import BinaryIO

import pytest

from ris_cache.errors import CorruptShardError
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
    joined = files.safe_join(tmp_path / "link", "images/pool.parquet")
    assert joined == tmp_path / "link" / "images" / "pool.parquet"


def test_a_link_within_the_cache_is_welcome(tmp_path: Path) -> None:
    (tmp_path / "features").mkdir()
    (tmp_path / "features" / "00000.h5").write_bytes(b"")
    (tmp_path / "features" / "00001.h5").symlink_to("00000.h5")
    assert files.safe_join(tmp_path, "features/00001.h5") == tmp_path / "features" / "00001.h5"


def test_another_content_gets_another_name() -> None:
    names = {files.table_file("images", "pool", content) for content in (b"", b"a", b"b", b"a")}
    assert len(names) == 3
    assert all(files.is_safe_relative(name) for name in names)
    digest = hashlib.sha256(b"a").hexdigest()[:12]
    assert (
        files.table_file("expressions", "refcoco+.unc", b"a") == f"expressions/refcoco+.unc.{digest}.parquet"
    )


def test_a_file_is_temporary_exactly_while_it_is_written(tmp_path: Path) -> None:
    seen: list[bool] = []

    def look(file: BinaryIO) -> None:
        (path,) = (tmp_path / "a").iterdir()
        seen.append(files.is_temporary(path.relative_to(tmp_path).as_posix()))

    files.write_atomically(tmp_path / "a" / "pool.parquet", look)
    assert seen == [True]
    assert not files.is_temporary("a/pool.parquet")


def put(root: Path, *relatives: str) -> None:
    for relative in relatives:
        (root / relative).parent.mkdir(parents=True, exist_ok=True)
        (root / relative).write_bytes(b"")


def test_the_files_of_a_cache_are_those_of_its_directories(tmp_path: Path) -> None:
    own = ["features/00000.h5", "features.zarr/sam/c/0/0", "images/pool.parquet", "categories/coco.json"]
    own += [
        "expressions/a.b.parquet",
        "instances/a.b.parquet",
        "sam_heads.safetensors",
        ".manifest.json.7.tmp",
    ]
    put(tmp_path, *own, "manifest.json", ".lock", "extraction/plan.json", "notes.txt", "mine/notes.txt")
    found = files.all_files(tmp_path)
    assert set(found) == set(own)
    assert all(path == tmp_path / relative for relative, path in found.items())


def test_removing_files_takes_the_directories_that_this_leaves_empty(tmp_path: Path) -> None:
    put(tmp_path, "features.zarr/sam/c/0/0", "features.zarr/sam/c/1/0", "images/pool.parquet")
    files.remove_files(tmp_path, ["features.zarr/sam/c/0/0", "images/pool.parquet", "images/absent.parquet"])
    left = sorted(path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*"))
    assert left == [
        "features.zarr",
        "features.zarr/sam",
        "features.zarr/sam/c",
        "features.zarr/sam/c/1",
        "features.zarr/sam/c/1/0",
    ]


def test_removing_every_file_leaves_the_cache_directory(tmp_path: Path) -> None:
    root = tmp_path / "feats"
    put(root, "images/pool.parquet")
    files.remove_files(root, ["images/pool.parquet"])
    assert list(root.iterdir()) == []

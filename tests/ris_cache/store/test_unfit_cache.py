"""Opening what is no cache, or one that is not as its manifest says; and caches in odd places."""

from __future__ import annotations

import json
import os
import pickle
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from ris_cache import FeatureCache
from ris_cache.errors import CacheError, CacheMissError, CorruptShardError, IncompleteCacheError
from ris_cache.store import files, tables
from ris_cache.store.draft import CacheDraft
from ris_cache.store.manifest import FileEntry, Manifest, load_manifest
from ris_cache.store.tables import CachedImage

pytestmark = pytest.mark.usefixtures("no_waiting_for_the_disk")

TABLE = "refcoco.unc"
IMAGE_IDS = [0, 1, 2, 3, 4, 6, 7, 8, 9]


@pytest.fixture
def root(either_drawing: Any, tmp_path: Path) -> Path:
    """Images 0 to 9, image 5 quarantined; to damage."""
    either_drawing.extract(tmp_path / "feats", range(10), bad=(5,))
    return tmp_path / "feats"


def reseal(root: Path, **changes: Any) -> Manifest:
    """Change the manifest and its digest with it: what no checksum notices."""
    manifest = load_manifest(root).model_copy(update=changes).sealed()
    (root / "manifest.json").write_bytes(manifest.to_json())
    return manifest


def a_shard_file(root: Path) -> str:
    """The file that holds image 4 to 7, or their `sam`."""
    return "features/00001.h5" if (root / "features").is_dir() else "features.zarr/sam/c/1/0/0/0"


# Where a cache is, or is not.


def test_no_directory_no_cache(tmp_path: Path) -> None:
    with pytest.raises(CacheMissError, match=r"no cache at .*ris extract"):
        FeatureCache.open(tmp_path / "feats")


def test_an_empty_directory_is_unfinished(tmp_path: Path) -> None:
    with pytest.raises(IncompleteCacheError, match=r"is empty.*ris extract"):
        FeatureCache.open(tmp_path)
    (tmp_path / files.LOCK_NAME).write_bytes(b"")
    with pytest.raises(IncompleteCacheError, match=r"is empty.*ris extract"):
        FeatureCache.open(tmp_path)


def test_an_unfinished_extraction_is_told_from_other_directories(drawing: Any, tmp_path: Path) -> None:
    writer = drawing.open(tmp_path / "feats", range(4))
    drawing.commit_all(writer)
    with pytest.raises(IncompleteCacheError, match=r"not finished.*goes on where it was"):
        FeatureCache.open(tmp_path / "feats")
    with pytest.raises(CacheError, match=r"is not a cache.*ris extract") as caught:
        FeatureCache.open(tmp_path)
    assert not isinstance(caught.value, IncompleteCacheError)
    (tmp_path / "file").write_text("")
    with pytest.raises(CacheError, match=r"is a file.*ris extract"):
        FeatureCache.open(tmp_path / "file")


def test_the_manifest_of_something_else_is_no_cache(tmp_path: Path) -> None:
    (tmp_path / "manifest.json").write_text('{"name": "a browser extension"}')
    with pytest.raises(CacheError, match="does not describe a feature cache") as caught:
        FeatureCache.open(tmp_path)
    assert caught.value.exit_code == 3


def test_a_newer_format_and_a_damaged_manifest_are_told_apart(root: Path) -> None:
    document = json.loads((root / "manifest.json").read_bytes())
    (root / "manifest.json").write_text(json.dumps(document | {"format_version": 2}))
    with pytest.raises(CacheError, match="Update ris") as caught:
        FeatureCache.open(root)
    assert caught.value.exit_code == 3
    (root / "manifest.json").write_bytes((root / "manifest.json").read_bytes()[:-20])
    with pytest.raises(CorruptShardError, match=r"manifest\.json is damaged.*ris extract"):
        FeatureCache.open(root)


def test_a_cache_may_be_reached_through_a_link(either_drawing: Any, root: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(root)
    cache = FeatureCache.open(tmp_path / "link")
    assert cache.root == tmp_path / "link"
    either_drawing.require_features(cache, IMAGE_IDS)
    either_drawing.extract(tmp_path / "link", range(20, 24), "testA")
    assert len(either_drawing.require_whole(root)) == 13


def test_a_cache_may_be_moved_and_copied(either_drawing: Any, root: Path, tmp_path: Path) -> None:
    shutil.copytree(root, tmp_path / "copy")
    root.rename(tmp_path / "else where")
    for place in (tmp_path / "else where", tmp_path / "copy"):
        either_drawing.require_whole(place)
        either_drawing.extract(place, range(20, 24), "testA")
        assert len(either_drawing.require_whole(place)) == 13


@pytest.mark.parametrize("kind", ["table", "features", "directory"])
def test_a_link_out_of_the_cache_is_refused(root: Path, tmp_path: Path, kind: str) -> None:
    relatives = {
        "table": load_manifest(root).images.file,
        "features": a_shard_file(root),
        "directory": "expressions",
    }
    inside = root / relatives[kind]
    inside.rename(tmp_path / "outside")
    inside.symlink_to(tmp_path / "outside")
    with pytest.raises(CorruptShardError, match=r"leads out of the cache .* through a symbolic link"):
        FeatureCache.open(root)


def test_a_link_within_the_cache_is_followed(either_drawing: Any, root: Path) -> None:
    shard = root / a_shard_file(root)
    shard.rename(shard.with_name("moved"))
    shard.symlink_to("moved")
    either_drawing.require_features(FeatureCache.open(root), IMAGE_IDS)


def test_a_relative_path_survives_a_change_of_directory(
    either_drawing: Any, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(root.parent)
    cache = FeatureCache.open("feats")
    monkeypatch.chdir("/")
    either_drawing.require_features(cache, [1])
    either_drawing.require_features(pickle.loads(pickle.dumps(cache)), [1])


# Files that are not as the manifest says.


def test_every_missing_file_is_named(root: Path) -> None:
    manifest = load_manifest(root)
    for relative in manifest.files:
        (root / relative).rename(root / "aside")
        with pytest.raises(CorruptShardError, match=r"lacks files of its manifest.*from a copy") as caught:
            FeatureCache.open(root)
        assert caught.value.facts["missing"] == [relative]
        (root / "aside").rename(root / relative)
    FeatureCache.open(root)


def test_many_missing_files_are_counted(root: Path) -> None:
    for relative in load_manifest(root).files:
        (root / relative).unlink()
    with pytest.raises(CorruptShardError, match="lacks files of its manifest") as caught:
        FeatureCache.open(root)
    missing = caught.value.facts["missing"]
    assert sorted(missing) == sorted(load_manifest(root).files)  # type: ignore[call-overload]
    assert ("and" in str(caught.value)) == (len(load_manifest(root).files) > 10)


@pytest.mark.parametrize("change", [-1, 1, None])
def test_every_file_of_another_length_is_noticed_when_opening(root: Path, change: int | None) -> None:
    for relative, entry in load_manifest(root).files.items():
        content = (root / relative).read_bytes()
        length = 0 if change is None else entry.bytes + change
        os.truncate(root / relative, length)
        with pytest.raises(CorruptShardError) as caught:
            FeatureCache.open(root)
        assert f"{root / relative} has {length} bytes, but the manifest says {entry.bytes}" in str(
            caught.value
        )
        (root / relative).write_bytes(content)
    FeatureCache.open(root)


@pytest.mark.parametrize("kind", ["images", "expressions", "instances", "categories"])
def test_a_file_that_the_manifest_needs_must_be_listed(root: Path, kind: str) -> None:
    manifest = load_manifest(root)
    (first, *_) = (relative for relative in manifest.files if relative.startswith(kind))
    reseal(root, files={name: entry for name, entry in manifest.files.items() if name != first})
    with pytest.raises(CorruptShardError, match="lacks files of its manifest") as caught:
        FeatureCache.open(root)
    assert caught.value.facts["missing"] == [first]


def test_a_shard_that_the_manifest_does_not_list_is_missing_when_read(
    either_drawing: Any, root: Path
) -> None:
    """Written by something else: the files are sound one by one, but do not make a cache."""
    manifest = load_manifest(root)
    gone = [name for name in manifest.shard_files() if "/c/1/" in name or "00001" in name]
    reseal(root, files={name: entry for name, entry in manifest.files.items() if name not in gone})
    files.remove_files(root, gone)
    cache = FeatureCache.open(root)
    either_drawing.require_features(cache, [0, 9])
    with pytest.raises(CorruptShardError):
        cache.read([4])


def change_images(root: Path, change: Callable[[list[CachedImage]], list[CachedImage]]) -> None:
    """Replace the table of images by one that is sound in itself."""
    draft = CacheDraft.of(root)
    images = list(draft.images.values())
    draft.drop_images([image.image_id for image in images])
    manifest = draft.commit()
    content = tables.table_bytes(tables.images_table(change(images)))
    relative = files.table_file("images", "pool", content)
    (root / relative).write_bytes(content)
    listed = {name: entry for name, entry in manifest.files.items() if name != manifest.images.file}
    listed[relative] = FileEntry.of(files.digest_of(content))
    reseal(root, files=listed, images=manifest.images.model_copy(update={"file": relative}))


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (lambda images: [*images, replace(images[0], row=11)], "names an image or a row twice"),
        (lambda images: [*images, replace(images[0], image_id=99)], "names an image or a row twice"),
        (lambda images: [*images[1:], replace(images[0], row=12)], "names rows outside 0 to 11"),
        (lambda images: [*images[1:], replace(images[0], row=-1)], "names rows outside 0 to 11"),
        (lambda images: [*images[1:], replace(images[0], crc32c=(1,))], "does not give 3 checksums"),
    ],
    ids=["image twice", "row twice", "row past the end", "negative row", "checksums"],
)
def test_a_table_of_images_that_makes_no_sense_is_refused(root: Path, change: Any, problem: str) -> None:
    change_images(root, change)
    with pytest.raises(CorruptShardError, match=problem):
        FeatureCache.open(root)


def test_an_image_at_a_row_that_its_shard_does_not_hold_is_missed(root: Path) -> None:
    change_images(root, lambda images: [*images[1:], replace(images[0], row=11)])
    with pytest.raises(CacheError):
        FeatureCache.open(root).read([0])


def test_arrays_of_another_shape_than_the_manifest_says_are_noticed(root: Path) -> None:
    arrays = load_manifest(root).arrays
    reseal(root, arrays=(*arrays[:2], arrays[2].model_copy(update={"shape": (6,)})))
    with pytest.raises(CorruptShardError):
        FeatureCache.open(root).read([1])

"""The next state of a cache: nothing until the manifest is replaced, and then all of it."""

from __future__ import annotations

import itertools
import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ris_cache.errors import (
    CacheMissError,
    ConfigError,
    CorruptShardError,
    DataError,
    IncompleteCacheError,
    ShapeError,
)
from ris_cache.store import files
from ris_cache.store.cache import FeatureCache
from ris_cache.store.draft import CacheDraft, Recipe, remove_unlisted
from ris_cache.store.manifest import load_manifest

pytestmark = pytest.mark.usefixtures("no_waiting_for_the_disk")

TABLE = "refcoco.unc"


@pytest.fixture
def root(drawing: Any, tmp_path: Path) -> Path:
    """Images 0 to 5, of which 1 is quarantined; split val of refcoco.unc."""
    drawing.extract(tmp_path / "feats", range(6), bad=(1,))
    return tmp_path / "feats"


def state_of(root: Path) -> dict[str, tuple[int, int, bytes]]:
    """Inode, time of change and content of every file."""
    return {
        path.relative_to(root).as_posix(): (path.stat().st_ino, path.stat().st_mtime_ns, path.read_bytes())
        for path in root.rglob("*")
        if path.is_file()
    }


@pytest.fixture
def renames(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names that files got, in order."""
    names: list[str] = []
    real: Callable[[Path, Path], Path] = Path.replace

    def record(source: Path, target: Path) -> Path:
        names.append(target.name)
        return real(source, target)

    monkeypatch.setattr(Path, "replace", record)
    return names


# Committing.


def test_a_draft_writes_nothing_before_it_is_committed(drawing: Any, root: Path) -> None:
    before = state_of(root)
    draft = CacheDraft.of(root)
    drawing.edit(range(3), "testA")(draft)
    drawing.edit(range(3), "val", "refcocog.umd", "lvis")(draft)
    draft.drop_dataset(TABLE)
    assert state_of(root) == before


@pytest.mark.parametrize("edited", [False, True])
def test_a_draft_without_changes_touches_no_file(drawing: Any, root: Path, edited: bool) -> None:
    before = state_of(root)
    draft = CacheDraft.begin(root, replace(drawing.recipe, libraries={"torch": "99"}))
    if edited:
        drawing.edit(range(6), "val")(draft)
    assert draft.commit() == load_manifest(root)
    assert state_of(root) == before


def test_one_rename_changes_the_cache_and_it_is_the_last(
    drawing: Any, root: Path, renames: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    draft = CacheDraft.of(root)
    drawing.edit(range(3), "testA")(draft)
    draft.commit()
    assert renames.count("manifest.json") == 1
    assert renames[-1] == "manifest.json"
    assert len(renames) > 3


@pytest.mark.parametrize("has_cache", [False, True])
def test_a_cut_at_any_rename_leaves_the_old_state_whole(
    drawing: Any, root: Path, tmp_path: Path, has_cache: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    class PowerCut(BaseException):
        pass

    real: Callable[[Path, Path], Path] = Path.replace
    for survived in itertools.count():
        copy = tmp_path / f"copy{survived}"
        if has_cache:
            shutil.copytree(root, copy)
        draft = CacheDraft.begin(copy, drawing.recipe)
        if has_cache:
            drawing.edit(range(3), "testA")(draft)
        counter = itertools.count()

        def cut(source: Path, target: Path, counter: Any = counter, survived: int = survived) -> Path:
            if next(counter) >= survived:
                raise PowerCut
            return real(source, target)

        with monkeypatch.context() as patch:
            patch.setattr(Path, "replace", cut)
            try:
                draft.commit()
            except PowerCut:
                is_cut = True
            else:
                is_cut = False
        if has_cache:
            cache = FeatureCache.open(copy)
            found = [expression.split for expression in cache.expressions(TABLE)]
            assert found == ["val"] * 6 + ([] if is_cut else ["testA"] * 3)
            drawing.require_features(cache, [0, 2, 3, 4, 5])
        else:
            assert (copy / "manifest.json").exists() == (not is_cut)
        if not is_cut:
            break
    assert survived >= 4


def test_the_manifest_says_when_the_cache_was_made_and_when_it_was_changed(
    drawing: Any, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = load_manifest(root)
    document = json.loads((root / "manifest.json").read_bytes())
    recorded = before.recorded.model_copy(
        update={"created": before.recorded.created.replace(year=2020), "libraries": {"torch": "1.0"}}
    )
    old = before.model_copy(update={"recorded": recorded}).sealed()
    (root / "manifest.json").write_bytes(old.to_json())
    draft = CacheDraft.begin(root, drawing.recipe)
    drawing.edit(range(3), "testA")(draft)
    after = draft.commit()
    assert after == load_manifest(root)
    assert after.recorded.created.year == 2020
    assert after.recorded.updated >= before.recorded.updated
    assert after.recorded.libraries["torch"] == "2.6"
    assert after.fingerprint.digest == document["fingerprint"]["digest"]


def test_a_draft_of_nothing_needs_a_cache(drawing: Any, tmp_path: Path) -> None:
    with pytest.raises(IncompleteCacheError):
        CacheDraft.of(tmp_path)
    assert CacheDraft.begin(tmp_path, drawing.recipe).images == {}


def test_a_recipe_comes_back_from_a_manifest(any_drawing: Any, tmp_path: Path) -> None:
    manifest = any_drawing.extract(tmp_path, range(2))
    recipe = any_drawing.recipe
    found = Recipe.of(manifest)
    assert replace(found, libraries={}) == replace(recipe, libraries={})
    assert found.arrays == recipe.arrays
    assert found.libraries.items() >= recipe.libraries.items()
    stored = any_drawing.stored([0])
    assert found.image_bytes == sum(array.nbytes for array in stored.values())


# Images and shards.


def test_images_and_files_can_be_dropped_and_replaced(drawing: Any, root: Path) -> None:
    draft = CacheDraft.of(root)
    draft.drop_images([4, 5])
    shards = [name for name in load_manifest(root).shard_files() if "/c/1/" in name]
    assert len(shards) == 3
    draft.drop_files(shards)
    draft.replace_images([replace(draft.images[0], sha256="f" * 64)])
    manifest = draft.commit()
    assert (manifest.images.ok, manifest.images.quarantined) == (3, 1)
    assert not set(shards) & set(manifest.files)
    removed = remove_unlisted(root, manifest)
    assert set(shards) <= set(removed)
    cache = FeatureCache.open(root)
    drawing.require_features(cache, [0, 2, 3])
    assert cache.images[0].sha256 == "f" * 64


def test_removing_what_is_not_listed_leaves_what_is(either_drawing: Any, tmp_path: Path) -> None:
    either_drawing.extract(tmp_path, range(6))
    manifest = either_drawing.extract(tmp_path, range(6), "testA")
    stale = [name for name in files.all_files(tmp_path) if name not in manifest.files]
    stale = [name for name in stale if not name.endswith("zarr.json")]
    assert any(name.startswith("expressions/") for name in stale)  # of the state before
    files.write_atomically(tmp_path / "features" / "mine.txt", b"12345")
    sizes = {name: (tmp_path / name).stat().st_size for name in [*stale, "features/mine.txt"]}
    assert remove_unlisted(tmp_path, manifest) == sizes
    either_drawing.require_whole(tmp_path)
    assert remove_unlisted(tmp_path, manifest) == {}


# Datasets.


def test_splits_join_one_by_one_within_a_draft_and_across_drafts(drawing: Any, root: Path) -> None:
    draft = CacheDraft.of(root)
    drawing.edit([0], "train")(draft)
    drawing.edit([2, 3], "testA")(draft)
    draft.commit()
    draft = CacheDraft.of(root)
    drawing.edit([4], "testB")(draft)
    manifest = draft.commit()
    cache = FeatureCache.open(root)
    splits = [expression.split for expression in cache.expressions(TABLE)]
    assert splits == ["val"] * 6 + ["train"] + ["testA"] * 2 + ["testB"]
    assert list(manifest.datasets[TABLE].splits) == ["val", "train", "testA", "testB"]
    assert sorted(cache.instances(TABLE)) == list(range(1000, 1006))
    # Only the newest table of each kind is listed.
    for kind in ("expressions", "instances", "images"):
        assert sum(name.startswith(f"{kind}/") for name in manifest.files) == 1


def test_a_part_of_a_split_is_told_from_the_whole(drawing: Any, root: Path) -> None:
    draft = CacheDraft.of(root)

    def write(image_ids: range, incomplete: frozenset[str]) -> None:
        draft.write_tables(
            TABLE,
            [drawing.expression(image_id, "train") for image_id in image_ids],
            [drawing.instance(image_id) for image_id in image_ids],
            clip_category_ids=[1] * len(image_ids),
            category_set="coco",
            incomplete_splits=incomplete,
        )

    assert not draft.has_split(TABLE, "train", num_expressions=0)
    write(range(2), frozenset({"train"}))
    assert not draft.datasets[TABLE].splits["train"].is_complete
    assert draft.has_split(TABLE, "train", num_expressions=2)
    assert not draft.has_split(TABLE, "train", num_expressions=3)
    write(range(6), frozenset())
    assert draft.datasets[TABLE].splits["train"].is_complete
    assert draft.commit().datasets[TABLE].splits["train"].expressions == 6
    assert not draft.has_split("refcocog.umd", "train", num_expressions=0)


def test_tables_must_fit_the_images_and_the_instances(drawing: Any, root: Path) -> None:
    draft = CacheDraft.of(root)

    def write(image_id: int, ann_id: int) -> None:
        draft.write_tables(
            "a.b",
            [drawing.expression(image_id)],
            [drawing.instance(0, ann_id=ann_id)],
            clip_category_ids=[1],
            category_set="coco",
        )

    with pytest.raises(CacheMissError, match="Image 77 was never added") as caught:
        write(77, 1077)
    assert caught.value.facts["image_id"] == 77
    with pytest.raises(DataError, match="ref 0 targets"):
        write(0, 5)
    with pytest.raises(ShapeError, match="1 expressions need as many"):
        draft.write_tables(
            "a.b", [drawing.expression(0)], [drawing.instance(0)], clip_category_ids=[], category_set="coco"
        )
    assert list(draft.datasets) == [TABLE]
    assert draft.commit() == load_manifest(root)


def test_an_expression_of_a_quarantined_image_is_kept(drawing: Any, root: Path) -> None:
    assert 1 in FeatureCache.open(root).quarantined
    assert 1 in {expression.image_id for expression in FeatureCache.open(root).expressions(TABLE)}


@pytest.mark.parametrize("name", ["../a", "a/b", "", ".a", "a\0b"])
def test_a_name_that_is_no_file_name_is_refused(drawing: Any, root: Path, name: str) -> None:
    draft = CacheDraft.of(root)
    with pytest.raises(ConfigError, match="cannot be the name of a table"):
        draft.write_tables(name, [], [], clip_category_ids=[], category_set="coco")
    with pytest.raises(ConfigError, match="cannot name a category set"):
        draft.write_categories(name, drawing.categories())


def test_dropping_a_dataset_takes_what_it_alone_uses(drawing: Any, root: Path) -> None:
    draft = CacheDraft.of(root)
    drawing.edit(range(3), "val", "refcocog.umd", "coco")(draft)
    drawing.edit(range(3), "val", "grefcoco.unc", "lvis")(draft)
    draft.commit()
    draft = CacheDraft.of(root)
    draft.drop_dataset("grefcoco.unc")
    draft.drop_dataset(TABLE)
    with pytest.raises(CacheMissError, match=r"no dataset 'grefcoco\.unc'; it has refcocog\.umd"):
        draft.drop_dataset("grefcoco.unc")
    manifest = draft.commit()
    assert (list(manifest.datasets), manifest.category_sets) == (["refcocog.umd"], ("coco",))
    removed = remove_unlisted(root, manifest)
    assert {"categories/lvis.json", "categories/lvis.safetensors"} <= set(removed)
    cache = drawing.require_whole(root)
    assert len(cache.expressions("refcocog.umd")) == 3
    assert cache.categories("coco").ids == (1, 47)
    with pytest.raises(CacheMissError, match="no table"):
        cache.expressions(TABLE)


def test_a_dataset_may_be_dropped_and_added_again_at_once(drawing: Any, root: Path) -> None:
    before = load_manifest(root)
    draft = CacheDraft.of(root)
    draft.drop_dataset(TABLE)
    drawing.edit(range(6), "val")(draft)
    manifest = draft.commit()
    assert manifest.files == before.files
    drawing.require_whole(root)
    assert FeatureCache.open(root).categories("coco").ids == (1, 47)


@pytest.mark.parametrize("kind", ["images", "expressions", "instances", "categories"])
def test_damage_is_not_carried_over_into_the_next_state(drawing: Any, root: Path, kind: str) -> None:
    """A table that still reads, with another value in it, would get a checksum of its own."""
    (path, *_) = (root / name for name in load_manifest(root).files if name.startswith(kind))
    content = bytearray(path.read_bytes())
    content[len(content) // 3] ^= 1
    path.write_bytes(content)
    with pytest.raises(CorruptShardError, match="its SHA-256 is not that of the manifest"):
        drawing.edit(range(3), "testA")(CacheDraft.of(root))


def test_what_is_lost_is_written_again_under_the_same_manifest(drawing: Any, root: Path) -> None:
    before = state_of(root)
    lost = ["categories/coco.json", files.SAM_HEADS_NAME, "features.zarr/clip/zarr.json"]
    for name in lost:
        (root / name).unlink()
    draft = CacheDraft.of(root)
    draft.replace_categories("coco", drawing.categories())
    draft.drop_files([files.SAM_HEADS_NAME])
    draft.write_sam_heads({"mask_tokens": np.ones((2, 3), np.float32).T, "scale": np.array(2.5)})
    assert draft.commit() == load_manifest(root)
    after = state_of(root)
    assert {name: state[2] for name, state in after.items()} == {name: s[2] for name, s in before.items()}
    assert {name for name, state in after.items() if state != before[name]} == set(lost)


def test_the_tables_of_a_dataset_are_dropped_without_its_categories(drawing: Any, root: Path) -> None:
    draft = CacheDraft.of(root)
    entry = load_manifest(root).datasets[TABLE]
    assert draft.drop_tables(TABLE) == entry
    manifest = draft.commit()
    assert (manifest.datasets, manifest.category_sets) == ({}, ("coco",))
    assert not {entry.expressions_file, entry.instances_file} & set(manifest.files)


# Category sets and heads.


def test_a_cache_is_not_finished_without_the_categories_of_its_datasets(drawing: Any, root: Path) -> None:
    before = state_of(root)
    draft = CacheDraft.of(root)
    draft.write_tables("a.b", [], [], clip_category_ids=[], category_set="lvis")
    with pytest.raises(IncompleteCacheError, match=r"category sets \['lvis'\] are missing") as caught:
        draft.commit()
    assert caught.value.facts["category_sets"] == ["lvis"]
    assert state_of(root) == before


@pytest.mark.parametrize("is_committed", [False, True])
@pytest.mark.parametrize("changes", [{"ids": (1, 48)}, {"names": ("person", "mug")}, {"template": "a {}."}])
def test_a_category_set_cannot_change_under_its_name(
    drawing: Any, root: Path, is_committed: bool, changes: dict[str, Any]
) -> None:
    draft = CacheDraft.of(root)
    draft.write_categories("lvis", drawing.categories())
    if is_committed:
        draft.commit()
        draft = CacheDraft.of(root)
    with pytest.raises(DataError, match="other ids, names or prompt template"):
        draft.write_categories("lvis", drawing.categories(**changes))


def test_a_known_category_set_keeps_its_embeddings(drawing: Any, root: Path) -> None:
    """They come from the same encoder, and what was read once must not change."""
    draft = CacheDraft.of(root)
    assert draft.has_category_set("coco")
    draft.write_categories("coco", drawing.categories(embeddings=np.zeros((2, 5), np.float32)))
    assert draft.commit() == load_manifest(root)
    assert FeatureCache.open(root).categories("coco").embeddings[0, 0] == 1


def test_heads_are_written_once(drawing: Any, root: Path) -> None:
    inode = (root / files.SAM_HEADS_NAME).stat().st_ino
    draft = CacheDraft.of(root)
    draft.write_sam_heads({"other": np.zeros(3, np.float32)})
    assert draft.commit() == load_manifest(root)
    assert (root / files.SAM_HEADS_NAME).stat().st_ino == inode
    heads = FeatureCache.open(root).sam_heads()
    np.testing.assert_array_equal(heads["mask_tokens"], np.ones((3, 2), np.float32))
    assert heads["scale"].shape == ()

"""Merging caches: what is added, what stays, what must agree."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ris_cache.errors import ConfigError, CorruptShardError, DataError, FingerprintMismatchError, StoppedError
from ris_cache.store.cache import FeatureCache
from ris_cache.store.draft import CacheDraft
from ris_cache.store.merge import merge, plan_merge
from ris_cache.store.writer import CacheWriter, Outcome

pytestmark = pytest.mark.usefixtures("no_waiting_for_the_disk")


def files_of(root: Path) -> dict[str, bytes]:
    return {
        path.relative_to(root).as_posix(): path.read_bytes()
        for path in root.rglob("*")
        if path.is_file() and path.name != ".lock"
    }


@pytest.fixture
def into(drawing: Any, tmp_path: Path) -> Path:
    """float16 in zarr: images 0 to 5 of split val, 1 quarantined."""
    drawing.extract(tmp_path / "into", range(6), bad=(1,))
    return tmp_path / "into"


def test_parts_of_an_extraction_become_the_whole(either_drawing: Any, drawing: Any, tmp_path: Path) -> None:
    drawing.extract(tmp_path / "into", range(6), "val")
    either_drawing.extract(tmp_path / "from", range(4, 12), "testA", bad=(9,))
    before, reader = files_of(tmp_path / "from"), FeatureCache.open(tmp_path / "into")
    planned = plan_merge(tmp_path / "into", [tmp_path / "from"])
    assert (planned.added, planned.mended, planned.quarantined) == (tuple(range(6, 12)), (), (9,))
    assert planned.splits == ("refcoco.unc:testA",)
    num_copied, _ = merge(planned)
    assert num_copied == 6

    cache = drawing.require_whole(tmp_path / "into")
    assert set(cache.images) == set(range(12))
    assert list(cache.quarantined) == [9]
    assert {i: image.row for i, image in cache.images.items() if i < 6} == {i: i for i in range(6)}
    assert list(cache.manifest.datasets["refcoco.unc"].splits) == ["val", "testA"]
    assert len(cache.expressions("refcoco.unc")) == 14
    assert sorted(cache.instances("refcoco.unc")) == list(range(1000, 1012))
    assert files_of(tmp_path / "from") == before
    drawing.require_features(reader, range(6))
    assert len(reader.expressions("refcoco.unc")) == 6


def test_several_caches_in_one_go(drawing: Any, tmp_path: Path, into: Path) -> None:
    for name, ids, table, bad in (
        ("a", range(6, 10), "refcoco+.unc", (9,)),
        ("b", range(8, 14), "refcocog.umd", ()),
    ):
        drawing.extract(tmp_path / name, ids, "train", table=table, bad=bad)
    planned = plan_merge(into, [tmp_path / "a", tmp_path / "b"])
    assert planned.quarantined == ()  # image 9 has features in b
    merge(planned)
    cache = drawing.require_whole(into)
    assert set(cache.image_ids) == set(range(14)) - {1}
    assert list(cache.manifest.datasets) == ["refcoco.unc", "refcoco+.unc", "refcocog.umd"]


def test_quarantined_images_are_taken_from_who_has_them(drawing: Any, tmp_path: Path, into: Path) -> None:
    drawing.extract(tmp_path / "from", range(4), "val2", bad=(2,))
    planned = plan_merge(into, [tmp_path / "from"])
    assert (planned.added, planned.mended) == ((), (1,))
    merge(planned)
    cache = drawing.require_whole(into)
    assert cache.quarantined == {}
    assert cache.images[1].row == 8
    drawing.require_features(cache, [1, 2])


def test_merging_again_changes_nothing(drawing: Any, tmp_path: Path, into: Path) -> None:
    drawing.extract(tmp_path / "from", range(4, 9), "testA")
    merge(plan_merge(into, [tmp_path / "from"]))
    before = files_of(into)
    planned = plan_merge(into, [tmp_path / "from"])
    assert (planned.added, planned.mended, planned.splits, planned.category_sets) == ((), (), (), ())
    assert merge(planned)[0] == 0
    assert files_of(into) == before


def test_planning_writes_nothing(drawing: Any, tmp_path: Path, into: Path) -> None:
    drawing.extract(tmp_path / "from", range(4, 9), "testA")
    before = files_of(into)
    plan_merge(into, [tmp_path / "from"])
    assert files_of(into) == before


def test_the_whole_of_a_split_replaces_a_part(drawing: Any, tmp_path: Path) -> None:
    writer = drawing.open(tmp_path / "into", range(2))
    drawing.commit_all(writer)

    def edit(draft: CacheDraft) -> None:
        drawing.edit((), "none")(draft)
        draft.write_tables(
            "refcoco.unc",
            [drawing.expression(i) for i in range(2)],
            [drawing.instance(i) for i in range(2)],
            clip_category_ids=[1, 1],
            category_set="coco",
            incomplete_splits=frozenset({"val"}),
        )

    writer.finish(edit)
    drawing.extract(tmp_path / "from", range(5))
    merge(plan_merge(tmp_path / "into", [tmp_path / "from"]))
    split = drawing.require_whole(tmp_path / "into").manifest.datasets["refcoco.unc"].splits["val"]
    assert (split.expressions, split.is_complete) == (5, True)


def test_a_stopped_merge_goes_on_where_it_was(drawing: Any, tmp_path: Path, into: Path) -> None:
    drawing.extract(tmp_path / "from", range(6, 16), "testA")
    looks = iter([False, True])
    with pytest.raises(StoppedError, match="4 of 10"):
        merge(plan_merge(into, [tmp_path / "from"]), should_stop=lambda: next(looks, True))
    drawing.require_features(FeatureCache.open(into), [0, 2, 3, 4, 5])
    num_copied, _ = merge(plan_merge(into, [tmp_path / "from"]))
    assert num_copied == 6
    assert len(drawing.require_whole(into)) == 15


def test_what_an_interrupted_extraction_has_done_is_kept(drawing: Any, tmp_path: Path, into: Path) -> None:
    writer = drawing.open(into, range(20, 28))
    drawing.commit(next(writer.free_claims()))
    writer.close()
    drawing.extract(tmp_path / "from", range(6, 9), "testA")
    merge(plan_merge(into, [tmp_path / "from"]))
    cache = drawing.require_whole(into)
    assert set(cache.image_ids) == {0, 2, 3, 4, 5, 6, 7, 8, 20, 21, 22, 23}


# What must agree.


def test_other_makings_are_refused_field_by_field(
    drawing: Any, other_drawing: Any, tmp_path: Path, into: Path
) -> None:
    other_drawing.extract(tmp_path / "seed", range(3))
    dataclasses.replace(drawing, dtype="float32").extract(tmp_path / "wide", range(3))
    with pytest.raises(FingerprintMismatchError, match=r"weights.sam.seed: expected 0, found 1") as caught:
        plan_merge(into, [tmp_path / "seed"])
    assert caught.value.exit_code == 5
    with pytest.raises(FingerprintMismatchError, match=r'dtype: expected "float16", found "float32"'):
        plan_merge(into, [tmp_path / "wide"])


def test_a_cache_named_twice_is_refused(drawing: Any, tmp_path: Path, into: Path) -> None:
    drawing.extract(tmp_path / "from", range(3))
    (tmp_path / "link").symlink_to(into)
    for sources in ([into], [tmp_path / "link"], [tmp_path / "from", tmp_path / "from"]):
        with pytest.raises(ConfigError, match="named twice"):
            plan_merge(into, sources)


def write_other(drawing: Any, root: Path, outcome: Outcome | None = None, **changes: Any) -> None:
    """Write a cache of image 3 alone, changed somehow."""
    writer = CacheWriter.open(
        root,
        drawing.recipe,
        purpose="extract",
        request={},
        choose=lambda known: [drawing.image(3, **changes)],
    )
    for claim in writer.free_claims():
        claim.commit(drawing.stored([3]), [outcome or Outcome(sha256=f"{3:064x}")])
    writer.finish(drawing.edit([3], "testB"))


@pytest.mark.parametrize("changes", [{"height": 7}, {"file_name": "x.jpg"}, {"namespace": "objects365"}])
def test_an_image_id_of_another_image_is_refused(
    drawing: Any, tmp_path: Path, into: Path, changes: dict[str, Any]
) -> None:
    write_other(drawing, tmp_path / "from", **changes)
    before = files_of(into)
    with pytest.raises(DataError, match="Image 3 is"):
        plan_merge(into, [tmp_path / "from"])
    assert files_of(into) == before


def test_an_image_of_another_file_is_refused(drawing: Any, tmp_path: Path, into: Path) -> None:
    write_other(drawing, tmp_path / "from", Outcome(sha256="f" * 64))
    with pytest.raises(DataError, match=r"Image 3 .* extracted from another file"):
        plan_merge(into, [tmp_path / "from"])


def test_other_annotations_of_a_split_are_refused_before_anything_is_copied(
    drawing: Any, tmp_path: Path, into: Path
) -> None:
    writer = drawing.open(tmp_path / "from", range(10))
    drawing.commit_all(writer)

    def edit(draft: CacheDraft) -> None:
        drawing.edit(range(6), "val")(draft)
        draft.drop_dataset("refcoco.unc")
        draft.write_categories("coco", drawing.categories())
        draft.write_tables(
            "refcoco.unc",
            [drawing.expression(i, sent="another cup") for i in range(6)],
            [drawing.instance(i) for i in range(6)],
            clip_category_ids=[1] * 6,
            category_set="coco",
        )

    writer.finish(edit)
    before = files_of(into)
    with pytest.raises(DataError, match=r"refcoco\.unc:val"):
        plan_merge(into, [tmp_path / "from"])
    assert files_of(into) == before


def test_other_categories_by_the_same_name_are_refused(drawing: Any, tmp_path: Path, into: Path) -> None:
    writer = drawing.open(tmp_path / "from", [8])
    drawing.commit_all(writer)
    names = drawing.categories(names=("person", "mug"), embeddings=np.ones((2, 5), np.float32))
    writer.finish(lambda draft: draft.write_categories("coco", names))
    with pytest.raises(DataError, match="category set 'coco'"):
        plan_merge(into, [tmp_path / "from"])


def test_damage_in_a_source_is_never_copied(drawing: Any, tmp_path: Path, into: Path) -> None:
    drawing.extract(tmp_path / "from", range(6, 9), "testA")
    path = tmp_path / "from" / "features.zarr/sam/c/0/0/0/0"
    content = bytearray(path.read_bytes())
    content[5] ^= 1
    path.write_bytes(content)
    with pytest.raises(CorruptShardError, match="Image 6 "):
        merge(plan_merge(into, [tmp_path / "from"]))
    drawing.require_features(FeatureCache.open(into), [0, 2, 3, 4, 5])

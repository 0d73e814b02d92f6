"""Writing a cache: what it then holds, how it grows, and what is refused."""

from __future__ import annotations

import json
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
)
from ris_cache.store.cache import FeatureCache
from ris_cache.store.planning import require_same_image
from ris_cache.store.writer import CacheWriter, Outcome

pytestmark = pytest.mark.usefixtures("no_waiting_for_the_disk")


def content_of(root: Path) -> dict[str, bytes]:
    return {
        path.relative_to(root).as_posix(): path.read_bytes() for path in root.rglob("*") if path.is_file()
    }


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


# What is refused.


def test_other_settings_are_refused_and_nothing_is_touched(
    drawing: Any, other_drawing: Any, tmp_path: Path
) -> None:
    drawing.extract(tmp_path, range(4))
    before = content_of(tmp_path)
    with pytest.raises(FingerprintMismatchError, match=r"weights\.sam\.seed: cache has 0, asked for 1"):
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
    with pytest.raises(CacheError, match=r"is (stored as zarr, not|in shards of 4 images, not)") as caught:
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

"""Writing a cache, adding to it, and failing at every point in between."""

from __future__ import annotations

import itertools
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow.parquet as pq
import pytest
import zarr

from ris_cache.datasets.records import ExpressionRecord, ImageRecord, InstanceRecord
from ris_cache.encoders.spec import TINY
from ris_cache.errors import (
    CacheError,
    CacheMissError,
    ConfigError,
    CorruptShardError,
    DataError,
    FingerprintMismatchError,
    IncompleteCacheError,
    NonFiniteError,
)
from ris_cache.store.cache import FeatureCache
from ris_cache.store.files import sha256_file
from ris_cache.store.fingerprint import Fingerprint, cache_fingerprint
from ris_cache.store.tables import CategorySet
from ris_cache.store.writer import CacheWriter

Array = npt.NDArray[Any]
SHAPES = {"sam": (2, 3, 3), "clip": (4, 2), "clip_pooled": (5,)}
FINGERPRINT = cache_fingerprint(TINY, {"sam": {"seed": 0}}, dtype="float16")


@pytest.fixture(scope="module", autouse=True)
def no_waiting_for_the_disk() -> Iterator[None]:
    """Power cuts are the business of test_files.py; here fsync would take most of the time."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("os.fsync", lambda descriptor: None)
        yield


def create(root: Path, fingerprint: Fingerprint = FINGERPRINT) -> CacheWriter:
    return CacheWriter.create(
        root,
        fingerprint,
        preset="tiny",
        shapes=SHAPES,
        weights={"sam": "random(seed=0)"},
        shard_rows=4,
        libraries={"torch": "2.6"},
    )


def image(image_id: int, **changes: Any) -> ImageRecord:
    values = {"image_id": image_id, "file_name": f"{image_id:012}.jpg", "height": 30 + image_id, "width": 40}
    return ImageRecord(**(values | changes))


def features(image_id: int) -> dict[str, Array]:
    """What the encoders of this file give for an image, in float32."""
    generator = np.random.default_rng(image_id)
    return {name: generator.standard_normal(shape).astype(np.float32) for name, shape in SHAPES.items()}


def expression(sent_id: int, image_id: int, split: str, **changes: Any) -> ExpressionRecord:
    values = {
        "split": split,
        "ref_id": sent_id // 2,
        "sent_id": sent_id,
        "sent_index": 0,
        "image_id": image_id,
        "raw": "A cup",
        "sent": "a cup",
        "ann_ids": (100 + image_id,),
        "category_ids": (47,),
        "is_degenerate": False,
    }
    return ExpressionRecord(**(values | changes))


def instance(image_id: int, **changes: Any) -> InstanceRecord:
    values = {
        "ann_id": 100 + image_id,
        "image_id": image_id,
        "category_id": 47,
        "segmentation": ((0.0, 0.0, 9.5, 0.0, 9.5, 9.5),),
        "is_crowd": False,
    }
    return InstanceRecord(**(values | changes))


def write_images(writer: CacheWriter, image_ids: range, bad: tuple[int, ...] = ()) -> dict[int, int]:
    rows = writer.add_images([image(image_id) for image_id in image_ids])
    for image_id in rows:
        if image_id in bad:
            writer.quarantine(image_id, "cut off in the middle")
        else:
            writer.record_file(image_id, f"{image_id:064x}")
    for shard_index in sorted({row // writer.shard_rows for row in rows.values()}):
        own = [features(shard_image.image_id) for shard_image in writer.shard_images(shard_index)]
        writer.write_shard(shard_index, {name: np.stack([one[name] for one in own]) for name in SHAPES})
    return rows


def write_rest(writer: CacheWriter, image_ids: range, split: str) -> None:
    writer.write_tables(
        "refcoco.unc",
        [expression(image_id, image_id, split) for image_id in image_ids],
        [instance(image_id) for image_id in image_ids],
        clip_category_ids=[1] * len(image_ids),
        category_set="coco",
    )
    writer.write_categories(
        "coco",
        CategorySet(
            ids=(1, 47),
            names=("person", "cup"),
            template="a photo of a {}.",
            embeddings=np.eye(2, 5, dtype=np.float32),
        ),
    )
    writer.write_sam_heads({"mask_tokens": np.ones((2, 3), np.float32).T, "scale": np.array(2.5)})


def extract(root: Path, image_ids: range, split: str, bad: tuple[int, ...] = ()) -> None:
    writer = create(root)
    write_images(writer, image_ids, bad)
    write_rest(writer, image_ids, split)
    writer.finish()


def require_whole(root: Path) -> FeatureCache:
    """Every file but the manifest is listed with its digest, nothing else lies there, all features read."""
    cache = FeatureCache.open(root)
    found = {
        path.relative_to(root).as_posix(): sha256_file(path)
        for path in root.rglob("*")
        if path.is_file() and path != root / "manifest.json"
    }
    listed = {name: (entry.bytes, entry.sha256) for name, entry in cache.manifest.files.items()}
    assert {name: (digest.num_bytes, digest.sha256) for name, digest in found.items()} == listed
    batch = cache.read(cache.image_ids.tolist())
    for position, image_id in enumerate(batch.image_ids):
        for name in SHAPES:
            expected = features(int(image_id))[name].astype(np.float16)
            np.testing.assert_array_equal(getattr(batch, name)[position], expected)
    return cache


def test_a_finished_cache_holds_what_was_written(tmp_path: Path) -> None:
    extract(tmp_path / "feats", range(6), "val", bad=(1,))
    cache = require_whole(tmp_path / "feats")
    manifest = cache.manifest
    assert (manifest.rows, manifest.shard_rows, manifest.dtype) == (8, 4, "float16")
    assert (manifest.images.ok, manifest.images.quarantined) == (5, 1)
    assert manifest.to_fingerprint() == FINGERPRINT
    assert manifest.weights == {"sam": "random(seed=0)"}
    assert manifest.recorded.libraries["torch"] == "2.6"
    assert "zarr" in manifest.recorded.libraries
    split = manifest.datasets["refcoco.unc"].splits["val"]
    assert (split.expressions, split.refs, split.images) == (6, 3, 6)
    assert not (tmp_path / "feats" / "extraction.json").exists()


def test_other_readers_need_nothing_of_ours(tmp_path: Path) -> None:
    extract(tmp_path / "feats", range(6), "val", bad=(1,))
    root = tmp_path / "feats"
    images = pq.read_table(root / "images.parquet").to_pylist()
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
    }
    group = zarr.open_group(root / "features.zarr", mode="r")
    for row in images:
        for name in SHAPES:
            array = group[name]
            assert isinstance(array, zarr.Array)
            found = np.asarray(array[row["row"]])
            if row["status"] == "ok":
                np.testing.assert_array_equal(found, features(row["image_id"])[name].astype(np.float16))
            else:
                assert np.isnan(found).all()
    expressions = pq.read_table(root / "expressions" / "refcoco.unc.parquet").to_pylist()
    assert expressions[2] == {
        "split": "val",
        "ref_id": 1,
        "sent_id": 2,
        "sent_index": 0,
        "image_id": 2,
        "raw": "A cup",
        "sent": "a cup",
        "ann_ids": [102],
        "category_ids": [47],
        "is_degenerate": False,
        "no_target": False,
        "category_id": 47,
        "clip_category_id": 1,
    }
    instances = pq.read_table(root / "instances" / "refcoco.unc.parquet").to_pylist()
    assert json.loads(instances[0]["segmentation"]) is not None
    assert json.loads((root / "manifest.json").read_bytes())["format"] == "ris-feature-cache"


def test_adding_computes_only_what_is_missing_and_starts_a_fresh_shard(tmp_path: Path) -> None:
    root = tmp_path / "feats"
    extract(root, range(6), "val")
    created = FeatureCache.open(root).manifest.recorded.created
    old_shards = {path: path.read_bytes() for path in root.glob("features.zarr/*/c/**/0") if path.is_file()}
    writer = create(root)
    assert write_images(writer, range(4, 10)) == {6: 8, 7: 9, 8: 10, 9: 11}
    write_rest(writer, range(4, 10), "testA")
    writer.finish()
    cache = require_whole(root)
    assert sorted(cache.image_ids.tolist()) == list(range(10))
    assert list(cache.manifest.datasets["refcoco.unc"].splits) == ["val", "testA"]
    assert cache.manifest.recorded.created == created
    assert all(path.read_bytes() == content for path, content in old_shards.items())


def test_every_batch_of_images_starts_a_fresh_shard_even_after_finishing(tmp_path: Path) -> None:
    writer = create(tmp_path / "feats")
    assert write_images(writer, range(2)) == {0: 0, 1: 1}
    assert write_images(writer, range(1, 3)) == {2: 4}
    writer.finish()
    assert write_images(writer, range(3, 4)) == {3: 8}
    writer.finish()
    assert len(require_whole(tmp_path / "feats").image_ids) == 4


def test_an_extraction_repeated_changes_nothing_but_the_manifest(tmp_path: Path) -> None:
    root = tmp_path / "feats"
    extract(root, range(6), "val", bad=(1,))
    before = FeatureCache.open(root).manifest.files
    extract(root, range(6), "val")
    assert require_whole(root).manifest.files == before


def test_a_cache_without_images_can_be_finished(tmp_path: Path) -> None:
    create(tmp_path / "feats").finish()
    assert require_whole(tmp_path / "feats").manifest.rows == 0


def test_until_the_manifest_is_there_the_cache_is_unfinished(tmp_path: Path) -> None:
    root = tmp_path / "feats"
    writer = create(root)
    with pytest.raises(IncompleteCacheError, match="has not finished"):
        FeatureCache.open(root)
    write_images(writer, range(6))
    write_rest(writer, range(6), "val")
    with pytest.raises(IncompleteCacheError, match="has not finished"):
        FeatureCache.open(root)


def test_an_unfinished_extraction_is_started_over(tmp_path: Path) -> None:
    root = tmp_path / "feats"
    write_images(create(root), range(9))
    extract(root, range(6), "val")
    assert len(require_whole(root).image_ids) == 6


def test_an_update_that_never_finished_leaves_the_old_cache_and_no_trace_in_the_next(tmp_path: Path) -> None:
    root = tmp_path / "feats"
    extract(root, range(4), "val")
    writer = create(root)
    write_images(writer, range(4, 16))
    write_rest(writer, range(4, 16), "testA")
    assert sorted(FeatureCache.open(root).image_ids.tolist()) == [0, 1, 2, 3]
    writer = create(root)
    write_images(writer, range(4, 6), bad=(4, 5))
    writer.finish()
    assert sorted(require_whole(root).image_ids.tolist()) == [0, 1, 2, 3]


class PowerCut(BaseException):
    """Stops a test's extraction where a real one may be killed."""


@pytest.mark.parametrize("has_cache", [False, True])
def test_a_crash_at_any_rename_leaves_a_usable_or_an_unfinished_cache(
    tmp_path: Path, has_cache: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    real_replace: Callable[[Path, Path], Path] = Path.replace
    extract(tmp_path / "before", range(4), "val")
    for survived in itertools.count():
        root = tmp_path / f"feats{survived}"
        if has_cache:
            shutil.copytree(tmp_path / "before", root)
        writer = create(root)
        write_images(writer, range(2, 7))
        write_rest(writer, range(2, 7), "testA")
        renames = itertools.count()

        def replace_until(
            source: Path, target: Path, renames: Any = renames, survived: int = survived
        ) -> Path:
            if next(renames) >= survived:
                raise PowerCut
            return real_replace(source, target)

        with monkeypatch.context() as patch:
            patch.setattr(Path, "replace", replace_until)
            try:
                writer.finish()
            except PowerCut:
                is_finished = False
            else:
                is_finished = True
        if has_cache:
            cache = FeatureCache.open(root)
            assert set(cache.image_ids.tolist()) >= set(range(4))
            cache.read(cache.image_ids.tolist())
            cache.expressions("refcoco.unc")
        elif not is_finished:
            with pytest.raises(IncompleteCacheError):
                FeatureCache.open(root)
        extract(root, range(2, 7), "testA")
        cache = require_whole(root)
        assert set(cache.image_ids.tolist()) == set(range(0 if has_cache else 2, 7))
        if is_finished:
            break
    assert survived > 10


def test_other_settings_are_refused_and_nothing_is_touched(tmp_path: Path) -> None:
    root = tmp_path / "feats"
    extract(root, range(4), "val")
    with pytest.raises(FingerprintMismatchError, match=r"weights\.sam\.seed: expected 1, found 0"):
        create(root, cache_fingerprint(TINY, {"sam": {"seed": 1}}, dtype="float16"))
    require_whole(root)


@pytest.mark.parametrize("name", ["notes.txt", "features.zarr/mine", "pending/manifest.json"])
def test_a_directory_of_somebody_else_is_refused_untouched(tmp_path: Path, name: str) -> None:
    path = tmp_path / "home" / name
    path.parent.mkdir(parents=True)
    path.write_text("mine")
    with pytest.raises(ConfigError, match="nothing was changed"):
        create(tmp_path / "home")
    assert [child for child in (tmp_path / "home").rglob("*") if child.is_file()] == [path]


def test_a_manifest_of_somebody_else_is_refused_untouched(tmp_path: Path) -> None:
    (tmp_path / "pending").mkdir()
    for path in (tmp_path / "manifest.json", tmp_path / "pending" / "manifest.json"):
        path.write_text('{"name": "a browser extension"}')
    with pytest.raises(CacheError, match="does not describe a feature cache"):
        create(tmp_path)
    assert (tmp_path / "pending" / "manifest.json").exists()


def test_a_file_is_no_place_for_a_cache(tmp_path: Path) -> None:
    (tmp_path / "feats").write_text("")
    with pytest.raises(ConfigError, match="is a file"):
        create(tmp_path / "feats")


def test_the_same_image_from_another_file_is_refused(tmp_path: Path) -> None:
    root = tmp_path / "feats"
    extract(root, range(4), "val")
    writer = create(root)
    writer.record_file(2, f"{2:064x}")
    with pytest.raises(DataError, match=r"Image 2 \(000000000002\.jpg\) has SHA-256 ffff") as caught:
        writer.record_file(2, "f" * 64)
    assert caught.value.facts["expected"] == f"{2:064x}"


@pytest.mark.parametrize("changes", [{"height": 7}, {"width": 7}, {"file_name": "other.jpg"}])
def test_an_image_id_means_one_image(tmp_path: Path, changes: dict[str, Any]) -> None:
    writer = create(tmp_path / "feats")
    writer.add_images([image(1)])
    with pytest.raises(DataError, match="Image 1 is"):
        writer.add_images([image(1, **changes)])


def test_an_image_id_of_another_namespace_is_another_image(tmp_path: Path) -> None:
    writer = create(tmp_path / "feats")
    writer.add_images([image(1)])
    with pytest.raises(DataError, match="objects365"):
        writer.add_images([image(1)], namespace="objects365")


def test_quarantined_images_stay_so_unless_a_retry_is_asked_for(tmp_path: Path) -> None:
    root = tmp_path / "feats"
    extract(root, range(4), "val", bad=(1,))
    writer = create(root)
    assert writer.known_images[1].reason == "cut off in the middle"
    assert writer.add_images([image(1)]) == {}
    assert writer.add_images([image(1)], retry_quarantined=True) == {1: 4}
    writer.record_file(1, "a" * 64)
    writer.write_shard(1, {name: values[None] for name, values in features(1).items()})
    writer.finish()
    cache = require_whole(root)
    assert cache.quarantined == {}
    assert sorted(cache.image_ids.tolist()) == [0, 1, 2, 3]


def test_features_that_are_not_finite_name_the_image_which_can_then_be_quarantined(tmp_path: Path) -> None:
    root = tmp_path / "feats"
    writer = create(root)
    writer.add_images([image(image_id) for image_id in (7, 8, 9)])
    for image_id in (7, 8, 9):
        writer.record_file(image_id, f"{image_id:064x}")
    arrays = {name: np.stack([features(image_id)[name] for image_id in (7, 8, 9)]) for name in SHAPES}
    arrays["clip"][1, 0, 0] = 1e5
    with pytest.raises(NonFiniteError, match="Image 8: clip: row 1 reaches 100000") as caught:
        writer.write_shard(0, arrays)
    assert caught.value.facts["image_id"] == 8
    writer.quarantine(8, str(caught.value))
    writer.write_shard(0, arrays)
    writer.finish()
    assert list(require_whole(root).quarantined) == [8]


def test_a_cache_is_not_finished_while_shards_or_categories_are_missing(tmp_path: Path) -> None:
    writer = create(tmp_path / "feats")
    writer.add_images([image(image_id) for image_id in range(5)])
    with pytest.raises(IncompleteCacheError, match=r"unwritten shards \[0, 1\]"):
        writer.finish()
    writer = create(tmp_path / "feats")
    writer.write_tables("refcoco.unc", [], [], clip_category_ids=[], category_set="coco")
    with pytest.raises(IncompleteCacheError, match=r"missing category sets \['coco'\]"):
        writer.finish()


def test_calls_out_of_order_are_refused(tmp_path: Path) -> None:
    writer = create(tmp_path / "feats")
    with pytest.raises(CacheMissError, match="Image 3 was never added"):
        writer.record_file(3, "0" * 64)
    with pytest.raises(ConfigError, match="Shard 0 is not waiting"):
        writer.write_shard(0, {})
    writer.add_images([image(3)])
    arrays = {name: values[None] for name, values in features(3).items()}
    with pytest.raises(ConfigError, match="no file digest"):
        writer.write_shard(0, arrays)
    writer.record_file(3, "0" * 64)
    writer.write_shard(0, arrays)
    with pytest.raises(ConfigError, match="its shard is written"):
        writer.quarantine(3, "too late")


def test_tables_must_fit_the_images_and_instances(tmp_path: Path) -> None:
    writer = create(tmp_path / "feats")
    writer.add_images([image(1)])
    with pytest.raises(CacheMissError, match="Image 2 was never added"):
        writer.write_tables(
            "a.b", [expression(1, 2, "val")], [instance(2)], clip_category_ids=[1], category_set="coco"
        )
    with pytest.raises(DataError, match="ref 0 targets"):
        writer.write_tables(
            "a.b", [expression(1, 1, "val")], [instance(2)], clip_category_ids=[1], category_set="coco"
        )
    for name in ("../a", "a/b", "", ".a"):
        with pytest.raises(ConfigError, match="cannot"):
            writer.write_tables(name, [], [], clip_category_ids=[], category_set="coco")


def test_splits_written_one_by_one_join_before_and_after_finishing(tmp_path: Path) -> None:
    root = tmp_path / "feats"
    writer = create(root)
    write_images(writer, range(3))
    for image_id, split in ((0, "train"), (1, "val")):
        write_rest(writer, range(image_id, image_id + 1), split)
    writer.finish()
    write_rest(writer, range(2, 3), "testA")
    writer.finish()
    cache = require_whole(root)
    assert [record.split for record in cache.expressions("refcoco.unc")] == ["train", "val", "testA"]
    assert sorted(cache.instances("refcoco.unc")) == [100, 101, 102]


@pytest.mark.parametrize("is_finished", [False, True])
def test_a_category_set_cannot_change_under_its_name(tmp_path: Path, is_finished: bool) -> None:
    root = tmp_path / "feats"
    writer = create(root)
    write_images(writer, range(1))
    write_rest(writer, range(1), "val")
    if is_finished:
        writer.finish()
        writer = create(root)
    other = CategorySet(
        ids=(1, 48), names=("person", "cup"), template="a photo of a {}.", embeddings=np.eye(2, 5, dtype="f4")
    )
    with pytest.raises(DataError, match="other ids, names or prompt template"):
        writer.write_categories("coco", other)


def test_a_damaged_image_table_stops_an_update(tmp_path: Path) -> None:
    root = tmp_path / "feats"
    extract(root, range(4), "val")
    (root / "images.parquet").write_bytes(b"PAR1")
    with pytest.raises(CorruptShardError, match=r"images\.parquet"):
        create(root)

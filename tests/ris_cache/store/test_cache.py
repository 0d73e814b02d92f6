"""Opening and reading a cache, and each way in which it can be unfit."""

from __future__ import annotations

import json
import multiprocessing
import os
import pickle
import shutil
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ris_cache import FeatureCache
from ris_cache.datasets.records import ExpressionRecord, ImageRecord, InstanceRecord
from ris_cache.encoders.spec import TINY
from ris_cache.errors import CacheError, CacheMissError, CorruptShardError, IncompleteCacheError, ShapeError
from ris_cache.store.fingerprint import cache_fingerprint
from ris_cache.store.tables import CategorySet
from ris_cache.store.writer import CacheWriter

SHAPES = {"sam": (2, 3, 3), "clip": (4, 2), "clip_pooled": (5,)}
IMAGE_IDS = [30, 10, 20, 50, 40]
QUARANTINED = 20
FINGERPRINT = cache_fingerprint(TINY, {}, dtype="float16")


@pytest.fixture(scope="module", autouse=True)
def no_waiting_for_the_disk() -> Iterator[None]:
    """Power cuts are the business of test_files.py; here fsync would take most of the time."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("os.fsync", lambda descriptor: None)
        yield


def value_of(image_id: int) -> float:
    """Every feature of an image is this number."""
    return image_id / 8


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("cache") / "feats"
    writer = CacheWriter.create(root, FINGERPRINT, preset="tiny", shapes=SHAPES, weights={}, shard_rows=2)
    rows = writer.add_images(
        [
            ImageRecord(image_id=image_id, file_name=f"{image_id}.jpg", height=image_id, width=100)
            for image_id in IMAGE_IDS
        ]
    )
    for image_id in rows:
        writer.record_file(image_id, f"{image_id:064x}")
    writer.quarantine(QUARANTINED, "not a JPEG file")
    for shard_index in range(3):
        values = np.array([value_of(image.image_id) for image in writer.shard_images(shard_index)])
        writer.write_shard(
            shard_index,
            {name: values.reshape(-1, *(1 for _ in s)) * np.ones(s) for name, s in SHAPES.items()},
        )
    writer.write_tables(
        "refcoco+.unc",
        [
            ExpressionRecord(
                split="val",
                ref_id=1,
                sent_id=2,
                sent_index=0,
                image_id=30,
                raw="Cup!",
                sent="cup",
                ann_ids=(7,),
                category_ids=(47,),
                is_degenerate=False,
            )
        ],
        [
            InstanceRecord(
                ann_id=7,
                image_id=30,
                category_id=47,
                segmentation=((0.0, 0.0, 1.0, 0.0, 1.0, 1.0),),
                is_crowd=False,
            )
        ],
        clip_category_ids=[1],
        category_set="coco",
    )
    writer.write_categories(
        "coco",
        CategorySet(ids=(47,), names=("cup",), template="a {}.", embeddings=np.ones((1, 5), np.float32)),
    )
    writer.write_sam_heads({"scale": np.array(2.5, np.float32), "weight": np.ones((2, 3), np.float32)})
    writer.finish()
    return root


@pytest.fixture
def root(finished: Path, tmp_path: Path) -> Path:
    """A copy to damage."""
    return shutil.copytree(finished, tmp_path / "feats")


def edit_manifest(root: Path, **changes: Any) -> None:
    document = json.loads((root / "manifest.json").read_bytes())
    (root / "manifest.json").write_text(json.dumps(document | changes))


def test_a_cache_says_what_it_holds(finished: Path) -> None:
    cache = FeatureCache.open(finished)
    assert cache.fingerprint == FINGERPRINT
    assert cache.manifest.preset == "tiny"
    assert cache.image_ids.tolist() == [30, 10, 50, 40]
    assert cache.sizes == {image_id: (image_id, 100) for image_id in IMAGE_IDS}
    assert cache.quarantined == {QUARANTINED: "not a JPEG file"}
    assert cache.images[30].sha256 == f"{30:064x}"
    assert cache.root == finished


def test_features_come_in_the_order_asked_for(finished: Path) -> None:
    batch = FeatureCache.open(str(finished)).read([40, 30, 40])
    assert batch.image_ids.tolist() == [40, 30, 40]
    for name, shape in SHAPES.items():
        values = getattr(batch, name)
        assert (values.shape, values.dtype) == ((3, *shape), np.float16)
        assert (values == np.array([5.0, 3.75, 5.0]).reshape(3, *(1 for _ in shape))).all()


def test_buffers_are_filled_in_place_and_may_be_larger(finished: Path) -> None:
    cache = FeatureCache.open(finished)
    buffers = cache.allocate(3)
    batch = cache.read([10, 50], buffers)
    assert (batch.sam.shape[0], batch.image_ids.tolist()) == (2, [10, 50])
    for name in ("image_ids", *SHAPES):
        assert np.shares_memory(getattr(batch, name), getattr(buffers, name))
    assert (buffers.clip[:, 0, 0] == [1.25, 6.25, 0]).all()
    with pytest.raises(ShapeError, match="hold 3 images; 4 were asked for"):
        cache.read([10, 50, 10, 50], buffers)


def test_no_images_give_an_empty_batch(finished: Path) -> None:
    assert FeatureCache.open(finished).read([]).sam.shape == (0, 2, 3, 3)


def test_unknown_images_are_listed(finished: Path) -> None:
    with pytest.raises(CacheMissError, match=r"images 11, 12\. Add them with `ris extract`") as caught:
        FeatureCache.open(finished).read([10, 11, 12, 11])
    assert caught.value.facts["image_ids"] == [11, 12]
    with pytest.raises(CacheMissError, match="and 90 more"):
        FeatureCache.open(finished).read(range(1000, 1100))


def test_a_quarantined_image_is_refused_with_its_reason(finished: Path) -> None:
    with pytest.raises(CacheMissError, match="20: not a JPEG file") as caught:
        FeatureCache.open(finished).read([10, QUARANTINED])
    assert caught.value.facts["reasons"] == {QUARANTINED: "not a JPEG file"}


def test_tables_categories_and_heads_are_read(finished: Path) -> None:
    cache = FeatureCache.open(finished)
    (expression,) = cache.expressions("refcoco+.unc")
    assert (expression.raw, expression.ann_ids, expression.category_id) == ("Cup!", (7,), 47)
    assert expression.clip_category_id == 1
    assert cache.instances("refcoco+.unc")[7].segmentation == ((0.0, 0.0, 1.0, 0.0, 1.0, 1.0),)
    categories = cache.categories(cache.manifest.datasets["refcoco+.unc"].category_set)
    assert (categories.ids, categories.names, categories.template) == ((47,), ("cup",), "a {}.")
    assert categories.embeddings.dtype == np.float32
    heads = cache.sam_heads()
    assert heads["scale"].shape == ()
    assert heads["weight"].shape == (2, 3)


def test_a_missing_table_or_category_set_lists_those_there_are(finished: Path) -> None:
    cache = FeatureCache.open(finished)
    for read in (cache.expressions, cache.instances):
        with pytest.raises(CacheMissError, match=r"no table 'refcoco\.unc'; it has refcoco\+\.unc"):
            read("refcoco.unc")
    with pytest.raises(CacheMissError, match="no category set 'lvis'; it has coco"):
        cache.categories("lvis")


def test_a_cache_without_heads_says_so(tmp_path: Path) -> None:
    CacheWriter.create(tmp_path, FINGERPRINT, preset="tiny", shapes=SHAPES, weights={}).finish()
    with pytest.raises(CacheMissError, match=r"sam_heads\.safetensors"):
        FeatureCache.open(tmp_path).sam_heads()


def test_no_directory_no_cache(tmp_path: Path) -> None:
    with pytest.raises(CacheMissError, match=r"no cache at .*ris extract"):
        FeatureCache.open(tmp_path / "feats")


def test_an_empty_directory_is_unfinished(tmp_path: Path) -> None:
    with pytest.raises(IncompleteCacheError, match=r"is empty.*ris extract"):
        FeatureCache.open(tmp_path)


def test_an_unfinished_extraction_is_told_from_other_directories(tmp_path: Path) -> None:
    CacheWriter.create(tmp_path / "feats", FINGERPRINT, preset="tiny", shapes=SHAPES, weights={})
    with pytest.raises(IncompleteCacheError, match=r"not finished.*ris extract"):
        FeatureCache.open(tmp_path / "feats")
    with pytest.raises(CacheError, match=r"is not a cache.*ris extract") as caught:
        FeatureCache.open(tmp_path)
    assert not isinstance(caught.value, IncompleteCacheError)
    (tmp_path / "file").write_text("")
    with pytest.raises(CacheError, match=r"is a file.*ris extract"):
        FeatureCache.open(tmp_path / "file")


def test_a_newer_format_and_a_damaged_manifest_are_told_apart(root: Path) -> None:
    edit_manifest(root, format_version=2)
    with pytest.raises(CacheError, match="Update ris") as caught:
        FeatureCache.open(root)
    assert not isinstance(caught.value, CorruptShardError)
    (root / "manifest.json").write_bytes((root / "manifest.json").read_bytes()[:-20])
    with pytest.raises(CorruptShardError, match=r"manifest\.json is damaged.*ris extract"):
        FeatureCache.open(root)


@pytest.mark.parametrize(
    "relative",
    [
        "images.parquet",
        "sam_heads.safetensors",
        "expressions/refcoco+.unc.parquet",
        "categories/coco.json",
        "features.zarr/clip/zarr.json",
        "features.zarr/sam/c/1/0/0/0",
    ],
)
def test_every_missing_file_is_named(root: Path, relative: str) -> None:
    (root / relative).unlink()
    with pytest.raises(CorruptShardError, match=r"lacks files of its manifest.*ris extract") as caught:
        FeatureCache.open(root)
    assert caught.value.facts["missing"] == [relative]


def test_a_file_that_the_manifest_should_list_is_required(root: Path) -> None:
    document = json.loads((root / "manifest.json").read_bytes())
    del document["files"]["instances/refcoco+.unc.parquet"]
    edit_manifest(root, files=document["files"])
    with pytest.raises(CorruptShardError, match=r"instances/refcoco\+\.unc\.parquet"):
        FeatureCache.open(root)


def test_a_truncated_shard_is_noticed_when_opening(root: Path) -> None:
    shard = root / "features.zarr" / "sam" / "c" / "1" / "0" / "0" / "0"
    shard.write_bytes(shard.read_bytes()[:-1])
    with pytest.raises(CorruptShardError, match=r"sam/c/1/0/0/0 has \d+ bytes, but the manifest says"):
        FeatureCache.open(root)


def test_a_flipped_byte_in_an_index_is_noticed_when_reading(root: Path) -> None:
    shard = root / "features.zarr" / "sam" / "c" / "1" / "0" / "0" / "0"
    content = bytearray(shard.read_bytes())
    content[-10] ^= 1
    shard.write_bytes(bytes(content))
    cache = FeatureCache.open(root)
    cache.read([30])
    with pytest.raises(CorruptShardError, match="sam/c/1/0/0/0"):
        cache.read([50])


def test_arrays_of_another_shape_than_the_manifest_says_are_noticed(root: Path) -> None:
    edit_manifest(root, arrays={"sam": [2, 3, 3], "clip": [4, 2], "clip_pooled": [6]})
    with pytest.raises(CorruptShardError, match="clip_pooled"):
        FeatureCache.open(root)


def test_a_symbolic_link_out_of_the_cache_is_refused(root: Path, tmp_path: Path) -> None:
    (root / "images.parquet").rename(tmp_path / "elsewhere.parquet")
    (root / "images.parquet").symlink_to(tmp_path / "elsewhere.parquet")
    with pytest.raises(CorruptShardError, match="symbolic link"):
        FeatureCache.open(root)


def test_a_path_out_of_the_cache_is_refused(root: Path) -> None:
    document = json.loads((root / "manifest.json").read_bytes())
    edit_manifest(root, files=document["files"] | {"../../etc/passwd": {"bytes": 1, "sha256": "0" * 64}})
    with pytest.raises(CorruptShardError, match="plain relative path"):
        FeatureCache.open(root)


def test_reading_writes_nothing(root: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in root.rglob("*")}
    for directory in (root, *(path for path in root.rglob("*") if path.is_dir())):
        directory.chmod(0o555)
    try:
        cache = FeatureCache.open(root)
        cache.read([30, 50])
        cache.expressions("refcoco+.unc")
        cache.categories("coco")
        cache.sam_heads()
        assert {path: path.stat().st_mtime_ns for path in root.rglob("*")} == before
    finally:
        for directory in (root, *(path for path in root.rglob("*") if path.is_dir())):
            directory.chmod(0o755)


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_a_cache_travels_to_worker_processes(finished: Path, method: str) -> None:
    cache = FeatureCache.open(finished)
    cache.read([30])
    context = multiprocessing.get_context(method)
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        batch = pool.submit(cache.read, [50, 10]).result(timeout=60)
    assert (batch.sam[:, 0, 0, 0] == [6.25, 1.25]).all()


def test_threads_read_at_the_same_time(finished: Path) -> None:
    cache = FeatureCache.open(finished)
    with ThreadPoolExecutor(8) as pool:
        wanted = [[30, 10, 50, 40][number % 4] for number in range(100)]
        found = list(pool.map(lambda image_id: cache.read([image_id]).clip[0, 0, 0], wanted))
    assert found == [value_of(image_id) for image_id in wanted]


def test_a_relative_path_survives_a_change_of_directory(
    finished: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(finished.parent)
    cache = FeatureCache.open("feats")
    monkeypatch.chdir("/")
    assert pickle.loads(pickle.dumps(cache)).read([10]).clip[0, 0, 0] == 1.25


def test_importing_errors_or_the_package_loads_nothing_heavy() -> None:
    code = (
        "import sys, ris_cache, ris_cache.errors\n"
        "heavy = {'torch', 'zarr', 'pyarrow', 'pydantic', 'numpy'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
        "assert 'FeatureCache' in dir(ris_cache)\n"
        "from ris_cache import FeatureCache, CacheWriter, FeatureBatch, cache_fingerprint\n"
        "assert 'torch' not in sys.modules and 'zarr' not in sys.modules\n"
        "try:\n"
        "    ris_cache.no_such_name\n"
        "except AttributeError as error:\n"
        "    assert 'no_such_name' in str(error)\n"
        "else:\n"
        "    raise SystemExit('no AttributeError')\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, env=dict(os.environ), timeout=60)

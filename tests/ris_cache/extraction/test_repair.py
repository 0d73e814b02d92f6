"""Damaged caches of the tiny encoders, mended from the drawn images that they were made of."""

from __future__ import annotations

import shutil
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from ris_cache.datasets import parse_selections
from ris_cache.datasets.shapes import write_shapes_dataset
from ris_cache.encoders.frozen import FrozenEncoders
from ris_cache.encoders.spec import TINY
from ris_cache.encoders.weights import RandomWeights
from ris_cache.errors import (
    CorruptShardError,
    FingerprintMismatchError,
    IncompleteCacheError,
    StoppedError,
)
from ris_cache.extraction.repair import RepairReport, plan_repair, repair
from ris_cache.extraction.run import Layout, Silent, extract, make_recipe
from ris_cache.store import files
from ris_cache.store.backends import make_backend
from ris_cache.store.cache import FeatureCache
from ris_cache.store.collect import remove
from ris_cache.store.draft import CacheDraft
from ris_cache.store.fingerprint import cache_fingerprint
from ris_cache.store.journal import Journal
from ris_cache.store.locks import FileLock
from ris_cache.store.manifest import load_manifest
from ris_cache.store.planning import NewImage
from ris_cache.store.precision import decode, encode
from ris_cache.store.verify import verify
from ris_cache.store.writer import CacheWriter, Outcome

SHARD_ROWS = 4
BATCH = 2


@pytest.fixture(scope="module", autouse=True)
def no_waiting_for_the_disk() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("os.fsync", lambda descriptor: None)
        yield


@pytest.fixture(scope="module")
def encoders() -> FrozenEncoders:
    return load_encoders(seed=0)


def load_encoders(seed: int) -> FrozenEncoders:
    weights = RandomWeights(seed)
    return FrozenEncoders.load(TINY, sam_source=weights, clip_source=weights, device="cpu")


@pytest.fixture(scope="module")
def drawn(tmp_path_factory) -> Path:
    """Data root with ten training images, one of which is no image."""
    root = tmp_path_factory.mktemp("drawn") / "data"
    write_shapes_dataset(root, num_images={"train": 10, "val": 1, "testA": 1, "testB": 1}, seed=5)
    image_files(root)[6].write_bytes(b"not a JPEG")
    return root


@pytest.fixture
def data(tmp_path, drawn) -> Path:
    """The same, to be changed."""
    shutil.copytree(drawn, tmp_path / "data")
    return tmp_path / "data"


def image_files(data_root: Path) -> list[Path]:
    return sorted((data_root / "images" / "train2014").iterdir())


@pytest.fixture(scope="module", params=["zarr-float16", "hdf5-int8"])
def finished(request, tmp_path_factory, drawn, encoders) -> Path:
    """Ten images in three shards, the seventh in quarantine."""
    backend, dtype = request.param.split("-")
    root = tmp_path_factory.mktemp("finished") / "feats"
    extract(
        parse_selections("refcoco:train"),
        data_root=drawn,
        cache_root=root,
        encoders=encoders,
        batch_size=BATCH,
        layout=Layout(backend=backend, dtype=dtype, shard_rows=SHARD_ROWS),
    )
    return root


@pytest.fixture
def cache(tmp_path, finished) -> Path:
    """The same, to be damaged."""
    shutil.copytree(finished, tmp_path / "feats")
    return tmp_path / "feats"


def content(root: Path) -> dict[str, bytes]:
    return {
        path.relative_to(root).as_posix(): path.read_bytes()
        for path in sorted(root.rglob("*"))
        if path.is_file() and path.name != files.LOCK_NAME
    }


def shard_paths(root: Path, shard: int) -> list[Path]:
    manifest = load_manifest(root)
    backend = make_backend(manifest.backend, root, manifest.stored_arrays(), manifest.shard_rows)
    return [root / path for path in backend.shard_files(shard)]


def flip(path: Path) -> None:
    changed = bytearray(path.read_bytes())
    changed[len(changed) // 2] ^= 1
    path.write_bytes(changed)


def mend(root: Path, data_root: Path, load: Callable[[], FrozenEncoders], **options: Any) -> RepairReport:
    findings = verify(root).findings
    return repair(root, findings, data_root=data_root, load_encoders=load, batch_size=BATCH, **options)


def never() -> FrozenEncoders:
    raise AssertionError("no encoders are needed")


@pytest.fixture
def rounding(monkeypatch) -> None:
    """Encoders that round otherwise, as on another GPU."""
    exact = FrozenEncoders.encode

    def encode(self: FrozenEncoders, *pixels: torch.Tensor) -> dict[str, torch.Tensor]:
        return {name: values * 1.01 for name, values in exact(self, *pixels).items()}

    monkeypatch.setattr(FrozenEncoders, "encode", encode)


# --- mending -------------------------------------------------------------------------------------------------


def test_damaged_shards_come_back_byte_for_byte_and_nothing_else_is_touched(cache, drawn, encoders):
    before = content(cache)
    untouched = [path.stat().st_ino for path in shard_paths(cache, 1)]
    for path in shard_paths(cache, 0):
        path.unlink()
    flip(shard_paths(cache, 2)[0])
    report = mend(cache, drawn, lambda: encoders)
    assert (report.restored, report.changed, report.rewritten) == ((0, 2), (), ())
    assert (report.num_images, report.failures, report.is_stopped) == (6, {}, False)
    assert content(cache) == before
    assert [path.stat().st_ino for path in shard_paths(cache, 1)] == untouched
    assert verify(cache).is_sound


def test_the_shard_of_a_quarantined_image_is_mended_without_it(cache, drawn, encoders):
    before, quarantined = content(cache), FeatureCache.open(cache).quarantined
    flip(shard_paths(cache, 1)[0])
    report = mend(cache, drawn, lambda: encoders)
    assert (report.restored, report.num_images) == ((1,), SHARD_ROWS - 1)
    assert content(cache) == before
    assert FeatureCache.open(cache).quarantined == quarantined
    assert len(quarantined) == 1


def test_mending_the_same_findings_again_changes_nothing(cache, drawn, encoders):
    before = content(cache)
    flip(shard_paths(cache, 0)[0])
    findings = verify(cache).findings
    for _ in range(2):
        report = repair(cache, findings, data_root=drawn, load_encoders=lambda: encoders, batch_size=BATCH)
        assert report.restored == (0,)
        assert content(cache) == before


def test_features_that_come_out_otherwise_get_new_checksums(cache, drawn, encoders, rounding):
    old = load_manifest(cache)
    images = FeatureCache.open(cache).images
    features = FeatureCache.open(cache).read(sorted(images)[:4]).decoded()["clip_pooled"]
    flip(shard_paths(cache, 0)[0])
    report = mend(cache, drawn, lambda: encoders)
    assert (report.restored, report.changed) == ((), (0,))
    assert verify(cache).is_sound
    again = FeatureCache.open(cache, integrity="every-read")
    np.testing.assert_allclose(
        again.read(sorted(images)[:4]).decoded()["clip_pooled"], features * 1.01, atol=1e-2
    )
    new = again.manifest
    own = {path.relative_to(cache).as_posix() for path in shard_paths(cache, 0)}
    assert {path for path, entry in new.shard_files().items() if entry != old.files[path]} == own
    changed = {
        image_id for image_id, image in again.images.items() if image.crc32c != images[image_id].crc32c
    }
    assert changed == {image.image_id for image in images.values() if image.row < SHARD_ROWS}
    assert new.fingerprint == old.fingerprint
    assert new.datasets == old.datasets


def test_a_shard_that_the_manifest_has_lost_is_listed_again(cache, drawn, encoders):
    before = content(cache)
    lost = [path.relative_to(cache).as_posix() for path in shard_paths(cache, 2)]
    draft = CacheDraft.of(cache)
    draft.drop_files(lost)
    draft.commit()
    report = mend(cache, drawn, lambda: encoders)
    assert report.changed == (2,)
    assert verify(cache).is_sound
    assert {path: content(cache)[path] for path in lost} == {path: before[path] for path in lost}


def test_wrong_checksums_in_the_table_are_put_right(cache, drawn, encoders):
    draft = CacheDraft.of(cache)
    image = min(draft.images.values(), key=lambda image: image.row)
    fields = {name: getattr(image, name) for name in image.__dataclass_fields__}
    draft.replace_images([type(image)(**{**fields, "crc32c": tuple(value ^ 1 for value in image.crc32c)})])
    draft.commit()
    assert mend(cache, drawn, lambda: encoders).changed == (0,)
    assert verify(cache).is_sound
    assert FeatureCache.open(cache).images[image.image_id] == image


def test_a_shard_without_images_is_written_without_encoders(cache, drawn):
    draft = CacheDraft.of(cache)
    draft.drop_dataset("refcoco.unc")
    draft.drop_images([image.image_id for image in draft.images.values() if image.row < SHARD_ROWS])
    draft.commit()
    flip(shard_paths(cache, 0)[0])
    report = mend(cache, drawn, never)
    assert (report.changed, report.num_images) == ((0,), 0)
    assert verify(cache).is_sound


def test_damaged_metadata_is_written_anew_without_encoders(cache, drawn):
    manifest = load_manifest(cache)
    if manifest.backend != "zarr":
        pytest.skip("each HDF5 file describes itself")
    before = content(cache)
    wrong = ("features.zarr/clip/zarr.json", "features.zarr/zarr.json")
    (cache / wrong[0]).write_text("{")
    (cache / wrong[1]).unlink()
    report = mend(cache, drawn, never)
    assert set(report.rewritten) == set(wrong)
    assert content(cache) == before


def test_features_are_rounded_through_the_precisions_that_they_came_by(tmp_path, drawn, encoders):
    """A cache that was extracted as float16 and converted to int8 holds other codes than an extracted one."""
    source = tmp_path / "float16"
    selections = parse_selections("refcoco:val")
    extract(selections, data_root=drawn, cache_root=source, encoders=encoders, batch_size=1)
    old = FeatureCache.open(source)
    (image_id,) = old.image_ids.tolist()
    features = {name: torch.from_numpy(array) for name, array in old.read([image_id]).decoded().items()}
    recipe = make_recipe(encoders, tmp_path / "int8", Layout(dtype="int8"))
    fields = recipe.fingerprint.fields
    recipe = type(recipe)(
        **{name: getattr(recipe, name) for name in recipe.__dataclass_fields__ if name != "fingerprint"},
        fingerprint=cache_fingerprint(
            TINY, fields["weights"], arithmetic="float32", dtype="int8", rounded_through=["float16"]
        ),
    )
    image = old.images[image_id]
    wanted = NewImage(image_id=image_id, file_name=image.file_name, height=image.height, width=image.width)
    writer = CacheWriter.open(
        tmp_path / "int8", recipe, purpose="convert", request={}, choose=lambda known: [wanted]
    )
    (claim,) = writer.free_claims()
    arrays = {name: tensor.numpy() for name, tensor in encode("int8", features).arrays.items()}
    claim.commit(arrays, [Outcome(sha256=image.sha256)])
    writer.finish(lambda draft: None)
    before = content(tmp_path / "int8")
    flip(shard_paths(tmp_path / "int8", 0)[0])
    assert mend(tmp_path / "int8", drawn, lambda: encoders).restored == (0,)
    assert content(tmp_path / "int8") == before
    assert set(decode("int8", arrays)) == {"sam", "clip", "clip_pooled"}


# --- tables, categories and heads ----------------------------------------------------------------------------

SMALL_FILES = ("expressions", "instances", "categories", "heads")


def small_files(root: Path, kind: str) -> list[Path]:
    entry = load_manifest(root).datasets["refcoco.unc"]
    found = {
        "expressions": [entry.expressions_file],
        "instances": [entry.instances_file],
        "categories": [f"categories/{entry.category_set}.{end}" for end in ("json", "safetensors")],
        "heads": [files.SAM_HEADS_NAME],
    }
    return [root / path for path in found[kind]]


@pytest.mark.parametrize("harm", [flip, Path.unlink, lambda path: path.write_bytes(b"")])
def test_small_files_come_back_byte_for_byte(cache, drawn, encoders, harm):
    before = content(cache)
    for path in [path for kind in SMALL_FILES for path in small_files(cache, kind)]:
        harm(path)
    assert all(finding.is_repairable for finding in verify(cache).findings)
    report = mend(cache, drawn, lambda: encoders)
    things = ("SAM's heads", "the category set refcoco.unc", "the tables of refcoco.unc")
    assert (report.rebuilt, report.not_rebuilt, report.left_out) == (things, {}, ())
    assert (report.num_images, report.is_stopped) == (0, False)
    assert content(cache) == before


@pytest.mark.parametrize("kind", SMALL_FILES)
def test_each_small_file_is_made_again_alone(cache, drawn, encoders, kind):
    before = content(cache)
    for path in small_files(cache, kind):
        flip(path)
        others = {
            place: place.stat().st_ino for place in cache.rglob("*") if place.is_file() and place != path
        }
        assert len(mend(cache, drawn, lambda: encoders).rebuilt) == 1
        assert content(cache) == before
        assert {place: place.stat().st_ino for place in others} == others


def test_category_names_that_are_there_need_no_annotations(cache, tmp_path, encoders):
    before = content(cache)
    small_files(cache, "categories")[1].unlink()
    assert mend(cache, tmp_path / "none", lambda: encoders).rebuilt == ("the category set refcoco.unc",)
    assert content(cache) == before


def test_annotations_that_are_gone_or_others_leave_the_tables_and_let_the_rest_be_mended(
    cache, tmp_path, encoders
):
    for kind in ("expressions", "heads"):
        flip(small_files(cache, kind)[0])
    report = mend(cache, tmp_path / "none", lambda: encoders)
    assert report.rebuilt == ("SAM's heads",)
    assert list(report.not_rebuilt) == ["the tables of refcoco.unc"]
    write_shapes_dataset(
        tmp_path / "other", num_images={"train": 8, "val": 1, "testA": 1, "testB": 1}, seed=5
    )
    before = content(cache)
    plan = plan_repair(cache, verify(cache).findings, tmp_path / "other")
    assert (
        "are not those that the cache was made of" in plan.annotations.obstacles["the tables of refcoco.unc"]
    )
    assert not plan.annotations.things
    report = mend(cache, tmp_path / "other", never)
    assert report.not_rebuilt == plan.annotations.obstacles
    assert content(cache) == before


def test_other_encoders_make_no_small_files(cache, drawn):
    flip(small_files(cache, "heads")[0])
    before = content(cache)
    with pytest.raises(FingerprintMismatchError):
        mend(cache, drawn, lambda: load_encoders(seed=1))
    assert content(cache) == before


def test_of_a_split_that_is_a_part_nothing_is_built(tmp_path, drawn, encoders):
    def run(splits: str, limit: int | None = None) -> None:
        extract(
            parse_selections(splits),
            data_root=drawn,
            cache_root=tmp_path / "feats",
            encoders=encoders,
            batch_size=BATCH,
            limit=limit,
        )

    root = tmp_path / "feats"
    run("refcoco:train", limit=3)
    flip(small_files(root, "expressions")[0])
    (found,) = verify(root).findings
    assert not found.is_repairable
    assert "`ris cache remove refcoco.unc`" in found.remedy
    assert "`ris extract --split refcoco/unc:train`" in found.remedy
    assert mend(root, drawn, never) == RepairReport(num_images=0)
    remove(root, ["refcoco.unc"])
    run("refcoco:train", limit=3)
    run("refcoco:val")
    flip(small_files(root, "instances")[0])
    report = mend(root, drawn, lambda: encoders)
    assert (report.rebuilt, report.left_out) == (("the tables of refcoco.unc",), ("refcoco/unc:train",))
    assert list(load_manifest(root).datasets["refcoco.unc"].splits) == ["val"]
    assert len(FeatureCache.open(root)) == 4
    run("refcoco:train", limit=3)
    assert verify(root).is_sound


def test_a_stopped_repair_builds_nothing_more(cache, drawn, encoders):
    for kind in ("expressions", "heads"):
        flip(small_files(cache, kind)[0])
    answers = iter([False, True])
    report = mend(cache, drawn, lambda: encoders, should_stop=lambda: next(answers))
    assert (report.rebuilt, report.is_stopped) == (("SAM's heads",), True)
    assert mend(cache, drawn, lambda: encoders).rebuilt == ("the tables of refcoco.unc",)
    assert verify(cache).is_sound


def test_extracting_into_a_damaged_cache_is_refused_and_changes_nothing(cache, drawn, encoders):
    paths = [*shard_paths(cache, 1), *[path for kind in SMALL_FILES for path in small_files(cache, kind)]]
    harms = [
        Path.unlink,
        lambda path: path.write_bytes(b""),
        lambda path: path.write_bytes(path.read_bytes()[:-1]),
    ]
    for number, path in enumerate(paths):
        good = path.read_bytes()
        harms[number % len(harms)](path)
        before = content(cache)
        with pytest.raises(CorruptShardError, match=f"{path.name}.*ris cache verify --repair --data DIR"):
            extract(
                parse_selections("refcoco:train,refcoco:val"),
                data_root=drawn,
                cache_root=cache,
                encoders=encoders,
                batch_size=BATCH,
            )
        assert content(cache) == before
        path.write_bytes(good)


@pytest.mark.parametrize("harm", [Path.unlink, lambda path: path.write_bytes(b"")])
def test_a_shard_that_an_unfinished_extraction_has_lost_is_computed_again(tmp_path, drawn, encoders, harm):
    root = tmp_path / "feats"

    def run(should_stop: Callable[[], bool] = lambda: False) -> int:
        return extract(
            parse_selections("refcoco:train"),
            data_root=drawn,
            cache_root=root,
            encoders=encoders,
            batch_size=BATCH,
            layout=Layout(shard_rows=SHARD_ROWS),
            should_stop=should_stop,
        ).added

    with pytest.raises(StoppedError):
        run(lambda: any((root / "extraction" / "shards").glob("*.json")))
    harm(root / "features.zarr/sam/c/0/0/0/0")
    assert run() >= SHARD_ROWS
    assert verify(root).is_sound


# --- what cannot be mended -----------------------------------------------------------------------------------


def test_an_image_that_is_gone_or_another_leaves_its_shard_and_lets_others_be_mended(cache, data, encoders):
    order = sorted(FeatureCache.open(cache).images.values(), key=lambda image: image.row)
    folder = data / "images" / "train2014"
    (folder / order[0].file_name).unlink()
    shutil.copy(folder / order[1].file_name, folder / order[SHARD_ROWS].file_name)
    for shard in range(3):
        flip(shard_paths(cache, shard)[0])
    report = mend(cache, data, lambda: encoders)
    assert report.restored == (2,)
    assert f"No image file {order[0].file_name}" in report.failures[0]
    assert "is not the file that the features were computed from" in report.failures[1]
    assert order[SHARD_ROWS].file_name in report.failures[1]
    assert verify(cache).bad_shards == (0, 1)


def test_features_that_cannot_be_stored_leave_the_shard_as_it_was(cache, drawn, encoders, monkeypatch):
    exact = FrozenEncoders.encode
    monkeypatch.setattr(
        FrozenEncoders,
        "encode",
        lambda self, *pixels: {name: values / 0 for name, values in exact(self, *pixels).items()},
    )
    flip(shard_paths(cache, 0)[0])
    before = content(cache)
    report = mend(cache, drawn, lambda: encoders)
    assert "cannot be stored" in report.failures[0]
    assert content(cache) == before


def test_other_encoders_are_refused_and_nothing_is_changed(cache, drawn):
    flip(shard_paths(cache, 0)[0])
    if load_manifest(cache).backend == "zarr":
        (cache / "features.zarr/zarr.json").unlink()
    before = content(cache)
    with pytest.raises(FingerprintMismatchError, match=r"weights\.clip\.seed: cache has 0, asked for 1"):
        mend(cache, drawn, lambda: load_encoders(seed=1))
    assert content(cache) == before


def test_a_damaged_table_of_images_is_no_base_for_a_repair(cache, drawn):
    flip(shard_paths(cache, 0)[0])
    flip(cache / load_manifest(cache).images.file)
    with pytest.raises(CorruptShardError, match="not known which images"):
        mend(cache, drawn, never)


def test_an_extraction_that_was_cut_off_goes_on_after_a_repair(cache, drawn, encoders, rounding):
    """Neither may wait for the other: extracting refuses a damaged cache."""

    def go_on(should_stop: Callable[[], bool] = lambda: False) -> None:
        extract(
            parse_selections("refcoco:train,refcoco:val"),
            data_root=drawn,
            cache_root=cache,
            encoders=encoders,
            batch_size=BATCH,
            should_stop=should_stop,
        )

    with pytest.raises(StoppedError):
        go_on(should_stop=lambda: True)
    plan = Journal(cache).read_plan()
    assert plan is not None
    shard_paths(cache, 0)[0].unlink()
    with pytest.raises(CorruptShardError, match="ris cache verify --repair --data DIR"):
        go_on()
    assert mend(cache, drawn, lambda: encoders).changed == (0,)
    assert Journal(cache).read_plan() == plan
    go_on()
    assert verify(cache).is_sound
    assert list(load_manifest(cache).datasets["refcoco.unc"].splits) == ["train", "val"]


def test_no_lock_is_left_where_there_is_no_cache(tmp_path, drawn):
    (tmp_path / "empty").mkdir()
    with pytest.raises(IncompleteCacheError):
        repair(tmp_path / "empty", (), data_root=drawn, load_encoders=never)
    assert list((tmp_path / "empty").iterdir()) == []


# --- asking and stopping -------------------------------------------------------------------------------------


def test_a_plan_says_what_a_repair_would_do_and_writes_nothing(cache, data):
    order = sorted(FeatureCache.open(cache).images.values(), key=lambda image: image.row)
    (data / "images" / "train2014" / order[-1].file_name).unlink()
    for shard in (0, 1, 2):
        flip(shard_paths(cache, shard)[0])
    before = content(cache)
    plan = plan_repair(cache, verify(cache).findings, data)
    assert {shard: len(images) for shard, images in plan.images.items()} == {0: 4, 1: 3, 2: 2}
    assert list(plan.obstacles) == [2]
    assert not plan.metadata
    assert content(cache) == before


def test_a_repair_that_is_stopped_keeps_what_it_has_done(cache, drawn, encoders):
    for shard in (0, 1, 2):
        flip(shard_paths(cache, shard)[0])
    answers = iter([False, True])
    report = mend(cache, drawn, lambda: encoders, should_stop=lambda: next(answers))
    assert (report.restored, report.is_stopped) == ((0,), True)
    assert verify(cache).bad_shards == (1, 2)


def test_a_repair_cut_off_keeps_the_new_checksums_of_what_it_has_done(cache, drawn, encoders, rounding):
    for shard in (0, 1, 2):
        flip(shard_paths(cache, shard)[0])
    seen = 0

    def stop() -> bool:
        nonlocal seen
        seen += 1
        if seen == 3:
            raise KeyboardInterrupt
        return False

    with pytest.raises(KeyboardInterrupt):
        mend(cache, drawn, lambda: encoders, should_stop=stop)
    assert verify(cache).bad_shards == (2,)


def test_two_repairs_follow_each_other(cache, drawn, encoders):
    said: list[str] = []

    class Watcher(Silent):
        def say(self, message: str) -> None:
            said.append(message)

    flip(shard_paths(cache, 0)[0])
    lock = FileLock(cache / files.LOCK_NAME)
    lock.acquire()
    threading.Thread(target=lambda: (time.sleep(0.2), lock.release())).start()
    report = mend(cache, drawn, lambda: encoders, progress=Watcher())
    assert report.restored == (0,)
    assert len(said) == 1
    assert "another process changes" in said[0]

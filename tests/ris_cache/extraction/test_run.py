"""One extraction from start to end: bad images, bad features, trials on a few images, layouts, growth."""

from __future__ import annotations

import inspect
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from ris_cache.datasets import parse_selections
from ris_cache.datasets.refer import load_refer
from ris_cache.datasets.selection import select_split
from ris_cache.encoders.frozen import FrozenEncoders
from ris_cache.errors import CacheError, DataError, FingerprintMismatchError, NonFiniteError, StoppedError
from ris_cache.extraction.run import ExtractionReport, Layout, extract
from ris_cache.progress import Silent
from ris_cache.store.cache import FeatureCache

Run = Callable[..., ExtractionReport]
NUM_VAL = 8


@pytest.fixture
def own_data(tmp_path: Path, data: Path) -> Path:
    """A data root of which the test may damage images."""
    return Path(shutil.copytree(data, tmp_path / "data"))


@pytest.fixture
def run(tmp_path: Path, data: Path, encoders: FrozenEncoders) -> Run:
    """Extract the validation split of the drawn refcoco into `feats`, or as told."""

    def run(split: str = "refcoco:val", **options: Any) -> ExtractionReport:
        terms = {"data_root": data, "cache_root": tmp_path / "feats", "batch_size": 4, "workers": 2}
        layout = Layout(
            shard_rows=options.pop("shard_rows", None),
            backend=options.pop("store", None),
            dtype=options.pop("dtype", None),
        )
        return extract(parse_selections(split), encoders=encoders, layout=layout, **(terms | options))

    return run


@pytest.fixture
def val_images(own_data: Path) -> dict[int, Path]:
    """Where each image of the validation split lies, in the test's own data, by ascending image_id."""
    dataset = load_refer(own_data, "refcoco", "unc")
    ids = sorted({expression.image_id for expression in select_split(dataset, "val")})
    return {i: next(own_data.rglob(dataset.images[i].file_name)) for i in ids}


def everything_on_disk(root: Path) -> dict[str, tuple[bytes, int]]:
    """Content and time of the last change of every file but the lock."""
    return {
        path.relative_to(root).as_posix(): (path.read_bytes(), path.stat().st_mtime_ns)
        for path in sorted(root.rglob("*"))
        if path.is_file() and path.name != ".lock"
    }


def require_same(one: Path, other: Path, read_everything: Callable[[Path], dict[str, Any]]) -> None:
    """Compare two caches whose images were computed in other batches, which rounds otherwise here and there."""
    found, expected = read_everything(one), read_everything(other)
    assert set(found.pop("features")) == set(expected.pop("features"))
    assert found == expected
    caches = FeatureCache.open(one), FeatureCache.open(other)
    ids = caches[0].image_ids
    features = [cache.read(ids).decoded() for cache in caches]
    for name, values in features[0].items():
        np.testing.assert_allclose(values, features[1][name], rtol=2**-9, atol=2**-9)


def damage(path: Path, how: str) -> None:
    content = path.read_bytes()
    match how:
        case "noise":
            path.write_bytes(np.random.default_rng(0).bytes(len(content)))
        case "truncated":
            path.write_bytes(content[: len(content) // 2])
        case "empty":
            path.write_bytes(b"")
        case "missing":
            path.unlink()


REASONS = {
    "noise": "cannot be decoded (UnidentifiedImageError",
    "truncated": "cannot be decoded (OSError: image file is truncated",
    "empty": "cannot be decoded (UnidentifiedImageError",
    "missing": "No image file COCO_train2014_",
}


@pytest.mark.parametrize("how", REASONS)
def test_a_bad_image_is_quarantined_and_the_rest_is_extracted(
    how, run, own_data, val_images, tmp_path, data, read_everything
):
    bad, path = list(val_images.items())[3]
    good_bytes = path.read_bytes()
    damage(path, how)

    report = run(data_root=own_data, shard_rows=4)

    assert (report.added, report.present, list(report.quarantined)) == (NUM_VAL - 1, 0, [bad])
    assert REASONS[how] in report.quarantined[bad]
    assert path.name in report.quarantined[bad]
    cache = FeatureCache.open(tmp_path / "feats")
    assert sorted(cache.image_ids.tolist()) == [i for i in val_images if i != bad]
    assert cache.quarantined == report.quarantined
    assert (cache.manifest.images.ok, cache.manifest.images.quarantined) == (NUM_VAL - 1, 1)

    before = everything_on_disk(tmp_path / "feats")
    again = run(data_root=own_data)
    assert (again.added, again.quarantined) == (0, report.quarantined)
    assert everything_on_disk(tmp_path / "feats") == before

    path.write_bytes(good_bytes)
    mended = run(data_root=own_data)
    assert (mended.added, mended.present, mended.quarantined) == (1, NUM_VAL - 1, {})
    run(cache_root=tmp_path / "never_bad", shard_rows=4)
    require_same(tmp_path / "feats", tmp_path / "never_bad", read_everything)


@pytest.mark.parametrize("how", REASONS)
def test_strict_makes_a_bad_image_fatal_and_names_it(how, run, own_data, val_images, tmp_path):
    path = list(val_images.values())[3]
    damage(path, how)

    with pytest.raises(DataError, match=path.name) as caught:
        run(data_root=own_data, strict=True)

    assert caught.value.exit_code == 3
    assert not (tmp_path / "feats/manifest.json").exists()


@pytest.mark.parametrize("how", REASONS)
def test_strict_refuses_what_the_cache_has_quarantined(how, run, own_data, val_images, tmp_path):
    path = list(val_images.values())[3]
    damage(path, how)
    run(data_root=own_data)
    before = everything_on_disk(tmp_path / "feats")

    with pytest.raises(DataError, match=path.name) as caught:
        run(data_root=own_data, strict=True)

    assert "Repair the files, or leave out --strict" in str(caught.value)
    assert everything_on_disk(tmp_path / "feats") == before


def test_strict_refuses_what_the_run_it_goes_on_from_has_quarantined(run, own_data, val_images, tmp_path):
    bad, path = next(iter(val_images.items()))
    good_bytes = path.read_bytes()
    damage(path, "noise")
    with pytest.raises(StoppedError):
        run(data_root=own_data, shard_rows=4, should_stop=stop_after(1))

    with pytest.raises(DataError, match=path.name) as caught:
        run(data_root=own_data, strict=True)

    assert list(caught.value.facts["quarantined"]) == [bad]
    path.write_bytes(good_bytes)
    assert run(data_root=own_data, strict=True).added == 1


def stop_after(num_shards: int) -> Callable[[], bool]:
    """Ask to stop once so many shards were begun; whoever claims shards ahead asks too, but begins none."""
    begun: list[int] = []

    def should_stop() -> bool:
        if inspect.stack()[1].function == "compute":
            begun.append(1)
        return len(begun) > num_shards

    return should_stop


def test_an_image_of_another_size_than_annotated_is_always_fatal(run, own_data, val_images):
    """Its masks would lie elsewhere, and nothing would show it."""
    path = list(val_images.values())[3]
    Image.new("RGB", (31, 17)).save(path)

    with pytest.raises(DataError, match="Check that images and annotations belong together") as caught:
        run(data_root=own_data)

    assert path.name in str(caught.value)


@pytest.fixture
def spoiled(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    """Have the encoders give the second image that they ever see a value."""

    def spoil(value: float) -> None:
        plain_encode, values = FrozenEncoders.encode, iter([value])

        def encode(self: FrozenEncoders, *pixels: torch.Tensor) -> dict[str, torch.Tensor]:
            features = plain_encode(self, *pixels)
            for spoiling in values:
                features["clip"][1, 0, 0] = spoiling
            return features

        monkeypatch.setattr(FrozenEncoders, "encode", encode)

    return spoil


PROBLEMS = [
    (float("nan"), "float16", "clip holds NaN; check the encoder and its weights"),
    (float("-inf"), "bfloat16", "clip holds infinite values; check the encoder and its weights"),
    (
        1e5,
        "float16",
        "clip reaches 100000 in magnitude, but float16 holds at most 65504; store the features as",
    ),
]


@pytest.mark.parametrize(("value", "dtype", "reason"), PROBLEMS)
def test_features_that_cannot_be_stored_are_quarantined(
    value, dtype, reason, run, spoiled, val_images, tmp_path
):
    spoiled(value)
    bad, path = list(val_images.items())[1]

    report = run(dtype=dtype, shard_rows=4)

    assert (report.added, list(report.quarantined)) == (NUM_VAL - 1, [bad])
    assert report.quarantined[bad].startswith(f"{path.name}: {reason}")
    before = everything_on_disk(tmp_path / "feats")
    assert run().quarantined == report.quarantined
    assert everything_on_disk(tmp_path / "feats") == before
    cache = FeatureCache.open(tmp_path / "feats", integrity="every-read")
    assert np.isfinite(cache.read(cache.image_ids).decoded()["clip"]).all()


@pytest.mark.parametrize(("value", "dtype", "reason"), PROBLEMS)
def test_strict_makes_features_that_cannot_be_stored_fatal(value, dtype, reason, run, spoiled, val_images):
    spoiled(value)
    path = list(val_images.values())[1]

    with pytest.raises(NonFiniteError) as caught:
        run(dtype=dtype, strict=True)

    assert f"{path.name}: {reason}" in str(caught.value)
    assert caught.value.exit_code == 1


def test_a_trial_on_a_few_images_grows_into_the_whole_split(run, tmp_path, read_everything):
    trial = run(limit=3, shard_rows=4)
    counts = trial.manifest.datasets["refcoco.unc"].splits["val"]
    assert (trial.added, counts.images, counts.is_complete) == (3, 3, False)

    whole = run()

    counts = whole.manifest.datasets["refcoco.unc"].splits["val"]
    assert (whole.added, whole.present) == (NUM_VAL - 3, 3)
    assert (counts.images, counts.is_complete) == (NUM_VAL, True)
    run(cache_root=tmp_path / "at_once", shard_rows=4)
    require_same(tmp_path / "feats", tmp_path / "at_once", read_everything)
    assert run(limit=3).manifest == whole.manifest, "a later trial takes nothing away"


def test_a_limit_beyond_the_number_of_images_is_the_whole_split(run):
    counts = run(limit=NUM_VAL).manifest.datasets["refcoco.unc"].splits["val"]

    assert (counts.images, counts.is_complete) == (NUM_VAL, True)


@pytest.mark.parametrize(("store", "dtype"), [("zarr", "int8"), ("hdf5", "bfloat16")])
def test_the_layout_asked_for_is_recorded_and_kept_by_later_runs(store, dtype, run):
    first = run(store=store, dtype=dtype, shard_rows=3).manifest

    later = run("refcoco+:val").manifest

    assert (first.backend, first.dtype, first.shard_rows) == (store, dtype, 3)
    assert (later.backend, later.dtype, later.shard_rows) == (store, dtype, 3)
    assert first.fingerprint == later.fingerprint
    assert later.images.ok == NUM_VAL + 4


@pytest.mark.parametrize("is_finished", [True, False], ids=["finished", "cut off"])
@pytest.mark.parametrize(
    ("options", "error", "code", "named"),
    [
        ({"dtype": "float32"}, FingerprintMismatchError, 5, ["dtype", "float16", "float32"]),
        ({"store": "hdf5"}, CacheError, 3, ["stored as zarr, not hdf5 (--store)"]),
        ({"shard_rows": 8}, CacheError, 3, ["in shards of 4 images, not 8 (--shard-rows)"]),
    ],
)
def test_another_layout_than_that_of_the_cache_is_refused_by_name(
    is_finished, options, error, code, named, run, tmp_path
):
    if is_finished:
        run(shard_rows=4)
    else:
        with pytest.raises(StoppedError):
            run(shard_rows=4, should_stop=stop_after(1))
    before = everything_on_disk(tmp_path / "feats")

    with pytest.raises(error) as caught:
        run(**options)

    assert caught.value.exit_code == code
    assert all(word in str(caught.value) for word in (*named, str(tmp_path / "feats"))), str(caught.value)
    assert everything_on_disk(tmp_path / "feats") == before


def test_a_second_dataset_adds_its_own_images_while_readers_of_the_first_go_on(run, tmp_path):
    first = run("refcoco:val", shard_rows=4)
    reader = FeatureCache.open(tmp_path / "feats", integrity="every-read")
    ids = reader.image_ids.tolist()

    second = run("refcoco+")

    assert (second.added, second.present, second.manifest.images.ok) == (12, 0, NUM_VAL + 12)
    assert set(second.manifest.datasets) == {"refcoco.unc", "refcoco+.unc"}
    assert reader.manifest == first.manifest
    late = reader.read(ids).stored["sam"]
    assert (
        len(reader.expressions("refcoco.unc"))
        == first.manifest.datasets["refcoco.unc"].splits["val"].expressions
    )
    grown = FeatureCache.open(tmp_path / "feats", integrity="every-read")
    np.testing.assert_array_equal(grown.read(ids).stored["sam"], late)


def test_a_split_that_is_there_costs_nothing(run, tmp_path, monkeypatch):
    run("refcoco:val,refcoco+")
    before = everything_on_disk(tmp_path / "feats")
    for computing in ("encode", "encode_texts", "category_embeddings"):
        monkeypatch.setattr(
            FrozenEncoders, computing, lambda *arguments: pytest.fail("something was computed")
        )

    report = run("refcoco+:val")

    assert (report.added, report.present) == (0, 4)
    assert everything_on_disk(tmp_path / "feats") == before


def test_stopping_commits_the_shard_at_hand_and_says_how_far_it_came(run, tmp_path, committed):
    with pytest.raises(StoppedError) as caught:
        run("refcoco", shard_rows=4, should_stop=stop_after(3))

    assert str(caught.value) == (
        "Stopped after a whole shard; 12 of 52 images are done. The same command goes on from there."
    )
    assert len(committed(tmp_path / "feats")) == 12
    assert run("refcoco").added == 40


def test_what_goes_on_keeps_the_batch_size_it_began_with(run, tmp_path):
    """The last bits of features depend on it."""
    run("refcoco", shard_rows=4, batch_size=2, cache_root=tmp_path / "straight")
    with pytest.raises(StoppedError):
        run("refcoco", shard_rows=4, batch_size=2, should_stop=stop_after(3))
    run("refcoco", batch_size=None)

    for path in (tmp_path / "straight" / "features.zarr").rglob("*"):
        if path.is_file():
            other = tmp_path / "feats" / path.relative_to(tmp_path / "straight")
            assert path.read_bytes() == other.read_bytes()


def test_another_batch_size_on_the_way_is_taken_and_said(run, tmp_path):
    said: list[str] = []

    class Listener(Silent):
        def say(self, message: str) -> None:
            said.append(message)

    with pytest.raises(StoppedError):
        run("refcoco", shard_rows=4, batch_size=2, should_stop=stop_after(3))
    assert run("refcoco", batch_size=3, progress=Listener()).added == 40
    assert said == [
        "This extraction began with batches of 2; with 3, features may differ in their last bits from an "
        "uninterrupted one's."
    ]


def test_progress_hears_of_every_image_once(run, own_data, val_images):
    heard: list[Any] = []

    class Listener:
        def start(self, *, total: int, done: int) -> None:
            heard.append((total, done))

        def advance(self, reason: str | None) -> None:
            heard.append(reason)

        def say(self, message: str) -> None:
            heard.append(message)

        def stop(self) -> None:
            heard.append("stop")

    path = list(val_images.values())[3]
    damage(path, "empty")

    run(data_root=own_data, progress=Listener())

    assert heard[0] == (NUM_VAL, 0)
    assert heard[-1] == "stop"
    assert heard[1:-1].count(None) == NUM_VAL - 1
    assert sum(path.name in str(reason) for reason in heard[1:-1]) == 1


@pytest.mark.parametrize("what", ["a file", "other files"])
def test_a_place_that_is_no_cache_is_refused_untouched(what, run, tmp_path):
    place = tmp_path / "place"
    if what == "a file":
        place.write_text("mine")
    else:
        place.mkdir()
        (place / "thesis.tex").write_text("mine")

    with pytest.raises(ValueError, match=str(place)) as caught:
        run(cache_root=place)

    assert caught.value.exit_code == 2
    assert [path.read_text() for path in ([place] if what == "a file" else place.iterdir())] == ["mine"]

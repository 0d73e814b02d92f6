"""Converting a cache: what stays byte for byte, what is rounded and how that is recorded, and refusals."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ris_cache.errors import ConfigError, CorruptShardError, NonFiniteError, StoppedError
from ris_cache.store.cache import FeatureCache
from ris_cache.store.convert import Conversion, convert, converted_fingerprint, plan_conversion
from ris_cache.store.fingerprint import Fingerprint
from ris_cache.store.precision import DTYPES
from ris_cache.store.transfer import as_new
from ris_cache.store.writer import CacheWriter, Outcome

pytestmark = pytest.mark.usefixtures("no_waiting_for_the_disk")


def content_of(root: Path) -> dict[str, Any]:
    """Every file but the lock, and the manifest without what may change."""
    found: dict[str, Any] = {
        path.relative_to(root).as_posix(): path.read_bytes()
        for path in root.rglob("*")
        if path.is_file() and path.name not in (".lock", "manifest.json")
    }
    manifest = json.loads((root / "manifest.json").read_bytes())
    del manifest["recorded"], manifest["digest"]
    return {**found, "manifest.json": manifest}


def run(source: Path, target: Path, **options: Any) -> FeatureCache:
    conversion = plan_conversion(source, target, **options)
    num_copied, manifest = convert(conversion)
    assert num_copied == len(conversion.source.images)
    cache = FeatureCache.open(target, integrity="every-read")
    assert cache.manifest == manifest
    return cache


@pytest.fixture
def source(drawing: Any, tmp_path: Path) -> Path:
    """float16 in zarr: images 0 to 9, of which 5 is quarantined, in two extractions."""
    drawing.extract(tmp_path / "source", range(6), bad=(5,))
    drawing.extract(tmp_path / "source", range(6, 10), "testA", table="refcoco+.unc")
    return tmp_path / "source"


# What stays.


def test_everything_comes_back_identical_from_the_other_backend(any_drawing: Any, tmp_path: Path) -> None:
    any_drawing.extract(tmp_path / "first", range(10), bad=(5,))
    other = "hdf5" if any_drawing.backend == "zarr" else "zarr"
    between = run(tmp_path / "first", tmp_path / "second", backend=other)
    dataclasses.replace(any_drawing, backend=other).require_whole(tmp_path / "second")
    assert between.fingerprint == any_drawing.recipe.fingerprint
    assert between.quarantined == FeatureCache.open(tmp_path / "first").quarantined
    run(tmp_path / "second", tmp_path / "third", backend=any_drawing.backend)
    assert content_of(tmp_path / "third") == content_of(tmp_path / "first")


def test_tables_categories_heads_and_rows_come_along(source: Path, tmp_path: Path) -> None:
    before = FeatureCache.open(source)
    after = run(source, tmp_path / "target", backend="hdf5", dtype="float32")
    assert {i: image.row for i, image in after.images.items()} == {
        i: image.row for i, image in before.images.items()
    }
    assert after.manifest.datasets == before.manifest.datasets
    assert after.manifest.category_sets == before.manifest.category_sets
    for name in before.manifest.datasets:
        assert after.expressions(name) == before.expressions(name)
        assert after.instances(name) == before.instances(name)
    assert after.categories("coco").embeddings.tobytes() == before.categories("coco").embeddings.tobytes()
    assert after.sam_heads().keys() == before.sam_heads().keys()


def test_a_part_of_a_split_stays_a_part(drawing: Any, tmp_path: Path) -> None:
    writer = drawing.open(tmp_path / "source", range(2))
    drawing.commit_all(writer)

    def edit(draft: Any) -> None:
        drawing.edit(range(2), "val")(draft)
        draft.write_tables(
            "refcoco+.unc",
            [drawing.expression(0)],
            [drawing.instance(0)],
            clip_category_ids=[-1],
            category_set="coco",
            incomplete_splits=frozenset({"val"}),
        )

    writer.finish(edit)
    datasets = run(tmp_path / "source", tmp_path / "target", dtype="int8").manifest.datasets
    assert datasets["refcoco.unc"].splits["val"].is_complete
    assert not datasets["refcoco+.unc"].splits["val"].is_complete


def test_another_shard_size_packs_the_images_in_order(source: Path, drawing: Any, tmp_path: Path) -> None:
    cache = run(source, tmp_path / "target", shard_rows=3)
    assert [image.row for _, image in sorted(cache.images.items())] == list(range(10))
    assert cache.manifest.rows == 12
    dataclasses.replace(drawing, shard_rows=3).require_whole(tmp_path / "target")


def test_a_cache_without_images_converts(drawing: Any, tmp_path: Path) -> None:
    drawing.open(tmp_path / "source", ()).finish(lambda draft: None)
    assert len(run(tmp_path / "source", tmp_path / "target", backend="hdf5")) == 0


def test_rows_at_the_end_that_lost_their_images_still_count(drawing: Any, tmp_path: Path) -> None:
    writer = drawing.open(tmp_path / "source", range(10))
    drawing.commit_all(writer)

    def edit(draft: Any) -> None:
        drawing.edit(range(4), "val")(draft)
        draft.drop_images(range(4, 10))
        draft.drop_files(
            f"features.zarr/{name}/c/{shard}/" + "/".join("0" * rank)
            for shard in (1, 2)
            for name, rank in (("sam", 3), ("clip", 2), ("clip_pooled", 1))
        )

    writer.finish(edit)
    assert run(tmp_path / "source", tmp_path / "target", backend="hdf5").manifest.rows == 12
    run(tmp_path / "target", tmp_path / "back", backend="zarr")
    assert content_of(tmp_path / "back") == content_of(tmp_path / "source")


# What is rounded.


def test_float32_rounded_to_float16_is_what_an_extraction_in_float16_gives(
    either_drawing: Any, tmp_path: Path
) -> None:
    wide = dataclasses.replace(either_drawing, dtype="float32")
    wide.extract(tmp_path / "wide", range(10), bad=(5,))
    either_drawing.extract(tmp_path / "narrow", range(10), bad=(5,))
    run(tmp_path / "wide", tmp_path / "converted", dtype="float16")
    assert content_of(tmp_path / "converted") == content_of(tmp_path / "narrow")


def test_float32_rounds_to_bfloat16_as_torch_rounds(drawing: Any, tmp_path: Path) -> None:
    wide = dataclasses.replace(drawing, dtype="float32")
    wide.extract(tmp_path / "wide", range(10))
    cache = run(tmp_path / "wide", tmp_path / "converted", dtype="bfloat16")
    for name, values in wide.stored(range(10)).items():
        expected = torch.from_numpy(values).bfloat16().float().numpy()
        assert np.array_equal(cache.read(range(10)).decoded()[name], expected)
    assert cache.fingerprint == dataclasses.replace(drawing, dtype="bfloat16").recipe.fingerprint


def test_int8_errs_by_half_a_step_of_each_channel_at_most(drawing: Any, tmp_path: Path) -> None:
    wide = dataclasses.replace(drawing, dtype="float32")
    wide.extract(tmp_path / "wide", range(10))
    found = run(tmp_path / "wide", tmp_path / "converted", dtype="int8").read(range(10)).decoded()
    drawn = wide.stored(range(10))
    for name, axes in (("sam", (2, 3)), ("clip", (1,))):
        step = np.abs(drawn[name]).max(axes, keepdims=True) / 127
        assert (np.abs(found[name] - drawn[name]) <= 0.5001 * step).all()


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_a_wider_precision_and_back_changes_nothing(drawing: Any, tmp_path: Path, dtype: str) -> None:
    narrow = dataclasses.replace(drawing, dtype=dtype)
    narrow.extract(tmp_path / "narrow", range(10), bad=(5,))
    wide = run(tmp_path / "narrow", tmp_path / "wide", dtype="float32")
    assert wide.fingerprint.fields["rounded_through"] == [dtype]
    assert wide.fingerprint != dataclasses.replace(drawing, dtype="float32").recipe.fingerprint
    ids = wide.image_ids.tolist()
    before = FeatureCache.open(tmp_path / "narrow").read(ids).decoded()
    assert all(np.array_equal(values, before[name]) for name, values in wide.read(ids).decoded().items())
    run(tmp_path / "wide", tmp_path / "back", dtype=dtype)
    assert content_of(tmp_path / "back") == content_of(tmp_path / "narrow")


@pytest.mark.parametrize(
    ("chain", "rounded_through"),
    [
        (["float32", "float16"], []),
        (["float16", "float32"], ["float16"]),
        (["float16", "float32", "float16"], []),
        (["float16", "float32", "bfloat16"], ["float16"]),
        (["float16", "bfloat16"], ["float16"]),
        (["float16", "bfloat16", "float16"], ["float16", "bfloat16"]),
        (["float16", "bfloat16", "float32"], ["float16", "bfloat16"]),
        (["float16", "bfloat16", "float32", "bfloat16"], ["float16"]),
        (["float16", "int8", "float16"], ["float16", "int8"]),
        (["float32", "int8"], []),
        (["int8", "float32"], ["int8"]),
        (["int8", "float32", "int8"], ["int8"]),
        (["int8", "float16", "int8"], ["int8", "float16"]),
        (["int8", "int8"], []),
    ],
    ids=lambda value: "-".join(value) if value else None,
)
def test_the_fingerprint_keeps_what_rounded(
    drawing: Any, chain: list[str], rounded_through: list[str]
) -> None:
    fingerprint = dataclasses.replace(drawing, dtype=chain[0]).recipe.fingerprint
    for dtype in chain[1:]:
        fingerprint = converted_fingerprint(fingerprint, dtype)
    fresh = dataclasses.replace(drawing, dtype=chain[-1]).recipe.fingerprint
    assert fingerprint == Fingerprint.of({**fresh.fields, "rounded_through": rounded_through})


@given(st.lists(st.sampled_from(["float16", "bfloat16", "float32"]), min_size=2, max_size=6), st.data())
def test_equal_fingerprints_mean_equal_numbers(chain: list[str], data: st.DataObject) -> None:
    """Whatever the chain, rounding through what the fingerprint says gives the value that the chain gives."""
    start = Fingerprint.of({"dtype": chain[0], "quantiser": "none", "rounded_through": []})
    value = torch.tensor(data.draw(st.floats(-60000, 60000, width=32)), dtype=torch.float32)

    def rounded(dtypes: list[str]) -> torch.Tensor:
        result = value
        for dtype in dtypes:
            result = result.to(getattr(torch, dtype)).float()
        return result

    fingerprint = start
    for dtype in chain[1:]:
        fingerprint = converted_fingerprint(fingerprint, dtype)
    said = [*fingerprint.fields["rounded_through"], fingerprint.fields["dtype"]]
    assert torch.equal(rounded(said), rounded(chain))


@pytest.mark.parametrize("before", DTYPES)
@pytest.mark.parametrize("after", DTYPES)
def test_a_plan_says_whether_values_stay(drawing: Any, tmp_path: Path, before: str, after: str) -> None:
    dataclasses.replace(drawing, dtype=before).extract(tmp_path / "source", range(2))
    planned = plan_conversion(tmp_path / "source", tmp_path / "target", dtype=after)
    assert planned.is_exact == (after in (before, "float32"))
    assert (planned.num_shards, planned.num_bytes) == (1, 2 * planned.recipe.image_bytes)
    assert not (tmp_path / "target").exists()


# Values that do not fit.


@pytest.fixture
def too_large(drawing: Any, tmp_path: Path) -> Path:
    """float32, images 0 to 9 in three shards; image 6 reaches 70000, which float16 does not."""
    wide = dataclasses.replace(drawing, dtype="float32")
    writer = wide.open(tmp_path / "source", range(10))
    for claim in writer.free_claims():
        stored = wide.stored(image.image_id for image in claim.images)
        for position, image in enumerate(claim.images):
            if image.image_id == 6:
                stored["clip"][position, 1, 0] = -70000
        claim.commit(stored, [Outcome(sha256=f"{image.image_id:064x}") for image in claim.images])
    writer.finish(wide.edit(range(10), "val"))
    return tmp_path / "source"


@pytest.mark.parametrize("backend", ["zarr", "hdf5"])
def test_a_value_that_does_not_fit_is_named_and_another_precision_can_be_asked_for(
    too_large: Path, tmp_path: Path, backend: str
) -> None:
    target = tmp_path / "target"
    with pytest.raises(NonFiniteError, match=r"Image 6 \(000000000006.jpg\).*clip reaches 70000") as caught:
        convert(plan_conversion(too_large, target, dtype="float16", backend=backend))
    assert "bfloat16 or float32" in str(caught.value)
    assert "Nothing is kept" in str(caught.value)
    assert caught.value.facts["image_id"] == 6
    assert [path.name for path in target.iterdir()] == [".lock"]
    assert len(run(too_large, target, dtype="bfloat16", backend=backend)) == 10


def test_a_value_that_does_not_fit_leaves_others_at_work_in_peace(too_large: Path, tmp_path: Path) -> None:
    target = tmp_path / "target"
    conversion = plan_conversion(too_large, target, dtype="float16")
    other = _joined(conversion)
    with pytest.raises(NonFiniteError, match="Other processes still write"):
        convert(conversion)
    assert (target / "extraction" / "plan.json").exists()
    other.close()


def _joined(conversion: Conversion) -> CacheWriter:
    """A process that has planned the conversion and does nothing yet."""
    images = sorted(conversion.source.images.values(), key=lambda image: image.row)
    return CacheWriter.open(
        conversion.target,
        conversion.recipe,
        purpose="cache convert",
        request=conversion.request,
        choose=lambda known: [as_new(image, row=image.row) for image in images],
    )


# Being cut off, and company.


def test_a_stopped_conversion_goes_on_where_it_was(source: Path, tmp_path: Path) -> None:
    target = tmp_path / "target"
    looks = iter([False, True])
    with pytest.raises(StoppedError, match="4 of 10 images are done"):
        convert(plan_conversion(source, target, backend="hdf5"), should_stop=lambda: next(looks, True))
    (written,) = target.glob("features/*.h5")
    before = written.stat().st_mtime_ns
    num_copied, _ = convert(plan_conversion(source, target, backend="hdf5"))
    assert num_copied == 6
    assert written.stat().st_mtime_ns == before
    assert len(FeatureCache.open(target)) == 9


def test_whoever_comes_after_the_end_finds_nothing_to_do(source: Path, tmp_path: Path) -> None:
    run(source, tmp_path / "target", backend="hdf5")
    before = content_of(tmp_path / "target")
    num_copied, _ = convert(plan_conversion(source, tmp_path / "target", backend="hdf5"))
    assert num_copied == 0
    assert content_of(tmp_path / "target") == before


# A source that grows.


def grow(drawing: Any, source: Path) -> None:
    """Give a split and a dataset more to `source`: images 10 to 16, of which 12 is quarantined."""
    drawing.extract(source, range(8, 13), "testB", bad=(12,))
    drawing.extract(source, range(11, 17), "val", table="grefcoco.unc")


def current_content_of(root: Path) -> dict[str, Any]:
    """As `content_of`, without tables of the state before, which stay for those who read it."""
    content = content_of(root)
    listed = content["manifest.json"]["files"]
    tables = ("images/", "expressions/", "instances/")
    return {path: value for path, value in content.items() if path in listed or not path.startswith(tables)}


def require_same_content(found: FeatureCache, expected: FeatureCache) -> None:
    """Features by image, what became of each image, tables and categories."""
    ids = sorted(expected.image_ids.tolist())
    assert sorted(found.image_ids.tolist()) == ids
    wanted = expected.read(ids).stored
    assert all(array.tobytes() == wanted[name].tobytes() for name, array in found.read(ids).stored.items())
    assert found.quarantined == expected.quarantined
    assert found.sizes == expected.sizes
    assert found.manifest.datasets == expected.manifest.datasets
    assert found.manifest.category_sets == expected.manifest.category_sets


@pytest.mark.parametrize("backend", ["zarr", "hdf5"])
@pytest.mark.parametrize("dtype", ["float16", "int8"])
def test_converting_a_grown_source_again_gives_what_one_conversion_gives(
    source: Path, drawing: Any, tmp_path: Path, backend: str, dtype: str
) -> None:
    old_reader = run(source, tmp_path / "target", backend=backend, dtype=dtype)
    before = old_reader.read(range(5))
    grow(drawing, source)
    planned = plan_conversion(source, tmp_path / "target", dtype=dtype)  # the backend is that of the target
    assert [image.image_id for image in planned.missing] == list(range(10, 17))
    assert not planned.has_everything
    num_copied, manifest = convert(planned)
    assert (num_copied, planned.num_shards) == (7, len({i.row // 4 for i in planned.source.images.values()}))
    run(source, tmp_path / "at once", backend=backend, dtype=dtype)
    assert current_content_of(tmp_path / "target") == content_of(tmp_path / "at once")
    again = old_reader.read(range(5))
    assert all(array.tobytes() == before.stored[name].tobytes() for name, array in again.stored.items())
    assert len(old_reader.expressions("refcoco.unc")) == 6
    late = plan_conversion(source, tmp_path / "target", dtype=dtype)
    assert late.has_everything
    assert convert(late) == (0, manifest)


def test_a_grown_source_of_another_shard_size_is_added_in_shards_of_the_target(
    source: Path, drawing: Any, tmp_path: Path
) -> None:
    run(source, tmp_path / "target", shard_rows=3)
    grow(drawing, source)
    planned = plan_conversion(source, tmp_path / "target")
    convert(planned)
    found = dataclasses.replace(drawing, shard_rows=3).require_whole(tmp_path / "target")
    assert [image.row for _, image in sorted(found.images.items())] == [*range(10), *range(12, 19)]
    assert planned.num_shards == 7
    require_same_content(found, run(source, tmp_path / "at once", shard_rows=3))


def test_splits_alone_are_added_without_a_plan(source: Path, drawing: Any, tmp_path: Path) -> None:
    run(source, tmp_path / "target", backend="hdf5")
    drawing.extract(source, range(4), "testB")
    planned = plan_conversion(source, tmp_path / "target")
    assert (planned.missing, planned.has_everything) == ((), False)
    assert convert(planned)[0] == 0
    require_same_content(FeatureCache.open(tmp_path / "target"), FeatureCache.open(source))


def test_an_image_that_is_no_longer_quarantined_gets_its_features(
    source: Path, drawing: Any, tmp_path: Path
) -> None:
    run(source, tmp_path / "target", backend="hdf5")
    writer = CacheWriter.open(
        source, drawing.recipe, purpose="extract", request={}, choose=lambda known: [drawing.image(5)]
    )
    drawing.commit_all(writer)
    writer.finish(lambda draft: None)
    planned = plan_conversion(source, tmp_path / "target")
    assert [image.image_id for image in planned.missing] == [5]
    assert convert(planned)[0] == 1
    found = dataclasses.replace(drawing, backend="hdf5").require_whole(tmp_path / "target")
    require_same_content(found, FeatureCache.open(source))
    assert plan_conversion(source, tmp_path / "target").has_everything


def test_images_whose_rows_are_taken_get_others(drawing: Any, tmp_path: Path) -> None:
    drawing.extract(tmp_path / "first", range(6))
    run(tmp_path / "first", tmp_path / "target", backend="hdf5")
    drawing.extract(tmp_path / "second", range(6, 10), "testA")
    drawing.extract(tmp_path / "second", range(6))
    planned = plan_conversion(tmp_path / "second", tmp_path / "target")
    assert not planned.keeps_rows
    convert(planned)
    found = dataclasses.replace(drawing, backend="hdf5").require_whole(tmp_path / "target")
    assert sorted(image.row for image in found.images.values()) == [*range(6), *range(8, 12)]
    assert sorted(found.manifest.datasets["refcoco.unc"].splits) == ["testA", "val"]


@pytest.mark.parametrize("has_earlier", [False, True])
def test_a_conversion_that_was_cut_off_goes_on_from_a_source_that_grew_meanwhile(
    source: Path, drawing: Any, tmp_path: Path, has_earlier: bool
) -> None:
    target = tmp_path / "target"
    if has_earlier:
        run(source, target, backend="hdf5")
        drawing.extract(source, range(20, 26), "train")
    looks = iter([False, True])
    with pytest.raises(StoppedError):
        convert(plan_conversion(source, target, backend="hdf5"), should_stop=lambda: next(looks, True))
    grow(drawing, source)
    planned = plan_conversion(source, target, backend="hdf5")
    num_copied, _ = convert(planned)
    assert num_copied == len(planned.missing) - 4
    run(source, tmp_path / "at once", backend="hdf5")
    assert current_content_of(target) == content_of(tmp_path / "at once")


def test_a_value_that_does_not_fit_leaves_an_earlier_result_as_it_was(
    too_large: Path, drawing: Any, tmp_path: Path
) -> None:
    wide = dataclasses.replace(drawing, dtype="float32")
    wide.extract(tmp_path / "source before", range(4))
    target = tmp_path / "target"
    convert(plan_conversion(tmp_path / "source before", target, dtype="float16"))
    before = content_of(target)
    shutil.rmtree(tmp_path / "source before")
    grown = plan_conversion(too_large, target, dtype="float16")
    with pytest.raises(NonFiniteError, match="is as it was: name another directory"):
        convert(grown)
    assert content_of(target) == before


@pytest.mark.parametrize(
    "other", ["image", "file", "expression", "instance", "dataset", "precision", "layout"]
)
def test_a_cache_that_is_no_earlier_conversion_is_refused_by_what_differs(
    source: Path, drawing: Any, tmp_path: Path, other: str
) -> None:
    target = tmp_path / "target"
    options: dict[str, Any] = {}
    run(source, target)
    expected = ""
    match other:
        case "image":
            drawing.extract(target, [20], "testB")
            expected = r"its image 20 \(000000000020.jpg\) is not in the source"
        case "file":
            shutil.rmtree(source)
            drawing.extract(source, range(10), bad=(3,))
            expected = r"its image 3 \(000000000003.jpg\) is another one in the source"
        case "expression":
            drawing.extract(target, range(4), "testB")
            expected = "its dataset refcoco.unc is annotated otherwise in the source"
        case "instance":
            writer = drawing.open(target, ())
            writer.finish(
                lambda draft: draft.write_tables(
                    "refcoco.unc",
                    [],
                    [drawing.instance(9)],
                    clip_category_ids=[],
                    category_set="coco",
                )
            )
            expected = "its dataset refcoco.unc is annotated otherwise in the source"
        case "dataset":
            drawing.extract(target, range(4), table="grefcoco.unc")
            expected = "its dataset grefcoco.unc is not in the source"
        case "precision":
            options = {"dtype": "int8"}
            expected = r"stored as float16, not int8 \(--dtype float16 would add to it\)"
        case "layout":
            options = {"backend": "hdf5"}
            expected = "stored as zarr in shards of 4 .leave --store and --shard-rows out"
    before = content_of(target)
    with pytest.raises(ConfigError, match=f"holds a cache already, .*{expected}"):
        plan_conversion(source, target, **options)
    assert content_of(target) == before


# Refusals.


def test_a_cache_is_not_converted_into_itself_or_its_inside(source: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(source)
    for target in (source, tmp_path / "link"):
        with pytest.raises(ConfigError, match="same directory"):
            plan_conversion(source, target)
    with pytest.raises(ConfigError, match="inside the cache"):
        plan_conversion(source, source / "images" / "new")


@pytest.mark.parametrize("taken", ["cache", "other conversion", "files", "file"])
def test_a_target_that_is_taken_is_refused_and_left_alone(
    source: Path, drawing: Any, tmp_path: Path, taken: str
) -> None:
    target = tmp_path / "target"
    match taken:
        case "cache":
            drawing.extract(target, range(3))
        case "other conversion":
            stopped = plan_conversion(source, target, dtype="int8")
            with pytest.raises(StoppedError):
                convert(stopped, should_stop=lambda: True)
        case "files":
            target.mkdir()
            (target / "thesis.tex").write_text("years of work")
        case "file":
            target.write_text("a file")
    before = {path: path.read_bytes() for path in [target, *target.rglob("*")] if path.is_file()}
    expected = {
        "cache": "holds a cache already",
        "other conversion": "unfinished `ris cache convert` of something else .*--dtype int8",
        "files": "not empty",
        "file": "is a file",
    }
    with pytest.raises(ConfigError, match=expected[taken]):
        plan_conversion(source, target, dtype="float32")
    assert before == {path: path.read_bytes() for path in [target, *target.rglob("*")] if path.is_file()}


@pytest.mark.parametrize("is_finished", [False, True])
def test_a_target_that_is_taken_after_planning_is_refused(
    source: Path, drawing: Any, tmp_path: Path, is_finished: bool
) -> None:
    drawing.extract(tmp_path / "other", range(20, 26))
    planned = plan_conversion(source, tmp_path / "target")
    other = plan_conversion(tmp_path / "other", tmp_path / "target")
    if is_finished:
        convert(other)
    else:
        with pytest.raises(StoppedError):
            convert(other, should_stop=lambda: True)
    with pytest.raises(ConfigError, match="holds"):
        convert(planned)
    assert set(run_to_the_end(other).images) == set(range(20, 26))


def run_to_the_end(conversion: Conversion) -> FeatureCache:
    convert(conversion)
    return FeatureCache.open(conversion.target)


@pytest.mark.parametrize(
    ("option", "value", "known"), [("backend", "lmdb", "zarr, hdf5"), ("dtype", "int4", "int8")]
)
def test_unknown_names_are_refused_with_the_known_ones(
    source: Path, tmp_path: Path, option: str, value: str, known: str
) -> None:
    options: dict[str, Any] = {option: value}
    with pytest.raises(ConfigError, match=known):
        plan_conversion(source, tmp_path / "target", **options)
    assert not (tmp_path / "target").exists()


def test_damage_in_the_source_is_never_copied(source: Path, tmp_path: Path) -> None:
    intact = tmp_path / "intact"
    shutil.copytree(source, intact)
    path = source / "features.zarr/clip/c/1/0/0"
    content = bytearray(path.read_bytes())
    content[3] ^= 1
    path.write_bytes(content)
    with pytest.raises(CorruptShardError, match=r"Image 4 .*checksum"):
        convert(plan_conversion(source, tmp_path / "target", backend="hdf5"))
    shutil.copy(intact / "features.zarr/clip/c/1/0/0", path)
    num_copied, _ = convert(plan_conversion(source, tmp_path / "target", backend="hdf5"))
    assert num_copied == 6

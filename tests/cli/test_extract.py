"""`ris extract` as a user meets it: reports, refusals, dry runs."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

import cli.extract
from ris_cache.store.cache import FeatureCache

NUM_VAL = 4


@pytest.fixture(scope="module")
def extract(ris, drawn_data: Path) -> Any:
    """Run `ris extract` on the validation split of the drawn data; the encoders are loaded once."""
    encoders = cli.extract.load_encoders(
        "tiny", sam_weights=None, clip_weights=None, random_seed=0, arithmetic="float32", device="cpu"
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cli.extract, "load_encoders", lambda *arguments, **options: encoders)

        def extract(
            cache: Path, *options: object, data: Path = drawn_data, split: str = "refcoco:val"
        ) -> Any:
            return ris("extract", "--split", split, "--data", data, "--cache", cache, *options)

        yield extract


@pytest.fixture(scope="module")
def val_cache(extract, tmp_path_factory) -> Path:
    """A finished cache of the validation split, in shards of 3; not to be changed."""
    cache = tmp_path_factory.mktemp("val") / "feats"
    assert extract(cache, "--shard-rows", 3).exit_code == 0
    return cache


def error_line(result: Any) -> str:
    """What went wrong, as stderr has it: one line, but for fingerprints, which take one per field."""
    lines = [line for line in result.stderr.splitlines() if not line.startswith(("extract:", "quarantined:"))]
    assert len(lines) == 1 or result.exit_code == 5, result.stderr
    assert "Traceback" not in result.stderr
    return "\n".join(lines)


def test_the_report_is_one_json_document_on_stdout(extract, tmp_path):
    result = extract(tmp_path / "feats", "--json", "--store", "hdf5", "--dtype", "int8")

    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    manifest = FeatureCache.open(tmp_path / "feats").manifest
    assert report["fingerprint"] == manifest.fingerprint.digest
    assert (report["store"], report["dtype"]) == ("hdf5", "int8")
    assert (report["added"], report["present"], report["quarantined"]) == (NUM_VAL, 0, {})
    assert report["weights"] == {"sam": "random(seed=0)", "clip": "random(seed=0)"}
    assert report["datasets"]["refcoco.unc"]["splits"]["val"]["images"] == NUM_VAL


def test_the_report_for_people_says_what_there_is(extract, tmp_path):
    result = extract(tmp_path / "feats")

    assert result.exit_code == 0, result.output
    for words in (
        "images added",
        str(NUM_VAL),
        "float16, zarr",
        "random(seed=0)",
        "refcoco.unc val",
        "4 images",
    ):
        assert words in result.stdout


def test_a_part_of_a_split_is_called_one(extract, tmp_path):
    result = extract(tmp_path / "feats", "--limit", 2)

    assert result.exit_code == 0, result.output
    assert "2 images" in result.stdout
    assert "(a part)" in result.stdout


def test_only_the_first_process_of_torchrun_reports(extract, tmp_path, monkeypatch):
    monkeypatch.setenv("RANK", "1")

    result = extract(tmp_path / "feats", "--json")

    assert (result.exit_code, result.stdout) == (0, "")


def test_a_dry_run_writes_nothing_and_its_numbers_come_true(extract, tmp_path):
    cache = tmp_path / "feats"

    told = extract(cache, "--dry-run", "--json", "--shard-rows", 3)

    assert told.exit_code == 0, told.output
    assert not cache.exists()
    found = json.loads(told.stdout)
    done = json.loads(extract(cache, "--json", "--shard-rows", 3).stdout)
    assert found["num_images"] == done["added"] == NUM_VAL
    assert found["num_shards"] == 2
    assert found["num_expressions"] == done["datasets"]["refcoco.unc"]["splits"]["val"]["expressions"]
    assert (found["backend"], found["dtype"]) == (done["store"], done["dtype"])


def test_a_dry_run_for_people_says_that_nothing_was_written(extract, val_cache):
    before = {path: path.stat().st_mtime_ns for path in val_cache.rglob("*")}

    result = extract(val_cache, "--dry-run", split="refcoco")

    assert result.exit_code == 0, result.output
    assert "Nothing was written." in result.stdout
    assert "images to do" in result.stdout
    assert {path: path.stat().st_mtime_ns for path in val_cache.rglob("*")} == before


@pytest.mark.parametrize(
    ("options", "code", "words"),
    [
        (["--dtype", "bfloat16"], 5, ["dtype", "float16", "bfloat16"]),
        (["--store", "hdf5"], 3, ["stored as zarr, not hdf5 (--store)", "Leave that option out"]),
        (["--shard-rows", "5"], 3, ["in shards of 3 images, not 5 (--shard-rows)"]),
        (["--store", "parquet"], 2, ["--store 'parquet'", "zarr, hdf5"]),
        (["--dtype", "float8"], 2, ["--dtype 'float8'", "float16, bfloat16, float32, int8"]),
        (["--split", "refcoco:dev"], 2, ["'dev'", "known: train, val"]),
    ],
)
@pytest.mark.parametrize("dry", [[], ["--dry-run"]], ids=["", "dry"])
def test_what_contradicts_the_cache_is_refused_by_name(options, code, words, dry, extract, val_cache):
    before = {path: path.stat().st_mtime_ns for path in val_cache.rglob("*") if path.name != ".lock"}

    result = extract(val_cache, *options, *dry)

    assert result.exit_code == code, result.output
    assert result.stdout == ""
    line = error_line(result)
    assert line.startswith("error: ")
    assert all(word in line for word in words), line
    assert {path: path.stat().st_mtime_ns for path in val_cache.rglob("*") if path.name != ".lock"} == before


def test_a_data_root_that_is_not_there_is_refused_before_weights_are_looked_for(ris, tmp_path):
    result = ris(
        "extract", "--split", "refcoco", "--data", tmp_path / "nowhere", "--cache", tmp_path / "feats"
    )

    assert result.exit_code == 3
    assert error_line(result) == (
        f"error: There is no data root at {tmp_path / 'nowhere'}. Name one with --data or $RIS_DATA."
    )


@pytest.fixture
def one_bad_image(drawn_data: Path, tmp_path: Path) -> tuple[Path, Path]:
    """A copy of the drawn data, and an image of its validation split that is cut short."""
    from ris_cache.datasets import parse_selections
    from ris_cache.extraction.sources import load_sources

    data = Path(shutil.copytree(drawn_data, tmp_path / "data"))
    paths = load_sources(parse_selections("refcoco:val"), data).paths
    bad = paths[max(paths)]
    assert bad is not None
    bad.write_bytes(bad.read_bytes()[:300])
    return data, bad


def test_a_bad_image_is_said_counted_and_left_out(extract, one_bad_image, tmp_path):
    data, bad = one_bad_image

    result = extract(tmp_path / "feats", "--json", data=data)

    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    assert report["added"] == NUM_VAL - 1
    ((_, reason),) = report["quarantined"].items()
    assert bad.name in reason
    assert f"quarantined: {reason}" in result.stderr
    assert f"{NUM_VAL}/{NUM_VAL} images" in result.stderr
    assert "1 quarantined" in result.stderr


@pytest.mark.parametrize("has_cache", [False, True], ids=["new cache", "quarantined before"])
def test_strict_fails_on_a_bad_image_and_names_it(has_cache, extract, one_bad_image, tmp_path):
    data, bad = one_bad_image
    if has_cache:
        assert extract(tmp_path / "feats", data=data).exit_code == 0

    result = extract(tmp_path / "feats", "--strict", data=data)

    assert result.exit_code == 3
    assert bad.name in error_line(result)


def test_the_public_command_makes_the_cache_that_was_asked_for(tiny_cache):
    """Weights and all, as the fixture of the whole suite calls it."""
    cache = FeatureCache.open(tiny_cache)

    assert len(cache) == 36
    assert cache.manifest.weights == {"sam": "random(seed=0)", "clip": "random(seed=0)"}


def test_the_wait_for_another_command_is_said_on_stderr(extract, val_cache, tmp_path, monkeypatch) -> None:
    """Another process holds a plan for something else; here it is this one, which then ends."""
    import ris_cache.store.writer as writer_module
    from ris_cache.store.draft import Recipe
    from ris_cache.store.planning import NewImage
    from ris_cache.store.writer import CacheWriter

    cache = Path(shutil.copytree(val_cache, tmp_path / "feats"))
    recipe = Recipe.of(FeatureCache.open(cache).manifest)
    image = NewImage(image_id=7, file_name="7.jpg", height=2, width=2)
    other = CacheWriter.open(
        cache, recipe, purpose="extract", request={"--split": "other"}, choose=lambda known: [image]
    )
    sleeps: list[float] = []

    def end_the_other(seconds: float) -> None:
        sleeps.append(seconds)
        other.close()

    monkeypatch.setattr(writer_module.time, "sleep", end_the_other)
    result = extract(cache)

    assert result.exit_code == 0, result.output
    assert len(sleeps) == 1
    assert (
        f"another `ris extract` is at work on {cache} (--split other); waiting for it to end\n"
        in result.stderr
    )

"""`ris cache convert | compare | merge | remove | gc`: what they print, how they exit, what they leave alone."""

from __future__ import annotations

import json
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ris_cache.store.cache import FeatureCache
from ris_cache.store.writer import ShardClaim

Documents = Callable[..., dict[str, Any]]


@pytest.fixture
def document(ris: Callable[..., Any]) -> Documents:
    """Run a command with --json that must succeed; returns what it printed."""

    def run(*arguments: object) -> dict[str, Any]:
        result = ris(*arguments, "--json")
        assert result.exit_code == 0, result.output
        found: dict[str, Any] = json.loads(result.stdout)
        return found

    return run


@pytest.fixture
def refused(ris: Callable[..., Any]) -> Callable[..., str]:
    """Run a command that must fail with a message and no traceback; returns the message."""

    def run(*arguments: object, exit_code: int) -> str:
        result = ris(*arguments)
        assert result.exit_code == exit_code, result.output
        assert isinstance(result.exception, SystemExit), "an unforeseen exception got through"
        assert "Traceback" not in result.output
        return str(result.stderr)

    return run


@pytest.fixture(scope="module")
def parts(
    tmp_path_factory: pytest.TempPathFactory, ris: Callable[..., Any], drawn_data: Path
) -> tuple[Path, Path]:
    """Two caches of the drawn data: val, and val with testA in the other backend; shards of 3."""
    roots = tmp_path_factory.mktemp("parts") / "val", tmp_path_factory.mktemp("parts") / "test"
    for root, split, store in zip(
        roots, ("refcoco:val", "refcoco:val,refcoco:testA"), ("zarr", "hdf5"), strict=True
    ):
        result = ris(
            "extract", "--split", split, "--data", drawn_data, "--cache", root, "--preset", "tiny",
            "--random-weights", "--device", "cpu", "--store", store, "--shard-rows", 3, "--batch-size", 3,
        )  # fmt: skip
        assert result.exit_code == 0, result.output
    return roots


@pytest.fixture
def small(parts: tuple[Path, Path], tmp_path: Path) -> Path:
    """A copy of the cache of val, to be changed."""
    return Path(shutil.copytree(parts[0], tmp_path / "small"))


def files_of(root: Path) -> dict[str, bytes]:
    return {
        path.relative_to(root).as_posix(): path.read_bytes()
        for path in root.rglob("*")
        if path.is_file() and path.name != ".lock"
    }


# convert


def test_converting_says_what_it_would_do_and_then_does_it(
    document: Documents, ris: Callable[..., Any], small: Path, tmp_path: Path
) -> None:
    target = tmp_path / "new"
    arguments = ("cache", "convert", small, target, "--store", "hdf5", "--dtype", "int8")
    planned = document(*arguments, "--dry-run")
    assert (planned["images"], planned["shards"], planned["copied"]) == (4, 2, 0)
    assert not target.exists()
    shown = ris(*arguments)
    assert shown.exit_code == 0, shown.output
    assert "4 images copied by this process" in shown.stdout
    done = document(*arguments)  # nothing is left to do
    news = {"dry_run": False, "free_bytes": done["free_bytes"], "to_add": 0, "nothing_to_add": True}
    assert done == planned | news
    cache = FeatureCache.open(target)
    assert cache.manifest.fingerprint.digest == done["fingerprint"]
    assert (done["rounded_through"], done["exact"]) == (["float16"], False)
    assert cache.read(cache.image_ids.tolist()).dtype == "int8"


def test_a_source_that_grew_is_converted_into_the_same_cache_again(
    document: Documents, ris: Callable[..., Any], small: Path, parts: tuple[Path, Path], tmp_path: Path
) -> None:
    arguments = ("cache", "convert", small, tmp_path / "new", "--dtype", "float32")
    document(*arguments)
    shown = ris(*arguments)
    assert shown.exit_code == 0, shown.output
    assert "Nothing to add" in shown.stdout
    document("cache", "merge", small, parts[1])
    planned = document(*arguments, "--dry-run")
    assert (planned["to_add"], planned["copied"], planned["nothing_to_add"]) == (4, 0, False)
    assert document(*arguments)["copied"] == 4
    cache = FeatureCache.open(tmp_path / "new")
    assert (len(cache), list(cache.manifest.datasets["refcoco.unc"].splits)) == (8, ["val", "testA"])
    assert document(*arguments)["nothing_to_add"]


def test_converting_to_where_it_cannot_go(
    refused: Callable[..., str], small: Path, parts: tuple[Path, Path], tmp_path: Path
) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("mine")
    assert "same directory" in refused("cache", "convert", small, small, exit_code=2)
    assert "not empty" in refused("cache", "convert", small, tmp_path / "mine", exit_code=2)
    assert "holds a cache already" in refused("cache", "convert", small, parts[1], exit_code=2)
    assert "zarr, hdf5" in refused("cache", "convert", small, tmp_path / "new", "--store", "npy", exit_code=2)
    assert "ris extract" in refused("cache", "convert", tmp_path / "none", tmp_path / "new", exit_code=3)
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(("number", "exit_code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_ends_a_conversion_after_a_whole_shard(
    document: Documents,
    ris: Callable[..., Any],
    small: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    number: signal.Signals,
    exit_code: int,
) -> None:
    commit = ShardClaim.commit

    def commit_and_be_told(claim: ShardClaim, *arguments: Any) -> None:
        commit(claim, *arguments)
        signal.raise_signal(number)

    with monkeypatch.context() as patch:
        patch.setattr(ShardClaim, "commit", commit_and_be_told)
        result = ris("cache", "convert", small, tmp_path / "new", "--store", "hdf5")
    assert result.exit_code == exit_code, result.output
    assert "stopped: Stopped after a whole shard; 3 of 4 images are done" in result.stderr
    assert document("cache", "convert", small, tmp_path / "new", "--store", "hdf5")["copied"] == 1


# merge


def test_merging_parts_of_an_extraction(
    document: Documents, ris: Callable[..., Any], small: Path, parts: tuple[Path, Path]
) -> None:
    before = files_of(parts[1])
    planned = document("cache", "merge", small, parts[1], "--dry-run")
    assert (planned["added"], planned["splits"]) == (4, ["refcoco.unc:testA"])
    shown = ris("cache", "merge", small, parts[1])
    assert shown.exit_code == 0, shown.output
    assert "refcoco.unc:testA" in shown.stdout
    assert files_of(parts[1]) == before
    again = document("cache", "merge", small, parts[1])
    assert (again["added"], again["copied"], again["splits"]) == (0, 0, [])
    assert len(FeatureCache.open(small)) == 8


def test_caches_of_other_making_are_not_merged(
    document: Documents, refused: Callable[..., str], small: Path, tmp_path: Path
) -> None:
    document("cache", "convert", small, tmp_path / "wide", "--dtype", "float32")
    message = refused("cache", "merge", small, tmp_path / "wide", exit_code=5)
    assert 'dtype: expected "float16", found "float32"' in message
    assert 'rounded_through: expected [], found ["float16"]' in message
    assert "named twice" in refused("cache", "merge", small, small, exit_code=2)


# remove and gc


def test_a_dataset_is_removed_and_its_space_reclaimed(
    document: Documents, ris: Callable[..., Any], small: Path
) -> None:
    before = files_of(small)
    assert document("cache", "remove", "refcoco", "--cache", small, "--dry-run")["unused_images"] == 4
    assert files_of(small) == before
    removed = document("cache", "remove", "refcoco/unc", "--cache", small)
    assert removed["datasets"] == ["refcoco.unc"]
    planned = document("cache", "gc", "--cache", small, "--dry-run")
    assert (planned["dropped_images"], planned["unused_shards"]) == (4, 2)
    assert len(FeatureCache.open(small)) == 4
    shown = ris("cache", "gc", "--cache", small)
    assert shown.exit_code == 0, shown.output
    assert "space reclaimed" in shown.stdout
    assert len(FeatureCache.open(small)) == 0
    assert document("cache", "gc", "--cache", small)["reclaimed_bytes"] == 0


def test_removing_what_is_not_there(refused: Callable[..., str], small: Path, tmp_path: Path) -> None:
    message = refused("cache", "remove", "refcocog", "--cache", small, exit_code=3)
    assert "it has refcoco.unc" in message
    assert "Did you mean" in message
    assert "NAME" in refused("cache", "remove", "--cache", small, exit_code=2)
    assert "ris extract" in refused("cache", "gc", "--cache", tmp_path / "none", exit_code=3)


# compare


def test_comparing_says_what_differs(
    document: Documents, ris: Callable[..., Any], small: Path, parts: tuple[Path, Path], tmp_path: Path
) -> None:
    document("cache", "convert", small, tmp_path / "int8", "--dtype", "int8")
    found = document("cache", "compare", small, tmp_path / "int8")
    assert found["num_compared"] == 4
    assert 0 < found["features"]["sam"]["relative_error"] < 0.02
    assert 0.999 < found["features"]["sam"]["cosine_min"] < 1
    assert {field["path"] for field in found["fields"]} == {"dtype", "quantiser", "rounded_through"}
    assert found["checkpoint"] is None
    shown = ris("cache", "compare", small, parts[1], "--images", 2)
    assert shown.exit_code == 0, shown.output
    assert "2 of 4 images in common" in shown.stdout
    assert "The fingerprints are the same." in shown.stdout
    assert "Images only in B: 4" in shown.stdout


def test_a_checkpoint_is_scored_on_both_caches_and_nothing_is_kept(
    document: Documents, ris: Callable[..., Any], tiny_cache: Path, tiny_runs: Path, tmp_path: Path
) -> None:
    runs = Path(shutil.copytree(tiny_runs, tmp_path / "runs"))
    document("cache", "convert", tiny_cache, tmp_path / "int8", "--dtype", "int8")
    before = files_of(runs)
    command = ("cache", "compare", tiny_cache, tmp_path / "int8", "--runs", runs, "--device", "cpu")
    scored = document(*command, "--checkpoint", "first")["checkpoint"]
    assert (scored["trained_on"], scored["fingerprint_checked"]) == ("A", False)
    (split,) = scored["splits"]
    assert split["split"] == "refcoco.unc:val"
    assert split["change"]["mIoU"] == split["second"]["mIoU"] - split["first"]["mIoU"]
    shown = ris(*command, "--checkpoint", runs / "first" / "checkpoints" / "best.safetensors")
    assert shown.exit_code == 0, shown.output
    assert "Comparison, no result" in shown.stdout
    assert "trained on: A" in shown.stdout
    assert files_of(runs) == before
    own = ris("eval", "--cache", tiny_cache, "--runs", runs, "--split", "refcoco:val", "--json")
    assert split["first"] == json.loads(own.stdout)["results"][0]
    other = ris("eval", "--cache", tmp_path / "int8", "--runs", runs)
    assert other.exit_code == 5  # only a comparison reads features of another fingerprint


def test_comparing_what_is_not_there(refused: Callable[..., str], small: Path, tmp_path: Path) -> None:
    assert "ris extract" in refused("cache", "compare", small, tmp_path / "none", exit_code=3)
    message = refused(
        "cache", "compare", small, small, "--checkpoint", "x", "--runs", tmp_path / "runs", exit_code=3
    )
    assert "no run 'x'" in message

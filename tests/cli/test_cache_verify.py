"""`ris cache verify`: what it prints, how it exits, and repairing through it."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from cli.cache import verify as command
from ris_cache.store.manifest import load_manifest

TRIAL = ("--random-weights", "--device", "cpu")


@pytest.fixture(scope="module")
def small_shards(tmp_path_factory, ris, drawn_data) -> Path:
    """The drawn data's val and test splits, in shards of four."""
    root = tmp_path_factory.mktemp("shards") / "feats"
    result = ris(
        "extract", "--split", "refcoco:val,refcoco:test", "--data", drawn_data, "--cache", root, "--preset",
        "tiny", "--shard-rows", 4, *TRIAL,
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    return root


@pytest.fixture
def cache(tmp_path, small_shards) -> Path:
    shutil.copytree(small_shards, tmp_path / "feats")
    return tmp_path / "feats"


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def shard(cache: Path, number: int, array: str = "sam") -> Path:
    return cache / f"features.zarr/{array}/c/{number}" / ("0/0/0" if array == "sam" else "0/0")


@pytest.mark.parametrize("options", [(), ("--fast",)])
def test_a_sound_cache_ends_with_0(ris, small_shards, options):
    result = ris("cache", "verify", "--cache", small_shards, *options)
    assert result.exit_code == 0
    assert "is sound" in result.stdout
    assert ("is sound: features were not read (--fast); " in result.stdout) is bool(options)
    assert result.stderr == ""


def test_every_bad_shard_is_named_and_the_exit_code_is_4(ris, cache):
    flip(shard(cache, 0))
    shard(cache, 2).unlink()
    (cache / load_manifest(cache).datasets["refcoco.unc"].instances_file).write_bytes(b"")
    result = ris("cache", "verify", "--cache", cache)
    assert result.exit_code == 4
    assert "Damaged shards: 0, 2." in result.stdout
    assert (
        "features.zarr/sam/c/0/0/0/0 contradicts its SHA-256; contradicts the checksum of sam"
        in result.stdout
    )
    assert "features.zarr/sam/c/2/0/0/0 is missing (shard 2)" in result.stdout
    assert "has 0 bytes instead of" in result.stdout
    assert "For features: `ris cache verify --repair --data DIR`" in result.stdout
    assert "For table: `ris cache verify --repair --data DIR` builds it again" in result.stdout


def test_json_says_the_same(ris, cache):
    flip(shard(cache, 1, "clip"))
    (cache / "images" / "pool.old.parquet").write_bytes(b"old")
    result = ris("cache", "verify", "--cache", cache, "--json")
    assert result.exit_code == 4
    document = json.loads(result.stdout)
    assert document["sound"] is document["fast"] is False
    assert document["bad_shards"] == [1]
    (finding,) = document["findings"]
    assert (finding["kind"], finding["path"], finding["shard"]) == (
        "features",
        "features.zarr/clip/c/1/0/0",
        1,
    )
    assert len(finding["image_ids"]) == 1
    assert finding["repairable"] is True
    assert "of earlier states of the cache" in document["notes"][0]
    assert document["repaired"] is document["would_repair"] is None


def test_a_repair_ends_with_0_and_the_cache_is_as_before(ris, cache, small_shards, drawn_data):
    flip(shard(cache, 0))
    shutil.rmtree(cache / "features.zarr/clip")
    result = ris("cache", "verify", "--cache", cache, "--repair", "--data", drawn_data, *TRIAL)
    assert result.exit_code == 0, result.output
    assert "Computed again, to the same bytes as before: shards 0, 1, 2." in result.stdout
    assert "Written anew: features.zarr/clip/zarr.json." in result.stdout
    assert "is sound" in result.stdout
    files = {path.relative_to(small_shards) for path in small_shards.rglob("*") if path.is_file()}
    assert all((cache / path).read_bytes() == (small_shards / path).read_bytes() for path in files)


def test_a_dry_run_says_what_a_repair_would_do_and_does_nothing(ris, cache, drawn_data):
    flip(shard(cache, 1))
    damaged = shard(cache, 1).read_bytes()
    arguments = ("cache", "verify", "--cache", cache, "--repair", "--dry-run", "--data", drawn_data)
    result = ris(*arguments)
    assert result.exit_code == 4
    assert "Would compute 4 images again: shards 1." in result.stdout
    assert "Nothing was written." in result.stdout
    document = json.loads(ris(*arguments, "--json").stdout)
    nothing = {"rebuilt": [], "not_rebuilt": {}, "left_out": []}
    assert document["would_repair"] == {"images": {"1": 4}, "metadata": [], "obstacles": {}} | nothing
    assert shard(cache, 1).read_bytes() == damaged
    assert ris("cache", "verify", "--cache", cache, "--dry-run").exit_code == 2


def test_a_repair_that_cannot_mend_everything_ends_with_4(ris, cache, drawn_data, tmp_path):
    flip(shard(cache, 0))
    shard(cache, 2).unlink()
    shard(cache, 2).mkdir()
    result = ris("cache", "verify", "--cache", cache, "--repair", "--data", drawn_data, "--json", *TRIAL)
    assert result.exit_code == 4
    document = json.loads(result.stdout)
    assert document["repaired"]["restored"] == [0]
    assert [finding["problem"] for finding in document["findings"]] == ["is not a file"]

    shard(cache, 2).rmdir()
    flip(shard(cache, 0))
    flip(cache / load_manifest(cache).datasets["refcoco.unc"].expressions_file)
    result = ris("cache", "verify", "--cache", cache, "--repair", "--data", tmp_path / "none", *TRIAL)
    assert result.exit_code == 4
    assert "Shard 0 could not be mended: No image file" in result.stdout
    assert "Not to be built again: the tables of refcoco.unc: " in result.stdout
    assert "Damaged shards: 0, 2." in result.stdout


def test_tables_categories_and_heads_are_built_again(ris, cache, small_shards, drawn_data):
    gone = [name for name in load_manifest(cache).files if not name.startswith(("features", "images"))]
    assert len(gone) == 5
    for name in gone:
        (cache / name).unlink()
    refused = ris(
        "extract", "--split", "refcoco", "--data", drawn_data, "--cache", cache, "--preset", "tiny", *TRIAL
    )
    assert refused.exit_code == 4
    assert "lacks files of its manifest" in refused.stderr
    assert "`ris cache verify --repair --data DIR`" in refused.stderr
    command = ("cache", "verify", "--cache", cache, "--repair", "--data", drawn_data)
    things = "SAM's heads, the category set refcoco.unc, the tables of refcoco.unc."
    assert f"Would build again: {things}" in ris(*command, "--dry-run").stdout
    result = ris(*command, *TRIAL)
    assert result.exit_code == 0, result.output
    assert f"Built again: {things}" in result.stdout
    assert all((cache / name).read_bytes() == (small_shards / name).read_bytes() for name in gone)


def test_other_encoders_end_a_repair_with_5(ris, cache, drawn_data):
    flip(shard(cache, 0))
    command = ("cache", "verify", "--cache", cache, "--repair", "--data", drawn_data, "--seed", 7, *TRIAL)
    result = ris(*command)
    assert result.exit_code == 5
    assert "weights.sam.seed: cache has 0, asked for 7" in result.stderr


def test_no_cache_ends_with_3_and_a_damaged_manifest_with_4(ris, cache, tmp_path):
    assert ris("cache", "verify", "--cache", tmp_path / "none").exit_code == 3
    (tmp_path / "empty").mkdir()
    assert ris("cache", "verify", "--cache", tmp_path / "empty").exit_code == 3
    flip(cache / "manifest.json")
    result = ris("cache", "verify", "--cache", cache, "--repair")
    assert result.exit_code == 4
    assert "manifest.json" in result.stdout
    assert "Restore the file from a copy" in result.stdout


def test_a_long_check_says_where_it_is(small_shards, ris, monkeypatch):
    monkeypatch.setattr(command, "_SECONDS_BETWEEN_LINES", 0.0)
    assert "verify: 3/3 shards" in ris("cache", "verify", "--cache", small_shards).stderr


def test_a_terminal_gets_a_bar(monkeypatch, capsys):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    progress = command._Progress()
    for done in (1, 2, 3):
        progress(done, 3)
        time.sleep(0.01)
    progress.stop()
    assert "3/3" in capsys.readouterr().err


def test_checking_needs_no_torch(small_shards):
    program = (
        "import sys\n"
        "from pathlib import Path\n"
        "from cli.cache.verify import verify\n"
        "verify(cache=Path(sys.argv[1]), json=True)\n"
        "sys.exit('torch' in sys.modules)\n"
    )
    finished = subprocess.run(
        [sys.executable, "-c", program, str(small_shards)], capture_output=True, check=False
    )
    assert finished.returncode == 0, finished.stderr

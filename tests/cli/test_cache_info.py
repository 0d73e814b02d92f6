"""`ris cache info`, as a table and as JSON."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from ris_cache.store.manifest import load_manifest


@pytest.fixture(scope="module")
def partial(tmp_path_factory, ris, drawn_data) -> Path:
    """The first six images of the drawn training split, one of them unreadable."""
    data = tmp_path_factory.mktemp("partial") / "data"
    shutil.copytree(drawn_data, data)
    (data / "images" / "train2014").joinpath(first_image(data)).write_bytes(b"no image")
    root = data.parent / "feats"
    result = ris(
        "extract", "--split", "refcoco:train", "--limit", 6, "--data", data, "--cache", root, "--preset", "tiny",
        "--random-weights", "--device", "cpu", "--store", "hdf5", "--dtype", "int8", "--shard-rows", 4,
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    return root


def first_image(data: Path) -> str:
    from ris_cache.datasets.refer import load_refer

    dataset = load_refer(data, "refcoco", "unc")
    expression = next(expression for expression in dataset.expressions if expression.split == "train")
    return dataset.images[expression.image_id].file_name


def test_the_table_says_what_the_cache_is(ris, partial):
    result = ris("cache", "info", "--cache", partial)
    assert result.exit_code == 0
    for part in (
        "random(seed=0)",
        "int8, hdf5, format 1",
        "sam_scale",
        "2 of 4 rows; 8 rows in all",
        "5 with features, 1 in quarantine",
        "  image ",
        "(a part)",
        "torch 2.",
        "ris cache gc would free",
        "encoders.sam.depth",
        "symmetric, one scale per channel",
    ):
        assert part in result.stdout, part


def test_json_holds_the_values(ris, partial):
    result = ris("cache", "info", "--cache", partial, "--json")
    assert result.exit_code == 0
    document = json.loads(result.stdout)
    manifest = load_manifest(partial)
    assert document["fingerprint"] == {
        "digest": manifest.fingerprint.digest,
        "fields": manifest.fingerprint.fields,
    }
    assert (document["store"], document["dtype"], document["preset"]) == ("hdf5", "int8", "tiny")
    assert (document["num_shards"], document["rows"], document["shard_rows"]) == (2, 8, 4)
    assert document["images"] == {"ok": 5, "quarantined": 1}
    assert len(document["quarantined"]) == 1
    assert document["datasets"]["refcoco.unc"]["splits"]["train"]["is_complete"] is False
    assert document["recorded"]["libraries"]["torch"].startswith("2.")
    assert document["total_bytes"] > document["feature_bytes"] > 5 * document["image_bytes"] > 0
    assert document["reclaimable"]["num_images"] == 0
    assert document["unfinished"] is document["adding"] is document["unclear"] is None


def test_growth_counts_images_that_the_cache_lacks(ris, partial, drawn_data):
    command = ("cache", "info", "--cache", partial, "--adding", "refcoco", "--data", drawn_data)
    document = json.loads(ris(*command, "--json").stdout)
    # Five are there; the one in quarantine has a good file in this data root, so it would be computed too.
    assert document["adding"] == {
        "num_images": 31,
        "num_present": 5,
        "num_shards": 8,
        "num_bytes": 31 * document["image_bytes"],
    }
    table = ris(*command)
    assert table.exit_code == 0
    assert "Adding refcoco" in table.stdout
    assert "images to compute" in table.stdout


def test_growth_needs_the_annotations(ris, partial, tmp_path):
    result = ris("cache", "info", "--cache", partial, "--adding", "refcocog", "--data", tmp_path)
    assert result.exit_code == 3
    assert ris("cache", "info", "--cache", partial, "--adding", "nonsense").exit_code == 2


def test_an_unfinished_extraction_is_shown(ris, tiny_cache, tmp_path):
    from ris_cache.store.draft import Recipe
    from ris_cache.store.planning import NewImage
    from ris_cache.store.writer import CacheWriter

    root = tmp_path / "feats"
    shutil.copytree(tiny_cache, root)
    CacheWriter.open(
        root,
        Recipe.of(load_manifest(root)),
        purpose="extract",
        request={"--split": "refcocog/umd"},
        choose=lambda known: [NewImage(image_id=1, file_name="1.jpg", height=2, width=2)],
    ).close()
    result = ris("cache", "info", "--cache", root)
    assert result.exit_code == 0
    assert "ris extract --split refcocog/umd: 0 of 1 shards done" in result.stdout
    document = json.loads(ris("cache", "info", "--cache", root, "--json").stdout)
    assert document["unfinished"]["num_images"] == 1
    assert document["reclaimable"] is None
    assert "Finish it first" in document["unclear"]


def test_an_extraction_that_never_finished_is_described(ris, drawn_data, tmp_path):
    from cli.signals import StopRequest

    root = tmp_path / "feats"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(StopRequest, "__call__", lambda self: True)
        stopped = ris(
            "extract", "--split", "refcoco:val", "--data", drawn_data, "--cache", root, "--preset", "tiny",
            "--random-weights", "--device", "cpu", "--shard-rows", 2,
        )  # fmt: skip
    assert stopped.exit_code != 0
    result = ris("cache", "info", "--cache", root)
    assert result.exit_code == 0, result.output
    for part in ("ris extract --split refcoco/unc:val", "tiny", "0 of 4 done", "0 of 2 done", "same command"):
        assert part in result.stdout, part
    document = json.loads(ris("cache", "info", "--cache", root, "--json").stdout)
    assert (document["finished"], document["preset"], document["store"]) == (False, "tiny", "zarr")
    assert document["unfinished"]["num_images"] == 4
    assert ris("cache", "info", "--cache", root, "--adding", "refcoco", "--data", drawn_data).exit_code == 3
    (root / "extraction" / "plan.json").write_text("{")
    damaged = ris("cache", "info", "--cache", root)
    assert damaged.exit_code == 4
    assert "plan.json is damaged" in damaged.stderr


def test_no_cache_ends_with_3(ris, tmp_path):
    result = ris("cache", "info", "--cache", tmp_path / "none")
    assert result.exit_code == 3
    assert "ris extract" in result.stderr

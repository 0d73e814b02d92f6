"""The whole path through the commands a user types, at the tiny preset."""

from __future__ import annotations

import json
import re
import shutil

import numpy as np
import pytest
from PIL import Image

from ris_cache import FeatureCache


def test_train_leaves_a_complete_run_directory(tiny_runs):
    run = tiny_runs / "first"
    assert {path.name for path in run.iterdir()} >= {"config.yaml", "env.json", "metrics.jsonl", "tokenizer"}
    assert (run / "checkpoints" / "best.safetensors").is_file()
    assert (run / "checkpoints" / "last.safetensors").is_file()
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [record["step"] for record in records if "loss" in record] == [2, 4, 6]
    assert [record["step"] for record in records if "oIoU" in record] == [3, 6]
    facts = json.loads((run / "env.json").read_text())
    assert facts["weights"] == {
        "sam": "random(seed=0)",
        "clip": "random(seed=0)",
        "bert": "random(seed=0)",
    }


def test_eval_prints_what_its_numbers_mean(ris, tiny_cache, tiny_runs):
    result = ris("eval", "--cache", tiny_cache, "--runs", tiny_runs, "--device", "cpu")
    assert result.exit_code == 0, result.output
    assert re.search(r"run first, checkpoint best of step [36]\b", result.stdout)
    for word in ("grid: original", "rules: ris", "category source: none", "logit > 0", "random(seed=0)"):
        assert word in " ".join(result.stdout.split())


def test_eval_json_scores_every_split_but_train_with_its_sample_count(ris, tiny_cache, tiny_runs):
    result = ris("eval", "--cache", tiny_cache, "--runs", tiny_runs, "--device", "cpu", "--json")
    document = json.loads(result.stdout)
    entry = FeatureCache.open(tiny_cache).manifest.datasets["refcoco.unc"]
    assert {row["split"]: row["num_samples"] for row in document["results"]} == {
        f"refcoco.unc:{split}": counts.expressions
        for split, counts in entry.splits.items()
        if split != "train"
    }
    assert all(0 <= row["oIoU"] <= 1 for row in document["results"])
    kept = json.loads((tiny_runs / "first" / "eval" / "scores-best-none.json").read_text())
    named = {"run": "first", "checkpoint": "best", "step": kept["step"]}
    assert {key: document[key] for key in named} == named
    assert document["checkpoint_sha256"] == kept["checkpoint_sha256"]


def test_eval_does_not_depend_on_the_batch_size(ris, tiny_cache, tiny_runs):
    command = ("eval", "--cache", tiny_cache, "--runs", tiny_runs, "--device", "cpu", "--json", "--split")
    wide = json.loads(ris(*command, "refcoco:val", "--batch-size", 32).stdout)["results"][0]
    narrow = json.loads(ris(*command, "refcoco:val", "--batch-size", 3).stdout)["results"][0]
    assert narrow["oIoU"] == pytest.approx(wide["oIoU"], abs=2e-3)


def test_shuffled_expressions_are_labelled(ris, tiny_cache, tiny_runs):
    result = ris(
        "eval", "--cache", tiny_cache, "--runs", tiny_runs, "--device", "cpu", "--split", "refcoco:val",
        "--shuffle-expressions", "--seed", 5, "--json",
    )  # fmt: skip
    (row,) = json.loads(result.stdout)["results"]
    assert row["expressions"] == "shuffled(seed=5)"


def test_training_needs_the_cache_directory_alone(ris, tiny_cache, tmp_path, monkeypatch):
    moved = tmp_path / "elsewhere" / "feats"
    shutil.copytree(tiny_cache, moved)
    monkeypatch.chdir(tmp_path)
    result = ris(
        "train", "--cache", moved, "--run", "alone", "--random-weights", "--device", "cpu",
        "--set", "train.steps=1", "--set", "train.batch_size=2", "--set", "train.val_samples=2",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    assert (tmp_path / "runs" / "alone" / "checkpoints" / "best.safetensors").is_file()


def test_a_second_run_with_the_same_seed_gives_the_same_metrics(ris, tiny_cache, tiny_runs, tmp_path):
    result = ris(
        "train", "--cache", tiny_cache, "--runs", tmp_path, "--run", "first", "--random-weights", "--device", "cpu",
        "--set", "train.steps=6", "--set", "train.batch_size=4", "--set", "train.eval_every=3",
        "--set", "train.log_every=2",
    )  # fmt: skip
    assert result.exit_code == 0, result.output

    def metrics(runs):
        lines = (runs / "first" / "metrics.jsonl").read_text().splitlines()
        return [{k: v for k, v in json.loads(line).items() if k != "seconds"} for line in lines]

    assert metrics(tmp_path) == metrics(tiny_runs)


def test_predict_writes_a_mask_of_the_images_own_size_and_an_overlay(ris, drawn_data, tiny_runs, tmp_path):
    image = sorted((drawn_data / "images" / "train2014").iterdir())[0]
    result = ris(
        "predict", "--image", image, "--text", "the red circle", "--runs", tiny_runs, "--out", tmp_path,
        "--device", "cpu", "--json",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    document = json.loads(result.stdout)
    mask = Image.open(document["mask"])
    assert mask.size == Image.open(image).size == Image.open(document["overlay"]).size
    assert set(np.unique(np.asarray(mask))) <= {0, 255}
    assert document["category_source"] == "none"
    assert document["weights"]["sam"] == "random(seed=0)"


def test_a_category_model_trains_and_names_its_category_source(ris, tiny_cache, drawn_data, tmp_path):
    trained = ris(
        "train", "--cache", tiny_cache, "--runs", tmp_path, "--run", "category", "--random-weights", "--device",
        "cpu", "--set", "train.steps=1", "--set", "train.batch_size=4", "--set", "model.sparse_prompt=category",
        "--set", "train.val_samples=4",
    )  # fmt: skip
    assert trained.exit_code == 0, trained.output
    command = (
        "eval",
        "--cache",
        tiny_cache,
        "--runs",
        tmp_path,
        "--device",
        "cpu",
        "--split",
        "refcoco:val",
        "--json",
    )
    for options, source in (((), "annotated"), (("--category", "predicted"), "predicted")):
        (row,) = json.loads(ris(*command, *options).stdout)["results"]
        assert row["category_source"] == source
    refused = ris(*command, "--category", "none")
    assert refused.exit_code == 2
    assert "use annotated or predicted" in refused.stderr

    image = sorted((drawn_data / "images" / "train2014").iterdir())[0]
    predict = (
        "predict",
        "--image",
        image,
        "--text",
        "the circle",
        "--runs",
        tmp_path,
        "--out",
        tmp_path,
        "--json",
    )
    assert json.loads(ris(*predict).stdout)["category_source"] == "predicted"
    assert json.loads(ris(*predict, "--category", "star").stdout)["category"] == "star"
    unknown = ris(*predict, "--category", "dog")
    assert unknown.exit_code == 2
    assert "star" in unknown.stderr


def test_extracting_twice_adds_nothing(ris, drawn_data, tiny_cache, tmp_path):
    cache = tmp_path / "feats"
    shutil.copytree(tiny_cache, cache)
    result = ris(
        "extract", "--split", "refcoco", "--data", drawn_data, "--cache", cache, "--preset", "tiny",
        "--random-weights", "--json",
    )  # fmt: skip
    document = json.loads(result.stdout)
    assert document["added"] == 0
    assert document["present"] == 36


def test_splits_extracted_one_after_the_other_hold_what_one_extraction_holds(
    ris, drawn_data, tiny_cache, tmp_path
):
    cache = tmp_path / "feats"
    for split in ("refcoco:val", "refcoco:train,refcoco:test"):
        result = ris(
            "extract", "--split", split, "--data", drawn_data, "--cache", cache, "--preset", "tiny",
            "--random-weights",
        )  # fmt: skip
        assert result.exit_code == 0, result.output
    ours, theirs = FeatureCache.open(cache), FeatureCache.open(tiny_cache)
    ids = sorted(theirs.image_ids.tolist())
    assert sorted(ours.image_ids.tolist()) == ids
    np.testing.assert_allclose(ours.read(ids).sam, theirs.read(ids).sam, atol=2e-3)
    assert set(ours.expressions("refcoco.unc")) == set(theirs.expressions("refcoco.unc"))


def test_demo_runs_from_drawing_to_overlays(tmp_path, capfd):
    from cli.demo import NUM_PICTURES, demo

    demo(out=tmp_path / "demo", train=12, steps=2, seed=0)
    printed = capfd.readouterr().out
    for command in ("data synth", "extract", "train", "eval", "predict"):
        assert f"$ ris {command}" in printed
    assert "shuffled within the image" in printed
    assert "Random:" in printed
    assert len(list((tmp_path / "demo" / "pictures").glob("*.overlay.png"))) == NUM_PICTURES


@pytest.mark.parametrize(("dtype", "store"), [("int8", "hdf5"), ("bfloat16", "zarr")])
def test_a_cache_of_another_precision_trains_and_scores(ris, drawn_data, tmp_path, dtype, store):
    cache, runs = tmp_path / "feats", tmp_path / "runs"
    common = ("--preset", "tiny", "--random-weights", "--device", "cpu")
    for split in ("refcoco:train", "refcoco:val"):
        result = ris(
            "extract", "--split", split, "--data", drawn_data, "--cache", cache, "--dtype", dtype,
            "--store", store, *common,
        )  # fmt: skip
        assert result.exit_code == 0, result.output
    result = ris(
        "train", "--cache", cache, "--runs", runs, "--run", "short", "--random-weights", "--device", "cpu",
        "--set", "train.steps=2", "--set", "train.batch_size=4", "--set", "train.eval_every=2",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    result = ris("eval", "--cache", cache, "--runs", runs, "--run", "short", "--device", "cpu", "--json")
    assert result.exit_code == 0, result.output
    assert [row["split"] for row in json.loads(result.stdout)["results"]] == ["refcoco.unc:val"]


def test_an_extraction_goes_on_in_the_arithmetic_it_began_with(ris, drawn_data, tmp_path):
    common = (
        "--data",
        drawn_data,
        "--cache",
        tmp_path,
        "--preset",
        "tiny",
        "--random-weights",
        "--device",
        "cpu",
    )
    assert ris("extract", "--split", "refcoco:val", "--arithmetic", "bfloat16", *common).exit_code == 0
    result = ris("extract", "--split", "refcoco:testA", *common)
    assert result.exit_code == 0, result.output
    result = ris("extract", "--split", "refcoco:testB", "--arithmetic", "float32", *common)
    assert result.exit_code == 5
    assert "arithmetic" in result.stderr

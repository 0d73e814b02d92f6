"""Bad input ends with one clear message and the right exit code, never with a traceback."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file

TINY = ("--preset", "tiny", "--random-weights", "--device", "cpu")


@pytest.fixture
def data(drawn_data, tmp_path) -> Path:
    """A copy of the drawn data, to be damaged."""
    root = tmp_path / "data"
    shutil.copytree(drawn_data, root)
    return root


@pytest.fixture
def refused(ris):
    """Run a command that must fail; returns its message, which must be one line and no traceback."""

    def run(*arguments: object, exit_code: int) -> str:
        result = ris(*arguments)
        assert result.exit_code == exit_code, result.output
        assert isinstance(result.exception, SystemExit), "an unforeseen exception got through"
        assert "Traceback" not in result.output
        assert "error: " in result.stderr or "Error" in result.stderr
        return result.stderr

    return run


def _first_image(data: Path) -> Path:
    return sorted((data / "images" / "train2014").iterdir())[0]


def _edit_json(path: Path, edit) -> None:
    document = json.loads(path.read_text())
    edit(document)
    path.write_text(json.dumps(document))


def _edit_refs(data: Path, edit) -> None:
    path = data / "refcoco" / "refs(unc).p"
    refs = pickle.loads(path.read_bytes())
    edit(refs)
    path.write_bytes(pickle.dumps(refs, protocol=2))


def test_missing_data_root(refused, tmp_path):
    message = refused(
        "extract", "--split", "refcoco", "--data", tmp_path / "nowhere", "--cache", tmp_path / "c", *TINY,
        exit_code=3,
    )  # fmt: skip
    assert str(tmp_path / "nowhere") in message


def test_missing_image_is_named_before_anything_is_computed(refused, data, tmp_path):
    gone = _first_image(data)
    gone.unlink()
    message = refused(
        "extract", "--split", "refcoco", "--data", data, "--cache", tmp_path / "c", *TINY, "--strict",
        exit_code=3,
    )  # fmt: skip
    assert gone.name in message
    assert "1 of 36 images" in message
    assert not (tmp_path / "c" / "features.zarr").exists()


def test_image_whose_size_is_not_the_annotated_one(refused, data, tmp_path):
    path = _first_image(data)
    Image.new("RGB", (50, 40)).save(path)
    message = refused(
        "extract", "--split", "refcoco", "--data", data, "--cache", tmp_path / "c", *TINY, exit_code=3
    )
    assert path.name in message
    assert "40x50" in message


def test_truncated_jpeg_is_quarantined_counted_and_left_out(ris, data, tmp_path):
    path = _first_image(data)
    path.write_bytes(path.read_bytes()[:500])
    cache = tmp_path / "c"
    result = ris("extract", "--split", "refcoco", "--data", data, "--cache", cache, *TINY, "--json")
    assert result.exit_code == 0, result.output
    (reason,) = json.loads(result.stdout)["quarantined"].values()
    assert path.name in reason
    trained = ris(
        "train", "--cache", cache, "--runs", tmp_path, "--run", "r", "--random-weights", "--device", "cpu",
        "--set", "train.steps=1", "--set", "train.batch_size=2", "--set", "train.val_samples=2", "--json",
    )  # fmt: skip
    assert trained.exit_code == 0, trained.output
    assert json.loads(trained.stdout)["left_out"] > 0


def test_a_repaired_image_is_taken_up_by_the_next_extraction(ris, data, tmp_path):
    path = _first_image(data)
    whole = path.read_bytes()
    command = ("extract", "--split", "refcoco", "--data", data, "--cache", tmp_path / "c", *TINY, "--json")
    path.write_bytes(whole[:500])
    assert len(json.loads(ris(*command).stdout)["quarantined"]) == 1
    assert len(json.loads(ris(*command).stdout)["quarantined"]) == 1
    path.write_bytes(whole)
    repaired = json.loads(ris(*command).stdout)
    assert repaired["added"] == 1
    assert repaired["quarantined"] == {}


def test_truncated_jpeg_stops_a_strict_extraction(refused, data, tmp_path):
    path = _first_image(data)
    path.write_bytes(path.read_bytes()[:500])
    message = refused(
        "extract", "--split", "refcoco", "--data", data, "--cache", tmp_path / "c", *TINY, "--strict",
        exit_code=3,
    )  # fmt: skip
    assert path.name in message


@pytest.mark.parametrize(
    ("split", "hint"),
    [("refcoco:vall", "'val'"), ("refcok", "refcoco"), ("refcoco/umd", "unc"), ("", "empty")],
)
def test_unknown_split_lists_the_known_ones(refused, drawn_data, tmp_path, split, hint):
    message = refused(
        "extract", "--split", split, "--data", drawn_data, "--cache", tmp_path / "c", *TINY, exit_code=2
    )
    assert hint in message


def test_split_that_was_not_extracted(refused, tiny_cache, tiny_runs):
    message = refused(
        "eval", "--cache", tiny_cache, "--runs", tiny_runs, "--split", "refcocog:val", exit_code=3
    )
    assert "ris extract --split refcocog/umd" in message


@pytest.mark.parametrize(
    ("override", "hint"),
    [
        ("train.stepz=3", "did you mean 'steps'?"),
        ("model.bert.hiddensize=3", "did you mean 'hidden_size'?"),
        ("lost.mask_dice=3", "did you mean 'loss'?"),
        ("train.steps=-3", "greater than 0"),
        ("train.steps", "section.key=value"),
        ("train=3", "train"),
        ("data.train=refcoco", "not the whole of refcoco/unc"),
        ("model.num_heads=5", "model.num_heads=5 does not divide"),
        ("model.norm_groups=7", "model.norm_groups=7 does not divide"),
        ("model.bert.num_heads=3", "model.bert.num_heads=3 does not divide"),
        ("model.max_tokens=600", "positions"),
    ],
)
def test_wrong_configuration_says_which_key_and_what_was_meant(refused, tiny_cache, tmp_path, override, hint):
    message = refused(
        "train", "--cache", tiny_cache, "--runs", tmp_path, "--random-weights", "--set", override, exit_code=2
    )
    assert hint in message


def test_all_problems_of_a_configuration_file_are_named_at_once(refused, tiny_cache, tmp_path):
    config = tmp_path / "my.yaml"
    config.write_text("train: {stepz: 3, lr: fast}\n")
    message = refused("train", "--cache", tiny_cache, "--config", config, "--random-weights", exit_code=2)
    assert "stepz" in message
    assert "train.lr" in message


def test_cache_of_other_weights_is_refused_field_by_field(refused, drawn_data, tiny_cache):
    message = refused(
        "extract", "--split", "refcoco", "--data", drawn_data, "--cache", tiny_cache, *TINY, "--seed", 1,
        exit_code=5,
    )  # fmt: skip
    assert "weights.sam.seed" in message


def test_checkpoint_of_another_cache_is_refused(ris, refused, drawn_data, tiny_runs, tmp_path):
    other = tmp_path / "other"
    ris("extract", "--split", "refcoco:val", "--data", drawn_data, "--cache", other, *TINY, "--seed", 1)
    message = refused("eval", "--cache", other, "--runs", tiny_runs, exit_code=5)
    assert "fingerprint" in message


def test_empty_and_missing_caches(refused, tmp_path):
    (tmp_path / "empty").mkdir()
    for name in ("empty", "missing"):
        message = refused("train", "--cache", tmp_path / name, exit_code=3)
        assert "ris extract" in message


def test_checkpoint_of_another_model_names_what_differs(refused, tiny_cache, tiny_runs, tmp_path):
    runs = tmp_path / "runs"
    shutil.copytree(tiny_runs, runs)
    path = runs / "first" / "checkpoints" / "best.safetensors"
    with safe_open(path, framework="pt") as file:
        metadata = json.loads(file.metadata()["ris"])
    metadata["config"]["model"]["num_queries"] = 7
    save_file(load_file(path), path, metadata={"ris": json.dumps(metadata)})
    message = refused("eval", "--cache", tiny_cache, "--runs", runs, exit_code=3)
    assert "another model" in message
    assert "dfam.query_features" in message


def test_damaged_and_foreign_checkpoints(refused, tiny_cache, tiny_runs, tmp_path):
    runs = tmp_path / "runs"
    shutil.copytree(tiny_runs, runs)
    path = runs / "first" / "checkpoints" / "best.safetensors"
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    assert "damaged" in refused("eval", "--cache", tiny_cache, "--runs", runs, exit_code=3)
    save_file({}, path)
    assert "not a checkpoint of ris" in refused("eval", "--cache", tiny_cache, "--runs", runs, exit_code=3)
    path.unlink()
    assert "no checkpoint" in refused("eval", "--cache", tiny_cache, "--runs", runs, exit_code=3)


def test_no_run_at_all(refused, tiny_cache, tmp_path):
    message = refused("eval", "--cache", tiny_cache, "--runs", tmp_path, exit_code=3)
    assert "ris train" in message


def test_text_that_looks_like_markup_is_only_text(ris, drawn_data, tiny_runs, tmp_path):
    result = ris(
        "predict", "--image", _first_image(drawn_data), "--text", "the [/] [red]circle", "--runs", tiny_runs,
        "--out", tmp_path,
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    assert "the [/] [red]circle" in result.stdout


def test_empty_expression(refused, drawn_data, tiny_runs):
    message = refused(
        "predict", "--image", _first_image(drawn_data), "--text", "  ", "--runs", tiny_runs, exit_code=2
    )
    assert "--text" in message


def test_blank_sentence_in_a_dataset_is_kept_and_said(ris, data, tmp_path):
    def blank(refs):
        ref = next(ref for ref in refs if ref["split"] == "val")
        ref["sentences"][0].update(raw=" ", sent="", tokens=[])

    _edit_refs(data, blank)
    result = ris("extract", "--split", "refcoco:val", "--data", data, "--cache", tmp_path / "c", *TINY)
    assert result.exit_code == 0, result.output
    assert "Blank sentences, kept: 1" in result.stderr


def test_two_point_polygon_is_kept_as_degenerate_and_counted(ris, data, tiny_runs, tmp_path):
    refs = pickle.loads((data / "refcoco" / "refs(unc).p").read_bytes())
    target = next(ref["ann_id"] for ref in refs if ref["split"] == "val")

    def two_points(document):
        for annotation in document["annotations"]:
            if annotation["id"] == target:
                annotation["segmentation"] = [[1.0, 2.0, 30.0, 40.0]]

    _edit_json(data / "refcoco" / "instances.json", two_points)
    cache = tmp_path / "c"
    result = ris("extract", "--split", "refcoco:val", "--data", data, "--cache", cache, *TINY)
    assert result.exit_code == 0, result.output
    assert "kept as empty masks: 1" in result.stderr
    scored = ris("eval", "--cache", cache, "--runs", tiny_runs, "--split", "refcoco:val", "--json")
    assert scored.exit_code == 0, scored.output
    (row,) = json.loads(scored.stdout)["results"]
    assert row["degenerate"] >= 1


def test_hostile_pickle_is_refused_and_nothing_runs(refused, data, tmp_path):
    canary = tmp_path / "canary"

    class Hostile:
        def __reduce__(self):
            return os.system, (f"touch {canary}",)

    (data / "refcoco" / "refs(unc).p").write_bytes(pickle.dumps([Hostile()], protocol=2))
    message = refused(
        "extract", "--split", "refcoco", "--data", data, "--cache", tmp_path / "c", *TINY, exit_code=4
    )
    assert "system" in message
    assert not canary.exists()


@pytest.mark.parametrize(
    ("preset", "hint"), [("paper", "sam_vit_b_01ec64.pth"), ("tiny", "--random-weights")]
)
def test_encoders_without_weights_say_what_to_get(refused, drawn_data, tmp_path, monkeypatch, preset, hint):
    monkeypatch.setenv("RIS_WEIGHTS", str(tmp_path))
    message = refused(
        "extract", "--split", "refcoco", "--data", drawn_data, "--cache", tmp_path / "c", "--preset", preset,
        exit_code=3,
    )  # fmt: skip
    assert hint in message


def test_training_without_bert_weights_says_what_to_do(refused, tiny_cache, tmp_path):
    message = refused("train", "--cache", tiny_cache, "--runs", tmp_path, "--device", "cpu", exit_code=3)
    assert "--random-weights" in message


def test_a_run_is_never_overwritten(refused, tiny_cache, tiny_runs):
    message = refused(
        "train", "--cache", tiny_cache, "--runs", tiny_runs, "--run", "first", "--random-weights", "--device",
        "cpu", "--resume", "never", exit_code=2,
    )  # fmt: skip
    assert "--run" in message


def test_unknown_device_preset_recipe_and_option(refused, drawn_data, tiny_cache, tmp_path):
    extract = ("extract", "--split", "refcoco", "--data", drawn_data, "--cache", tmp_path / "c")
    assert "paper, tiny" in refused(*extract, "--preset", "huge", exit_code=2)
    assert "ris doctor" in refused(
        *extract, "--preset", "tiny", "--random-weights", "--device", "warp", exit_code=2
    )
    assert "tiny" in refused("train", "--cache", tiny_cache, "--recipe", "nope", exit_code=2)
    assert "--spilt" in refused("extract", "--spilt", "refcoco", exit_code=2)


def test_ctrl_c_ends_with_130_and_the_extraction_can_be_run_again(ris, drawn_data, tmp_path):
    command = [
        sys.executable, "-m", "cli", "extract", "--split", "refcoco", "--data", str(drawn_data), "--cache",
        str(tmp_path / "c"), *TINY,
    ]  # fmt: skip
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 60
    while not (tmp_path / "c").exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 130, stderr
    assert "Traceback" not in stderr
    again = ris("extract", "--split", "refcoco", "--data", drawn_data, "--cache", tmp_path / "c", *TINY)
    assert again.exit_code == 0, again.output

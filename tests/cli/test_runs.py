"""`ris runs list`, `ris runs show` and `ris runs export`."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ris_train.run import RunDirectory
from ris_train.run_details import checkpoint_digest


@pytest.fixture(scope="module")
def runs(tiny_runs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run, and a copy whose configuration and last checkpoint are damaged."""
    root = tmp_path_factory.mktemp("listed")
    shutil.copytree(tiny_runs / "first", root / "first", ignore=shutil.ignore_patterns("eval"))
    shutil.copytree(tiny_runs / "first", root / "broken", ignore=shutil.ignore_patterns("eval"))
    (root / "broken" / "config.yaml").write_text("train: [")
    (root / "broken" / "checkpoints" / "last.safetensors").write_bytes(b"torn")
    return root


def test_every_run_is_listed_with_its_state_and_best_score(ris: Callable[..., Any], runs: Path) -> None:
    result = ris("runs", "list", "--runs", runs)
    assert result.exit_code == 0, result.output
    lines = result.stdout.splitlines()
    (first,) = [line for line in lines if "first" in line]
    assert "tiny" in first
    assert "finished, 6 steps" in first
    assert "oIoU" in first
    assert "refcoco:val" in first
    assert any("broken" in line and "damaged" in line for line in lines)
    assert "config.yaml" in result.stdout


def test_the_list_as_json_has_full_values(ris: Callable[..., Any], runs: Path) -> None:
    result = ris("runs", "list", "--runs", runs, "--json")
    assert result.exit_code == 0, result.output
    found = {run["name"]: run for run in json.loads(result.stdout)}
    assert found["first"]["state"] == "finished"
    assert found["first"]["best"]["rules"] == "ris"
    assert 0 <= found["first"]["best"]["value"] <= 1
    assert len(found["first"]["fingerprint"]) == 64
    assert found["broken"]["state"] == "damaged"
    assert found["broken"]["problems"]
    assert found["broken"]["best"] == found["first"]["best"], "its metrics are whole"


def test_a_run_is_shown_with_its_differences_metrics_and_checkpoints(
    ris: Callable[..., Any], runs: Path
) -> None:
    result = ris("runs", "show", "first", "--runs", runs, "--tail", "1")
    assert result.exit_code == 0, result.output
    assert "train.steps" in result.stdout
    assert "800" in result.stdout
    assert "best" in result.stdout
    assert "Last metrics" in result.stdout
    document = json.loads(ris("runs", "show", "first", "--runs", runs, "--json", "--tail", "2").stdout)
    assert document["config_differences"]["train.steps"] == {"recipe": 800, "run": 6}
    assert [line["step"] for line in document["metrics"]] == [6, 6]
    assert {one["name"] for one in document["checkpoints"]} >= {"best", "last"}
    assert document["facts"]["device"] == "cpu"


def test_a_damaged_run_is_shown_as_far_as_it_is_readable(ris: Callable[..., Any], runs: Path) -> None:
    result = ris("runs", "show", "broken", "--runs", runs)
    assert result.exit_code == 0, result.output
    assert "damaged" in result.stdout
    document = json.loads(ris("runs", "show", "broken", "--runs", runs, "--json").stdout)
    assert document["config_differences"] is None
    assert document["metrics"]
    (last,) = [one for one in document["checkpoints"] if one["name"] == "last"]
    assert "damaged" in last["problem"]


def test_a_run_that_was_not_evaluated_says_how_on_a_line_to_copy(ris: Callable[..., Any], runs: Path) -> None:
    lines = ris("runs", "show", "broken", "--runs", runs).stdout.splitlines()
    assert f"Not evaluated yet: ris eval --run {runs / 'broken'}" in lines


def test_scores_of_an_earlier_checkpoint_are_marked_and_not_exported(
    ris: Callable[..., Any], runs: Path, tmp_path: Path
) -> None:
    """A run that goes on from an earlier state may write another best checkpoint of the same step."""
    shutil.copytree(runs / "first", tmp_path / "first")
    run = RunDirectory(tmp_path / "first")
    scores = {"grid": "original", "threshold": 0.5, "num_samples": 7}
    for name, digest, value in (("now", checkpoint_digest(run, "best"), 0.125), ("before", "0" * 64, 0.875)):
        result = {
            "split": "refcoco.unc:testA", "rules": "ris", "category_source": "none", "expressions": "own",
            "scores": {"ris": {**scores, "oIoU": value}},
        }  # fmt: skip
        facts = {"checkpoint": "best", "step": 3, "checkpoint_sha256": digest}
        run.write_evaluation(name, {**facts, "results": [result]})
    output = ris("runs", "show", "first", "--runs", tmp_path).stdout
    assert "* before: of an earlier checkpoint best" in output
    assert "* now" not in output
    document = json.loads(ris("runs", "show", "first", "--runs", tmp_path, "--json").stdout)
    stale = {one["name"]: one["stale"] for one in document["evaluations"]}
    assert stale == {"before": "of an earlier checkpoint best", "now": ""}
    exported = ris("runs", "export", "first", "--runs", tmp_path, "--out", tmp_path / "model")
    assert exported.exit_code == 0, exported.output
    card = (tmp_path / "model" / "README.md").read_text()
    assert "12.50" in card
    assert "87.50" not in card


def test_an_unknown_run_and_an_empty_place_are_said_so(
    ris: Callable[..., Any], runs: Path, tmp_path: Path
) -> None:
    result = ris("runs", "show", "third", "--runs", runs)
    assert result.exit_code == 3
    assert "no run 'third'" in result.stderr
    assert "broken, first" in result.stderr
    assert ris("runs", "list", "--runs", tmp_path / "nowhere").exit_code == 3
    result = ris("runs", "list", "--runs", tmp_path, "--json")
    assert (result.exit_code, json.loads(result.stdout)) == (0, [])


def test_an_exported_model_predicts_what_its_run_predicts(
    ris: Callable[..., Any], runs: Path, drawn_data: Path, tmp_path: Path
) -> None:
    model = tmp_path / "model"
    result = ris("runs", "export", "first", "--runs", runs, "--out", model, "--licence", "mit", "--json")
    assert result.exit_code == 0, result.output
    document = json.loads(result.stdout)
    assert (document["folder"], document["run"], document["checkpoint"]) == (str(model), "first", "best")
    assert document["step"] in (3, 6)
    assert "license: mit" in (model / "README.md").read_text()
    image = sorted((drawn_data / "images" / "train2014").iterdir())[0]
    base = ("predict", "--image", image, "--text", "the red circle", "--device", "cpu", "--json")
    masks = []
    for name, options in (("a", ("--model", model)), ("b", ("--run", "first", "--runs", runs))):
        result = ris(*base, *options, "--out", tmp_path / name)
        assert result.exit_code == 0, result.output
        masks.append(Path(json.loads(result.stdout)["mask"]).read_bytes())
    assert masks[0] == masks[1]


def test_the_last_checkpoint_is_exported_if_asked_for_and_the_way_on_is_shown(
    ris: Callable[..., Any], runs: Path, tmp_path: Path
) -> None:
    result = ris("runs", "export", "first", "--runs", runs, "--out", tmp_path / "model", "--last")
    assert result.exit_code == 0, result.output
    assert "last, step 6" in result.stdout
    assert "ris predict --model" in result.stdout
    again = ris("runs", "export", "first", "--runs", runs, "--out", tmp_path / "model")
    assert again.exit_code == 2
    assert "is not empty" in again.stderr
    missing = ris("runs", "export", "third", "--runs", runs, "--out", tmp_path / "other")
    assert missing.exit_code == 3
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


@pytest.mark.parametrize(
    ("options", "code", "words"),
    [
        (("--model", "there/is/none"), 3, "There is no model at there/is/none"),
        (("--model", "a", "--run", "first"), 2, "--model and --run each name a model"),
    ],
    ids=["nowhere", "two"],
)
def test_a_model_that_cannot_be_meant_is_refused(
    ris: Callable[..., Any], tmp_path: Path, options: tuple[str, ...], code: int, words: str
) -> None:
    result = ris("predict", "--image", tmp_path / "a.jpg", "--text", "a circle", "--device", "cpu", *options)
    assert result.exit_code == code, result.output
    assert words in result.stderr

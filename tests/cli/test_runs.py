"""`ris runs list` and `ris runs show`."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest


@pytest.fixture(scope="module")
def runs(tiny_runs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run, and a copy whose configuration and last checkpoint are damaged."""
    root = tmp_path_factory.mktemp("listed")
    shutil.copytree(tiny_runs / "first", root / "first")
    shutil.copytree(tiny_runs / "first", root / "broken")
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

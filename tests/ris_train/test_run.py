"""Run directories: made once, found again, and written as files that other programs read."""

from __future__ import annotations

import json
import os
import re
from datetime import datetime
from pathlib import Path

import pytest
import yaml

from ris_cache.errors import CheckpointError, ConfigError
from ris_train.config import load_config, parse_config
from ris_train.run import RunDirectory, find_run, new_run_path

CONFIG = load_config(recipe="tiny")


def make_run(path: Path, *, modified: int | None = None) -> RunDirectory:
    """Create a run; `modified` sets the time, in seconds, at which its configuration was written."""
    run = RunDirectory.create(path, CONFIG, facts={"device": "cpu"})
    if modified is not None:
        os.utime(run.config_path, (modified, modified))
    return run


def test_a_new_run_holds_its_configuration_and_its_environment(tmp_path: Path) -> None:
    run = RunDirectory.create(
        tmp_path / "runs" / "a", CONFIG, facts={"device": "cpu", "weights": {"sam": "x"}}
    )
    assert parse_config(yaml.safe_load(run.config_path.read_text()), origin="the run") == CONFIG
    facts = json.loads((run.path / "env.json").read_text())
    assert facts["device"] == "cpu"
    assert facts["weights"] == {"sam": "x"}
    assert set(facts["libraries"]) >= {"ris", "torch", "transformers", "numpy"}
    assert datetime.fromisoformat(facts["started"]).utcoffset() is not None


def test_a_run_is_never_written_over(tmp_path: Path) -> None:
    run = make_run(tmp_path / "a")
    before = {path: path.read_bytes() for path in run.path.iterdir()}
    with pytest.raises(ConfigError, match="holds a run already") as caught:
        RunDirectory.create(run.path, load_config(recipe="paper"), facts={})
    assert str(run.path) in str(caught.value)
    assert "--run" in str(caught.value)
    assert {path: path.read_bytes() for path in run.path.iterdir()} == before


def test_without_a_name_the_latest_run_is_meant(tmp_path: Path) -> None:
    make_run(tmp_path / "b-old", modified=1_000)
    latest = make_run(tmp_path / "a-new", modified=3_000)
    make_run(tmp_path / "c-older", modified=2_000)
    (tmp_path / "not-a-run").mkdir()
    assert find_run(tmp_path, None) == latest


def test_a_run_is_found_by_its_name_or_its_path(tmp_path: Path) -> None:
    first = make_run(tmp_path / "first", modified=1_000)
    make_run(tmp_path / "second", modified=2_000)
    assert find_run(tmp_path, "first") == first
    assert find_run(tmp_path / "elsewhere", str(first.path)) == first


def test_an_unknown_run_lists_those_there_are(tmp_path: Path) -> None:
    make_run(tmp_path / "second")
    make_run(tmp_path / "first")
    with pytest.raises(CheckpointError, match=r"no run 'third' in .*; there are first, second\."):
        find_run(tmp_path, "third")


def test_a_name_in_an_empty_place_says_there_are_none(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="there are none"):
        find_run(tmp_path, "first")


@pytest.mark.parametrize("name", ["", "missing"], ids=["empty", "missing"])
def test_no_run_at_all_says_how_to_make_one(tmp_path: Path, name: str) -> None:
    with pytest.raises(CheckpointError, match="ris train") as caught:
        find_run(tmp_path / name, None)
    assert caught.value.exit_code == 3


def test_metrics_are_one_json_object_a_line_in_the_order_logged(tmp_path: Path) -> None:
    run = make_run(tmp_path / "a")
    records: list[dict[str, object]] = [
        {"step": 1, "loss": 0.1},
        {"step": 2, "val": 'a "quoted"\nname'},
        {"step": 3, "loss": 1e-9},
    ]
    for record in records:
        run.log(record)
    text = run.metrics_path.read_text(encoding="utf-8")
    assert text.endswith("\n")
    assert [json.loads(line) for line in text.splitlines()] == records


def test_an_evaluation_is_kept_as_json_and_replaced_by_a_later_one(tmp_path: Path) -> None:
    run = make_run(tmp_path / "a")
    run.write_evaluation("scores", {"results": [1]})
    path = run.write_evaluation("scores", {"results": [2]})
    assert path == run.path / "eval" / "scores.json"
    assert json.loads(path.read_text()) == {"results": [2]}
    assert list(path.parent.iterdir()) == [path]


def test_a_new_run_is_named_after_its_recipe_and_the_time(tmp_path: Path) -> None:
    path = new_run_path(tmp_path, "tiny")
    assert path.parent == tmp_path
    assert re.fullmatch(r"tiny-\d{8}-\d{6}", path.name)


def test_a_score_over_nothing_is_null_in_every_file(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    run.log({"step": 1, "oIoU": float("nan")})
    path = run.write_evaluation("scores", {"results": [{"oIoU": float("nan"), "mIoU": 0.5}]})
    assert json.loads(run.metrics_path.read_text()) == {"step": 1, "oIoU": None}
    assert json.loads(path.read_text()) == {"results": [{"oIoU": None, "mIoU": 0.5}]}

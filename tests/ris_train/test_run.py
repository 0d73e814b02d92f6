"""Run directories: made once, found again, and written as files that other programs read."""

from __future__ import annotations

import errno
import json
import os
import re
import shlex
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime
from pathlib import Path

import pytest
import yaml

from ris_cache.errors import CheckpointError, ConfigError
from ris_cache.store.locks import FileLock
from ris_train.config import load_config, parse_config
from ris_train.run import RunDirectory, find_run, free_run, new_run_path
from ris_train.run_listing import list_runs

CONFIG = load_config(recipe="tiny")


def make_run(path: Path, *, started: str | None = None) -> RunDirectory:
    """Create a run, which says that it was started at a time."""
    run = RunDirectory.create(path, CONFIG, facts={"device": "cpu"})
    if started is not None:
        run.facts_path.write_text(json.dumps({"started": started}))
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
    old = make_run(tmp_path / "b-old", started="2026-01-01T00:00:00+00:00")
    latest = make_run(tmp_path / "a-new", started="2026-01-03T00:00:00+00:00")
    make_run(tmp_path / "c-older", started="2026-01-02T00:00:00+00:00")
    make_run(tmp_path / "d-latest-too", started="2026-01-03T00:00:00+00:00")
    (tmp_path / "not-a-run").mkdir()
    old.write_config(CONFIG)  # as a run does that goes on
    assert find_run(tmp_path, None) == latest
    assert list_runs(tmp_path)[0].path == latest.path, "one order for both"


def test_a_run_is_found_by_its_name_or_its_path(tmp_path: Path) -> None:
    first = make_run(tmp_path / "first", started="2026-01-01T00:00:00+00:00")
    make_run(tmp_path / "second", started="2026-01-02T00:00:00+00:00")
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


def test_a_new_run_that_nobody_named_takes_the_next_free_name(tmp_path: Path) -> None:
    """Begun in the same second by several, each gets its own."""
    path = tmp_path / "runs" / "tiny-20260101-120000"
    with ThreadPoolExecutor(4) as pool:
        found = sorted(pool.map(free_run, [path] * 4))
    assert [one.name.removeprefix(path.name) for one in found] == ["", "-2", "-3", "-4"]
    assert all(one.is_dir() for one in found)
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="is a file, so no run can be at"):
        free_run(tmp_path / "file" / "a")


def test_the_command_that_goes_on_can_be_given_to_a_shell(tmp_path: Path) -> None:
    command = RunDirectory(tmp_path / "my runs" / "a").resume_command(Path("feats"))
    assert shlex.split(command) == [
        "ris", "train", "--cache", "feats", "--run", "a", "--runs", str(tmp_path / "my runs"),
    ]  # fmt: skip


@pytest.mark.parametrize("content", [None, "{", "[]", '{"resumed": 3}'])
def test_a_run_goes_on_whatever_became_of_its_environment(tmp_path: Path, content: str | None) -> None:
    run = make_run(tmp_path / "a")
    run.facts_path.unlink()
    if content is not None:
        run.facts_path.write_text(content)
    for step in (1, 2):
        run.add_resumption({"step": step}, begun={"device": "cpu"})
    facts = json.loads(run.facts_path.read_text())
    assert [one["step"] for one in facts["resumed"]] == [1, 2]
    assert facts.get("device", "cpu") == "cpu"


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


def test_what_is_left_of_a_run_without_its_configuration_is_not_mixed_with_another(tmp_path: Path) -> None:
    run = make_run(tmp_path / "a")
    run.log({"step": 1, "loss": 0.5})
    run.config_path.unlink()
    with pytest.raises(ConfigError, match=r"no config\.yaml. Put that back"):
        make_run(run.path)
    run.metrics_path.unlink()
    make_run(run.path)  # a run that was killed before it wrote its configuration is no obstacle


@pytest.mark.parametrize(
    ("content", "what"),
    [
        ("train: [", "is not YAML: while parsing"),
        ("", "holds no configuration"),
        ("train: {stepz: 1}", "steps"),
    ],
    ids=["torn", "empty", "unknown-key"],
)
def test_a_damaged_configuration_is_named_with_what_to_do(tmp_path: Path, content: str, what: str) -> None:
    run = make_run(tmp_path / "a")
    run.config_path.write_text(content)
    with pytest.raises(ConfigError, match=re.escape(what)) as caught:
        run.read_config()
    assert str(run.config_path) in str(caught.value)


def test_a_run_is_held_by_one_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ris_train.run_lock.LOCK_SECONDS", 0.05)
    run = RunDirectory(tmp_path / "runs" / "a")
    with (
        run.held(),
        pytest.raises(
            CheckpointError, match=rf"another process \(process {os.getpid()} on .*--run NAME"
        ) as caught,
        RunDirectory(run.path).held(),
    ):
        pass
    assert caught.value.exit_code == 3
    run.lock_path.write_text("")
    with run.held():
        pass


def test_a_look_at_the_lock_does_not_keep_a_training_out(tmp_path: Path) -> None:
    """`ris runs list` holds it, shared, for as long as it takes to find out."""
    run = make_run(tmp_path / "a")
    look = FileLock(run.lock_path)
    look.acquire(shared=True)
    end = threading.Timer(0.1, look.release)
    began = time.monotonic()
    end.start()
    with run.held():
        assert 0.05 < time.monotonic() - began < 1
    end.join()


@pytest.mark.parametrize("number", [errno.ENOTSUP, errno.ENOLCK])
def test_a_place_without_locks_is_said_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    def no_locks(descriptor: int, operation: int) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr("fcntl.flock", no_locks)
    with (
        pytest.raises(CheckpointError, match=f"{os.strerror(number)}.*--runs"),
        RunDirectory(tmp_path / "a").held(),
    ):
        pass


def test_a_file_is_no_place_for_a_run(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("")
    for path in (tmp_path / "a", tmp_path / "a" / "b"):
        with pytest.raises(ConfigError, match="is a file"), RunDirectory(path).held():
            pass

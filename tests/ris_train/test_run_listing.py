"""Lists of runs: states from files alone, and a damaged directory as a line of its own."""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ris_cache.errors import CheckpointError
from ris_cache.store.files import LOCK_NAME
from ris_cache.store.locks import FileLock
from ris_train.checkpoint import read_metadata
from ris_train.config import load_config
from ris_train.run import RunDirectory, find_run
from ris_train.run_details import checkpoint_digest, checkpoint_files, config_differences, evaluation_files
from ris_train.run_facts import reported_scores
from ris_train.run_listing import best_score, find_any_run, is_training, list_runs, summarise

CONFIG = load_config(recipe="tiny", overrides=["train.steps=100", "train.eval_every=50"])


@pytest.fixture
def run(tmp_path: Path) -> RunDirectory:
    """A run of a hundred steps that has not logged anything yet."""
    return RunDirectory.create(
        tmp_path / "runs" / "one", CONFIG, facts={"device": "cpu", "fingerprint": "ab" * 32}
    )


def evaluation(step: int, value: float | None, *, rules: str = "ris", metric: str = "oIoU") -> dict[str, Any]:
    return {"step": step, "val": "refcoco:val", "rules": rules, "num_samples": 7, metric: value}


def test_a_run_is_stopped_where_its_metrics_end_and_finished_at_its_last_step(run: RunDirectory) -> None:
    assert (summarise(run).state, summarise(run).step, summarise(run).steps) == ("stopped", 0, 100)
    run.log({"step": 20, "loss": 1.0})
    assert (summarise(run).state, summarise(run).step) == ("stopped", 20)
    run.log({"step": 100, "loss": 0.5})
    assert (summarise(run).state, summarise(run).step) == ("finished", 100)


def test_a_state_that_is_later_than_the_metrics_counts(run: RunDirectory) -> None:
    run.log({"step": 20, "loss": 1.0})
    for name in ("state-30", "state-9", "state-x", "state-"):
        (run.path / "checkpoints" / name).mkdir(parents=True)
    assert summarise(run).step == 30


def test_a_run_whose_lock_is_held_by_another_process_is_running(run: RunDirectory) -> None:
    program = (
        "import sys\nfrom pathlib import Path\nfrom ris_cache.store.locks import FileLock\n"
        "lock = FileLock(Path(sys.argv[1]))\nlock.acquire()\nprint('held', flush=True)\nsys.stdin.read()\n"
    )
    assert not is_training(run)
    holder = subprocess.Popen(
        [sys.executable, "-c", program, str(run.path / LOCK_NAME)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        assert summarise(run).state == "running"
    finally:
        holder.kill()
        holder.communicate()
    assert summarise(run).state == "stopped", "the kernel drops a killed holder's lock"


def test_looking_at_a_lock_leaves_it_free_and_makes_none(run: RunDirectory) -> None:
    assert not is_training(run)
    assert not (run.path / LOCK_NAME).exists()
    with FileLock(run.path / LOCK_NAME):
        assert is_training(run)
    assert not is_training(run)
    assert FileLock(run.path / LOCK_NAME).acquire(wait=False)


def test_the_best_score_is_by_the_headline_of_its_rules(run: RunDirectory) -> None:
    for step, value in ((25, 0.3), (50, 0.5), (75, 0.5), (100, 0.4)):
        run.log({"step": step, "loss": 1.0})
        run.log(evaluation(step, value))
    best = summarise(run).best
    assert best is not None
    assert (best.step, best.split, best.rules, best.metric) == (50, "refcoco:val", "ris", "oIoU")
    assert (best.value, best.num_samples) == (0.5, 7)
    assert math.isnan(best.values["mIoU"]), "not in the line"


def test_a_score_over_nothing_is_worse_than_any(run: RunDirectory) -> None:
    run.log(evaluation(10, float("nan")))
    found = summarise(run).best
    assert found is not None
    assert math.isnan(found.value)
    run.log(evaluation(20, 0.0))
    run.log(evaluation(30, None))
    found = summarise(run).best
    assert found is not None
    assert (found.step, found.value) == (20, 0.0)


@given(st.lists(st.none() | st.floats(0, 1), max_size=8))
def test_the_best_score_is_the_first_of_the_greatest(values: list[float | None]) -> None:
    lines = [evaluation(step, value) for step, value in enumerate(values, start=1)]
    best = best_score([{"step": 0, "loss": 1.0}, *lines])
    numbers = [value for value in values if value is not None]
    if not values:
        assert best is None
    elif numbers:
        assert best is not None
        assert (best.value, best.step) == (max(numbers), values.index(max(numbers)) + 1)
    else:
        assert best is not None
        assert best.step == len(values), "without any score the latest is kept, as training keeps it"


@pytest.mark.parametrize("value", [10**400, "0.5", [0.5], {}, True, -1, 2, float("inf")])
def test_what_can_be_no_score_is_none(value: object) -> None:
    best = best_score([{**evaluation(1, 0.25), "mIoU": value}])
    assert best is not None
    assert best.value == 0.25
    assert math.isnan(best.values["mIoU"])


def test_scores_by_unknown_rules_are_passed_over() -> None:
    assert best_score([evaluation(1, 0.5, rules="of tomorrow"), {"step": 2, "rules": 3}]) is None


def test_a_line_cut_short_by_a_kill_is_no_damage(run: RunDirectory) -> None:
    run.log({"step": 20, "loss": 1.0})
    with run.metrics_path.open("a") as file:
        file.write('{"step": 30, "lo')
    summary = summarise(run)
    assert (summary.state, summary.step, summary.problems) == ("stopped", 20, ())


DAMAGES: dict[str, tuple[Callable[[RunDirectory], object], str]] = {
    "no configuration": (lambda run: run.config_path.unlink(), "config.yaml is missing"),
    "not YAML": (lambda run: run.config_path.write_text("a: [b"), "config.yaml"),
    "not text": (lambda run: run.config_path.write_bytes(b"\xff\xfe\x00"), "config.yaml"),
    "a list": (lambda run: run.config_path.write_text("- a"), "config.yaml must hold sections"),
    "an empty file": (lambda run: run.config_path.write_text(""), "config.yaml holds no configuration"),
    "a number of two meanings": (
        lambda run: run.config_path.write_text("train: {steps: 010}"),
        "010 is a number that can be read in two ways",
    ),
    "configuration without end": (
        lambda run: run.config_path.write_text("a: " + 3000 * "[" + 3000 * "]"),
        "nested too deeply",
    ),
    "environment without end": (
        lambda run: (run.path / "env.json").write_text('{"a": ' + 600 * "[" + 600 * "]" + "}"),
        "env.json: nested too deeply",
    ),
    "metrics without end": (
        lambda run: run.metrics_path.write_text('{"step": ' + 9000 * "[" + 9000 * "]" + "}\n"),
        "metrics.jsonl, line 1: nested too deeply",
    ),
    "metrics with a switch for a step": (
        lambda run: run.metrics_path.write_text('{"step": true}\n'),
        "metrics.jsonl, line 1: names no step",
    ),
    "another version's": (
        lambda run: run.config_path.write_text("train: {stepz: 3}"),
        "stepz: unknown key; did you mean 'steps'",
    ),
    "no environment": (lambda run: (run.path / "env.json").unlink(), "env.json is missing"),
    "environment cut short": (lambda run: (run.path / "env.json").write_text('{"a"'), "env.json"),
    "metrics damaged": (
        lambda run: run.metrics_path.write_text('{"step": 1}\nnonsense\n{"step": 3}\n'),
        "metrics.jsonl, line 2",
    ),
    "metrics without steps": (lambda run: run.metrics_path.write_text('{"loss": 1}\n'), "names no step"),
    "metrics are a folder": (lambda run: run.metrics_path.mkdir(), "metrics.jsonl"),
    "configuration is a folder": (
        lambda run: (run.config_path.unlink(), run.config_path.mkdir()),
        "config.yaml",
    ),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_run_is_listed_as_such_beside_the_others(run: RunDirectory, damage: str) -> None:
    RunDirectory.create(run.path.parent / "whole", CONFIG, facts={})
    break_it, message = DAMAGES[damage]
    break_it(run)
    found = {summary.name: summary for summary in list_runs(run.path.parent)}
    assert found["whole"].state == "stopped"
    assert found["one"].state == "damaged"
    assert message in found["one"].problems[0]
    json.dumps(found["one"].as_dict())


def test_what_is_readable_of_a_damaged_run_is_shown(run: RunDirectory) -> None:
    run.log({"step": 20, "loss": 1.0})
    run.config_path.unlink()
    summary = summarise(run)
    assert (summary.step, summary.steps, summary.recipe) == (20, None, None)
    assert summary.fingerprint == "ab" * 32


def test_runs_are_listed_latest_first_and_other_directories_are_not(tmp_path: Path) -> None:
    for name, started in (("b", "2026-01-02"), ("a", "2026-01-03"), ("c", "2026-01-01")):
        path = RunDirectory.create(tmp_path / name, CONFIG, facts={}).path / "env.json"
        path.write_text(json.dumps({"started": started}))
    (tmp_path / "plots").mkdir()
    (tmp_path / "notes.txt").write_text("no run")
    (tmp_path / "torn" / "checkpoints").mkdir(parents=True)
    assert [run.name for run in list_runs(tmp_path)] == ["a", "b", "c", "torn"]


def test_no_directory_of_runs_says_how_to_make_one(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="ris train"):
        list_runs(tmp_path / "nowhere")


def test_a_damaged_run_is_found_by_name_and_an_unknown_one_lists_those_there_are(run: RunDirectory) -> None:
    run.config_path.unlink()
    assert find_any_run(run.path.parent, "one") == run
    assert find_any_run(Path("elsewhere"), str(run.path)) == run
    with pytest.raises(CheckpointError, match=r"no run 'two' in .*; there are one\."):
        find_any_run(run.path.parent, "two")


def test_the_differences_to_the_recipe_are_leaf_by_leaf() -> None:
    assert config_differences(load_config(recipe="tiny")) == []
    found = config_differences(
        load_config(recipe="tiny", overrides=["model.bert.dropout=0.2", "train.steps=3"])
    )
    assert found == [("model.bert.dropout", 0.0, 0.2), ("train.steps", 800, 3)]


def test_a_recipe_that_ships_no_more_has_no_differences() -> None:
    assert config_differences(CONFIG.model_copy(update={"recipe": "of yesterday"})) is None


def test_checkpoints_name_their_step_and_damaged_ones_their_problem(tiny_runs: Path, tmp_path: Path) -> None:
    trained = RunDirectory(tiny_runs / "first")
    run = RunDirectory(tmp_path)
    best = run.checkpoint_path("best")
    best.parent.mkdir()
    best.write_bytes(trained.checkpoint_path("best").read_bytes())
    run.checkpoint_path("last").write_bytes(best.read_bytes()[:40])
    state = best.parent / "state-4"
    state.mkdir()
    (state / "weights").write_bytes(bytes(10))
    found = {checkpoint.name: checkpoint for checkpoint in checkpoint_files(run)}
    assert set(found) == {"best", "last", "state-4"}
    assert found["best"].step in (3, 6)
    assert (found["best"].problem, found["best"].num_bytes) == ("", best.stat().st_size)
    assert found["last"].step is None
    assert "damaged" in found["last"].problem
    assert (found["state-4"].step, found["state-4"].num_bytes) == (4, 10)


TERMS = {"grid": "original", "threshold": 0.5, "num_samples": 7}
SPLIT = {"split": "refcoco.unc:val", "rules": "ris", "category_source": "none", "expressions": "own"}


def keep_evaluation(run: RunDirectory, name: str, checkpoint: str = "best", **facts: Any) -> None:
    scores = {
        "lavt": {**TERMS, "oIoU": 0.1},
        "ris": {**TERMS, "oIoU": 0.25, "mIoU": None, "overlap": "union"},
    }
    document = {"checkpoint": checkpoint, "step": 50, "results": [{**SPLIT, "scores": scores}]}
    run.write_evaluation(name, document | facts)


def test_evaluations_name_split_rules_and_grid_and_damaged_ones_their_problem(run: RunDirectory) -> None:
    keep_evaluation(run, "scores-best-none")
    (run.path / "eval" / "torn.json").write_text('{"results": [')
    (run.path / "eval" / "foreign.json").write_text('{"checkpoint": "best"}')
    foreign, good, torn = evaluation_files(run)
    assert [score.rules for score in good.scores] == ["ris", "lavt"]
    assert (good.checkpoint, good.step) == ("best", 50)
    first = good.scores[0]
    assert (first.split, first.grid, first.num_samples) == ("refcoco.unc:val", "original", 7)
    assert (first.metric, first.value) == ("oIoU", 0.25)
    assert first.values == {"oIoU": 0.25, "mIoU": None}
    assert "lacks 'results'" in foreign.problem
    assert "cannot be read" in torn.problem


def test_an_evaluation_is_of_the_file_whose_digest_it_has(run: RunDirectory) -> None:
    for checkpoint in ("best", "last"):
        run.checkpoint_path(checkpoint).parent.mkdir(exist_ok=True)
        run.checkpoint_path(checkpoint).write_bytes(checkpoint.encode())
        digest = checkpoint_digest(run, checkpoint)
        keep_evaluation(run, f"{checkpoint}-now", checkpoint, checkpoint_sha256=digest)
        keep_evaluation(run, f"{checkpoint}-before", checkpoint, checkpoint_sha256="0" * 64)
    keep_evaluation(run, "silent")
    keep_evaluation(run, "unnamed", None)  # type: ignore[arg-type]
    run.checkpoint_path("last").unlink()
    assert {one.name: one.stale for one in evaluation_files(run)} == {
        "best-now": "",
        "best-before": "of an earlier checkpoint best",
        "last-now": "of a checkpoint last that is not there",
        "last-before": "of a checkpoint last that is not there",
        "silent": "of a checkpoint best that it does not identify",
        "unnamed": "of a checkpoint that it does not identify",
    }


def test_a_model_card_has_the_evaluations_of_this_very_checkpoint_alone(
    tiny_runs: Path, tmp_path: Path
) -> None:
    """Another `best` of the same step is there where a run went on from an earlier state otherwise."""
    run = RunDirectory(tmp_path)
    run.checkpoint_path("best").parent.mkdir()
    content = RunDirectory(tiny_runs / "first").checkpoint_path("best").read_bytes()
    run.checkpoint_path("best").write_bytes(content)
    metadata = read_metadata(run.checkpoint_path("best"))
    for name, digest in (
        ("now", hashlib.sha256(content).hexdigest()),
        ("before", "0" * 64),
        ("silent", None),
    ):
        split = {**SPLIT, "split": name, "scores": {"ris": {**TERMS, "oIoU": 0.5}}}
        facts = {"step": metadata.step, "checkpoint_sha256": digest, "results": [split]}
        keep_evaluation(run, name, **facts)
    assert [score.split for score in reported_scores(run, "best", metadata)] == ["now"]
    assert reported_scores(run, "last", metadata) == ()


BAD_DOCUMENTS = {
    "no document": [],
    "a name for a number": {"checkpoint": "best", "step": "x", "results": []},
    "results are text": {"results": "none"},
    "a score is text": {"results": [{**SPLIT, "scores": {"ris": {**TERMS, "oIoU": "high"}}}]},
    "a score is a list": {"results": [{**SPLIT, "scores": {"ris": {**TERMS, "oIoU": [1]}}}]},
    "a score is no number": {"results": [{**SPLIT, "scores": {"ris": {**TERMS, "oIoU": math.nan}}}]},
    "a split is a number": {"results": [{**SPLIT, "split": 3, "scores": {}}]},
    "no samples": {"results": [{**SPLIT, "scores": {"ris": {**TERMS, "num_samples": None}}}]},
    "refused by a list": {"results": [{**SPLIT, "scores": {"ris": {**TERMS, "refused": []}}}]},
}


@pytest.mark.parametrize("damage", BAD_DOCUMENTS)
def test_an_evaluation_of_wrong_types_is_a_problem_and_hides_no_other(run: RunDirectory, damage: str) -> None:
    keep_evaluation(run, "whole")
    (run.path / "eval" / "bad.json").write_text(json.dumps(BAD_DOCUMENTS[damage]))
    bad, whole = evaluation_files(run)
    assert bad.problem.startswith("cannot be read: ")
    assert (bad.scores, whole.problem, len(whole.scores)) == ((), "", 2)


def test_an_evaluation_without_end_is_a_problem(run: RunDirectory) -> None:
    (run.path / "eval").mkdir()
    for name, depth in (("deep", 600), ("deeper", 100_000)):
        (run.path / "eval" / f"{name}.json").write_text('{"results": ' + depth * "[" + depth * "]" + "}")
    assert [one.problem for one in evaluation_files(run)] == ["cannot be read: nested too deeply"] * 2


def test_a_real_run_has_no_problems(tiny_runs: Path) -> None:
    (summary,) = [run for run in list_runs(tiny_runs) if run.name == "first"]
    assert (summary.state, summary.step, summary.steps, summary.problems) == ("finished", 6, 6, ())
    assert summary.best is not None
    assert summary.best.split == "refcoco:val"
    assert summary.recipe == "tiny"


def test_listing_loads_no_torch() -> None:
    program = (
        "import sys, ris_train.run_listing, ris_train.run_details, cli.runs; sys.exit('torch' in sys.modules)"
    )
    root = Path(__file__).parents[2]
    assert subprocess.run([sys.executable, "-c", program], check=False, cwd=root).returncode == 0


@pytest.fixture
def unprivileged() -> Iterator[Path]:
    """A folder that everybody may enter, used by somebody who may not enter everything."""
    root = Path(tempfile.mkdtemp())
    root.chmod(0o777)
    is_root = os.geteuid() == 0
    if is_root:
        os.seteuid(65534)
    try:
        yield root
    finally:
        if is_root:
            os.seteuid(0)
        subprocess.run(["chmod", "-R", "u+rwX", str(root)], check=True)
        shutil.rmtree(root)


@pytest.mark.parametrize("name", [".", "config.yaml", "env.json", "metrics.jsonl", "checkpoints"])
def test_what_may_not_be_read_is_a_problem_and_hides_no_other_run(unprivileged: Path, name: str) -> None:
    one = RunDirectory.create(unprivileged / "one", CONFIG, facts={})
    RunDirectory.create(unprivileged / "two", CONFIG, facts={})
    one.log({"step": 1})
    one.checkpoints_dir.mkdir()
    (one.path / "eval").mkdir()
    (one.path / name).chmod(0)
    found = {run.name: run for run in list_runs(unprivileged)}
    assert (found["one"].state, found["two"].state) == ("damaged", "stopped")
    assert any("Permission denied" in problem for problem in found["one"].problems)
    assert find_any_run(unprivileged, "one") == one
    assert find_run(unprivileged, None).path.name in ("one", "two")
    checkpoints, evaluations = checkpoint_files(one), evaluation_files(one)
    if name in (".", "checkpoints"):
        assert [file.problem for file in checkpoints] == ["cannot be read: Permission denied"]
    if name == ".":
        assert [file.problem for file in evaluations] == ["cannot be read: Permission denied"]
    else:
        assert evaluations == []

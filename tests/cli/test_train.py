"""`ris train` as a process: killed, signalled, resumed, planned."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from safetensors.torch import load_file

from ris_train.run import RunDirectory
from ris_train.run_listing import summarise

STEPS = 12
SETTINGS = (
    "train.batch_size=4", "train.eval_every=4", "train.checkpoint_every=2", "train.log_every=3",
    "train.val_samples=2", "model.bert.dropout=0.1", "loss.num_points=16", "loss.mask_size=32",
)  # fmt: skip


def command(cache: Path, runs: Path, name: str, *more: object) -> list[str]:
    """One `ris train` of a few steps on one thread."""
    settings = [part for setting in SETTINGS for part in ("--set", setting)]
    arguments = [
        "train",
        "--cache",
        cache,
        "--runs",
        runs,
        "--run",
        name,
        "--random-weights",
        "--device",
        "cpu",
    ]
    return [sys.executable, "-m", "cli", *map(str, arguments), *settings, *map(str, more)]


def start(arguments: list[str]) -> subprocess.Popen[str]:
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        arguments, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )


def last_step(run: Path) -> int:
    """Step of the latest state, -1 before the first."""
    steps = [int(path.name.removeprefix("state-")) for path in run.glob("checkpoints/state-*")]
    return max(steps, default=-1)


def end_at(arguments: list[str], run: Path, step: int, delay: float, number: int) -> int:
    """Send a signal a moment after the state of a step was saved; returns the exit code."""
    process = start(arguments)
    while last_step(run) < step:
        assert process.poll() is None, process.communicate()
        time.sleep(0.005)
    time.sleep(delay)
    if number == signal.SIGTERM:
        process.stderr.close()  # as of a `tee` that the same Ctrl-C has ended
    process.send_signal(number)
    process.communicate()
    assert summarise(RunDirectory(run)).state == "stopped"
    return process.returncode


def lines(run: Path) -> list[dict[str, object]]:
    """Lines of the metrics but for the wall clock."""
    found = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if name != "seconds"} for line in found]


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory, tiny_cache) -> Path:
    runs = tmp_path_factory.mktemp("uninterrupted")
    process = start(command(tiny_cache, runs, "whole", "--max-steps", STEPS))
    assert process.communicate()[0] is not None
    assert process.returncode == 0
    return runs / "whole"


@pytest.mark.parametrize(
    "kills",
    [pytest.param(3), pytest.param(10, marks=pytest.mark.exhaustive)],
    ids=["three-times", "ten-times"],
)
def test_a_run_killed_at_random_ends_like_one_that_was_not(tiny_cache, tmp_path, uninterrupted, kills):
    """The first of three is only asked to end, with SIGTERM."""
    chance = random.Random(kills)
    arguments = command(tiny_cache, tmp_path, "killed", "--max-steps", STEPS)
    run = tmp_path / "killed"
    numbers = [signal.SIGKILL] * kills
    if kills == 3:
        numbers[0] = signal.SIGTERM
    for number, step in zip(numbers, sorted(chance.choices(range(STEPS - 2), k=kills)), strict=True):
        code = end_at(arguments, run, step, chance.uniform(0, 0.15), number)
        assert code == (143 if number == signal.SIGTERM else -number)
    process = start(arguments)
    _, errors = process.communicate()
    assert process.returncode == 0, errors
    assert summarise(RunDirectory(run)).state == "finished"
    assert lines(run) == lines(uninterrupted)
    for name in ("best", "last"):
        one, other = (
            load_file(path / "checkpoints" / f"{name}.safetensors") for path in (run, uninterrupted)
        )
        assert one.keys() == other.keys()
        assert all((one[key] == other[key]).all() for key in one)


def test_a_signal_saves_the_state_at_that_step_and_the_same_command_goes_on(tiny_cache, tmp_path, ris):
    """Each signal at a random step, SIGUSR1 with a scheduler's SIGTERM behind it.

    A second command is given on the run while the first one trains it.
    """
    chance = random.Random(7)
    arguments = command(tiny_cache, tmp_path, "stopped", "--max-steps", 100_000)
    run, stopped_at = tmp_path / "stopped", -1
    for number, code in ((signal.SIGINT, 130), (signal.SIGUSR1, 138)):  # SIGTERM is above
        process = start(arguments)
        while last_step(run) < stopped_at + 2:
            assert process.poll() is None, process.communicate()
            time.sleep(0.01)
        assert summarise(RunDirectory(run)).state == "running"
        if number == signal.SIGINT:
            second = ris(*arguments[3:])
            assert (second.exit_code, second.stdout) == (3, "")
            assert f"being trained by another process (process {process.pid} on " in second.stderr
            assert ris(*arguments[3:], "--dry-run").exit_code == 0
        time.sleep(chance.uniform(0, 0.3))
        process.send_signal(number)
        if number == signal.SIGUSR1:
            process.send_signal(signal.SIGTERM)
        output, errors = process.communicate()
        assert (process.returncode, output) == (code, ""), errors
        stopped_at = last_step(run)
        assert errors.count("stopping after this step") == 1
        assert errors.count(f"after step {stopped_at} of 100000; its state is saved") == 1
        assert f"ris train --cache {tiny_cache} --run stopped" in errors
        assert "Traceback" not in errors
        assert max(line["step"] for line in lines(run)) <= stopped_at
    steps = [line["step"] for line in lines(run) if "loss" in line]
    assert steps == list(range(3, stopped_at + 1, 3)), "every line once, over all that it went on"


def test_a_finished_run_says_so(ris, tiny_cache, uninterrupted):
    result = ris(*command(tiny_cache, uninterrupted.parent, "whole", "--max-steps", STEPS)[3:], "--json")
    assert result.exit_code == 0, result.output
    assert f"is finished: it has taken all {STEPS} steps" in result.stderr
    assert json.loads(result.stdout)["run"] == str(uninterrupted)


def test_never_refuses_a_run_that_is_there(ris, tiny_cache, uninterrupted):
    result = ris(*command(tiny_cache, uninterrupted.parent, "whole", "--resume", "never")[3:])
    assert result.exit_code == 2
    assert "holds a run already" in result.stderr


def test_a_path_that_is_no_run_is_refused(ris, tiny_cache, tmp_path):
    result = ris("train", "--cache", tiny_cache, "--random-weights", "--resume", tmp_path)
    assert result.exit_code == 3
    assert "neither a run nor a state of one" in result.stderr


def test_a_run_goes_on_by_its_path_with_its_own_configuration(ris, tiny_cache, uninterrupted):
    """No settings are repeated; what is set on top may only be what may change."""
    base = ("train", "--cache", tiny_cache, "--device", "cpu", "--resume", uninterrupted)
    assert "is finished" in ris(*base).stderr
    refused = ris(*base, "--set", "train.weight_decay=3")
    assert refused.exit_code == 2
    assert "train.weight_decay was 0.01, is 3.0" in refused.stderr
    planned = ris(*base, "--set", "train.lr=3", "--max-steps", STEPS + 1, "--dry-run")
    assert f"train.lr was 0.001, is 3.0 from step {STEPS + 1} on" in planned.stderr


def test_a_dry_run_writes_nothing_and_says_what_trains(ris, tiny_cache, tmp_path):
    arguments = command(tiny_cache, tmp_path, "none", "--max-steps", 50, "--overfit", 3, "--dry-run")[3:]
    result = ris(*arguments, "--json")
    assert result.exit_code == 0, result.output
    plan = json.loads(result.stdout)
    assert (plan["num_samples"], plan["val_size"], plan["steps"]) == (3, 3, 50)
    assert plan["epochs"] == pytest.approx(50 * 4 / 3)
    assert plan["trained"]["language"] > 0
    assert plan["frozen"]["mask_decoder"] > 0
    assert plan["memory_bytes"]["gradients"] == 4 * sum(plan["trained"].values())
    assert plan["memory_bytes"]["activations"] > 4 * 64 * 64
    assert not list(tmp_path.iterdir())
    shown = ris(*arguments)
    assert "What trains" in shown.stdout

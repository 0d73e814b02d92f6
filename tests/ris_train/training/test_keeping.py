"""What a run keeps, whichever of its writes was the last before it was killed."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from itertools import chain, repeat
from pathlib import Path

import pytest

from ris_cache.errors import StoppedError
from ris_train.checkpoint import read_metadata
from ris_train.validation import Validation


class Killed(BaseException):
    """As by SIGKILL: nobody catches it."""


@pytest.fixture
def at_four(whole, tmp_path, monkeypatch) -> Path:
    """The whole run as it was after step 4, had every evaluation been the best."""
    monkeypatch.setattr(Validation, "is_better", lambda *scores: True)
    run = tmp_path / "run"
    shutil.copytree(whole, run)
    shutil.rmtree(run / "checkpoints" / "state-6")
    for name in ("last", "best"):
        shutil.copy(run / "checkpoints/state-4/model.safetensors", run / f"checkpoints/{name}.safetensors")
    return run


@pytest.fixture
def kill_before(monkeypatch):
    """Have the next rename to a name kill the process, as far as its files tell."""

    def arm(name: str) -> None:
        armed = [name]

        def moving(original: Callable[[Path, Path], Path]) -> Callable[[Path, Path], Path]:
            def move(path: Path, target: Path) -> Path:
                if [target.name] == armed:
                    armed.clear()
                    raise Killed
                return original(path, target)

            return move

        for method in ("rename", "replace"):
            monkeypatch.setattr(Path, method, moving(getattr(Path, method)))

    return arm


@pytest.mark.parametrize("write", ["last.safetensors", "best.safetensors", "state-6", "state.json"])
def test_a_run_killed_between_two_writes_ends_like_one_that_was_not(
    run_short, metrics, same_weights, whole, at_four, kill_before, write
):
    """state.json alone is written where a run was stopped within an evaluation and has taken it again."""
    if write == "state.json":
        answers = chain(
            [False], repeat(True)
        )  # one question after step 5, then one in the evaluation of step 6
        with pytest.raises(StoppedError, match="after step 6 of 6"):
            run_short(at_four, resume=True, should_stop=lambda: next(answers))
    kill_before(write)
    with pytest.raises(Killed):
        run_short(at_four, resume=True)
    report = run_short(at_four, resume=True)
    assert (report.resumed_from, report.best_step) == (6 if write == "state.json" else 4, 6)
    assert metrics(at_four) == metrics(whole)
    for name in ("last", "best"):
        path = at_four / "checkpoints" / f"{name}.safetensors"
        assert read_metadata(path).step == 6
        assert same_weights(path, whole / "checkpoints" / "last.safetensors")
    assert sorted(path.name for path in (at_four / "checkpoints").iterdir()) == [
        "best.safetensors", "last.safetensors", "state-4", "state-6",
    ]  # fmt: skip


@pytest.mark.parametrize("write", ["best.safetensors", "state-6"])
def test_a_run_killed_between_two_writes_may_be_cut_down_to_its_state(
    run_short, metrics, same_weights, whole, at_four, kill_before, monkeypatch, write
):
    """Checkpoints of a later step are no proof of an evaluation there, and do not stay under its name."""
    kill_before(write)
    with pytest.raises(Killed):
        run_short(at_four, resume=True)
    monkeypatch.setattr(Validation, "is_better", lambda *scores: False)
    report = run_short(at_four, "train.steps=4", resume=True)
    assert report.resumed_from == report.best_step == 4
    assert metrics(at_four) == [line for line in metrics(whole) if line["step"] <= 4]
    for name in ("last", "best"):
        path = at_four / "checkpoints" / f"{name}.safetensors"
        assert read_metadata(path).step == 4
        assert same_weights(path, whole / "checkpoints" / "state-4" / "model.safetensors")

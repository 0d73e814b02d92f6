"""A run that stops and goes on ends as one that never stopped; damaged states are found and passed over."""

from __future__ import annotations

import errno
import json
from pathlib import Path

import pytest
from safetensors.torch import load_file

from ris_cache.errors import (
    CheckpointError,
    ConfigError,
    DiskFullError,
    FingerprintMismatchError,
    StoppedError,
)
from ris_train.run import RunDirectory
from ris_train.training import state as state_module
from ris_train.training.resume import require_same_features
from ris_train.training.state import latest_state, read_state, saved_states


class StopAfter:
    """Asks to stop when asked for the n-th time."""

    def __init__(self, steps: int) -> None:
        self.left = steps

    def __call__(self) -> bool:
        self.left -= 1
        return self.left == 0


class Heard:
    """Keeps what was said."""

    def __init__(self) -> None:
        self.messages: list[str] = []

    def start(self, *, total: int, done: int) -> None: ...
    def advance(self, *, loss: float, samples: int, waited: float) -> None: ...
    def say(self, message: str) -> None:
        self.messages.append(message)

    def stop(self) -> None: ...


@pytest.fixture(scope="module")
def whole(tmp_path_factory, tiny_cache, short_config) -> Path:
    """A run that never stopped."""
    import torch

    from ris_train.training import train

    torch.set_num_threads(1)
    path = tmp_path_factory.mktemp("whole") / "run"
    train(tiny_cache, short_config(), path, device=torch.device("cpu"), random_seed=0)
    return path


def test_a_run_that_stops_anywhere_goes_on_to_the_same_bits(
    run_short, metrics, same_weights, whole, tmp_path
):
    """After step 1 (no line logged yet), then after 3 (between evaluations), then to the end."""
    run = tmp_path / "run"
    for stop_after, resume in ((1, False), (2, True)):
        with pytest.raises(StoppedError, match=r"its state is saved\. Go on with `ris train --run run"):
            run_short(run, resume=resume, should_stop=StopAfter(stop_after))
    report = run_short(run, resume=True)
    assert report.resumed_from == 3
    assert metrics(run) == metrics(whole)
    for name in ("best", "last"):
        assert same_weights(*(path / "checkpoints" / f"{name}.safetensors" for path in (run, whole)))
    (mine, *_), (theirs, *_) = (saved_states(RunDirectory(path)) for path in (run, whole))
    one, other = (load_file(path / "optimiser.safetensors") for path in (mine, theirs))
    assert all((one[name] == other[name]).all() for name in other)


def test_a_finished_run_takes_no_step_and_goes_on_if_given_more(run_short, metrics, whole, tmp_path):
    run = tmp_path / "run"
    first = run_short(run)
    again = run_short(run, resume=True)
    assert again.resumed_from == 6
    assert (again.best_step, again.best) == (first.best_step, first.best)
    assert metrics(run) == metrics(whole)
    assert run_short(run, "train.steps=7", resume=True).resumed_from == 6
    assert max(line["step"] for line in metrics(run)) == 7


def test_a_run_does_not_go_on_with_another_configuration(run_short, tmp_path):
    run = tmp_path / "run"
    with pytest.raises(StoppedError):
        run_short(run, should_stop=StopAfter(1))
    with pytest.raises(ConfigError, match=r"train\.batch_size was 4, is 2; train\.lr was") as caught:
        run_short(run, "train.batch_size=2", "train.lr=0.5", "train.log_every=1", resume=True)
    assert caught.value.facts["keys"] == ["train.batch_size", "train.lr"]


def test_a_damaged_state_is_passed_over_aloud(run_short, metrics, same_weights, whole, tmp_path):
    run = tmp_path / "run"
    with pytest.raises(StoppedError):
        run_short(run, should_stop=StopAfter(5))
    latest, *_ = saved_states(RunDirectory(run))
    file = latest / "optimiser.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    heard = Heard()
    report = run_short(run, resume=True, progress=heard)
    assert report.resumed_from == 4
    assert any("optimiser.safetensors is not what was written" in message for message in heard.messages)
    assert metrics(run) == metrics(whole)
    assert same_weights(*(path / "checkpoints" / "last.safetensors" for path in (run, whole)))


@pytest.mark.parametrize(
    ("damage", "what"),
    [
        (lambda path: (path / "state.json").unlink(), "state.json is missing"),
        (lambda path: (path / "state.json").write_bytes(b'{"sta'), "state.json is torn"),
        (lambda path: (path / "model.safetensors").unlink(), "model.safetensors is missing"),
        (lambda path: (path / "model.safetensors").write_bytes(b""), "model.safetensors is not what was"),
        (
            lambda path: (path / "state.json").write_text(
                (path / "state.json").read_text().replace('step\\":6', 'step\\":5')
            ),
            "state.json is not what was written",
        ),
    ],
    ids=["no-json", "torn-json", "no-model", "empty-model", "changed-json"],
)
def test_every_kind_of_damage_is_found(whole, tmp_path, damage, what):
    import shutil

    path = tmp_path / "state-6"
    shutil.copytree(whole / "checkpoints" / "state-6", path)
    read_state(path)
    damage(path)
    with pytest.raises(CheckpointError, match=what):
        read_state(path)


def test_a_run_whose_states_are_all_damaged_says_so(whole, tmp_path):
    run = RunDirectory(tmp_path)
    (tmp_path / "checkpoints" / "state-3").mkdir(parents=True)
    with pytest.raises(CheckpointError, match="All 1 states"):
        latest_state(run, lambda message: None)


def test_the_last_states_are_kept_and_nothing_half_written(whole):
    assert [path.name for path in saved_states(RunDirectory(whole))] == ["state-6", "state-4"]
    assert not [path for path in (whole / "checkpoints").iterdir() if path.name.startswith(".")]


def test_a_full_disk_leaves_the_states_before_as_they_were(run_short, tmp_path, monkeypatch):
    run = tmp_path / "run"
    with pytest.raises(StoppedError):
        run_short(run, should_stop=StopAfter(3))
    before = saved_states(RunDirectory(run))

    def full(path: Path, content: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(state_module, "write_atomically", full)
    with pytest.raises(DiskFullError, match="What was saved before is whole"):
        run_short(run, "train.checkpoint_every=1", resume=True)
    assert saved_states(RunDirectory(run)) == before
    read_state(before[0])
    assert len(list((run / "checkpoints").glob("*state-*"))) == len(before)


def test_going_on_from_an_earlier_state_drops_the_later_ones(run_short, metrics, whole, tmp_path):
    run = tmp_path / "run"
    run_short(run)
    heard = Heard()
    report = run_short(run, resume=True, from_state=run / "checkpoints" / "state-4", progress=heard)
    assert report.resumed_from == 4
    assert any("left behind" in message and "state-6" in message for message in heard.messages)
    assert metrics(run) == metrics(whole)


def test_metrics_that_somebody_shortened_are_an_error(run_short, tmp_path):
    run = tmp_path / "run"
    run_short(run)
    (run / "metrics.jsonl").write_text("")
    with pytest.raises(CheckpointError, match="somebody shortened it"):
        run_short(run, resume=True)


def test_a_run_does_not_go_on_from_other_features(whole):
    _, metadata = read_state(whole / "checkpoints" / "state-6")
    with pytest.raises(FingerprintMismatchError, match="--cache"):
        require_same_features(metadata, "0" * 64, RunDirectory(whole))


def test_a_state_holds_plain_tensors_and_json(whole):
    state = whole / "checkpoints" / "state-6"
    assert {path.name for path in state.iterdir()} == {
        "model.safetensors", "optimiser.safetensors", "state.json",
    }  # fmt: skip
    body = json.loads(json.loads((state / "state.json").read_text())["state"])
    assert (body["step"], body["consumed"]) == (6, 24)

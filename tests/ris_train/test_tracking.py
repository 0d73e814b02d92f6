"""Trackers: curves by name and step, opened once, and a missing package named before anything starts."""

from __future__ import annotations

import importlib.metadata
import inspect
import subprocess
import sys
from pathlib import Path
from typing import Any

import accelerate.tracking
import pytest

import ris_train.tracking
from ris_cache.errors import ConfigError
from ris_train.config import load_config
from ris_train.run import RunDirectory
from ris_train.tracking import open_trackers

CONFIG = load_config(recipe="tiny")


def is_distributed(package: str) -> bool:
    """Whether pip knows a package."""
    return any(found.name == package for found in importlib.metadata.distributions())


@pytest.fixture
def run(tmp_path: Path) -> RunDirectory:
    """A new run."""
    return RunDirectory.create(tmp_path / "curves", CONFIG, facts={})


@pytest.fixture
def said() -> list[str]:
    """What the trackers said of themselves."""
    return []


class Recorder:
    """Stands in for a tracker of accelerate and keeps what it was told."""

    made: list[Recorder] = []  # noqa: RUF012

    def __init__(self, **settings: Any) -> None:
        self.settings = settings
        self.calls: list[tuple[Any, ...]] = []
        self.fails_at = ""
        Recorder.made.append(self)

    def start(self) -> None:
        self._note("start")

    def store_init_configuration(self, values: dict[str, Any]) -> None:
        self._note("configuration", values)

    def log(self, values: dict[str, Any], step: int | None = None) -> None:
        self._note("log", step, values)

    def finish(self) -> None:
        self._note("finish")

    def _note(self, what: str, *facts: Any) -> None:
        self.calls.append((what, *facts))
        if what == self.fails_at:
            raise RuntimeError(f"{what} failed")


@pytest.fixture
def recorders(monkeypatch: pytest.MonkeyPatch) -> list[Recorder]:
    """Every tracker of accelerate replaced, and their packages thought to be installed."""
    Recorder.made = []
    for name in ("TensorBoardTracker", "WandBTracker", "TrackioTracker"):
        monkeypatch.setattr(accelerate.tracking, name, Recorder)
    monkeypatch.setattr(ris_train.tracking, "_is_installed", lambda package: True)
    return Recorder.made


def test_without_names_nothing_is_opened_and_logging_is_free(run: RunDirectory, said: list[str]) -> None:
    trackers = open_trackers((), run, CONFIG, say=said.append)
    trackers.log(1, {"loss": 1.0})
    trackers.close()
    assert said == []


def test_an_unknown_tracker_lists_those_there_are(run: RunDirectory, said: list[str]) -> None:
    with pytest.raises(ConfigError, match=r"no tracker 'mlflow'; there are tensorboard, wandb, trackio"):
        open_trackers(["mlflow"], run, CONFIG, say=said.append)


def test_a_missing_package_names_the_extra_and_opens_nothing(
    run: RunDirectory, recorders: list[Recorder], monkeypatch: pytest.MonkeyPatch, said: list[str]
) -> None:
    monkeypatch.setattr(ris_train.tracking, "_is_installed", lambda package: package != "wandb")
    with pytest.raises(ConfigError, match=r"wandb is not installed.*pip install 'ris\[wandb\]'") as caught:
        open_trackers(["tensorboard", "wandb"], run, CONFIG, say=said.append)
    assert caught.value.facts["missing"] == ("wandb",)
    assert caught.value.exit_code == 2
    assert recorders == []


def test_a_package_that_is_not_there_is_found_missing(
    run: RunDirectory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, said: list[str]
) -> None:
    """A folder of its name, as Weights & Biases leaves behind, is no package."""
    for name in ("wandb", "trackio"):
        (tmp_path / name).mkdir()
    monkeypatch.syspath_prepend(tmp_path)
    absent = [name for name in ("wandb", "trackio") if not is_distributed(name)]
    if not absent:
        pytest.skip("every tracker is installed")
    with pytest.raises(ConfigError, match="not installed"):
        open_trackers(absent, run, CONFIG, say=said.append)


def test_trackers_learn_the_run_and_its_configuration(
    run: RunDirectory, recorders: list[Recorder], said: list[str]
) -> None:
    open_trackers(["tensorboard", "wandb", "trackio", "wandb"], run, CONFIG, say=said.append)
    board, wandb, trackio = recorders
    assert board.settings == {"run_name": "tensorboard", "logging_dir": run.path}
    assert (wandb.settings["run_name"], wandb.settings["name"]) == ("ris", "curves")
    assert wandb.settings["resume"] == "allow", "resumed runs go on"
    name = f"curves-{run.identity()[:8]}"
    assert (trackio.settings["name"], trackio.settings["resume"]) == (name, "allow")
    for recorder in recorders:
        assert [call[0] for call in recorder.calls] == ["start", "configuration"]
        settings = recorder.calls[1][1]
        assert settings["train.steps"] == CONFIG.train.steps
        assert settings["model.bert.weights"] == "None"
        assert all(isinstance(value, (str, bool, int, float)) for value in settings.values())


def test_a_line_of_the_metrics_becomes_points_of_curves(
    run: RunDirectory, recorders: list[Recorder], said: list[str]
) -> None:
    trackers = open_trackers(["wandb"], run, CONFIG, say=said.append)
    trackers.log(10, {"step": 10, "loss": 0.5, "lr": 1e-3})
    evaluation = {"step": 20, "val": "refcoco:val", "rules": "ris", "num_samples": 7, "oIoU": 0.25}
    trackers.log(20, {**evaluation, "mIoU": float("nan"), "Pr@0.5": None, "is_best": True})
    trackers.log(30, {"step": 30, "note": "text alone"})
    assert recorders[0].calls[2:] == [
        ("log", 10, {"train/loss": 0.5, "train/lr": 1e-3}),
        ("log", 20, {"val/num_samples": 7, "val/oIoU": 0.25}),
    ]


def test_a_tracker_that_fails_ends_no_training_and_is_told_of_once(
    run: RunDirectory, recorders: list[Recorder], said: list[str]
) -> None:
    """It is asked again, since a connection may come back; the others and the end are as ever."""
    trackers = open_trackers(["tensorboard", "wandb", "trackio"], run, CONFIG, say=said.append)
    recorders[1].fails_at = "log"
    for step in (1, 2):
        trackers.log(step, {"step": step, "loss": 1.0})
    recorders[1].fails_at = "finish"
    trackers.close()
    for recorder in recorders:
        assert [call[0] for call in recorder.calls[2:]] == ["log", "log", "finish"]
    (message,) = said
    assert message.startswith("warning: the tracker wandb failed at step 1 (RuntimeError: log failed)")
    assert "metrics.jsonl has every value" in message


def test_a_tracker_that_fails_at_the_end_is_a_warning(
    run: RunDirectory, recorders: list[Recorder], said: list[str]
) -> None:
    trackers = open_trackers(["trackio"], run, CONFIG, say=said.append)
    recorders[0].fails_at = "finish"
    trackers.close()
    assert "the tracker trackio failed at the end (RuntimeError: finish failed)" in said[0]


@pytest.mark.parametrize("fails_in", ["__init__", "start", "store_init_configuration"])
@pytest.mark.parametrize(
    ("error", "words"),
    [
        (ConnectionError("no network\nsecond line"), r"ConnectionError: no network\)"),
        (RuntimeError("No API key configured."), "RuntimeError: No API key configured"),
        (OSError(), r"\(OSError\)"),
    ],
    ids=["no-network", "not-logged-in", "without-words"],
)
def test_a_tracker_that_cannot_be_opened_is_an_error_with_what_to_do(
    run: RunDirectory,
    recorders: list[Recorder],
    said: list[str],
    monkeypatch: pytest.MonkeyPatch,
    error: Exception,
    words: str,
    fails_in: str,
) -> None:
    def fail(*args: object, **kwargs: object) -> None:
        raise error

    unreachable = type("Unreachable", (Recorder,), {fails_in: fail})
    monkeypatch.setattr(accelerate.tracking, "WandBTracker", unreachable)
    with pytest.raises(ConfigError, match=f"wandb could not be started.*{words}") as caught:
        open_trackers(["tensorboard", "wandb", "trackio"], run, CONFIG, say=said.append)
    assert caught.value.__cause__ is error
    assert "`wandb login`" in str(caught.value)
    assert "WANDB_MODE=offline" in str(caught.value)
    assert "metrics.jsonl is written all the same" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert recorders[0].calls[-1] == ("finish",), "the one before it is closed"
    assert len(recorders) == (1 if fails_in == "__init__" else 2), "the third is never made"


def test_an_interrupt_while_a_tracker_opens_is_no_error_of_the_tracker(
    run: RunDirectory, recorders: list[Recorder], said: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    class Interrupted(Recorder):
        def start(self) -> None:
            raise KeyboardInterrupt

    monkeypatch.setattr(accelerate.tracking, "WandBTracker", Interrupted)
    with pytest.raises(KeyboardInterrupt):
        open_trackers(["tensorboard", "wandb"], run, CONFIG, say=said.append)
    assert recorders[0].calls[-1] == ("finish",)


def test_what_trackio_prints_is_kept_out_of_the_result(
    run: RunDirectory,
    recorders: list[Recorder],
    said: list[str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    class Talkative(Recorder):
        def _note(self, what: str, *facts: Any) -> None:
            sys.stdout.write(f"* {what}\n")

    monkeypatch.setattr(accelerate.tracking, "TrackioTracker", Talkative)
    trackers = open_trackers(["trackio"], run, CONFIG, say=said.append)
    trackers.log(1, {"step": 1, "loss": 1.0})
    trackers.close()
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.splitlines() == ["* start", "* configuration", "* log", "* finish"]


@pytest.mark.parametrize(("name", "mark"), [("wandb", "id"), ("trackio", "name")])
def test_a_run_trained_anew_under_its_name_is_another_one(
    run: RunDirectory, recorders: list[Recorder], said: list[str], name: str, mark: str
) -> None:
    """And one that goes on is the same, which env.json records."""
    open_trackers([name], run, CONFIG, say=said.append)
    run.add_resumption({"step": 3}, begun={})
    open_trackers([name], run, CONFIG, say=said.append)
    run.write_facts({"device": "another"})
    open_trackers([name], run, CONFIG, say=said.append)
    first, resumed, anew = [recorder.settings[mark] for recorder in recorders]
    assert first == resumed != anew
    assert first.replace("-", "").isalnum()


def test_the_trackers_of_accelerate_take_what_they_are_given() -> None:
    """Its own classes, whose packages need not be installed, by the signatures of this version."""
    classes = (
        accelerate.tracking.TensorBoardTracker,
        accelerate.tracking.WandBTracker,
        accelerate.tracking.TrackioTracker,
    )
    for made in classes:
        inspect.signature(made.start).bind(None)
        inspect.signature(made.store_init_configuration).bind(None, {"train.lr": 0.1})
        inspect.signature(made.log).bind(None, {"train/loss": 0.5}, step=3)
        inspect.signature(made.finish).bind(None)
    inspect.signature(classes[0]).bind(run_name="tensorboard", logging_dir=Path())
    names = {"run_name": "ris", "name": "a", "resume": "allow"}
    assert classes[1](**names, id="1", dir=".").init_kwargs == {
        "name": "a",
        "resume": "allow",
        "id": "1",
        "dir": ".",
    }
    assert classes[2](**names).init_kwargs == {"name": "a", "resume": "allow"}


def test_tensorboard_reads_back_what_was_logged(run: RunDirectory, said: list[str]) -> None:
    """The real package, read by its own reader."""
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    trackers = open_trackers(["tensorboard"], run, CONFIG, say=said.append)
    for step, loss in ((1, 2.0), (5, 0.5)):
        trackers.log(step, {"step": step, "loss": loss})
    trackers.log(5, {"step": 5, "val": "refcoco:val", "rules": "ris", "num_samples": 7, "oIoU": 0.25})
    trackers.close()
    reader = EventAccumulator(str(run.path / "tensorboard"))
    reader.Reload()
    assert [(event.step, event.value) for event in reader.Scalars("train/loss")] == [(1, 2.0), (5, 0.5)]
    assert [(event.step, event.value) for event in reader.Scalars("val/oIoU")] == [(5, 0.25)]
    (settings,) = (run.path / "tensorboard").rglob("hparams.yml")
    assert f"train.steps: {CONFIG.train.steps}" in settings.read_text()


def test_trackers_are_imported_only_when_asked_for() -> None:
    program = (
        "import sys, ris_train.tracking\n"
        "sys.exit(bool({'torch', 'accelerate', 'tensorboard', 'wandb'} & set(sys.modules)))"
    )
    root = Path(__file__).parents[2]
    assert subprocess.run([sys.executable, "-c", program], check=False, cwd=root).returncode == 0

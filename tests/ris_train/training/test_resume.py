"""A run that stops and goes on ends as one that never stopped; damaged states are found and passed over."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from ris_cache.errors import (
    CheckpointError,
    ConfigError,
    DataError,
    DiskFullError,
    FingerprintMismatchError,
    StoppedError,
    WeightsError,
)
from ris_train.checkpoint import OtherVersionError, read_metadata
from ris_train.ranks import Ranks
from ris_train.run import RunDirectory
from ris_train.run_facts import trained_on
from ris_train.run_listing import read_files
from ris_train.training import setup as preparation
from ris_train.training import state as state_module
from ris_train.training.data_digest import DataDigest
from ris_train.training.plan import make_plan
from ris_train.training.resume import (
    find_resume_point,
    require_same_data,
    require_same_features,
    resume_target,
)
from ris_train.training.state import discard_later, latest_state, read_state, saved_states


class StopAfter:
    """Says yes to the n-th question: there is one after each step, and one in each evaluation before it."""

    def __init__(self, questions: int) -> None:
        self.left = questions

    def __call__(self) -> bool:
        self.left -= 1
        return self.left == 0


class Heard:
    """Keeps what was said."""

    def __init__(self) -> None:
        self.messages: list[str] = []

    def start(self, *, total: int, done: int) -> None: ...
    def advance(self, *, loss: float, samples: int, images: int, waited: float, seconds: float) -> None: ...
    def say(self, message: str) -> None:
        self.messages.append(message)

    def stop(self) -> None: ...


def test_a_run_that_stops_anywhere_goes_on_to_the_same_bits(
    run_short, metrics, same_weights, whole, tiny_cache, tmp_path
):
    """After step 1 (no line logged yet), after 3 (between evaluations), twice within the evaluation of step 4,
    within that of the last step; then to the end.
    """
    run = tmp_path / "run"
    hint = f"its state is saved. Go on with `ris train --cache {tiny_cache} --run run --runs {tmp_path}`."
    for questions, step in ((1, 1), (3, 3), (1, 4), (1, 4), (3, 6)):
        with pytest.raises(StoppedError, match=re.escape(hint)) as stopped:
            run_short(run, resume=step > 1, should_stop=StopAfter(questions))
        assert stopped.value.facts["step"] == step
    assert [line["step"] for line in metrics(run) if "val" in line] == [2, 4], "the last one was stopped"
    report = run_short(run, resume=True)
    assert report.resumed_from == 6
    assert metrics(run) == metrics(whole)
    for name in ("best", "last"):
        assert same_weights(*(path / "checkpoints" / f"{name}.safetensors" for path in (run, whole)))
    (mine, *_), (theirs, *_) = (saved_states(RunDirectory(path)) for path in (run, whole))
    one, other = (load_file(path / "optimiser.safetensors") for path in (mine, theirs))
    assert all((one[name] == other[name]).all() for name in other)


def test_a_finished_run_takes_no_step_and_goes_on_if_given_more(run_short, metrics, whole, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(whole, run)
    best = read_state(run / "checkpoints" / "state-6")[0].best
    again = run_short(run, resume=True)
    assert again.resumed_from == 6
    assert (again.best_step, again.best.values) == (best.step, best.values)
    assert metrics(run) == metrics(whole)
    assert run_short(run, "train.steps=7", resume=True).resumed_from == 6
    assert max(line["step"] for line in metrics(run)) == 7


def test_a_run_does_not_go_on_with_another_configuration_but_for_what_may_change(
    run_short, metrics, tiny_cache, tmp_path
):
    """A rate and a clip may, to tame a run; it is said and recorded. The name, which nobody chose, was taken."""
    (tmp_path / "run").mkdir()
    with pytest.raises(StoppedError):
        run_short(tmp_path / "run", is_named=False, should_stop=StopAfter(1))
    assert not list((tmp_path / "run").iterdir())
    run = RunDirectory(tmp_path / "run-2")
    begun = run.identity()
    with pytest.raises(ConfigError, match=r"train\.batch_size was 4, is 2; train\.seed was") as caught:
        run_short(run.path, "train.batch_size=2", "train.seed=5", "train.log_every=1", resume=True)
    assert caught.value.facts["keys"] == ["train.batch_size", "train.seed"]
    assert "resumed" not in json.loads(run.facts_path.read_text())
    changes = ("train.lr=0.5", "train.clip_grad_norm=0.25", "train.steps=2", "train.log_every=1")
    heard = Heard()
    run_short(run.path, *changes, resume=True, progress=heard)
    assert "train.lr was 0.001, is 0.5 from step 2 on" in heard.messages
    lines = [line for line in metrics(run.path) if "lr" in line]
    assert [(line["step"], line["lr"] > 0.001) for line in lines] == [(2, True)]
    run_short(run.path, *changes, resume=True)
    first, second = json.loads(run.facts_path.read_text())["resumed"]
    assert (first["step"], first["device"], first["processes"]) == (1, "cpu", 1)
    assert first["cache"] == str(tiny_cache)
    assert {"time", "libraries"} <= first.keys()
    assert first["changed"] == {
        "train.clip_grad_norm": [1.0, 0.25], "train.log_every": [3, 1], "train.lr": [0.001, 0.5],
        "train.steps": [6, 2],
    }  # fmt: skip
    assert (second["step"], second["changed"]) == (2, {})
    assert run.identity() == begun, "what it was begun as"
    assert read_files(run).problems == ()
    assert trained_on(run)[0].selection == "refcoco.unc:train"


def test_a_damaged_state_is_passed_over_aloud(run_short, metrics, same_weights, whole, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(whole, run)
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


def test_a_full_disk_leaves_the_states_before_as_they_were(run_short, tiny_cache, tmp_path, monkeypatch):
    run = tmp_path / "run"
    with pytest.raises(StoppedError):
        run_short(run, should_stop=StopAfter(3))
    before = saved_states(RunDirectory(run))

    def full(path: Path, content: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(state_module, "write_atomically", full)
    command = f"`ris train --cache {tiny_cache} --run run --runs {tmp_path}`"
    with pytest.raises(DiskFullError, match=f"What was saved before is whole: .*{re.escape(command)}"):
        run_short(run, "train.checkpoint_every=1", resume=True)
    assert saved_states(RunDirectory(run)) == before
    read_state(before[0])
    assert len(list((run / "checkpoints").glob("*state-*"))) == len(before)


def test_going_on_from_an_earlier_state_drops_the_later_ones(run_short, metrics, whole, tmp_path):
    """And what processes that were killed had not finished."""
    run = tmp_path / "run"
    shutil.copytree(whole, run)
    left = [
        run / ".env.json.1.tmp",
        *(run / "checkpoints" / f".{name}.tmp" for name in ("last.1", "state-9.1")),
    ]
    left.append(run / "checkpoints" / "state-4" / ".state.json.1.tmp")
    for path in (*left[:2], left[3]):
        path.write_text("half")
    left[2].mkdir()
    (left[2] / "model.safetensors").write_text("half")
    heard = Heard()
    report = run_short(run, resume=True, from_state=run / "checkpoints" / "state-4", progress=heard)
    assert report.resumed_from == 4
    assert any("left behind" in message and "state-6" in message for message in heard.messages)
    assert metrics(run) == metrics(whole)
    assert not any(path.exists() for path in left)
    assert (run / ".lock").exists()


def test_states_are_removed_whatever_a_process_of_the_same_number_left(whole, tmp_path):
    shutil.copytree(whole, tmp_path / "run")
    run = RunDirectory(tmp_path / "run")
    left = run.checkpoints_dir / f".state-6.{os.getpid()}.removed.tmp"
    left.mkdir()
    (left / "model.safetensors").write_text("half")
    assert discard_later(run, 4) == [run.checkpoints_dir / "state-6"]
    assert [path.name for path in saved_states(run)] == ["state-4"]
    assert not left.exists()


def test_a_best_checkpoint_that_is_not_the_best_so_far_is_chosen_anew(run_short, metrics, whole, tmp_path):
    """It is of a later step than the state, as after a kill between an evaluation and its state; or gone."""
    from ris_train.checkpoint import read_metadata

    shutil.copytree(whole, tmp_path / "run")
    run = RunDirectory(tmp_path / "run")
    best, state = run.checkpoint_path("best"), run.checkpoints_dir / "state-4"
    best_then = read_state(state)[0].best.step
    for damage in (lambda: best.write_bytes(run.checkpoint_path("last").read_bytes()), best.unlink):
        damage()
        heard = Heard()
        report = run_short(run.path, "train.steps=5", resume=True, from_state=state, progress=heard)
        assert any(f"the best so far by step {best_then}" in message for message in heard.messages)
        assert report.best_step == read_metadata(best).step == 5
        state = run.checkpoints_dir / "state-4"
    assert read_metadata(best).val["oIoU"] == report.best.values["oIoU"]
    again = run_short(run.path, "train.steps=5", resume=True)
    assert again.best_step == 5


def test_an_edited_configuration_does_not_change_a_run_unseen(run_short, whole, tmp_path):
    """A file that was cut short reads as one with defaults."""
    shutil.copytree(whole, tmp_path / "run")
    run = RunDirectory(tmp_path / "run")
    run.write_config(run.read_config().model_copy(update={"recipe": "paper"}))
    before = run.config_path.read_text()
    edited = run.read_config()
    with pytest.raises(ConfigError, match="recipe was 'tiny', is 'paper'"):
        find_resume_point(run, edited, chosen=None, say=lambda message: None)
    assert run.config_path.read_text() == before


def test_a_lost_record_of_the_environment_is_written_again(run_short, whole, tmp_path):
    shutil.copytree(whole, tmp_path / "run")
    (tmp_path / "run" / "env.json").unlink()
    run_short(tmp_path / "run", resume=True)
    assert json.loads((tmp_path / "run" / "env.json").read_text())["device"] == "cpu"


def test_a_state_that_is_a_file_is_damaged(tmp_path):
    (tmp_path / "state-3").write_text("")
    with pytest.raises(CheckpointError, match=r"state\.json is missing"):
        read_state(tmp_path / "state-3")


def test_a_run_that_another_process_trains_is_left_alone(run_short, whole, tmp_path, monkeypatch):
    monkeypatch.setattr("ris_train.run_lock.LOCK_SECONDS", 0.05)
    shutil.copytree(whole, tmp_path / "run")
    run = RunDirectory(tmp_path / "run")
    with run.held(), pytest.raises(CheckpointError, match="being trained by another process"):
        run_short(run.path, "train.steps=7", resume=True)
    assert run.read_config().train.steps == 6
    assert run_short(run.path, resume=True).resumed_from == 6, "it is free again"
    with run.held():
        pass


def test_metrics_that_somebody_shortened_are_an_error_before_anything_is_removed(run_short, whole, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(whole, run)
    (run / "metrics.jsonl").write_text("")
    for state in (None, run / "checkpoints" / "state-4"):
        with pytest.raises(CheckpointError, match="somebody shortened it"):
            run_short(run, resume=True, from_state=state)
    assert [path.name for path in saved_states(RunDirectory(run))] == ["state-6", "state-4"]


def test_a_state_of_another_version_is_neither_damaged_nor_passed_over(run_short, whole, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(whole, run)
    file = run / "checkpoints" / "state-6" / "state.json"
    body = json.loads(json.loads(file.read_text())["state"]) | {"momentum": 1}
    text = json.dumps(body)
    digest = hashlib.sha256(text.encode()).hexdigest()
    file.write_text(json.dumps({"state": text, "sha256": digest}))
    heard = Heard()
    with pytest.raises(OtherVersionError, match=r"written by another version of ris \(momentum: .*--resume"):
        run_short(run, resume=True, progress=heard)
    assert not heard.messages
    assert [path.name for path in saved_states(RunDirectory(run))] == ["state-6", "state-4"]
    assert run_short(run, resume=True, from_state=run / "checkpoints" / "state-4").resumed_from == 4


def test_a_run_does_not_go_on_with_other_expressions(
    run_short, short_config, whole, tiny_cache, tmp_path, monkeypatch
):
    """The features are the same; the tables were made anew, with one expression less or in another order."""
    run, cpu = RunDirectory(tmp_path / "run"), torch.device("cpu")
    shutil.copytree(whole, run.path)
    point = find_resume_point(run, short_config(), chosen=None, say=lambda message: None)
    setup = preparation.prepare(tiny_cache, short_config(), Ranks(0, 1, cpu), random_seed=0)
    require_same_data(point, setup, run)
    samples = setup.validation.samples
    turned = DataDigest.of(samples.select(slice(None, None, -1)), [setup.validation.label])
    with pytest.raises(DataError, match=r"on 2 expressions of refcoco:val; .* gives 2 others now\."):
        require_same_data(
            replace(point, state=point.state.model_copy(update={"validation": turned})), setup, run
        )
    older = point.state.model_copy(update={"training": None, "validation": None})
    require_same_data(replace(point, state=older), setup, run)

    def fewer(*arguments: object, **options: object) -> object:
        training_set = load(*arguments, **options)
        return replace(training_set, samples=training_set.samples[:-1])

    load = preparation.load_training_set
    monkeypatch.setattr(preparation, "load_training_set", fewer)
    before = {
        path: path.read_bytes() for path in run.path.rglob("*") if path.is_file() and path.name != ".lock"
    }
    count = len(setup.training_set.samples)
    found = rf"on {count:,} expressions of refcoco:train; the cache .* gives {count - 1:,} now\. .*--cache"
    with pytest.raises(DataError, match=found):
        run_short(run.path, resume=True)
    with pytest.raises(DataError, match=found):
        make_plan(tiny_cache, short_config(), random_seed=0, resumed=run)
    assert {path: path.read_bytes() for path in before} == before


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


def test_a_run_is_not_given_fewer_steps_than_it_has_taken(run_short, whole, tmp_path):
    shutil.copytree(whole, tmp_path / "run")
    before = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}
    with pytest.raises(ConfigError, match=r"has taken 6 steps already; train\.steps is 3\. ") as caught:
        run_short(tmp_path / "run", "train.steps=3", resume=True)
    assert caught.value.exit_code == 2
    assert {path: path.read_bytes() for path in before} == before


def test_a_run_cut_down_to_where_it_was_stopped_is_evaluated_there(run_short, metrics, tmp_path):
    """It was stopped before its first evaluation."""
    run = tmp_path / "run"
    with pytest.raises(StoppedError):
        run_short(run, should_stop=StopAfter(1))
    report = run_short(run, "train.steps=1", resume=True)
    assert [line["step"] for line in metrics(run) if "val" in line] == [1]
    assert report.best_step == report.resumed_from == 1
    lines = metrics(run)
    again = run_short(run, "train.steps=1", resume=True)
    assert (again.best, again.best_step) == (report.best, report.best_step)
    assert metrics(run) == lines, "it is complete now"


def test_a_finished_run_cut_down_to_an_earlier_state_is_one_of_that_step(run_short, metrics, whole, tmp_path):
    shutil.copytree(whole, tmp_path / "run")
    state = tmp_path / "run" / "checkpoints" / "state-4"
    report = run_short(tmp_path / "run", "train.steps=4", resume=True, from_state=state)
    run = RunDirectory(tmp_path / "run")
    assert report.best_step == read_metadata(run.checkpoint_path("best")).step <= 4
    assert read_metadata(run.checkpoint_path("last")).step == 4
    assert max(line["step"] for line in metrics(run.path)) == 4


def test_a_state_is_named_from_wherever_one_is(whole, monkeypatch):
    checkpoints = whole / "checkpoints"
    for place, name in (
        (checkpoints, "state-4"),
        (checkpoints / "state-4", "."),
        (whole, "../run/checkpoints/state-4"),
    ):
        monkeypatch.chdir(place)
        run, state = resume_target(Path(name))
        assert (run.path, state) == (whole.resolve(), checkpoints.resolve() / "state-4")
    monkeypatch.chdir(whole)
    assert resume_target(Path()) == (RunDirectory(whole.resolve()), None)


def test_states_that_a_run_at_work_removes_meanwhile_are_not_damaged(whole, tmp_path, monkeypatch):
    """It writes state-8 and removes both that were there, after they were listed."""
    shutil.copytree(whole, tmp_path / "run")
    run, heard = RunDirectory(tmp_path / "run"), Heard()

    def meanwhile(path: Path) -> object:
        if path.name == "state-6" and path.exists():
            path.rename(path.with_name("state-8"))
            shutil.rmtree(path.with_name("state-4"))
        return read_state(path)

    monkeypatch.setattr(state_module, "read_state", meanwhile)
    found = latest_state(run, heard.say)
    assert found is not None
    assert (found[0].name, heard.messages) == ("state-8", [])


def test_a_run_that_goes_on_cuts_words_with_its_own_tokenizer(run_short, tiny_cache, tmp_path):
    """The one that the configuration names may have been moved, or changed, since."""
    from ris_train.data.text import TINY_VOCABULARY_PATH

    named, run = tmp_path / "named", tmp_path / "run"
    named.mkdir()
    shutil.copy(TINY_VOCABULARY_PATH, named / "vocab.txt")
    (named / "config.json").write_text('{"model_type": "bert"}')
    vocabulary = f"model.bert.vocabulary={named}"
    with pytest.raises(StoppedError):
        run_short(run, vocabulary, should_stop=StopAfter(1))
    (run / "tokenizer").rename(run / "kept")
    (run / "tokenizer").mkdir()
    with pytest.raises(WeightsError, match=r"run's own tokenizer, .*run/tokenizer, cannot be used"):
        run_short(run, vocabulary, "train.steps=2", resume=True)
    (run / "tokenizer").rmdir()
    (run / "kept").rename(run / "tokenizer")
    shutil.rmtree(named)
    assert run_short(run, vocabulary, "train.steps=2", resume=True).best_step == 2

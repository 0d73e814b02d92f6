"""What `ris train` refuses before it writes anything, and by which process it is told."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from typing import Any

import pytest
import torch

from cli import train as train_command
from cli.options import choose_device
from ris_cache.errors import ConfigError
from ris_train import tracking
from ris_train.training.setup import require_recipe_for

Ris = Callable[..., Any]
NO_NAMES = ["..", ".", "", "../up", "a/b", "/nowhere/run", "a\nb", " ", "a/", "\u202eb", "\x1b[1m"]


@pytest.mark.parametrize("name", NO_NAMES)
@pytest.mark.parametrize("resume", ["auto", "never"])
def test_a_new_run_takes_one_printable_folder_name(ris: Ris, tmp_path: Path, name: str, resume: str) -> None:
    """The commands that read runs find none of that name, and say so."""
    runs = tmp_path / "up" / "runs"
    result = ris("train", "--cache", tmp_path / "none", "--runs", runs, "--run", name, "--resume", resume)
    assert (result.exit_code, result.stdout) == (2, "")
    assert f"--run {name!r} cannot name a new run" in result.stderr
    for command in (("eval", "--run", name), ("predict", "--image", "x", "--text", "y", "--run", name)):
        found = ris(*command, "--runs", runs)
        assert found.exit_code == 3
        assert f"There is no run {name!r}" in found.stderr
    assert ris("runs", "show", "--runs", runs, "--", name).exit_code == 3
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["a", "ä b", "1.5", "..a", "-x", "图"])
def test_any_folder_name_will_do(name: str) -> None:
    train_command._require_name(name)


def test_a_run_that_is_there_is_named_by_its_path_too(
    tiny_runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A plain name is one below --runs alone, whatever lies in the folder that one is in."""
    monkeypatch.chdir(tiny_runs)
    for runs, name in ((tiny_runs, "first"), (tmp_path, str(tiny_runs / "first")), (tmp_path, "./first")):
        found, state = train_command._target(runs, name, "auto")
        assert found is not None
        assert (found.resolve(), state) == ((tiny_runs / "first").resolve(), None)
    assert train_command._target(tmp_path, "first", "auto") == (None, None)


def test_fewer_steps_than_were_taken_are_refused(
    ris: Ris, tiny_cache: Path, tiny_runs: Path, tmp_path: Path
) -> None:
    shutil.copytree(tiny_runs / "first", tmp_path / "first")
    before = (tmp_path / "first" / "config.yaml").read_bytes()
    for more in ((), ("--dry-run",)):
        result = ris(
            "train", "--cache", tiny_cache, "--runs", tmp_path, "--run", "first", "--max-steps", 2, "--device",
            "cpu", *more,
        )  # fmt: skip
        assert (result.exit_code, result.stdout) == (2, "")
        assert "has taken 6 steps already; train.steps is 2." in result.stderr
    assert (tmp_path / "first" / "config.yaml").read_bytes() == before


def test_a_dry_run_plans_a_run_that_is_there_as_it_is(ris: Ris, tiny_cache: Path, tiny_runs: Path) -> None:
    """Its BERT is random; going on with it does not ask for that again."""
    arguments = ("train", "--cache", tiny_cache, "--runs", tiny_runs, "--run", "first", "--dry-run")
    result = ris(*arguments, "--json", "--max-steps", 8)
    assert result.exit_code == 0, result.output
    plan = json.loads(result.stdout)
    assert (plan["steps"], plan["steps_taken"], plan["batch_size"]) == (8, 6, 4)


@pytest.mark.parametrize(
    ("options", "processes", "message"),
    [
        (("--run", "first", "--resume", "never"), 1, "holds a run already"),
        (("--run", "new", "--set", "train.trackers=[wandb]"), 1, "train.trackers"),
        (("--run", "new", "--set", "train.batch_size=2"), 3, "is the batch of all 3 processes together"),
    ],
    ids=["never", "tracker", "batch"],
)
def test_a_dry_run_refuses_what_training_would(
    ris: Ris,
    tiny_cache: Path,
    tiny_runs: Path,
    monkeypatch: pytest.MonkeyPatch,
    options: tuple[str, ...],
    processes: int,
    message: str,
) -> None:
    def not_installed(package: str) -> str:
        raise PackageNotFoundError(package)

    monkeypatch.setattr(tracking, "version", not_installed)
    monkeypatch.setenv("WORLD_SIZE", str(processes))
    monkeypatch.setenv("RANK", "0")
    result = ris(
        "train", "--cache", tiny_cache, "--runs", tiny_runs, "--random-weights", "--device", "cpu", "--dry-run",
        *options,
    )  # fmt: skip
    assert (result.exit_code, result.stdout) == (2, "")
    assert message in result.stderr
    assert not (tiny_runs / "new").exists()


def test_the_tables_name_what_was_trained_and_validated_on(
    ris: Ris, tiny_cache: Path, tmp_path: Path
) -> None:
    arguments = (
        "train", "--cache", tiny_cache, "--runs", tmp_path, "--run", "few", "--random-weights", "--device", "cpu",
        "--overfit", 3, "--max-steps", 1, "--set", "train.batch_size=2", "--set", "loss.num_points=16",
    )  # fmt: skip
    for more in (("--dry-run",), ()):
        result = ris(*arguments, *more)
        assert result.exit_code == 0, result.output
        assert "Trained on the first 3 of these, by train.overfit;" in result.stdout
        assert "3 of refcoco:train" in result.stdout
        assert "on refcoco:val" not in result.stdout
    document = json.loads(ris(*arguments, "--json").stdout)
    assert (document["val"], document["num_train_samples"]) == ("3 of refcoco:train", 3)


def test_a_recipe_for_caches_of_another_preset_is_refused(ris: Ris, tiny_cache: Path, tmp_path: Path) -> None:
    """With settings laid over it that would let it train, too, and before any tokenizer is looked for."""
    for settings in ((), ("--set", "model.bert.vocabulary=package:tiny", "--random-weights")):
        result = ris(
            "train", "--cache", tiny_cache, "--runs", tmp_path / "runs", "--recipe", "paper", "--device", "cpu",
            *settings,
        )  # fmt: skip
        assert (result.exit_code, result.stdout) == (2, "")
        assert f"Recipe paper needs a cache of preset paper; {tiny_cache} is of preset tiny." in result.stderr
        assert "--recipe tiny or tiny-gres" in result.stderr
    assert not list(tmp_path.iterdir())


def test_recipes_and_presets_of_ones_own_are_left_to_their_maker() -> None:
    for recipe, preset in (("tiny", "tiny"), ("gres", "paper"), ("mine", "tiny"), ("paper", "mine")):
        require_recipe_for(recipe, preset, Path("feats"))


@pytest.mark.parametrize("name", ["meta", "mps", "warp", "cpu:1", "cuda:", "cuda:-1", "CPU", "", "cuda:١"])
def test_other_devices_than_cpu_and_cuda_are_refused_in_a_line(name: str) -> None:
    with pytest.raises(
        ConfigError, match="ris runs on cpu, cuda, or one of several such as cuda:1"
    ) as caught:
        choose_device(name)
    assert len(str(caught.value)) < 160
    assert caught.value.exit_code == 2


def test_a_cuda_device_that_is_not_there_is_said_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for name in ("cuda", "cuda:0"):
        with pytest.raises(ConfigError, match="there is no CUDA device"):
            choose_device(name)
    assert choose_device("cpu") == choose_device(None) == torch.device("cpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(ConfigError, match="the last of the CUDA devices here is cuda:1"):
        choose_device("cuda:2")


class Ended(SystemExit):
    """As by the signal of a launcher."""


@pytest.mark.parametrize("wrong", [("--recipe", "nope"), ("--device", "meta", "--recipe", "tiny"), ()])
def test_what_fails_in_all_processes_is_told_by_the_first(
    ris: Ris, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, wrong: tuple[str, ...]
) -> None:
    """The others wait, and the launcher ends them; one that it leaves alone failed alone, and tells."""
    command = ("train", "--cache", tmp_path / "none", "--runs", tmp_path / "runs", *wrong)
    waited: list[float] = []

    def end(seconds: float) -> None:
        waited.append(seconds)
        raise Ended(-15)

    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setattr(time, "sleep", end)
    first = ris(*command)
    assert first.exit_code in (2, 3)
    assert first.stderr.count("error: ") == 1
    monkeypatch.setenv("RANK", "1")
    other = ris(*command)
    assert (other.exit_code, other.output, len(waited)) == (-15, "", 1)
    monkeypatch.setattr(time, "sleep", waited.append)
    alone = ris(*command)
    assert (alone.exit_code, alone.stderr, len(waited)) == (first.exit_code, first.stderr, 2)


@pytest.mark.parametrize(
    ("config", "variable", "override", "expected"),
    [
        (None, None, None, "refcocog/umd:val"),
        (None, None, "data.val=refcoco:testA", "refcoco:testA"),
        (None, None, "data={val: refcoco:testA}", "refcoco:testA"),
        (None, "refcoco:testA", None, "refcoco:testA"),
        ("data: {val: refcoco:testA}", None, None, "refcoco:testA"),
        ("data: {text: sent}", None, None, "refcocog/umd:val"),
    ],
    ids=["recipe", "set", "set-section", "variable", "file", "other-file"],
)
def test_split_leaves_the_validation_split_that_was_chosen_however_it_was(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    config: str | None,
    variable: str | None,
    override: str | None,
    expected: str,
) -> None:
    if variable is not None:
        monkeypatch.setenv("RIS_DATA__VAL", variable)
    path = tmp_path / "mine.yaml"
    path.write_text(config or "")
    found = train_command._resolve(
        tmp_path, "tiny", path if config else None, [override] if override else [], "refcocog", None
    )
    assert (found.data.train, found.data.val) == ("refcocog/umd:train", expected)


def test_split_moves_the_validation_split_of_a_run_that_goes_on(tmp_path: Path, tiny_runs: Path) -> None:
    """Its own configuration says where it was, not where it is to be."""
    found = train_command._resolve(tmp_path, None, None, [], "refcocog", tiny_runs / "first")
    assert found.data.val == "refcocog/umd:val"

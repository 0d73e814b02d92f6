"""`ris config`: what a run would be given, as text that can be given back, and as JSON."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from cli import config as config_command
from ris_train.config import load_config, recipe_head, recipes
from ris_train.config.json_schema import json_schema

Ris = Callable[..., Any]


def shown(ris: Ris, *arguments: object) -> str:
    result = ris("config", *arguments)
    assert result.exit_code == 0, result.output
    text: str = result.stdout
    return text


@pytest.mark.parametrize("recipe", recipes())
def test_what_is_shown_is_the_configuration_and_can_be_given_back(
    ris: Ris, tmp_path: Path, recipe: str
) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(shown(ris, "show", "--recipe", recipe, "--set", "train.lr=3.3e-5"), encoding="utf-8")
    expected = load_config(recipe=recipe, overrides=["train.lr=3.3e-5"])
    assert yaml.safe_load(path.read_text("utf-8")) == expected.model_dump(mode="json")
    assert load_config(recipe=recipe, config_path=path) == expected


def test_each_value_is_shown_with_its_origin(
    ris: Ris, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("loss: {dfam: 0.5}\ntrain: {steps: 7, seed: 1}\n", encoding="utf-8")
    monkeypatch.setenv("RIS_TRAIN__STEPS", "8")
    monkeypatch.setenv("RIS_TRAIN__SEED", "2")
    arguments = ("show", "--recipe", "authors-code", "--config", path, "--set", "train.seed=3")
    text = shown(ris, *arguments)
    origins = {
        line.split(":")[0].strip(): line.partition("# ")[2] for line in text.splitlines() if "# " in line
    }
    expected = {
        "oversample": "default",
        "eval_every": "recipe paper-refcoco",
        "bert_layers": "recipe authors-code",
        "dfam": f"file {path}",
        "steps": "RIS_TRAIN__STEPS",
        "seed": "--set",
    }
    assert {name: origins[name] for name in expected} == expected
    document = json.loads(shown(ris, *arguments, "--json"))
    assert document["recipe"] == "authors-code"
    assert document["settings"]["train.seed"] == {"value": 3, "origin": "--set"}
    assert document["settings"]["train.steps"] == {"value": 8, "origin": "RIS_TRAIN__STEPS"}


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf-8"])
def test_what_is_shown_can_be_given_back_from_any_terminal(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, encoding: str
) -> None:
    """YAML is read as UTF-8; what the output cannot hold is escaped as YAML has it."""
    path = tmp_path / "größe.yaml"
    path.write_text("model: {bert: {weights: 'größe/模型'}}", encoding="utf-8")
    output = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
    monkeypatch.setattr("sys.stdout", output)
    config_command.show(tmp_path / "none", "tiny", path)
    output.flush()
    content = output.buffer.getvalue()  # type: ignore[attr-defined]
    assert yaml.safe_load(content)["model"]["bert"]["weights"] == "größe/模型"
    assert ("模型".encode() in content) == (encoding == "utf-8")


def test_the_recipe_is_the_one_of_the_caches_preset(ris: Ris, tiny_cache: Path, tmp_path: Path) -> None:
    assert shown(ris, "show", "--cache", tiny_cache).startswith("recipe: tiny\n")
    assert shown(ris, "show", "--cache", tmp_path / "none").startswith("recipe: paper\n")


def test_training_reads_the_environment(
    ris: Ris, tiny_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A wrong value of it stops `ris train` before anything is written."""
    monkeypatch.setenv("RIS_TRAIN__LR", "fast")
    result = ris("train", "--cache", tiny_cache, "--runs", tmp_path / "runs", "--random-weights")
    assert result.exit_code == 2
    assert "train.lr: Input should be a valid number" in result.stderr
    assert "from RIS_TRAIN__LR" in result.stderr
    assert not (tmp_path / "runs").exists()


def test_a_mistyped_variable_is_an_error_and_names_the_right_one(
    ris: Ris, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RIS_TRAIN__STEP", "5")
    result = ris("config", "show", "--recipe", "tiny")
    assert result.exit_code == 2
    assert "RIS_TRAIN__STEP: unknown variable; did you mean RIS_TRAIN__STEPS?" in result.stderr


def test_the_schema_is_printed(ris: Ris) -> None:
    assert json.loads(shown(ris, "schema")) == json_schema()


def test_every_recipe_is_listed(ris: Ris) -> None:
    text = shown(ris, "recipes")
    assert [name for name in recipes() if name not in text] == []
    lines = [line.strip() for line in text.splitlines()]
    assert [recipe_head(name).command for name in recipes() if recipe_head(name).command not in lines] == []
    assert "ris train --cache ./feats --recipe tiny-gres --random-weights" in lines
    documents = json.loads(shown(ris, "recipes", "--json"))
    assert [document["name"] for document in documents] == list(recipes())
    assert documents[0]["extends"] == "paper-refcoco"
    assert all(document["about"] and document["cost"] for document in documents)

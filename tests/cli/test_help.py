"""Help: every command explains itself, with an example, quickly."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest

OPTIONS: dict[str, tuple[str, ...]] = {
    "data synth": ("--out", "--layout", "--train", "--val", "--test", "--seed"),
    "data check": ("--data", "--split", "--masks", "--json"),
    "extract": (
        "--split",
        "--data",
        "--cache",
        "--preset",
        "--sam-weights",
        "--clip-weights",
        "--random-weights",
        "--seed",
        "--store",
        "--dtype",
        "--arithmetic",
        "--shard-rows",
        "--batch-size",
        "--workers",
        "--compile",
        "--limit",
        "--dry-run",
        "--strict",
        "--device",
        "--json",
    ),
    "cache info": ("--cache", "--adding", "--data", "--json"),
    "cache verify": (
        "--cache",
        "--fast",
        "--repair",
        "--dry-run",
        "--data",
        "--sam-weights",
        "--clip-weights",
        "--random-weights",
        "--seed",
        "--batch-size",
        "--device",
        "--json",
    ),
    "cache convert": ("--store", "--dtype", "--shard-rows", "--dry-run", "--json"),
    "cache compare": ("--images", "--checkpoint", "--runs", "--batch-size", "--device", "--json"),
    "cache merge": ("--dry-run", "--json"),
    "cache remove": ("--cache", "--dry-run", "--json"),
    "cache gc": ("--cache", "--dry-run", "--json"),
    "train": (
        "--cache",
        "--recipe",
        "--config",
        "--set",
        "--split",
        "--run",
        "--runs",
        "--random-weights",
        "--json",
    ),
    "eval": (
        "--cache",
        "--run",
        "--checkpoint",
        "--split",
        "--rules",
        "--category",
        "--shuffle-expressions",
        "--seed",
        "--save-predictions",
        "--batch-size",
        "--json",
    ),
    "score": (
        "--predictions",
        "--split",
        "--cache",
        "--data",
        "--rules",
        "--name",
        "--allow-missing",
        "--out",
    ),
    "compare": (
        "--rules",
        "--layout",
        "--format",
        "--out",
        "--bootstrap",
        "--seed",
        "--histogram",
        "--bins",
        "--by",
        "--checkpoint",
        "--runs",
        "--json",
    ),
    "predict": ("--image", "--text", "--out", "--category", "--model", "--run", "--sam-weights", "--json"),
    "runs list": ("--runs", "--json"),
    "runs show": ("--runs", "--tail", "--json"),
    "runs export": ("--out", "--last", "--best", "--licence", "--runs", "--json"),
    "config show": ("--cache", "--recipe", "--config", "--set", "--json"),
    "config schema": (),
    "config recipes": ("--json",),
    "params": ("--preset", "--json"),
    "doctor": ("--data", "--cache", "--json"),
    "demo": ("--out", "--train", "--steps", "--seed"),
}

# One interpreter asks for every help, so that torch is known to be loaded by none of them.
PROGRAM = """
import json, sys
from typer.testing import CliRunner
from cli.app import app
runner = CliRunner(env={"COLUMNS": "200"})
shown = {}
for line in json.loads(sys.argv[1]):
    result = runner.invoke(app, [*line.split(), "--help"])
    shown[line] = [result.exit_code, result.stdout, result.stderr]
print(json.dumps({"shown": shown, "torch": "torch" in sys.modules}))
"""


@pytest.fixture(scope="module")
def asked() -> dict[str, Any]:
    """Exit code, stdout and stderr of each command's help, and whether torch was loaded by then."""
    commands = json.dumps(["", "data", "cache", "runs", "config", *OPTIONS])
    finished = subprocess.run(
        [sys.executable, "-c", PROGRAM, commands], capture_output=True, text=True, check=True
    )
    document: dict[str, Any] = json.loads(finished.stdout)
    return document


@pytest.fixture(scope="module")
def shown(asked: dict[str, Any]) -> dict[str, tuple[int, str, str]]:
    """Exit code, stdout and stderr of each command's help."""
    return {command: tuple(answer) for command, answer in asked["shown"].items()}


def test_no_help_loads_torch(asked: dict[str, Any]) -> None:
    assert asked["torch"] is False


@pytest.mark.parametrize("command", ["", "data", "cache", "runs", "config", *OPTIONS])
def test_help_succeeds_on_stdout(shown: dict[str, tuple[int, str, str]], command: str) -> None:
    exit_code, stdout, stderr = shown[command]
    assert exit_code == 0
    assert f"Usage: ris {command}".rstrip() in stdout
    assert stderr == ""


def test_the_first_help_lists_every_command(shown: dict[str, tuple[int, str, str]]) -> None:
    listed = shown[""][1].partition("Commands:")[2].splitlines()
    names = {line.split()[0] for line in listed if line.strip()}
    assert names == {command.split()[0] for command in OPTIONS}
    assert "synth" in shown["data"][1].partition("Commands:")[2]


@pytest.mark.parametrize("command", OPTIONS)
def test_a_commands_help_names_its_options_and_an_example(
    shown: dict[str, tuple[int, str, str]], command: str
) -> None:
    text = shown[command][1]
    words = text.replace(",", " ").split()
    assert [option for option in OPTIONS[command] if option not in words] == []
    assert f"Example: ris {command}" in text


@pytest.mark.parametrize("command", OPTIONS)
def test_every_option_says_what_it_does(shown: dict[str, tuple[int, str, str]], command: str) -> None:
    """An option's line goes on after its name and type; where they are long, on the next line."""
    lines = shown[command][1].partition("Options:")[2].splitlines()
    for line, following in zip(lines, [*lines[1:], ""], strict=True):
        if line.startswith("  --"):  # deeper ones go on with a sentence that names an option
            explained = len(line.strip().split("  ")) > 1 or not following.strip().startswith("-")
            assert explained, line


def test_no_arguments_show_the_help(ris: Callable[..., Any]) -> None:
    result = ris()
    assert "Usage: ris" in result.output
    assert "extract" in result.output


def test_an_unknown_command_or_option_is_a_usage_error(ris: Callable[..., Any]) -> None:
    for wrong, arguments in (("extrakt", ("extrakt",)), ("--cahce", ("train", "--cahce", "x"))):
        result = ris(*arguments)
        assert result.exit_code == 2
        assert wrong in result.stderr

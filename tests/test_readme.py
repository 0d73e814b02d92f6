"""The README against the command line: what it says to type can be typed."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import typer.main

from cli.app import app

README = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")


def shell_lines(text: str) -> list[str]:
    """Lines of the ```sh blocks, indented ones too; a trailing backslash joins the next line."""
    blocks = re.findall(r"^[ ]*```sh\n(.*?)^[ ]*```", text, flags=re.MULTILINE | re.DOTALL)
    lines = [line.strip() for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    return [line for line in lines if line]


def ris_lines(text: str) -> list[str]:
    return [line for line in shell_lines(text) if line.split()[0] == "ris"]


def parse(line: str) -> Any:
    """Read a `ris …` line as the command line would, without running it; returns the command's context.

    Raises:
        Exception: Typer's own, for an unknown command or option, a wrong value or a missing option.
    """
    program, *words = shlex.split(line, comments=True)
    assert program == "ris"
    command: Any = typer.main.get_command(app)
    names = [program]
    while hasattr(command, "commands"):
        assert words, f"{line!r} names no command"
        assert words[0] in command.commands, f"{line!r}: there is no {' '.join([*names, words[0]])!r}"
        names.append(words[0])
        command = command.commands[words.pop(0)]
    return command.make_context(" ".join(names), words)


def commands(command: Any, names: tuple[str, ...] = ("ris",)) -> set[str]:
    """Every command that does something, in full."""
    if not hasattr(command, "commands"):
        return {" ".join(names)}
    return {full for name, inner in command.commands.items() for full in commands(inner, (*names, name))}


def test_the_blocks_are_found() -> None:
    plain = "a\n```sh\nris demo\n```\n1. b\n\n"
    indented = "   ```sh\n   ris train \\\n     --cache x\n   ```\n"
    text = f"{plain}{indented}```\nris no\n```\n"
    assert [line.split() for line in shell_lines(text)] == [
        ["ris", "demo"],
        ["ris", "train", "--cache", "x"],
    ]
    assert len(ris_lines(README)) >= 3


@pytest.mark.parametrize("line", ris_lines(README))
def test_every_command_of_the_readme_parses(line: str) -> None:
    parse(line)


@pytest.mark.parametrize(
    "line",
    [
        "ris trian",
        "ris data",
        "ris train --cahce feats",
        "ris extract --cache feats",
        "ris demo --steps many",
        "ris eval --category guessed",
        "ris doctor surplus",
    ],
)
def test_a_line_that_is_wrong_does_not_parse(line: str) -> None:
    with pytest.raises(Exception, match=r".") as caught:
        parse(line)
    assert isinstance(caught.value, AssertionError) or "Usage" in repr(type(caught.value).__mro__)


def test_what_is_parsed_is_what_was_written() -> None:
    context = parse('ris predict --image a.jpg --text "the lady"  # a comment')
    assert context.params["text"] == ["the lady"]
    assert context.params["image"] == Path("a.jpg")


def test_the_table_of_commands_lists_each_command_once() -> None:
    section = README.partition("## Commands")[2].partition("\n## ")[0]
    listed = re.findall(r"^\| `(ris [^`]*)`", section, flags=re.MULTILINE)
    # Arguments are in capitals, and options begin with a dash.
    without_options = [re.split(r" (?=--|[A-Z])", line)[0] for line in listed]
    assert sorted(without_options) == sorted(commands(typer.main.get_command(app)))

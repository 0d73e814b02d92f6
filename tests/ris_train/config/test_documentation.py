"""docs/training.md says what the recipes, the schema and the commands say."""

from __future__ import annotations

import itertools
import re
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ris_cache.errors import DataError
from ris_train.config import load_config, recipe_head, recipes
from ris_train.config.deviations import SWITCHED, value_of
from ris_train.config.documentation import (
    AUTHORS,
    BLOCKS,
    COMMAND,
    OURS,
    deviations_tables,
    markers,
    recipes_table,
    update,
)
from ris_train.config.keys import all_keys, leaves, variable

ROOT = Path(__file__).parents[3]
DOCUMENT = ROOT / "docs" / "training.md"
TEXT = DOCUMENT.read_text("utf-8")
AROUND = "\n".join("\n".join(markers(name)) for name in BLOCKS)


def test_the_document_is_up_to_date() -> None:
    assert update(TEXT) == TEXT, f"The tables of docs/training.md are not those of the code; run `{COMMAND}`."


def test_the_command_in_the_document_rewrites_the_tables(tmp_path: Path) -> None:
    (tmp_path / "docs").mkdir()
    copy = tmp_path / "docs" / "training.md"
    copy.write_text(f"# Ours\n\n{AROUND}\n\nStays.\n", "utf-8")
    finished = subprocess.run(
        [sys.executable, *COMMAND.split()[1:]], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert finished.returncode == 0, finished.stderr
    text = copy.read_text("utf-8")
    assert recipes_table() in text
    assert deviations_tables() in text
    assert text.startswith("# Ours\n")
    assert text.endswith("\nStays.\n")


@pytest.mark.parametrize("text", ["", AROUND * 2, AROUND.replace("begin", "start", 1)])
def test_a_document_without_its_markers_is_refused(text: str) -> None:
    with pytest.raises(DataError, match="once each and in this order"):
        update(text)


def test_every_setting_in_which_the_two_recipes_differ_is_in_the_table() -> None:
    authors, ours = (load_config(recipe=name).model_dump(mode="json") for name in (AUTHORS, OURS))
    differing = {key for key, value in leaves(authors) if value_of(ours, key) != value} - {"recipe"}
    assert differing <= {key for row in SWITCHED for key in row.keys}
    assert len(differing) >= 10


def test_a_row_says_something_else_where_the_settings_do() -> None:
    authors, ours = (load_config(recipe=name).model_dump(mode="json") for name in (AUTHORS, OURS))
    for row in SWITCHED:
        values = [[value_of(tree, key) for key in row.keys] for tree in (authors, ours)]
        texts = [row.text(*found) for found in values]
        assert (texts[0] == texts[1]) == (values[0] == values[1]), row.subject


def test_a_changed_recipe_changes_the_table(monkeypatch: pytest.MonkeyPatch) -> None:
    before = deviations_tables()
    monkeypatch.setattr(
        "ris_train.config.documentation.load_config",
        lambda recipe: load_config(recipe=recipe, overrides=["train.bert_layers=7"]),
    )
    assert "the first 7 layers" in deviations_tables()
    assert "the first 7 layers" not in before


def test_every_row_has_the_cells_of_its_table() -> None:
    for make in BLOCKS.values():
        for table in re.findall(r"(?:^\|.*\n?)+", make(), re.M):
            assert len({line.count("|") for line in table.splitlines()}) == 1


def test_every_setting_and_variable_that_is_named_exists() -> None:
    keys = list(all_keys())
    named = set(re.findall(r"\b((?:model|loss|data|train)\.[a-z_.]*[a-z_])\b", TEXT))
    assert named
    assert named <= set(keys)
    variables = set(re.findall(r"\bRIS_\w+__\w+\b", TEXT))
    assert variables
    assert variables <= {variable(key) for key in keys}


def test_every_command_has_the_options_that_are_shown(ris: Callable[..., Any]) -> None:
    blocks = re.findall(r"^```sh\n(.*?)^```", TEXT, re.M | re.S)
    lines = [line.partition(" cli ")[2] or line for block in blocks for line in block.splitlines()]
    commands = [shlex.split(line.removeprefix("ris "), comments=True) for line in lines if "kill" not in line]
    assert len(commands) > 10
    # torchrun, which knows every beginning of its options, would refuse --run as one of them.
    assert all(" -m -- cli " in line for line in TEXT.splitlines() if line.startswith("torchrun "))
    for words in commands:
        count = 2 if words[0] in ("config", "runs") else 1
        shown = ris(*words[:count], "--help")
        assert shown.exit_code == 0, words
        assert [word for word in words if word.startswith("--") and word not in shown.stdout] == []
        named = {word for before, word in itertools.pairwise(words) if before == "--recipe"}
        assert named <= set(recipes())


def test_the_keys_that_a_resumed_run_may_change_are_those_listed() -> None:
    from ris_train.training.resume import MAY_CHANGE

    (listed,) = re.findall(r"must be the run's own but for (.*?`)\.\s", TEXT, re.S)
    assert set(re.findall(r"`([\w.]+)`", listed)) == MAY_CHANGE


def test_the_python_in_the_document_runs(
    tiny_runs: Path, drawn_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from ris_train.pretrained import RISModel
    from ris_train.run import RunDirectory

    (program,) = re.findall(r"^```python\n(.*?)^```", TEXT, re.M | re.S)
    RISModel.from_run(RunDirectory(tiny_runs / "first")).save_pretrained(tmp_path / "first-model")
    image = next((drawn_data / "images").rglob("*.jpg"))
    (tmp_path / "street.jpg").write_bytes(image.read_bytes())
    pushed: list[tuple[str, str]] = []
    monkeypatch.setattr(RISModel, "push_to_hub", lambda _, name, *, licence: pushed.append((name, licence)))
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    exec(program, names)
    assert names["lady"].mask.dtype == bool
    assert names["lady"].mask.shape == names["bus"].mask.shape
    assert pushed == [("owner/name", "apache-2.0")]


def test_the_recipe_of_the_demo_states_the_scores_of_the_readme() -> None:
    readme = (ROOT / "README.md").read_text("utf-8")
    rows = re.findall(r"refcoco\.unc:(val|testA|testB) +│ +\d+ │ +([\d.]+) │ +([\d.]+)", readme)
    assert [split for split, *_ in rows] == ["val", "testA", "testB"]
    overall = ", ".join(f"{split} {score}" for split, score, _ in rows)
    means = ", ".join(score for *_, score in rows)
    cost = recipe_head("tiny").cost
    assert f"oIoU: {overall}; mIoU: {means}." in cost
    (seconds,) = re.findall(r"training, scores and masks\. (\d+) s\.", readme)
    assert f"in {seconds} s on two CPU cores" in cost

"""docs/metrics.md says what the code does."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from ris_cache.errors import DataError
from ris_train.scoring.documentation import BEGIN, END, metrics_tables, update
from ris_train.scoring.rules import RULES

ROOT = Path(__file__).parents[3]
DOCUMENT = ROOT / "docs" / "metrics.md"
COMMAND = "python -m ris_train.scoring.documentation docs/metrics.md"


def test_the_document_is_up_to_date() -> None:
    text = DOCUMENT.read_text("utf-8")
    assert update(text) == text, f"The tables of docs/metrics.md are not those of the code; run `{COMMAND}`."


def test_the_command_in_the_document_rewrites_the_tables(tmp_path: Path) -> None:
    assert COMMAND in BEGIN
    (tmp_path / "docs").mkdir()
    copy = tmp_path / "docs" / "metrics.md"
    copy.write_text(f"# Ours\n\n{BEGIN}\n\nan old table\n\n{END}\n\nStays.\n", "utf-8")
    command = [sys.executable, *COMMAND.split()[1:]]
    finished = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert finished.returncode == 0, finished.stderr
    assert copy.read_text("utf-8") == f"# Ours\n\n{BEGIN}\n\n{metrics_tables()}\n\n{END}\n\nStays.\n"


@pytest.mark.parametrize(
    "text", ["", BEGIN, END, f"{END}\n{BEGIN}", f"{BEGIN}\n{END}\n{END}", f"{BEGIN}\n{BEGIN}\n{END}"]
)
def test_a_document_without_its_markers_is_refused(text: str) -> None:
    with pytest.raises(DataError, match="once each and in this order"):
        update(text)


def test_the_examples_run() -> None:
    blocks = re.findall(r"^```python\n(.*?)^```", DOCUMENT.read_text("utf-8"), re.M | re.S)
    assert blocks
    program = "\n".join(blocks) + "\nimport sys; sys.exit('torch' in sys.modules)\n"
    finished = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert finished.returncode == 0, finished.stderr


def test_every_rule_set_and_every_view_is_in_the_tables() -> None:
    tables = metrics_tables()
    for rules in RULES.values():
        assert tables.count(f"`{rules.name}`") >= 2
        assert f"`{rules.view.name}`" in tables


def test_every_row_has_the_cells_of_its_table() -> None:
    for table in re.findall(r"(?:^\|.*\n?)+", metrics_tables(), re.M):
        assert len({line.count("|") for line in table.splitlines()}) == 1


def test_the_tables_show_the_golden_values() -> None:
    tables = metrics_tables()
    for text in (
        "oIoU 62.162, mIoU 57.778, Acc 50.000 | 66.7 50.0 33.3 33.3 33.3",
        "oIoU 53.846, mIoU 30.667, gIoU 60.667 | 30.0 30.0 20.0 20.0 10.0",
        "cIoU 52.500, gIoU 50.667, N-acc 50.000, T-acc 83.333 | 33.3 33.3 33.3",
        "cIoU 54.762, gIoU 54.667",
    ):
        assert text in tables

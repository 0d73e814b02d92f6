"""`ris compare` by its command line."""

from __future__ import annotations

import csv
import io
import json
import os
import pty
import shutil
import subprocess
import sys
import termios
from pathlib import Path

import pytest

from ris_train.scoring.rules import RULES
from ris_train.scoring.samples import SampleTable


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory, tiny_cache, tiny_runs, ris) -> Path:
    """Runs directory in which `first` was evaluated by two rule sets on every split, and not otherwise."""
    runs = tmp_path_factory.mktemp("runs")
    shutil.copytree(tiny_runs / "first", runs / "first", ignore=shutil.ignore_patterns("eval"))
    result = ris(
        "eval", "--cache", tiny_cache, "--runs", runs, "--run", "first", "--rules", "ris,dfam", "--device", "cpu",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    return runs


def samples_of(runs: Path) -> SampleTable:
    (path,) = (runs / "first" / "eval").glob("scores-best-*.parquet")
    return SampleTable.read(path)


def test_a_run_beside_published_rows(ris, evaluated):
    result = ris("compare", "first", "published:ours-cls", "--runs", evaluated, "--bootstrap", 50)
    assert result.exit_code == 0, result.output
    for part in (
        "first",
        "Ours with p′sparse, published",
        "rules: ris",
        "category source",
        "samples",
        "95 % intervals",
    ):
        assert part in result.stdout, part


def test_json_holds_the_run_s_own_scores_in_full_precision(ris, evaluated):
    result = ris("compare", "first", "--runs", evaluated, "--bootstrap", 20, "--by", "length", "--json")
    document = json.loads(result.stdout)
    table = samples_of(evaluated)
    for split in document["splits"]:
        chosen = table.select([row for row, key in enumerate(table.key) if key[1] == split["split"]])
        expected = RULES["ris"].score(chosen.counts("original")).values
        metrics = split["scores"]["first"]["metrics"]
        assert {name: found["value"] for name, found in metrics.items()} == expected
        assert split["num_samples"] == len(chosen)
    assert document["bootstrap"] == {"confidence": 0.95, "resamples": 20, "seed": 0, "over": "images"}
    assert document["breakdown"]["by"] == "length"


def test_two_rule_sets_give_two_tables(ris, evaluated):
    result = ris("compare", "first", "--runs", evaluated, "--rules", "ris,dfam", "--bootstrap", 0)
    assert result.exit_code == 0, result.output
    assert "rules: ris ·" in result.stdout
    assert "rules: dfam ·" in result.stdout


@pytest.mark.parametrize(
    ("name", "sign"), [("t.md", "| Methods |"), ("t.tex", r"\toprule"), ("t.txt", "───")]
)
def test_a_file_takes_the_format_of_its_suffix(ris, evaluated, tmp_path, name, sign):
    out = tmp_path / name
    result = ris("compare", "first", "--runs", evaluated, "--bootstrap", 0, "--out", out)
    assert (result.exit_code, result.stdout) == (0, "")
    assert sign in out.read_text(encoding="utf-8")


def test_csv_on_stdout_parses(ris, tmp_path):
    result = ris("compare", "published", "--layout", "table5", "--format", "csv")
    rows = list(csv.DictReader(io.StringIO(result.stdout)))
    assert {row["Methods"]: row["RefCOCO Val"] for row in rows}["LISA, published"] == "0.749"
    assert {row["rules"] for row in rows} == {"as published"}


def test_published_lists_every_published_row(ris):
    result = ris("compare", "published")
    assert result.exit_code == 0
    for value in ("72.37", "72.38", "33.61", "7.3B", "73.82", "61.89"):
        assert value in result.stdout


def test_a_histogram_is_written(ris, evaluated, tmp_path):
    path = tmp_path / "iou.svg"
    result = ris("compare", "first", "--runs", evaluated, "--bootstrap", 0, "--histogram", path, "--bins", 10)
    assert result.exit_code == 0, result.output
    assert path.read_text().startswith("<?xml")


@pytest.mark.parametrize(
    ("arguments", "exit_code", "message"),
    [
        (["published:nobody"], 2, "There are no published rows 'nobody'"),
        (["absent.parquet"], 3, "There is no samples table absent.parquet"),
        (["published:ours", "--out", "x.pdf"], 2, "does not tell its format"),
        (["published:ours", "--rules", "rsi"], 2, "There is no rule set 'rsi'"),
        (["published:ours", "--histogram", "x.svg"], 2, "no samples for a histogram"),
        (["published:ours", "--by", "size"], 2, "no samples for a breakdown"),
        (["published:ours", "published:ours"], 2, "Two methods are called"),
        (["mine=published"], 2, "gives one name to all published rows. Name one: mine=published:ours"),
    ],
)
def test_mistakes_end_with_a_message_and_their_exit_code(ris, arguments, exit_code, message):
    result = ris("compare", *arguments)
    assert result.exit_code == exit_code
    assert message in result.stderr
    assert result.stdout == ""


def test_on_a_terminal_no_line_of_the_tables_is_wider_than_it(tmp_path):
    control, terminal = pty.openpty()
    termios.tcsetwinsize(terminal, (24, 72))
    environment = {name: value for name, value in os.environ.items() if name not in ("COLUMNS", "LINES")}
    process = subprocess.Popen(
        [sys.executable, "-m", "cli", "compare", "published"], stdout=terminal, env=environment
    )
    os.close(terminal)
    written = b""
    try:
        while part := os.read(control, 2**16):
            written += part
    except OSError:  # the other end is closed
        pass
    os.close(control)
    assert process.wait() == 0
    lines = written.decode().splitlines()
    assert max(map(len, lines)) == 72
    assert "72.38" in written.decode()

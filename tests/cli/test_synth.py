"""`ris data synth` as a user meets it."""

from __future__ import annotations

from pathlib import Path

import pytest

from cli.synth import chosen_layouts
from ris_cache.datasets.shapes import LAYOUT_NAMES
from ris_cache.errors import ConfigError

SIZES = ("--train", 3, "--val", 2, "--test", 1)


def cells(output: str) -> dict[str, list[list[str]]]:
    """The tables of the output: title → rows of cells."""
    tables: dict[str, list[list[str]]] = {}
    for line in output.splitlines():
        if line.startswith("Drawn dataset "):
            tables[line.split(" in ")[0]] = []
        elif line.startswith("│"):
            tables[list(tables)[-1]].append([cell.strip() for cell in line.strip("│").split("│")])
    return tables


def test_without_a_layout_it_draws_refcoco_alone(ris, tmp_path: Path) -> None:
    result = ris("data", "synth", "--out", tmp_path, *SIZES)
    assert result.exit_code == 0, result.output
    assert {path.name for path in tmp_path.iterdir()} == {"refcoco", "images"}
    ((title, rows),) = cells(result.stdout).items()
    assert title == "Drawn dataset refcoco (unc)"
    assert [row[:2] for row in rows] == [["train", "3"], ["val", "2"], ["testA", "1"], ["testB", "1"]]
    for _, _, _, expressions, none, one, many in rows:
        assert (none, one, many) == ("0", expressions, "0")


def test_all_writes_every_layout_and_prints_a_table_of_each(ris, tmp_path: Path) -> None:
    result = ris("data", "synth", "--out", tmp_path, "--layout", "all", *SIZES)
    assert result.exit_code == 0, result.output
    assert {path.name for path in tmp_path.iterdir()} == {"images", *LAYOUT_NAMES}
    tables = cells(result.stdout)
    assert list(tables) == [
        f"Drawn dataset {name}"
        for name in (
            "refcoco (unc)",
            "refcoco+ (unc)",
            "refcocog (umd)",
            "refcocog (google)",
            "grefcoco (unc)",
            "ref-zom (final)",
            "custom (drawn)",
        )
    ]
    for rows in tables.values():
        for _, _, _, expressions, *by_kind in rows:
            assert sum(map(int, by_kind)) == int(expressions)
    (val,) = (row for row in tables["Drawn dataset grefcoco (unc)"] if row[0] == "val")
    assert val[5] == "0"


def test_an_unknown_layout_is_named_with_the_known_ones(ris, tmp_path: Path) -> None:
    result = ris("data", "synth", "--out", tmp_path / "data", "--layout", "refcoco,gref", *SIZES)
    assert result.exit_code == 2
    assert "--layout 'gref' is not a layout; known: refcoco, refcoco+, refcocog" in result.stderr
    assert not (tmp_path / "data").exists()


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (["grefcoco"], ("grefcoco",)),
        (["custom, refcoco"], ("refcoco", "custom")),
        (["ref-zom", "refcoco+,ref-zom"], ("refcoco+", "ref-zom")),
        (["refcoco", "all"], LAYOUT_NAMES),
    ],
)
def test_layouts_may_be_repeated_listed_and_said_twice(options: list[str], expected: tuple[str, ...]) -> None:
    assert chosen_layouts(options) == expected


@pytest.mark.parametrize("option", ["", "refcoco,", "all,none"])
def test_empty_and_unknown_names_are_refused(option: str) -> None:
    with pytest.raises(ConfigError, match="is not a layout"):
        chosen_layouts([option])

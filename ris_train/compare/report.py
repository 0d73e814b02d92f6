"""A whole comparison, ready to print: its tables, its intervals, its breakdown."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ris_cache.errors import ConfigError
from ris_cache.store.files import write_atomically
from ris_train.compare.breakdown import Breakdown, break_down, breakdown_dict, breakdown_tables
from ris_train.compare.comparison import Comparison
from ris_train.compare.formats import FORMATS, SUFFIXES, to_terminal
from ris_train.compare.intervals import interval_tables
from ris_train.compare.layouts import lay_out
from ris_train.compare.tables import Table


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """What one call of `ris compare` has to say.

    Attributes:
        by: what the breakdown is by; None without one.
    """

    comparison: Comparison
    tables: tuple[Table, ...]
    by: str | None
    breakdowns: tuple[Breakdown, ...]

    def text(self, name: str, *, width: int | None = None) -> str:
        """The tables in one of the `FORMATS`.

        Args:
            width: of the terminal that will show them; the other formats have none.
        """
        if name == "terminal":
            return to_terminal(self.tables, width=width)
        return FORMATS[name](self.tables)

    def write(self, path: Path, name: str) -> None:
        """Write the tables to a file, atomically."""
        write_atomically(path, self.text(name).encode())

    def as_dict(self) -> dict[str, Any]:
        """Everything as plain values, for JSON."""
        document = self.comparison.as_dict()
        document["notes"] = [
            {"table": table.title, "row": row.label, "note": table.notes[mark - 1]}
            for table in self.tables
            for row in table.rows
            for mark in row.marks
        ]
        if self.by is not None:
            document["breakdown"] = {
                "by": self.by,
                "splits": [breakdown_dict(self.comparison, found) for found in self.breakdowns],
            }
        return document


def make_report(comparison: Comparison, *, layout: str = "auto", by: str | None = None) -> Report:
    """Lay a comparison out: the tables asked for, then those of the intervals, then those of the breakdown.

    Raises:
        ConfigError: a layout that a rule set cannot fill, or a breakdown of what was not counted.
    """
    breakdowns = break_down(comparison, by) if by is not None else ()
    return Report(
        comparison=comparison,
        tables=(
            *lay_out(comparison, layout),
            *interval_tables(comparison),
            *(breakdown_tables(comparison, by, breakdowns) if by is not None else ()),
        ),
        by=by,
        breakdowns=breakdowns,
    )


def choose_format(name: str | None, path: Path | None) -> str:
    """Choose the format: the one named, else that of the file's suffix, else terminal.

    Raises:
        ConfigError: no format is named and the suffix stands for none.
    """
    if name is not None:
        return name
    if path is None:
        return "terminal"
    if path.suffix not in SUFFIXES:
        raise ConfigError(
            f"{path} does not tell its format; its suffix is none of {', '.join(SUFFIXES)}. Add --format.",
            path=path,
        )
    return SUFFIXES[path.suffix]

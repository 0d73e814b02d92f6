"""A table as data, between what was computed and the four formats that print it."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from ris_train.compare.bootstrap import Interval

ABSENT = "–"


@dataclass(frozen=True, slots=True, kw_only=True)
class Cell:
    """One entry.

    Attributes:
        text: as people read it, percent for scores.
        value: as machines read it: a fraction, or a count; None where there is nothing.
        interval: around the value, fractions.
    """

    text: str = ABSENT
    value: float | int | None = None
    interval: Interval | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One line.

    Attributes:
        label: entry of the first column.
        marks: numbers of the footnotes that it bears, from 1.
        lead: entries of the other text columns.
        cells: one per column.
        facts: what only machine formats repeat on each row, one per title in the table's `fact_titles`.
    """

    label: str
    marks: tuple[int, ...] = ()
    lead: tuple[str, ...] = ()
    cells: tuple[Cell, ...]
    facts: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Block:
    """Rows under one heading; no heading if it is empty."""

    title: str
    rows: tuple[Row, ...]


@dataclass(frozen=True, slots=True)
class Column:
    """A column of values; neighbours of one group stand under one heading. No heading if it is empty."""

    group: str
    title: str

    @property
    def full_title(self) -> str:
        """Both headings in one, for formats without groups."""
        return f"{self.group} {self.title}".strip()


@dataclass(frozen=True, slots=True, kw_only=True)
class Table:
    """A table of methods against scores.

    Attributes:
        lead_titles: of the text columns on the left; the first is that of the rows' labels.
        blocks: each row has one cell per column and one entry per lead title after the first.
        caption: what holds for all of it: rule set, grid, unit.
        notes: footnotes; note k is marked k + 1.
        fact_titles: of the rows' facts.
    """

    title: str
    lead_titles: tuple[str, ...]
    columns: tuple[Column, ...]
    blocks: tuple[Block, ...]
    caption: str
    notes: tuple[str, ...] = ()
    fact_titles: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for row in self.rows:
            assert len(row.cells) == len(self.columns), row.label
            assert len(row.lead) == len(self.lead_titles) - 1, row.label
            assert all(1 <= mark <= len(self.notes) for mark in row.marks), row.label

    @property
    def rows(self) -> tuple[Row, ...]:
        """Every row of every block."""
        return tuple(row for block in self.blocks for row in block.rows)

    @property
    def groups(self) -> tuple[tuple[str, int], ...]:
        """The headings over neighbouring columns, each with how many it spans."""
        spans: list[tuple[str, int]] = []
        for column in self.columns:
            if spans and spans[-1][0] == column.group:
                spans[-1] = (column.group, spans[-1][1] + 1)
            else:
                spans.append((column.group, 1))
        return tuple(spans)


@dataclass(slots=True)
class Notes:
    """Collects the footnotes of one table; a note that is given twice keeps its first number."""

    texts: list[str] = field(default_factory=list)

    def mark(self, texts: Iterable[str]) -> tuple[int, ...]:
        """Add notes; returns their numbers, ascending."""
        numbers = []
        for text in texts:
            if text not in self.texts:
                self.texts.append(text)
            numbers.append(self.texts.index(text) + 1)
        return tuple(sorted(set(numbers)))


def score_cell(value: float, *, printed: str | None = None) -> Cell:
    """Return the cell of a score, as percent; nothing where it is NaN."""
    if math.isnan(value):
        return Cell()
    return Cell(text=percent(value) if printed is None else printed, value=value)


def interval_cell(value: float, interval: Interval | None, *, signed: bool = False) -> Cell:
    """Return the cell of a score, or of a difference of scores (`signed`), with its interval."""
    if math.isnan(value):
        return Cell()
    text = percent(value, signed=signed)
    if interval is not None:
        low, high = percent(interval.low, signed=signed), percent(interval.high, signed=signed)
        text += f" [{low}, {high}]"
    return Cell(text=text, value=value, interval=interval)


def count_cell(count: int) -> Cell:
    """Return the cell of a number of samples."""
    return Cell(text=f"{count:,}", value=count)


def percent(fraction: float, *, signed: bool = False) -> str:
    """Write a fraction as the field prints it, 0.7480 → 74.80; never −0.00."""
    rounded = round(100 * fraction, 2) + 0.0
    return f"{rounded:+.2f}" if signed and rounded else f"{rounded:.2f}"


def join_names(names: Sequence[str]) -> str:
    """Write a list in a sentence: a, b and c."""
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"

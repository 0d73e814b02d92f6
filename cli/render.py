"""Tables and JSON on stdout."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any, Literal

from rich.console import Console
from rich.table import Table
from rich.text import Text


def print_json(value: Any) -> None:
    """Print one JSON document; NaN, a score over nothing, becomes null."""
    from ris_train.run import finite_or_null

    print(json.dumps(finite_or_null(value), indent=1, allow_nan=False))


def print_table(
    title: str,
    columns: Sequence[str],
    rows: Sequence[Sequence[str]],
    caption: str = "",
    *,
    left: Sequence[str] = (),
) -> None:
    """Print a table; the first column and those of `left` are left-aligned, the others right-aligned."""
    # Texts, not strings: what users type must never be read as markup.
    table = Table(
        title=Text(title),
        caption=Text(caption) if caption else None,
        title_justify="left",
        caption_justify="left",
    )
    for index, column in enumerate(columns):
        justify: Literal["left", "right"] = "left" if index == 0 or column in left else "right"
        table.add_column(Text(column), justify=justify, no_wrap=index == 0)
    for row in rows:
        table.add_row(*(Text(cell) for cell in row))
    Console(width=None if Console().is_terminal else 110, highlight=False, markup=False).print(table)


def size(num_bytes: int) -> str:
    """A number of bytes as people read it: 3.1 MiB, 61.2 GiB."""
    unit, name = (2**30, "GiB") if num_bytes >= 2**30 else (2**20, "MiB")
    return f"{num_bytes / unit:.1f} {name}"


def percent(fraction: float) -> str:
    """A fraction as the field prints it: 0.7480 → 74.80."""
    return f"{100 * fraction:.2f}"

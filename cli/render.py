"""Tables and JSON on stdout."""

from __future__ import annotations

import json
import unicodedata
from collections.abc import Sequence
from typing import Any, Literal

from rich.console import Console
from rich.table import Table
from rich.text import Text

_TURNING = frozenset({"LRE", "RLE", "LRO", "RLO", "PDF", "LRI", "RLI", "FSI", "PDI"})
"""Bidirectional classes of invisible characters that reorder the text after them."""


def print_json(value: Any) -> None:
    """Print one JSON document; NaN, a score over nothing, becomes null."""
    from ris_train.run import finite_or_null

    print(json.dumps(finite_or_null(value), indent=1, allow_nan=False))


def printable(text: str, encoding: str = "utf-8") -> str:
    """Escape what would steer a terminal or cannot be printed at all; letters of every script stay.

    Control characters but line breaks, marks that turn the direction of what follows, and lone surrogates
    become `\\x1b`, `\\u202e`, `\\udcff`, and so does what the encoding lacks.
    """
    escaped = "".join(_escape(c) if _is_unsafe(c) else c for c in text)
    return escaped.encode(encoding, "backslashreplace").decode(encoding)


def _is_unsafe(character: str) -> bool:
    if unicodedata.category(character) in ("Cc", "Cs", "Zl", "Zp"):
        return character != "\n"
    return unicodedata.bidirectional(character) in _TURNING


def _escape(character: str) -> str:
    return character.encode("unicode_escape").decode("ascii")


def print_table(
    title: str,
    columns: Sequence[str],
    rows: Sequence[Sequence[str]],
    caption: str = "",
    *,
    left: Sequence[str] = (),
) -> None:
    """Print a table; the first column and those of `left` are left-aligned, the others right-aligned."""
    console = Console(width=None if Console().is_terminal else 110, highlight=False, markup=False)

    def shown(text: str) -> Text:
        # Texts, not strings: what users type must never be read as markup.
        return Text(printable(text, console.encoding))

    table = Table(
        title=shown(title),
        caption=shown(caption) if caption else None,
        title_justify="left",
        caption_justify="left",
    )
    for index, column in enumerate(columns):
        justify: Literal["left", "right"] = "left" if index == 0 or column in left else "right"
        table.add_column(shown(column), justify=justify, no_wrap=index == 0)
    for row in rows:
        table.add_row(*(shown(cell) for cell in row))
    console.print(table)


def size(num_bytes: int) -> str:
    """A number of bytes as people read it: 3.1 MiB, 61.2 GiB."""
    unit, name = (2**30, "GiB") if num_bytes >= 2**30 else (2**20, "MiB")
    return f"{num_bytes / unit:.1f} {name}"


def percent(fraction: float) -> str:
    """A fraction as the field prints it: 0.7480 → 74.80."""
    return f"{100 * fraction:.2f}"

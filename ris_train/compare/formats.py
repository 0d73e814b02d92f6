"""Tables as terminal text, Markdown, CSV and LaTeX."""

from __future__ import annotations

import csv
import io
import re
import textwrap
from collections.abc import Callable, Sequence
from dataclasses import replace
from types import MappingProxyType

from rich.cells import cell_len

from ris_train.compare.tables import Block, Cell, Row, Table

_GAP = "  "
_NOTE_WIDTH = 100
_NARROWEST_NOTE = 40
_SUPERSCRIPT = str.maketrans("0123456789", "⁰¹²³⁴⁵⁶⁷⁸⁹")
_MARKDOWN_SPECIAL = re.compile(r"([\\`*_\[\]<>|~#&$])")
_LATEX = MappingProxyType(
    {
        "\\": r"\textbackslash{}", "{": r"\{", "}": r"\}", "$": r"\$", "&": r"\&", "#": r"\#", "%": r"\%",
        "_": r"\_", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "<": r"\textless{}",
        ">": r"\textgreater{}", "|": r"\textbar{}", '"': "''", "–": "--", "−": "$-$",
        "Δ": r"$\Delta$", "Σ": r"$\Sigma$", "²": "$^2$", "≥": r"$\geq$", "≤": r"$\leq$", "×": r"$\times$",
        "·": r"$\cdot$", "†": r"\dag{}", "′": r"$'$", "…": r"\ldots{}", "“": "``", "”": "''",
        "\N{REPLACEMENT CHARACTER}": "?",
    }
)  # fmt: skip


def to_terminal(tables: Sequence[Table], *, width: int | None = None) -> str:
    """Write tables as aligned text.

    Args:
        width: of the terminal; columns that do not fit go below the others, under the same rows. None for
            a file, whose lines may be of any length.
    """
    return "\n".join(_terminal(table, width) for table in tables)


def to_markdown(tables: Sequence[Table]) -> str:
    """Write tables as GitHub's Markdown; group headings go into each column's own."""
    return "\n".join(_markdown(table) for table in tables)


def to_csv(tables: Sequence[Table]) -> str:
    """Write tables as CSV: scores as fractions in full precision, counts as they are, nothing as nothing.

    A column whose cells have intervals is followed by its `low` and `high`. Several tables are separated by
    an empty line, each with its own header.
    """
    return "\n".join(_csv(table) for table in tables)


def to_latex(tables: Sequence[Table]) -> str:
    """Write tables as LaTeX for the package booktabs."""
    return "% needs \\usepackage{booktabs}\n" + "\n".join(_latex(table) for table in tables)


FORMATS: MappingProxyType[str, Callable[[Sequence[Table]], str]] = MappingProxyType(
    {"terminal": to_terminal, "markdown": to_markdown, "csv": to_csv, "latex": to_latex}
)
"""What `--format` offers."""
SUFFIXES = MappingProxyType({".txt": "terminal", ".md": "markdown", ".csv": "csv", ".tex": "latex"})
"""Format of a file by its suffix."""


def _superscript(marks: Sequence[int]) -> str:
    return " ".join(str(mark) for mark in marks).translate(_SUPERSCRIPT)


def _entries(row: Row) -> list[str]:
    label = f"{row.label} {_superscript(row.marks)}" if row.marks else row.label
    return [label, *row.lead, *(cell.text for cell in row.cells)]


def _terminal(table: Table, width: int | None) -> str:
    out = [table.title] if width is None else textwrap.wrap(table.title, width)
    longest = 0
    parts = _parts(table, width)
    for part in parts:
        lines, total = _aligned(part)
        longest = max(longest, total)
        out += lines if part is parts[-1] else lines[:-1]  # the next one begins with a rule
    widest = max(longest, _NOTE_WIDTH) if width is None else max(width, _NARROWEST_NOTE)
    out += textwrap.wrap(table.caption, widest)
    for number, note in enumerate(table.notes, 1):
        out += textwrap.wrap(f"{_superscript([number])} {note}", widest, subsequent_indent="  ")
    return "\n".join(out) + "\n"


def _parts(table: Table, width: int | None) -> list[Table]:
    """Cut a table between columns so that each part fits; within a group only where it alone does not."""
    if width is None:
        return [table]

    def fits(indices: Sequence[int]) -> bool:
        return _aligned(_columns(table, indices))[1] <= width

    parts: list[list[int]] = []
    start = 0
    for group, span in table.groups:
        columns = range(start, start + span)
        start += span
        units = [columns] if group and fits(columns) else [range(index, index + 1) for index in columns]
        for unit in units:
            if not parts or not fits([*parts[-1], *unit]):
                parts.append([])
            parts[-1] += unit
    return [_columns(table, part) for part in parts]


def _columns(table: Table, indices: Sequence[int]) -> Table:
    """Some columns of a table."""
    return replace(
        table,
        columns=tuple(table.columns[index] for index in indices),
        blocks=tuple(
            replace(
                block,
                rows=tuple(
                    replace(row, cells=tuple(row.cells[index] for index in indices)) for row in block.rows
                ),
            )
            for block in table.blocks
        ),
    )


def _aligned(table: Table) -> tuple[list[str], int]:
    """Lines of a table's columns and rows between rules, and their width."""
    num_left = len(table.lead_titles)
    titles = [*table.lead_titles, *(column.title for column in table.columns)]
    lines = [_entries(row) for row in table.rows]
    widths = [max(cell_len(line[index]) for line in (titles, *lines)) for index in range(len(titles))]
    _widen_to_groups(table, widths)

    def line(entries: Sequence[str]) -> str:
        padded = [
            _pad(entry, width, right=index >= num_left)
            for index, (entry, width) in enumerate(zip(entries, widths, strict=True))
        ]
        return _GAP.join(padded).rstrip()

    total = sum(widths) + len(_GAP) * (len(widths) - 1)
    rule = "─" * total
    out = [rule]
    if any(group for group, _ in table.groups):
        out += _group_lines(table, widths)
    out += [line(titles), rule]
    for index, block in enumerate(table.blocks):
        out += [rule] if index else []
        out += [block.title] if block.title else []
        out += [line(_entries(row)) for row in block.rows]
    return [*out, rule], total


def _pad(text: str, width: int, *, right: bool) -> str:
    space = " " * (width - cell_len(text))
    return space + text if right else text + space


def _widen_to_groups(table: Table, widths: list[int]) -> None:
    """Make the columns of each group at least as wide together as its heading."""
    start = len(table.lead_titles)
    for group, span in table.groups:
        missing = cell_len(group) - (sum(widths[start : start + span]) + len(_GAP) * (span - 1))
        widths[start] += max(0, missing)
        start += span


def _group_lines(table: Table, widths: Sequence[int]) -> list[str]:
    left = sum(widths[: len(table.lead_titles)]) + len(_GAP) * (len(table.lead_titles) - 1)
    names, rules, start = [" " * left], [" " * left], len(table.lead_titles)
    for group, span in table.groups:
        width = sum(widths[start : start + span]) + len(_GAP) * (span - 1)
        space = width - cell_len(group)
        names.append(" " * (space // 2) + group + " " * (space - space // 2))
        rules.append(("─" if group else " ") * width)
        start += span
    return [_GAP.join(names).rstrip(), _GAP.join(rules).rstrip()]


def _markdown(table: Table) -> str:
    def line(entries: Sequence[str]) -> str:
        return "| " + " | ".join(_markdown_text(entry) for entry in entries) + " |"

    titles = [*table.lead_titles, *(column.full_title for column in table.columns)]
    out = [f"**{_markdown_text(table.title)}**", "", line(titles)]
    out.append("|" + "|".join([" --- "] * len(table.lead_titles) + [" ---: "] * len(table.columns)) + "|")
    for block in table.blocks:
        if block.title:
            out.append(f"| **{_markdown_text(block.title)}** |" + "  |" * (len(titles) - 1))
        out += [line(_entries(row)) for row in block.rows]
    out += ["", _markdown_text(table.caption)]
    for number, note in enumerate(table.notes, 1):
        out += ["", f"{_superscript([number])} {_markdown_text(note)}"]
    return "\n".join(out) + "\n"


def _markdown_text(text: str) -> str:
    return _MARKDOWN_SPECIAL.sub(r"\\\1", " ".join(text.split()))


def _csv(table: Table) -> str:
    has_interval = [
        any(row.cells[index].interval is not None for row in table.rows)
        for index in range(len(table.columns))
    ]
    header = ["table", "block", *table.lead_titles]
    for column, expand in zip(table.columns, has_interval, strict=True):
        title = column.full_title
        header += [title, f"{title} low", f"{title} high"] if expand else [title]
    header += [*table.fact_titles, "notes"]
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(header)
    for block in table.blocks:
        for row in block.rows:
            writer.writerow(_csv_row(table, block, row, has_interval))
    return buffer.getvalue()


def _csv_row(table: Table, block: Block, row: Row, has_interval: Sequence[bool]) -> list[str]:
    entries = [table.title, block.title, row.label, *row.lead]
    for cell, expand in zip(row.cells, has_interval, strict=True):
        entries += _csv_cell(cell) if expand else _csv_cell(cell)[:1]
    facts = row.facts or ("",) * len(table.fact_titles)
    return [*entries, *facts, "; ".join(table.notes[mark - 1] for mark in row.marks)]


def _csv_cell(cell: Cell) -> list[str]:
    value = "" if cell.value is None else repr(cell.value)
    if cell.interval is None:
        return [value, "", ""]
    return [value, repr(cell.interval.low), repr(cell.interval.high)]


def _latex(table: Table) -> str:
    num_left, num_columns = len(table.lead_titles), len(table.lead_titles) + len(table.columns)
    out = [
        r"\begin{table}",
        r"\centering",
        rf"\caption{{{_latex_text(table.title)}}}",
        rf"\begin{{tabular}}{{{'l' * num_left}{'r' * len(table.columns)}}}",
        r"\toprule",
    ]
    if any(group for group, _ in table.groups):
        out += _latex_groups(table)
    titles = [*table.lead_titles, *(column.title for column in table.columns)]
    out += [_latex_line([_latex_text(title) for title in titles]), r"\midrule"]
    for index, block in enumerate(table.blocks):
        out += [r"\midrule"] if index else []
        if block.title:
            out.append(rf"\multicolumn{{{num_columns}}}{{l}}{{{_latex_text(block.title)}}} \\")
        out += [_latex_row(row) for row in block.rows]
    out += [r"\bottomrule", r"\end{tabular}", r"\par\smallskip\footnotesize", _latex_text(table.caption)]
    out += [
        rf"\par\textsuperscript{{{number}}}\,{_latex_text(note)}"
        for number, note in enumerate(table.notes, 1)
    ]
    return "\n".join([*out, r"\end{table}"]) + "\n"


def _latex_groups(table: Table) -> list[str]:
    entries, rules, start = [""] * len(table.lead_titles), [], len(table.lead_titles) + 1
    for group, span in table.groups:
        entries.append(rf"\multicolumn{{{span}}}{{c}}{{{_latex_text(group)}}}")
        if group:
            rules.append(rf"\cmidrule(lr){{{start}-{start + span - 1}}}")
        start += span
    return [_latex_line(entries), " ".join(rules)]


def _latex_row(row: Row) -> str:
    label = _latex_text(row.label)
    if row.marks:
        label += rf"\textsuperscript{{{','.join(str(mark) for mark in row.marks)}}}"
    return _latex_line(
        [label, *(_latex_text(text) for text in (*row.lead, *(cell.text for cell in row.cells)))]
    )


def _latex_line(entries: Sequence[str]) -> str:
    # After the `\\` of the line above, `[` would be read as a length and `*` as part of the command.
    first, *rest = entries
    protected = f"{{}}{first}" if first.startswith(("[", "*")) else first
    return " & ".join([protected, *rest]) + r" \\"


def _latex_text(text: str) -> str:
    return "".join(_LATEX.get(character, character) for character in " ".join(text.split()))

"""Terminal, Markdown, CSV and LaTeX say the same, each escaped as it must be."""

from __future__ import annotations

import csv
import io
import re

import pytest

from ris_cache.errors import ConfigError
from ris_train.compare.bootstrap import Interval
from ris_train.compare.comparison import compare
from ris_train.compare.formats import FORMATS, to_csv, to_latex, to_markdown, to_terminal
from ris_train.compare.methods import published_row
from ris_train.compare.report import choose_format, make_report
from ris_train.compare.tables import Block, Cell, Column, Row, Table, interval_cell, percent, score_cell
from ris_train.scoring.rules import RULES

NASTY = r"a|b_c & 50% \x{y} $z$ #1 ~^ <i> [k] *b* `q`"


def table_of(label: str, *, marks: tuple[int, ...] = ()) -> Table:
    cells = (score_cell(0.1 + 0.2), interval_cell(0.5, Interval(0.4, 0.6)), score_cell(float("nan")))
    return Table(
        title=f"title {label}",
        lead_titles=("Methods", "category source"),
        columns=(Column("RefCOCO", "Val"), Column("RefCOCO", "TestA"), Column("", "last")),
        blocks=(
            Block(
                title="one",
                rows=(Row(label=label, marks=marks, lead=("none",), cells=cells, facts=("raw",)),),
            ),
        ),
        caption=f"caption {label}",
        notes=(f"note {label}", "second")[: max(marks, default=0)],
        fact_titles=("text",),
    )


@pytest.fixture(scope="module")
def report(make_table, method_of):
    """A report with every part, of methods with nasty names, undefined scores and absent splits."""
    splits = {("grefcoco.unc", "val"): 6, ("grefcoco.unc", "testA"): 5}
    one = make_table(1, splits, no_target=1.0)
    other = make_table(2, {("grefcoco.unc", "val"): 6}, no_target=1.0)
    methods = [method_of(NASTY, one), method_of("other", other), published_row("ours")]
    return make_report(compare(methods, num_resamples=30), by="objects")


@pytest.mark.parametrize("name", FORMATS)
def test_no_format_prints_nan_or_none(report, name):
    assert not re.search(r"\b(nan|NaN|None|inf|Infinity)\b", report.text(name))


def test_csv_keeps_full_precision_and_leaves_nothing_empty_of_meaning():
    (row,) = csv.DictReader(io.StringIO(to_csv([table_of(NASTY, marks=(1, 2))])))
    assert row == {
        "table": f"title {NASTY}", "block": "one", "Methods": NASTY, "category source": "none",
        "RefCOCO Val": "0.30000000000000004", "RefCOCO TestA": "0.5", "RefCOCO TestA low": "0.4",
        "RefCOCO TestA high": "0.6", "last": "", "text": "raw", "notes": f"note {NASTY}; second",
    }  # fmt: skip
    assert float(row["RefCOCO Val"]) == 0.1 + 0.2


def test_csv_of_a_whole_report_parses_back_to_its_cells(report):
    sections = report.text("csv").split("\n\n")
    assert len(sections) == len(report.tables)
    for section, table in zip(sections, report.tables, strict=True):
        rows = list(csv.DictReader(io.StringIO(section)))
        assert len(rows) == len(table.rows)
        for row, found in zip(rows, table.rows, strict=True):
            assert row[table.lead_titles[0]] == found.label
            assert None not in row
            assert None not in row.values()
            for column, cell in zip(table.columns, found.cells, strict=True):
                text = row[column.full_title]
                assert (float(text) if text else None) == cell.value
                if cell.interval is not None:
                    ends = (float(row[f"{column.full_title} low"]), float(row[f"{column.full_title} high"]))
                    assert ends == (cell.interval.low, cell.interval.high)


def test_markdown_rows_have_one_entry_per_column_whatever_the_names():
    lines = to_markdown([table_of(NASTY)]).splitlines()
    rows = [line for line in lines if line.startswith("|")]
    assert len(rows) == 4  # titles, rule, block, row
    assert {len(re.findall(r"(?<!\\)\|", row)) for row in rows} == {6}
    assert rows[1] == "| --- | --- | ---: | ---: | ---: |"
    assert r"a\|b\_c \& 50% \\x{y} \$z\$ \#1 \~^ \<i\> \[k\] \*b\* \`q\`" in rows[3]


def test_latex_escapes_every_special_character():
    text = to_latex([table_of(NASTY)])
    expected = (
        r"a\textbar{}b\_c \& 50\% \textbackslash{}x\{y\} \$z\$ \#1 \textasciitilde{}\textasciicircum{} "
        r"\textless{}i\textgreater{} [k] *b* `q`"
    )
    assert text.count(expected) == 3


def test_latex_is_balanced_and_each_line_has_as_many_columns_as_the_table(report):
    text = report.text("latex")
    bare = re.sub(r"\\[{}\\]", "", text)
    assert bare.count("{") == bare.count("}")
    assert re.sub(r"\\\$", "", text).count("$") % 2 == 0
    for part in re.findall(r"\\begin\{tabular\}.*?\\end\{tabular\}", text, re.DOTALL):
        num_columns = len(re.match(r"\\begin\{tabular\}\{([lr]+)\}", part).group(1))
        for line in re.findall(r"^(.*) \\\\$", part, re.MULTILINE):
            spanned = sum(int(span) - 1 for span in re.findall(r"\\multicolumn\{(\d+)\}", line))
            assert len(re.findall(r"(?<!\\)&", line)) + spanned + 1 == num_columns, line
        for rule in (r"\toprule", r"\midrule", r"\bottomrule"):
            assert rule in part
    assert text.count(r"\begin{table}") == text.count(r"\end{table}") == len(report.tables)


def test_latex_rules_under_groups_name_their_columns():
    assert r"\cmidrule(lr){3-4}" in to_latex([table_of("a")])
    assert "{5-5}" not in to_latex([table_of("a")])


@pytest.mark.parametrize("label", ["[a]", "*a"])
def test_a_latex_row_cannot_be_read_as_part_of_the_line_break_above_it(label):
    assert f"\n{{}}{label} & none" in to_latex([table_of(label)])


def test_straight_quotes_need_no_other_font_encoding_in_latex():
    text = to_latex([table_of('the "best"')])
    assert "the ''best''" in text
    assert "textquotedbl" not in text


def test_latex_holds_no_character_that_plain_pdflatex_lacks(report):
    assert set(report.text("latex")) <= set(map(chr, range(32, 127))) | {"\n"}


def test_terminal_columns_line_up_with_wide_names():
    text = to_terminal([table_of("日本語", marks=(1,)), table_of("plain")])
    assert "日本語 ¹  none" in text
    (wide, narrow) = [part for part in text.split("\n\n") if part]
    assert "  RefCOCO" in wide
    assert "30.00  50.00 [40.00, 60.00]     –" in wide
    assert "¹ note 日本語" in wide
    assert "¹" not in narrow


@pytest.mark.parametrize("width", [60, 80, 100, 400])
def test_on_a_terminal_no_line_is_wider_than_it_and_no_cell_is_lost(make_table, method_of, width):
    splits = {("refcoco.unc", name): 5 for name in ("val", "testA", "testB")}
    methods = [method_of(name, make_table(seed, splits)) for seed, name in enumerate("abc")]
    report = make_report(compare(methods, num_resamples=20), layout="table1", by="size")
    text = report.text("terminal", width=width)
    assert max(map(len, text.splitlines())) <= width
    printed = text.split()
    for table in report.tables:
        for row in table.rows:
            assert all(part in printed for cell in row.cells for part in cell.text.split())
    if width == 400:
        assert text.count("Methods") == 1
    assert report.text("terminal") == to_terminal(report.tables)


def test_groups_of_columns_stay_together_if_they_fit():
    columns = tuple(Column(group, title) for group in ("Val", "TestA") for title in ("oIoU", "mIoU"))
    row = Row(label="method", cells=(score_cell(0.1),) * 4)
    table = Table(
        title="t", lead_titles=("m",), columns=columns, blocks=(Block(title="", rows=(row,)),), caption="c"
    )
    lines = [line.split() for line in to_terminal([table], width=26).splitlines()]
    assert [line for line in lines if line[0] == "m"] == [["m", "oIoU", "mIoU"]] * 2
    assert [line for line in lines if line in (["Val"], ["TestA"])] == [["Val"], ["TestA"]]


def test_csv_rows_of_intervals_and_breakdowns_tell_rule_sets_apart(make_table, method_of):
    method = method_of("a", make_table(1, views=("original", "1024")))
    rules = [RULES["ris"], RULES["dfam"]]
    report = make_report(compare([method], rules=rules, num_resamples=5), by="size")
    for part in report.text("csv").split("\n\n"):
        for row in csv.DictReader(io.StringIO(part)):
            if row.get("Methods") != "samples":
                assert row["rules"] in ("ris", "dfam")
                assert row["grid"].startswith("original" if row["rules"] == "ris" else "1024 × 1024")


def test_long_group_names_widen_their_columns():
    table = Table(
        title="t", lead_titles=("m",), columns=(Column("a very long group name", "x"), Column("b", "y")),
        blocks=(Block(title="", rows=(Row(label="r", cells=(score_cell(0.1), score_cell(0.2))),)),), caption="",
    )  # fmt: skip
    lines = to_terminal([table]).splitlines()
    assert max(map(len, lines[:8])) == len(lines[1])
    assert lines[-2].split() == ["r", "10.00", "20.00"]


@pytest.mark.parametrize(
    ("fraction", "signed", "text"),
    [
        (0.748, False, "74.80"),
        (0.1, True, "+10.00"),
        (-0.00001, True, "0.00"),
        (-0.02, True, "-2.00"),
        (1, False, "100.00"),
    ],
)
def test_percentages_have_two_decimals_and_no_negative_zero(fraction, signed, text):
    assert percent(fraction, signed=signed) == text


def test_a_table_whose_rows_do_not_fit_is_a_mistake_of_ours():
    with pytest.raises(AssertionError):
        Table(
            title="t", lead_titles=("m",), columns=(Column("", "x"),), caption="",
            blocks=(Block(title="", rows=(Row(label="r", cells=(Cell(), Cell())),)),),
        )  # fmt: skip


def test_the_format_is_the_one_named_or_that_of_the_suffix(tmp_path):
    assert choose_format(None, None) == "terminal"
    assert [choose_format(None, tmp_path / f"x{suffix}") for suffix in (".txt", ".md", ".csv", ".tex")] == [
        "terminal", "markdown", "csv", "latex",
    ]  # fmt: skip
    assert choose_format("csv", tmp_path / "x.md") == "csv"
    with pytest.raises(ConfigError, match=r"does not tell its format.*--format"):
        choose_format(None, tmp_path / "x.pdf")

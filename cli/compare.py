"""`ris compare`: methods side by side."""

from __future__ import annotations

import shutil
import sys
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from cli.evaluate import CheckpointName
from cli.options import DEFAULT_RUNS, JsonOption, RunsOption
from cli.render import print_json


class LayoutName(StrEnum):
    """How tables are laid out; the numbers are the supplement's."""

    AUTO = "auto"
    TABLE1 = "table1"
    TABLE3 = "table3"
    TABLE4 = "table4"
    TABLE5 = "table5"
    PLAIN = "plain"


class FormatName(StrEnum):
    """How tables are written."""

    TERMINAL = "terminal"
    MARKDOWN = "markdown"
    CSV = "csv"
    LATEX = "latex"


class BinningName(StrEnum):
    """What a breakdown is by."""

    OBJECTS = "objects"
    SIZE = "size"
    LENGTH = "length"
    POSITION = "position"


def compare(
    methods: Annotated[
        list[str],
        typer.Argument(
            metavar="[NAME=]METHOD...",
            help="A run by name or path, a samples table (*.parquet) of `ris eval` or `ris score`, "
            "published:<name>, or published for all published rows. NAME= is what the tables call it. "
            "Differences are to the first that has samples.",
        ),
    ],
    rules: Annotated[
        str | None, typer.Option("--rules", help="Rule sets such as ris,dfam; by default each dataset's own.")
    ] = None,
    layout: Annotated[
        LayoutName, typer.Option("--layout", help="As a table of the supplement, or plain.")
    ] = LayoutName.AUTO,
    output_format: Annotated[
        FormatName | None,
        typer.Option("--format", help="By default that of --out's suffix (.txt, .md, .csv, .tex)."),
    ] = None,
    out: Annotated[Path | None, typer.Option("--out", help="File to write the tables to.")] = None,
    bootstrap: Annotated[
        int, typer.Option("--bootstrap", min=0, help="Resamples for 95 % intervals; 0 for none.")
    ] = 2000,
    seed: Annotated[int, typer.Option("--seed", min=0, help="Seed of the resamples.")] = 0,
    histogram: Annotated[
        Path | None, typer.Option("--histogram", help="Draw the samples' IoU into this .svg or .png.")
    ] = None,
    bins: Annotated[int, typer.Option("--bins", help="Bins of the histogram, 10 or 20.")] = 20,
    by: Annotated[
        BinningName | None, typer.Option("--by", help="Also score the samples in bins of this.")
    ] = None,
    checkpoint: Annotated[
        CheckpointName, typer.Option(help="Whose evaluation of a run is meant.")
    ] = CheckpointName.BEST,
    runs: RunsOption = DEFAULT_RUNS,
    json: JsonOption = False,
) -> None:
    """Compare runs, predictions and published rows on the same samples, with paired intervals.

    Example: ris compare first second published:ours --by size --histogram iou.svg
    """
    from ris_train import compare as library
    from ris_train.compare.report import choose_format, make_report
    from ris_train.scoring.rules import rules_named

    written_as = choose_format(output_format.value if output_format is not None else None, out)
    chosen = rules_named(rules) if rules is not None else None
    compared = library.compare(
        library.find_methods(methods, runs_dir=runs, checkpoint=checkpoint.value, rules=chosen),
        rules=chosen,
        num_resamples=bootstrap,
        seed=seed,
    )
    report = make_report(compared, layout=layout.value, by=by.value if by is not None else None)
    if histogram is not None:
        library.draw_histograms(library.count_histograms(compared, num_bins=bins), histogram)
    if out is not None:
        report.write(out, written_as)
    if json:
        print_json(report.as_dict())
    elif out is None:
        width = shutil.get_terminal_size().columns if sys.stdout.isatty() else None
        typer.echo(report.text(written_as, width=width), nl=False)

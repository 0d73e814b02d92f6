"""`ris`: every command in one place."""

from __future__ import annotations

import logging
from typing import Annotated

import typer

from cli import (
    cache,
    compare,
    config,
    data,
    demo,
    doctor,
    evaluate,
    extract,
    guard,
    params,
    predict,
    runs,
    score,
    train,
)

app = typer.Typer(
    name="ris",
    help="Referring image segmentation on frozen SAM and CLIP features: extract once, share, train.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
app.add_typer(data.app, name="data")
app.add_typer(cache.app, name="cache")
app.add_typer(runs.app, name="runs")
app.add_typer(config.app, name="config")
app.command("extract")(guard.guarded(extract.extract))
app.command("train")(guard.guarded(train.train))
app.command("eval")(guard.guarded(evaluate.evaluate))
app.command("score")(guard.guarded(score.score))
app.command("compare")(guard.guarded(compare.compare))
app.command("predict")(guard.guarded(predict.predict))
app.command("params")(guard.guarded(params.params))
app.command("doctor")(guard.guarded(doctor.doctor))
app.command("demo")(guard.guarded(demo.demo))


@app.callback()
def options(
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
) -> None:
    """Options of every command."""
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s")
    guard.set_debug(debug)

"""`ris cache …`: what one does with a cache that exists; one module per command."""

from __future__ import annotations

import typer

from cli import guard
from cli.cache import compare, convert, gc, info, merge, remove, verify

app = typer.Typer(
    help="Look at a feature cache, check and repair it, convert, compare, merge, shrink it.",
    no_args_is_help=True,
    rich_markup_mode=None,
)
app.command("info")(guard.guarded(info.info))
app.command("verify")(guard.guarded(verify.verify))
app.command("convert")(guard.guarded(convert.convert))
app.command("compare")(guard.guarded(compare.compare))
app.command("merge")(guard.guarded(merge.merge))
app.command("remove")(guard.guarded(remove.remove))
app.command("gc")(guard.guarded(gc.gc))

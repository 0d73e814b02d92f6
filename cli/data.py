"""`ris data`: datasets on disk."""

from __future__ import annotations

import typer

from cli.data_check import check
from cli.guard import guarded
from cli.synth import synth

app = typer.Typer(help="Datasets on disk.", no_args_is_help=True, rich_markup_mode=None)
app.command("synth")(guarded(synth))
app.command("check")(guarded(check))

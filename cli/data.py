"""`ris data`: datasets on disk."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from cli.guard import guarded
from cli.options import DEFAULT_DATA
from cli.render import print_table

app = typer.Typer(help="Datasets on disk.", no_args_is_help=True, rich_markup_mode=None)


@app.command("synth")
@guarded
def synth(
    out: Annotated[
        Path, typer.Option("--out", help="Data root to write into.", envvar="RIS_DATA")
    ] = DEFAULT_DATA,
    train: Annotated[int, typer.Option(min=1, help="Training images.")] = 2000,
    val: Annotated[int, typer.Option(min=1, help="Validation images.")] = 130,
    test: Annotated[int, typer.Option(min=1, help="Images of testA, and as many of testB.")] = 65,
    seed: Annotated[int, typer.Option(min=0, help="The same seed draws the same dataset.")] = 0,
) -> None:
    """Draw a small dataset in the exact layout of RefCOCO (UNC).

    Example: ris data synth --out ./data --train 2000
    """
    from tqdm import tqdm

    from ris_cache.datasets.shapes import write_shapes_dataset

    num_images = {"train": train, "val": val, "testA": test, "testB": test}
    with tqdm(total=sum(num_images.values()), unit="image", desc="draw") as bar:

        def show(done: int) -> None:
            bar.update(done - bar.n)

        summary = write_shapes_dataset(
            out,
            num_images=num_images,
            seed=seed,
            progress=show,
        )
    print_table(
        f"Drawn dataset refcoco (unc) in {out}",
        ["split", "images", "refs", "expressions"],
        [
            [split, str(counts.images), str(counts.refs), str(counts.expressions)]
            for split, counts in summary.splits.items()
        ],
    )

"""`ris data synth`: draw a dataset in the layout of a published one."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from cli.options import DEFAULT_DATA
from cli.render import print_table


def synth(
    out: Annotated[
        Path, typer.Option("--out", help="Data root to write into.", envvar="RIS_DATA")
    ] = DEFAULT_DATA,
    layout: Annotated[
        list[str] | None,
        typer.Option(
            "--layout",
            help="refcoco (default), refcoco+, refcocog, grefcoco, ref-zom, custom or all; "
            "repeatable, or a comma list.",
        ),
    ] = None,
    train: Annotated[int, typer.Option(min=1, help="Training images.")] = 2000,
    val: Annotated[int, typer.Option(min=1, help="Validation images.")] = 130,
    test: Annotated[
        int, typer.Option(min=1, help="Images of testA, and as many of testB; images of test.")
    ] = 65,
    seed: Annotated[int, typer.Option(min=0, help="The same seed draws the same dataset.")] = 0,
) -> None:
    """Draw a small dataset in the exact layout of RefCOCO (UNC), or of the other datasets.

    refcoco, refcoco+, refcocog and grefcoco share their images, refcocog in another partition, so that images
    leak as they do between the real ones; its test has as many images as testA and testB together.

    Example: ris data synth --out ./data --layout grefcoco --train 2000
    """
    from tqdm import tqdm

    from ris_cache.datasets.shapes import num_pictures, write_layouts

    layouts = chosen_layouts(layout or ["refcoco"])
    num_images = {"train": train, "val": val, "testA": test, "testB": test, "test": test}
    with tqdm(total=num_pictures(layouts, num_images), unit="image", desc="draw") as bar:

        def show(done: int) -> None:
            bar.update(done - bar.n)

        summaries = write_layouts(out, layouts, num_images=num_images, seed=seed, progress=show)
    for summary in summaries:
        print_table(
            f"Drawn dataset {summary.layout} ({summary.split_by}) in {out}",
            ["split", "images", "refs", "expressions", "no target", "one", "many"],
            [
                [
                    split,
                    *(
                        str(number)
                        for number in (
                            counts.images,
                            counts.refs,
                            counts.expressions,
                            counts.none,
                            counts.one,
                            counts.many,
                        )
                    ),
                ]
                for split, counts in summary.splits.items()
            ],
        )


def chosen_layouts(options: list[str]) -> tuple[str, ...]:
    """Read the layouts asked for, in the order of `LAYOUT_NAMES`.

    Args:
        options: names, comma lists of names, or "all".

    Raises:
        ConfigError: an unknown or empty name.
    """
    from ris_cache.datasets.shapes import LAYOUT_NAMES
    from ris_cache.errors import ConfigError

    names = [name.strip() for option in options for name in option.split(",")]
    for name in names:
        if name not in (*LAYOUT_NAMES, "all"):
            raise ConfigError(
                f"--layout {name!r} is not a layout; known: {', '.join(LAYOUT_NAMES)}, all.",
                layout=name,
                known=LAYOUT_NAMES,
            )
    return tuple(name for name in LAYOUT_NAMES if name in names or "all" in names)

"""`ris cache remove`: forget datasets of a cache."""

from __future__ import annotations

from typing import Annotated

import typer

from cli.options import DEFAULT_CACHE, CacheOption, JsonOption
from cli.render import print_json, print_table


def remove(
    names: Annotated[
        list[str], typer.Argument(metavar="NAME", help="Datasets: refcoco.unc, refcocog/umd or refcoco+.")
    ],
    cache: CacheOption = DEFAULT_CACHE,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would be removed, and stop.")] = False,
    json: JsonOption = False,
) -> None:
    """Forget datasets: their tables, and category sets that no other dataset uses.

    Features stay until `ris cache gc`.

    Example: ris cache remove refcoco+ --cache ./feats
    """
    from ris_cache.store.collect import remove as run_removal

    found = run_removal(cache, names, dry_run=dry_run)
    if json:
        print_json(
            {
                "cache": str(cache),
                "dry_run": dry_run,
                "datasets": found.datasets,
                "category_sets": found.category_sets,
                "unused_images": found.num_images,
                "unused_bytes": found.num_bytes,
            }
        )
        return
    print_table(
        f"What removing from {cache} would do" if dry_run else f"Removed from {cache}",
        ["what", "value"],
        [
            ["datasets", ", ".join(found.datasets)],
            ["category sets", ", ".join(found.category_sets) or "none"],
            ["images no dataset needs", str(found.num_images)],
            ["size of their features", f"{found.num_bytes / 2**20:.1f} MiB"],
        ],
        "Nothing was changed." if dry_run else "Features stay until `ris cache gc`.",
    )

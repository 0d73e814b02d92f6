"""`ris cache merge`: one cache out of several that were extracted in parts."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from cli.cache.convert import watched
from cli.options import JsonOption
from cli.render import print_json, print_table


def merge(
    into: Annotated[Path, typer.Argument(metavar="INTO", help="Cache that grows.")],
    sources: Annotated[
        list[Path], typer.Argument(metavar="FROM", help="Caches to take from; they are only read.")
    ],
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would be added, and stop.")] = False,
    json: JsonOption = False,
) -> None:
    """Add images, splits and categories of other caches with the same fingerprint to a cache.

    What INTO has stays as it is; what it has quarantined is taken from a cache that has its features. A merge
    that was cut off goes on where it was, and merging again changes nothing.

    Example: ris cache merge ./feats ./feats-of-another-machine
    """
    from ris_cache.store.merge import merge as run_merge
    from ris_cache.store.merge import plan_merge

    planned = plan_merge(into, sources)
    num_copied = 0
    if not dry_run:
        num_copied, _ = watched(
            "merge", lambda progress, stop: run_merge(planned, progress=progress, should_stop=stop)
        )
    if json:
        print_json(
            {
                "into": str(into),
                "from": [str(source) for source in sources],
                "dry_run": dry_run,
                "added": len(planned.added),
                "mended": len(planned.mended),
                "quarantined": list(planned.quarantined),
                "copied": num_copied,
                "bytes": planned.num_bytes,
                "splits": planned.splits,
                "category_sets": planned.category_sets,
            }
        )
        return
    print_table(
        f"What merging into {into} would do" if dry_run else f"Merged into {into}",
        ["what", "value"],
        [
            ["images added", str(len(planned.added))],
            ["of them quarantined", str(len(planned.quarantined))],
            ["quarantined images mended", str(len(planned.mended))],
            ["size of features", f"{planned.num_bytes / 2**20:.1f} MiB"],
            ["splits added", ", ".join(planned.splits) or "none"],
            ["category sets added", ", ".join(planned.category_sets) or "none"],
        ],
        "Nothing was written." if dry_run else f"{num_copied} images copied by this process.",
    )

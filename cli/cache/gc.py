"""`ris cache gc`: reclaim the space of what no dataset needs."""

from __future__ import annotations

from typing import Annotated

import typer

from cli.cache.convert import watched
from cli.options import DEFAULT_CACHE, CacheOption, JsonOption
from cli.render import print_json, print_table


def gc(
    cache: CacheOption = DEFAULT_CACHE,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Say what would be reclaimed, and stop.")
    ] = False,
    json: JsonOption = False,
) -> None:
    """Remove images that no expression refers to, and files that belong to nothing.

    Shards without needed images are removed. Shards with at most half of their rows in use are copied
    together into new ones. A collection that was cut off leaves the cache usable; run it again. Programs
    that have the cache open may have to open it again.

    Example: ris cache gc --cache ./feats --dry-run
    """
    from ris_cache.store.collect import collect, find_garbage

    if dry_run:
        found = find_garbage(cache)
        num_bytes = found.num_bytes
    else:
        found, num_bytes = watched(
            "gc", lambda progress, stop: collect(cache, progress=progress, should_stop=stop)
        )
    if json:
        print_json(
            {
                "cache": str(cache),
                "dry_run": dry_run,
                "dropped_images": len(found.dropped),
                "unused_shards": found.num_unused_shards,
                "sparse_shards": found.num_sparse_shards,
                "moved_images": len(found.moved),
                "leftover_files": len(found.leftover),
                "reclaimed_bytes": num_bytes,
            }
        )
        return
    print_table(
        f"What collecting in {cache} would do" if dry_run else f"Collected in {cache}",
        ["what", "value"],
        [
            ["images dropped, that no expression refers to", str(len(found.dropped))],
            ["shards removed", str(found.num_unused_shards)],
            ["shards copied together", str(found.num_sparse_shards)],
            ["images moved", str(len(found.moved))],
            ["files that belonged to nothing", str(len(found.leftover))],
            ["space reclaimed", f"{num_bytes / 2**20:.1f} MiB"],
        ],
        "Nothing was changed." if dry_run else "",
    )

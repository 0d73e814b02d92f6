"""`ris cache convert`: the same cache in another layout; and how commands that copy images are watched."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, TypeVar

import typer

from cli.options import JsonOption
from cli.render import print_json, print_table
from ris_cache.errors import StoppedError

if TYPE_CHECKING:
    from ris_cache.progress import Progress
    from ris_cache.store.convert import Conversion

T = TypeVar("T")


def convert(
    source: Annotated[Path, typer.Argument(metavar="SRC", help="Cache to convert; it is only read.")],
    target: Annotated[
        Path, typer.Argument(metavar="DST", help="New or empty directory, or an earlier result.")
    ],
    store: Annotated[
        str | None, typer.Option("--store", help="zarr or hdf5; by default as in DST or SRC.")
    ] = None,
    dtype: Annotated[
        str | None,
        typer.Option("--dtype", help="float16, bfloat16, float32 or int8; by default as in SRC."),
    ] = None,
    shard_rows: Annotated[
        int | None, typer.Option("--shard-rows", min=1, help="Images per shard; by default as in DST or SRC.")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would be written, and stop.")] = False,
    json: JsonOption = False,
) -> None:
    """Write a cache anew in another backend, precision or shard size; what is not named stays as it is.

    A conversion that was cut off goes on where it was, and several processes share it. Where DST is the
    result of an earlier one, what SRC has gained since is added to it; who reads DST is not disturbed.
    Between backends, and to float32, nothing is lost; other changes of precision round, and the fingerprint
    says so.

    Example: ris cache convert ./feats ./feats-int8 --dtype int8
    """
    from ris_cache.store.convert import convert as run_conversion
    from ris_cache.store.convert import plan_conversion
    from ris_cache.store.refusals import free_bytes

    planned = plan_conversion(source, target, backend=store, dtype=dtype, shard_rows=shard_rows)
    num_copied = 0
    if not dry_run:
        num_copied, _ = watched(
            "convert", lambda progress, stop: run_conversion(planned, progress=progress, should_stop=stop)
        )
    before, after = planned.source.manifest, planned.recipe
    free = free_bytes(target)
    document = {
        "source": str(source),
        "target": str(target),
        "dry_run": dry_run,
        "images": len(planned.source),
        "quarantined": before.images.quarantined,
        "to_add": len(planned.missing),
        "copied": num_copied,
        "nothing_to_add": planned.has_everything,
        "shards": planned.num_shards,
        "bytes": planned.num_bytes,
        "free_bytes": free,
        "store": after.backend,
        "dtype": after.dtype,
        "shard_rows": after.shard_rows,
        "exact": planned.is_exact,
        "rounded_through": planned.rounded_through,
        "fingerprint": after.fingerprint.digest,
    }
    if json:
        print_json(document)
        return
    rounded = ", ".join(planned.rounded_through)
    print_table(
        f"{'What converting' if dry_run else 'Converted'} {source} into {target}"
        + (" would do" if dry_run else ""),
        ["what", "before", "after"],
        [
            ["store", before.backend, after.backend],
            ["precision", before.dtype, after.dtype],
            ["values", "", "unchanged" if planned.is_exact else "rounded"],
            ["rounded before to", _before(planned.source.fingerprint.fields), rounded or "-"],
            ["images per shard", str(before.shard_rows), str(after.shard_rows)],
            ["images", str(before.images.ok), str(len(planned.source))],
            ["images that DST lacks", "", str(len(planned.missing))],
            ["images quarantined", str(before.images.quarantined), str(before.images.quarantined)],
            ["size of features", "", f"{planned.num_bytes / 2**20:.1f} MiB"],
            ["free space", "", f"{free / 2**20:.1f} MiB"],
            ["fingerprint", before.fingerprint.digest[:12], after.fingerprint.short],
        ],
        _outcome(planned, num_copied, is_dry_run=dry_run),
    )


def watched(what: str, work: Callable[[Progress, Callable[[], bool]], T]) -> T:
    """Run work that copies images, with progress on stderr, until it is done or a signal stops it."""
    from cli.progress import ImageProgress
    from cli.signals import StopRequest

    with StopRequest("after the shard at hand") as stop:
        try:
            return work(ImageProgress(what), stop)
        except StoppedError as stopped:
            typer.echo(f"stopped: {stopped}", err=True)
            raise typer.Exit(stop.exit_code) from None


def _outcome(planned: Conversion, num_copied: int, *, is_dry_run: bool) -> str:
    if planned.has_everything:
        return f"Nothing to add: {planned.target} has all that {planned.source.root} has."
    return "Nothing was written." if is_dry_run else f"{num_copied} images copied by this process."


def _before(fields: dict[str, object]) -> str:
    found = fields.get("rounded_through")
    return ", ".join(map(str, found)) if isinstance(found, list) and found else "-"

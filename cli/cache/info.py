"""`ris cache info`: what a cache is, holds and takes."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cli.extract import split_rows
from cli.options import DEFAULT_CACHE, DEFAULT_DATA, CacheOption, DataOption, JsonOption
from cli.render import print_json, print_table

if TYPE_CHECKING:
    from ris_cache.store.info import BegunCache, CacheInfo, Growth

_MAX_REASONS = 5


def info(
    cache: CacheOption = DEFAULT_CACHE,
    adding: Annotated[
        str | None,
        typer.Option("--adding", help="Also say what these splits would add, as for ris extract --split."),
    ] = None,
    data: DataOption = DEFAULT_DATA,
    json: JsonOption = False,
) -> None:
    """Say what a feature cache is: what made it, what it holds, its size, and what could be added or freed.

    Example: ris cache info --cache ./feats --adding refcocog --data ./data
    """
    from ris_cache.store.info import describe, find_begun

    begun = find_begun(cache) if adding is None else None
    if begun is not None:
        _print_begun(cache, begun, json=json)
        return
    found = describe(cache)
    more = _growth(found, adding, data) if adding is not None else None
    if json:
        print_json(_as_document(cache, found, more))
        return
    print_table(f"Cache {cache}", ["what", "value"], _rows(found), left=("value",))
    print_table(
        f"Fingerprint {found.manifest.fingerprint.digest[:12]}: what the features depend on",
        ["field", "value"],
        _fingerprint_rows(found),
        left=("value",),
    )
    if more is not None:
        print_table(
            f"Adding {adding}",
            ["what", "value"],
            [
                ["images to compute", str(more.num_images)],
                ["images present", str(more.num_present)],
                ["shards", str(more.num_shards)],
                ["size", _size(more.num_bytes)],
            ],
        )


def _print_begun(cache: Path, begun: BegunCache, *, json: bool) -> None:
    from dataclasses import asdict

    plan = begun.unfinished
    if json:
        print_json(
            {
                "cache": str(cache),
                "finished": False,
                "preset": begun.preset,
                "store": begun.backend,
                "dtype": begun.dtype,
                "shard_rows": begun.shard_rows,
                "total_bytes": begun.num_bytes,
                "unfinished": asdict(plan),
            }
        )
        return
    print_table(
        f"Unfinished cache {cache}",
        ["what", "value"],
        [
            ["begun by", plan.command],
            ["preset", begun.preset or "unknown"],
            ["stored as", f"{begun.dtype}, {begun.backend}"],
            ["images", f"{plan.num_images_done} of {plan.num_images} done"],
            ["shards", f"{plan.num_shards_done} of {plan.num_shards} done, of {begun.shard_rows} rows"],
            ["size so far", _size(begun.num_bytes)],
        ],
        "Cut off, or still at work: the same command goes on where it was. Nothing can be read until then.",
        left=("value",),
    )


def _growth(found: CacheInfo, adding: str, data: Path) -> Growth:
    from ris_cache.datasets import parse_selections
    from ris_cache.extraction.sources import load_sources
    from ris_cache.store.info import growth

    sources = load_sources(parse_selections(adding), data)
    wanted = sources.needing_features(found.images, found.root)
    return growth(found.manifest, num_images=len(wanted), num_present=len(sources.images) - len(wanted))


def _as_document(cache: Path, found: CacheInfo, more: Growth | None) -> dict[str, Any]:
    from dataclasses import asdict

    manifest = found.manifest
    unfinished, reclaimable = found.unfinished, found.reclaimable
    return {
        "cache": str(cache),
        "finished": True,
        "format_version": manifest.format_version,
        "preset": manifest.preset,
        "store": manifest.backend,
        "dtype": manifest.dtype,
        "arrays": [entry.model_dump() for entry in manifest.arrays],
        "shard_rows": manifest.shard_rows,
        "num_shards": found.num_shards,
        "rows": manifest.rows,
        "weights": manifest.weights,
        "recorded": manifest.recorded.model_dump(mode="json"),
        "fingerprint": manifest.fingerprint.model_dump(),
        "datasets": {name: entry.model_dump() for name, entry in manifest.datasets.items()},
        "images": {"ok": manifest.images.ok, "quarantined": manifest.images.quarantined},
        "quarantined": found.quarantined,
        "image_bytes": found.image_bytes,
        "feature_bytes": found.feature_bytes,
        "total_bytes": found.total_bytes,
        "unfinished": None if unfinished is None else asdict(unfinished),
        "reclaimable": None if reclaimable is None else asdict(reclaimable),
        "unclear": found.unclear or None,
        "adding": None if more is None else asdict(more),
    }


def _rows(found: CacheInfo) -> list[list[str]]:
    manifest, recorded = found.manifest, found.manifest.recorded
    rows = [
        ["preset", manifest.preset],
        *[[f"{role} weights", label] for role, label in manifest.weights.items()],
        ["made", f"{recorded.created:%Y-%m-%d %H:%M}, extended {recorded.updated:%Y-%m-%d %H:%M} UTC"],
        ["made with", _versions({"ris": recorded.ris, **recorded.libraries})],
        ["stored as", f"{manifest.dtype}, {manifest.backend}, format {manifest.format_version}"],
        *[[f"array {array.name}", f"{array.dtype} {list(array.shape)}"] for array in manifest.arrays],
        ["shards", f"{found.num_shards} of {manifest.shard_rows} rows; {manifest.rows} rows in all"],
        ["images", f"{manifest.images.ok} with features, {manifest.images.quarantined} in quarantine"],
        *_reasons(found.quarantined),
        *split_rows(manifest.datasets),
        ["size", f"{_size(found.total_bytes)}, of which features {_size(found.feature_bytes)}"],
        ["features of one image", _size(found.image_bytes)],
    ]
    if found.unfinished is not None:
        plan = found.unfinished
        rows.append(
            ["unfinished", f"{plan.command}: {plan.num_shards_done} of {plan.num_shards} shards done"]
        )
    if found.reclaimable is not None:
        freed = found.reclaimable
        rows.append(
            [
                "ris cache gc would free",
                f"{_size(freed.num_bytes)}: {freed.num_images} images that no expression refers to, "
                f"{freed.num_files} files that belong to nothing",
            ]
        )
    elif found.unfinished is None:
        rows.append(["ris cache gc would free", f"unknown: {found.unclear}"])
    return rows


def _reasons(quarantined: dict[int, str]) -> list[list[str]]:
    shown = [[f"  image {image_id}", reason] for image_id, reason in list(quarantined.items())[:_MAX_REASONS]]
    more = len(quarantined) - len(shown)
    return [*shown, *([["", f"and {more} more, see --json"]] if more else [])]


def _fingerprint_rows(found: CacheInfo) -> list[list[str]]:
    from ris_cache.store.info import flat_fields

    return [[path, str(value)] for path, value in flat_fields(found.manifest.fingerprint.fields)]


def _versions(libraries: dict[str, str]) -> str:
    return ", ".join(f"{name} {version}" for name, version in libraries.items())


def _size(num_bytes: int) -> str:
    for unit, power in (("GiB", 30), ("MiB", 20), ("KiB", 10)):
        if num_bytes >= 1 << power:
            return f"{num_bytes / (1 << power):.2f} {unit}"
    return f"{num_bytes} bytes"

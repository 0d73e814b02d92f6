"""`ris extract`: stage 1."""

from __future__ import annotations

from typing import Annotated

import typer

from cli.options import (
    DEFAULT_CACHE,
    DEFAULT_DATA,
    CacheOption,
    ClipWeightsOption,
    DataOption,
    DeviceOption,
    JsonOption,
    PresetOption,
    SamWeightsOption,
    choose_device,
)
from cli.render import print_json, print_table
from ris_cache.errors import ConfigError, DataError


def extract(
    split: Annotated[
        str, typer.Option("--split", help="refcoco, refcoco:val, refcocog/umd:test, a comma list, or all.")
    ],
    data: DataOption = DEFAULT_DATA,
    cache: CacheOption = DEFAULT_CACHE,
    preset: PresetOption = "paper",
    sam_weights: SamWeightsOption = None,
    clip_weights: ClipWeightsOption = None,
    random_weights: Annotated[
        bool, typer.Option("--random-weights", help="Random encoders, for trials; labelled everywhere.")
    ] = False,
    seed: Annotated[int, typer.Option(min=0, help="Seed of random weights.")] = 0,
    batch_size: Annotated[int, typer.Option(min=1, help="Images per forward pass.")] = 8,
    strict: Annotated[bool, typer.Option("--strict", help="Stop at the first unreadable image.")] = False,
    device: DeviceOption = None,
    json: JsonOption = False,
) -> None:
    """Run frozen SAM and CLIP once over the images and write the feature cache.

    Images that the cache holds already are skipped.

    Example: ris extract --split refcoco --data ./data --cache ./feats
    """
    from ris_cache.datasets import parse_selections
    from ris_cache.encoders.spec import PRESETS
    from ris_cache.encoders.weights import resolve_clip_weights, resolve_sam_weights

    selections = parse_selections(split)
    if preset not in PRESETS:
        raise ConfigError(f"Unknown preset {preset!r}; there are {', '.join(PRESETS)}.", preset=preset)
    spec = PRESETS[preset]
    if not data.is_dir():  # before any weights are looked for or downloaded
        raise DataError(f"There is no data root at {data}. Name one with --data or $RIS_DATA.", path=data)
    random_seed = seed if random_weights else None
    sam_source = resolve_sam_weights(sam_weights, spec.sam, random_seed=random_seed)
    clip_source = resolve_clip_weights(clip_weights, spec.clip, random_seed=random_seed)

    from ris_cache.encoders.frozen import FrozenEncoders
    from ris_cache.extract import extract as run_extraction

    encoders = FrozenEncoders.load(
        spec, sam_source=sam_source, clip_source=clip_source, device=choose_device(device)
    )
    report = run_extraction(
        selections,
        data_root=data,
        cache_root=cache,
        encoders=encoders,
        batch_size=batch_size,
        strict=strict,
        show_progress=True,
    )
    manifest = report.manifest
    for warning in report.warnings:
        typer.echo(f"note: {warning}", err=True)
    if json:
        print_json(
            {
                "cache": str(cache),
                "fingerprint": manifest.fingerprint.digest,
                "weights": manifest.weights,
                "added": report.added,
                "present": report.present,
                "quarantined": report.quarantined,
                "warnings": report.warnings,
                "datasets": {name: entry.model_dump() for name, entry in manifest.datasets.items()},
            }
        )
        return
    print_table(
        f"Cache {cache}",
        ["what", "value"],
        [
            ["images added", str(report.added)],
            ["images present before", str(report.present)],
            ["images quarantined", str(len(report.quarantined))],
            ["size", f"{sum(entry.bytes for entry in manifest.files.values()) / 2**20:.1f} MiB"],
            *[[f"{role} weights", label] for role, label in manifest.weights.items()],
            ["fingerprint", manifest.fingerprint.digest[:12]],
            *[
                [
                    f"{name} {split_name}",
                    f"{counts.images} images, {counts.refs} refs, {counts.expressions} expressions",
                ]
                for name, entry in manifest.datasets.items()
                for split_name, counts in entry.splits.items()
            ],
        ],
    )

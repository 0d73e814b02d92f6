"""`ris extract`: stage 1."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

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
)
from cli.render import print_json, print_table, size
from ris_cache.errors import ConfigError, DataError, StoppedError

if TYPE_CHECKING:
    from ris_cache.encoders.frozen import FrozenEncoders
    from ris_cache.extraction.estimate import Estimate
    from ris_cache.extraction.run import ExtractionReport

StoreOption = Annotated[
    str | None,
    typer.Option("--store", help="How features lie on disk: zarr (default) or hdf5."),
]
DtypeOption = Annotated[
    str | None,
    typer.Option("--dtype", help="Stored precision: float16 (default), bfloat16, float32 or int8."),
]
RandomWeightsOption = Annotated[
    bool, typer.Option("--random-weights", help="Random encoders, for trials; labelled everywhere.")
]
SeedOption = Annotated[int, typer.Option(min=0, help="Seed of random weights.")]
BatchSizeOption = Annotated[
    int | None,
    typer.Option("--batch-size", min=1, help="Images per forward pass; by default what fits the device."),
]
ArithmeticOption = Annotated[
    str,
    typer.Option(
        "--arithmetic",
        help="Of the encoders: float32, float16 or bfloat16; auto is what the cache has, in a new one "
        "float16 on CUDA and float32 elsewhere.",
    ),
]
WorkersOption = Annotated[
    int | None, typer.Option("--workers", min=1, help="Decoding threads; by default one per core, at most 8.")
]


def extract(
    split: Annotated[
        str, typer.Option("--split", help="refcoco, refcoco:val, refcocog/umd:test, a comma list, or all.")
    ],
    data: DataOption = DEFAULT_DATA,
    cache: CacheOption = DEFAULT_CACHE,
    preset: PresetOption = "paper",
    sam_weights: SamWeightsOption = None,
    clip_weights: ClipWeightsOption = None,
    random_weights: RandomWeightsOption = False,
    seed: SeedOption = 0,
    store: StoreOption = None,
    dtype: DtypeOption = None,
    arithmetic: ArithmeticOption = "auto",
    shard_rows: Annotated[
        int | None,
        typer.Option("--shard-rows", min=1, help="Images per shard of a new cache; 64 by default."),
    ] = None,
    batch_size: BatchSizeOption = None,
    workers: WorkersOption = None,
    compile_encoders: Annotated[
        bool, typer.Option("--compile", help="Compile the encoders with torch.compile.")
    ] = False,
    limit: Annotated[
        int | None, typer.Option("--limit", min=1, help="Only the first so many images, for a first try.")
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Say what would be done, and how long it would take.")
    ] = False,
    strict: Annotated[
        bool, typer.Option("--strict", help="Stop at the first missing or unreadable image.")
    ] = False,
    device: DeviceOption = None,
    json: JsonOption = False,
) -> None:
    """Run frozen SAM and CLIP once over the images and write the feature cache.

    Images that the cache holds are skipped, and an extraction that was cut off goes on where it was. Several
    processes on one cache share the work; under torchrun each takes one GPU.

    Example: ris extract --split refcoco --data ./data --cache ./feats
    """
    from ris_cache.datasets import parse_selections

    selections = parse_selections(split)
    _require_layout(store, dtype)
    if not data.is_dir():  # before any weights are looked for or downloaded
        raise DataError(f"There is no data root at {data}. Name one with --data or $RIS_DATA.", path=data)
    encoders = load_encoders(
        preset,
        sam_weights=sam_weights,
        clip_weights=clip_weights,
        random_seed=seed if random_weights else None,
        arithmetic=_arithmetic_of(cache) or arithmetic if arithmetic == "auto" else arithmetic,
        device=device,
        compile_encoders=compile_encoders,
    )
    from cli.progress import ImageProgress
    from cli.signals import StopRequest
    from ris_cache.encoders.batch_size import find_batch_size
    from ris_cache.extraction.estimate import estimate
    from ris_cache.extraction.run import Layout
    from ris_cache.extraction.run import extract as run_extraction

    layout = Layout(backend=store, dtype=dtype, shard_rows=shard_rows)
    if dry_run:
        found = estimate(
            selections,
            data_root=data,
            cache_root=cache,
            encoders=encoders,
            batch_size=batch_size or find_batch_size(encoders),
            layout=layout,
            limit=limit,
            workers=workers,
        )
        _print_estimate(cache, found, json=json)
        return
    with StopRequest("after the shard at hand") as stop:
        try:
            report = run_extraction(
                selections,
                data_root=data,
                cache_root=cache,
                encoders=encoders,
                batch_size=batch_size,
                layout=layout,
                strict=strict,
                workers=workers,
                limit=limit,
                progress=ImageProgress(),
                should_stop=stop,
            )
        except StoppedError as stopped:
            typer.echo(f"stopped: {stopped}", err=True)
            raise typer.Exit(stop.exit_code) from None
    for warning in report.warnings:
        typer.echo(f"note: {warning}", err=True)
    if int(os.environ.get("RANK", "0")) == 0:  # one of the processes of torchrun speaks for all
        _print_report(cache, report, json=json)


def _arithmetic_of(cache: Path) -> str | None:
    """The arithmetic that a cache, or the first extraction into it, was begun with; None if there is none."""
    from ris_cache.store.journal import Journal
    from ris_cache.store.planning import load_base
    from ris_cache.store.refusals import explained

    if not cache.is_dir():
        return None
    with explained(cache):
        found = load_base(cache) or Journal(cache).read_plan()
    return str(found.fingerprint.fields.get("arithmetic", "auto")) if found else None


def _require_layout(store: str | None, dtype: str | None) -> None:
    from ris_cache.store.backends import BACKENDS
    from ris_cache.store.precision import DTYPES

    for option, value, known in (("--store", store, tuple(BACKENDS)), ("--dtype", dtype, DTYPES)):
        if value is not None and value not in known:
            raise ConfigError(f"Unknown {option} {value!r}; there are {', '.join(known)}.", value=value)


def load_encoders(
    preset: str,
    *,
    sam_weights: str | None,
    clip_weights: str | None,
    random_seed: int | None,
    arithmetic: str,
    device: str | None,
    compile_encoders: bool = False,
) -> FrozenEncoders:
    """Load the frozen encoders that the options ask for.

    Raises:
        ConfigError: an unknown preset, arithmetic or device.
        WeightsError: weights that are missing or do not fit.
    """
    from cli.options import choose_device
    from ris_cache.encoders.spec import PRESETS
    from ris_cache.encoders.weights import resolve_clip_weights, resolve_sam_weights

    if preset not in PRESETS:
        raise ConfigError(f"Unknown preset {preset!r}; there are {', '.join(PRESETS)}.", preset=preset)
    spec = PRESETS[preset]
    sam_source = resolve_sam_weights(sam_weights, spec.sam, random_seed=random_seed)
    clip_source = resolve_clip_weights(clip_weights, spec.clip, random_seed=random_seed)

    from ris_cache.encoders.frozen import FrozenEncoders

    return FrozenEncoders.load(
        spec,
        sam_source=sam_source,
        clip_source=clip_source,
        device=choose_device(device or _device_of_rank()),
        arithmetic=arithmetic,
        compile=compile_encoders,
    )


def _device_of_rank() -> str | None:
    """The GPU that torchrun means for this process; None without torchrun or without a GPU."""
    import torch

    rank = os.environ.get("LOCAL_RANK")
    if rank is None or not torch.cuda.is_available():
        return None
    return f"cuda:{int(rank) % torch.cuda.device_count()}"


def _print_report(cache: Path, report: ExtractionReport, *, json: bool) -> None:
    manifest = report.manifest
    if json:
        print_json(
            {
                "cache": str(cache),
                "fingerprint": manifest.fingerprint.digest,
                "weights": manifest.weights,
                "store": manifest.backend,
                "dtype": manifest.dtype,
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
            ["size", size(sum(entry.bytes for entry in manifest.files.values()))],
            ["stored as", f"{manifest.dtype}, {manifest.backend}"],
            *[[f"{role} weights", label] for role, label in manifest.weights.items()],
            ["fingerprint", manifest.fingerprint.digest[:12]],
            *split_rows(manifest.datasets),
        ],
    )


def split_rows(datasets: dict[str, Any]) -> list[list[str]]:
    """One table row per split: its name, and how much of it there is."""
    return [
        [
            f"{name} {split}",
            f"{counts.images} images, {counts.refs} refs, {counts.expressions} expressions"
            + ("" if counts.is_complete else " (a part)"),
        ]
        for name, entry in datasets.items()
        for split, counts in entry.splits.items()
    ]


def _print_estimate(cache: Path, found: Estimate, *, json: bool) -> None:
    from cli.progress import duration

    if json:
        print_json({"cache": str(cache), **found.as_dict()})
        return
    print_table(
        f"What extracting into {cache} would do",
        ["what", "value"],
        [
            ["images to do", str(found.num_images)],
            ["images present", str(found.num_present)],
            ["images missing on disk", str(found.num_missing)],
            ["shards", str(found.num_shards)],
            ["size", size(found.num_bytes)],
            ["free space", size(found.free_bytes)],
            ["expressions to add", str(found.num_expressions)],
            ["category embeddings to add", str(found.num_categories)],
            ["stored as", f"{found.dtype}, {found.backend}"],
            ["batch size", str(found.batch_size)],
            ["measured", f"{found.images_per_second:.2f} images/s"],
            ["estimated time", duration(found.seconds)],
        ],
        "Nothing was written.",
    )

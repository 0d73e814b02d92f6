"""`ris cache verify`: is a cache sound, and if not, what is wrong and can it be mended."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

from cli.extract import BatchSizeOption, RandomWeightsOption, SeedOption, load_encoders
from cli.options import (
    DEFAULT_CACHE,
    DEFAULT_DATA,
    CacheOption,
    ClipWeightsOption,
    DataOption,
    DeviceOption,
    JsonOption,
    SamWeightsOption,
)
from cli.render import print_json
from ris_cache.errors import ConfigError, CorruptShardError

if TYPE_CHECKING:
    from tqdm import tqdm

    from ris_cache.encoders.frozen import FrozenEncoders
    from ris_cache.extraction.repair import RepairPlan, RepairReport
    from ris_cache.store.manifest import Manifest
    from ris_cache.store.verify import VerifyReport

_SECONDS_BETWEEN_LINES = 30.0


def verify(
    cache: CacheOption = DEFAULT_CACHE,
    fast: Annotated[
        bool, typer.Option("--fast", help="Leave the features unread: files, sizes, indexes and tables only.")
    ] = False,
    repair: Annotated[
        bool,
        typer.Option(
            "--repair", help="Make what is damaged again, from the images and annotations in --data."
        ),
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="With --repair: say what would be done, and do nothing.")
    ] = False,
    data: DataOption = DEFAULT_DATA,
    sam_weights: SamWeightsOption = None,
    clip_weights: ClipWeightsOption = None,
    random_weights: RandomWeightsOption = False,
    seed: SeedOption = 0,
    batch_size: BatchSizeOption = None,
    device: DeviceOption = None,
    json: JsonOption = False,
) -> None:
    """Check every file of a feature cache, and name every shard that is damaged.

    Exits with 0 if the cache is sound, also after a repair, and with 4 if it is not. A repair needs the
    images, annotations and weights that the cache was made of.

    Example: ris cache verify --cache ./feats --repair --data ./data
    """
    if dry_run and not repair:
        raise ConfigError("--dry-run says what --repair would do; give both.")
    report = _verify(cache, fast=fast, shards=None)
    plan: RepairPlan | None = None
    repaired: RepairReport | None = None
    exit_code = CorruptShardError.exit_code
    manifest = report.manifest
    if repair and manifest is not None and any(finding.is_repairable for finding in report.findings):
        if dry_run:
            from ris_cache.extraction.repair import plan_repair

            plan = plan_repair(cache, report.findings, data)
        else:
            weights = sam_weights, clip_weights, seed if random_weights else None
            repaired, exit_code = _repair(
                cache, report, data, lambda: _encoders_of(manifest, *weights, device=device), batch_size
            )
            # Damaged metadata hid the rows of all shards; otherwise the others are known to be sound.
            shards = {finding.shard for finding in report.findings if finding.shard is not None}
            report = _verify(cache, fast=fast, shards=None if repaired.rewritten else shards)
    if json:
        print_json(_as_document(cache, report, plan, repaired))
    else:
        _print_report(cache, report, plan, repaired)
    if not report.is_sound:
        raise typer.Exit(exit_code)


def _repair(
    cache: Path,
    report: VerifyReport,
    data: Path,
    load: Callable[[], FrozenEncoders],
    batch_size: int | None,
) -> tuple[RepairReport, int]:
    """Repair; returns what was done, and how to exit if the cache is not sound after it."""
    from cli.progress import ImageProgress
    from cli.signals import StopRequest
    from ris_cache.extraction.repair import repair

    with StopRequest("after the shard at hand") as stop:
        repaired = repair(
            cache,
            report.findings,
            data_root=data,
            load_encoders=load,
            batch_size=batch_size,
            progress=ImageProgress("repair"),
            should_stop=stop,
        )
    return repaired, stop.exit_code if repaired.is_stopped else CorruptShardError.exit_code


def _verify(cache: Path, *, fast: bool, shards: set[int] | None) -> VerifyReport:
    from ris_cache.store.verify import verify as run_verify

    progress = _Progress()
    try:
        return run_verify(cache, fast=fast, shards=shards, progress=progress)
    finally:
        progress.stop()


def _encoders_of(
    manifest: Manifest,
    sam_weights: str | None,
    clip_weights: str | None,
    random_seed: int | None,
    *,
    device: str | None,
) -> FrozenEncoders:
    return load_encoders(
        manifest.preset,
        sam_weights=sam_weights,
        clip_weights=clip_weights,
        random_seed=random_seed,
        arithmetic=str(manifest.fingerprint.fields.get("arithmetic", "auto")),
        device=device,
    )


class _Progress:
    """Shards checked, on stderr: a bar on a terminal, a line now and then elsewhere."""

    def __init__(self) -> None:
        self._bar: tqdm[NoReturn] | None = None
        self._last_line = time.monotonic()

    def __call__(self, done: int, total: int) -> None:
        if sys.stderr.isatty():
            from tqdm import tqdm

            self._bar = self._bar or tqdm(total=total, unit="shard", desc="verify")
            self._bar.update(done - self._bar.n)
        elif time.monotonic() - self._last_line >= _SECONDS_BETWEEN_LINES:
            self._last_line = time.monotonic()
            print(f"verify: {done}/{total} shards", file=sys.stderr, flush=True)

    def stop(self) -> None:
        if self._bar is not None:
            self._bar.close()


def _as_document(
    cache: Path, report: VerifyReport, plan: RepairPlan | None, repaired: RepairReport | None
) -> dict[str, Any]:
    return {
        "cache": str(cache),
        "sound": report.is_sound,
        "fast": report.is_fast,
        "num_shards": report.num_shards,
        "num_files": report.num_files,
        "num_bytes": report.num_bytes,
        "bad_shards": report.bad_shards,
        "findings": [
            {**asdict(finding), "repairable": finding.is_repairable, "remedy": finding.remedy}
            for finding in report.findings
        ],
        "notes": report.notes,
        "would_repair": None
        if plan is None
        else {
            "images": {shard: len(images) for shard, images in plan.images.items()},
            "metadata": list(plan.metadata),
            "obstacles": plan.obstacles,
            "rebuilt": list(plan.annotations.things),
            "not_rebuilt": plan.annotations.obstacles,
            "left_out": plan.annotations.left_out,
        },
        "repaired": None if repaired is None else repaired.as_dict(),
    }


def _print_report(
    cache: Path, report: VerifyReport, plan: RepairPlan | None, repaired: RepairReport | None
) -> None:
    if repaired is not None:
        _print_repaired(repaired)
    looked_at = (
        f"{_count(report.num_files, 'file')}, {_count(report.num_shards, 'shard')}; "
        f"{report.num_bytes / 2**20:.1f} MiB compared with their checksums"
    )
    if report.is_fast:
        looked_at = f"features were not read (--fast); {looked_at}"
    print(f"{cache} is {'sound' if report.is_sound else 'damaged'}: {looked_at}.")
    for finding in report.findings:
        print(f"  {finding}" + ("" if finding.shard is None else f" (shard {finding.shard})"))
    if report.bad_shards:
        print(f"Damaged shards: {_numbers(report.bad_shards)}.")
    if plan is not None:
        _print_plan(plan)
    else:
        for remedy, kinds in _by_remedy(report).items():
            print(f"For {kinds}: {remedy}")
    for note in report.notes:
        print(f"note: {note}", file=sys.stderr)


def _by_remedy(report: VerifyReport) -> dict[str, str]:
    kinds: dict[str, dict[str, None]] = {}
    for finding in report.findings:
        kinds.setdefault(finding.remedy, {})[finding.kind] = None
    return {remedy: ", ".join(names) for remedy, names in kinds.items()}


def _print_plan(plan: RepairPlan) -> None:
    todo = {shard: images for shard, images in plan.images.items() if shard not in plan.obstacles}
    if todo:
        num_images = sum(len(images) for images in todo.values())
        print(f"Would compute {_count(num_images, 'image')} again: shards {_numbers(todo)}.")
    for path in plan.metadata:
        print(f"Would write {path} anew.")
    if plan.annotations.things:
        print(f"Would build again: {', '.join(plan.annotations.things)}.")
    _print_annotations(plan.annotations.obstacles, plan.annotations.left_out)
    for shard, obstacle in plan.obstacles.items():
        print(f"Shard {shard} could not be mended: {obstacle}")
    print("Nothing was written.")


def _print_repaired(repaired: RepairReport) -> None:
    if repaired.restored:
        print(f"Computed again, to the same bytes as before: shards {_numbers(repaired.restored)}.")
    if repaired.changed:
        print(
            f"Computed again, to other bytes than before: shards {_numbers(repaired.changed)}. Their new "
            "checksums are recorded; how much the features differ is unknown, since the old ones are lost. "
            "Other hardware or another batch size is the usual cause."
        )
    for path in repaired.rewritten:
        print(f"Written anew: {path}.")
    if repaired.rebuilt:
        print(f"Built again: {', '.join(repaired.rebuilt)}.")
    _print_annotations(repaired.not_rebuilt, repaired.left_out)
    for shard, problem in repaired.failures.items():
        print(f"Shard {shard} could not be mended: {problem}")


def _print_annotations(obstacles: Mapping[str, str], left_out: Sequence[str]) -> None:
    for thing, problem in obstacles.items():
        print(f"Not to be built again: {thing}: {problem}")
    if left_out:
        splits = ",".join(left_out)
        print(
            f"Of {splits} the cache held a part, which cannot be built again: extract it again with "
            f"`ris extract --split {splits}`. Features are kept."
        )


def _count(number: int, what: str) -> str:
    return f"{number} {what}" + ("" if number == 1 else "s")


def _numbers(shards: Any) -> str:
    return ", ".join(str(shard) for shard in shards)

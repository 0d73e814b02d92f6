"""`ris cache compare`: how far the features of two caches agree, and what that means for a model."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cli.options import DEFAULT_RUNS, DeviceOption, JsonOption, RunsOption, choose_device
from cli.render import percent, print_json, print_table

if TYPE_CHECKING:
    from ris_cache.store.compare import Comparison
    from ris_train.run import RunDirectory
    from ris_train.scoring.results import EvaluationResult

_MAX_LISTED = 10


def compare(
    first: Annotated[Path, typer.Argument(metavar="A", help="Cache that is the reference.")],
    second: Annotated[Path, typer.Argument(metavar="B", help="Cache to compare with it.")],
    images: Annotated[
        int | None,
        typer.Option("--images", min=1, help="Compare so many images, spread evenly; all by default."),
    ] = None,
    checkpoint: Annotated[
        str | None,
        typer.Option(
            "--checkpoint", help="Run by name or path, or a checkpoint file: score it on both caches."
        ),
    ] = None,
    runs: RunsOption = DEFAULT_RUNS,
    batch_size: Annotated[int, typer.Option(min=1, help="Expressions per forward pass.")] = 32,
    device: DeviceOption = None,
    json: JsonOption = False,
) -> None:
    """Compare the features of the images that two caches share, decoded to float32.

    With a checkpoint, its model also reads both caches on the validation split of its run, whatever their
    fingerprints: what a precision costs in the end.

    Example: ris cache compare ./feats ./feats-int8 --checkpoint my-run
    """
    from ris_cache.store.cache import FeatureCache
    from ris_cache.store.compare import compare as run_comparison

    model = _find_checkpoint(runs, checkpoint) if checkpoint is not None else None
    found = run_comparison(FeatureCache.open(first), FeatureCache.open(second), num_images=images)
    scored = _score(first, second, *model, batch_size=batch_size, device=device) if model else None
    if json:
        print_json(
            {
                "first": str(first),
                "second": str(second),
                **found.as_dict(),
                "checkpoint": scored.as_dict() if scored else None,
            }
        )
        return
    _print_comparison(first, second, found)
    if scored is not None:
        _print_scores(first, second, scored)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Scored:
    """One checkpoint on two caches.

    Attributes:
        trained_on: A, B, "A and B" or "neither": whose fingerprint the checkpoint carries.
        pairs: of each split, on the first and the second cache.
        labels: of all weights that the numbers rest on.
    """

    checkpoint: Path
    trained_on: str
    pairs: tuple[tuple[EvaluationResult, EvaluationResult], ...]
    labels: dict[str, str]

    def as_dict(self) -> dict[str, Any]:
        return {
            "path": str(self.checkpoint),
            "trained_on": self.trained_on,
            "fingerprint_checked": False,
            "weights": self.labels,
            "splits": [
                {
                    "split": one.split,
                    "first": one.as_dict(),
                    "second": other.as_dict(),
                    "change": {measure: b - a for measure, a, b in _measures(one, other)},
                }
                for one, other in self.pairs
            ],
        }


def _measures(one: EvaluationResult, other: EvaluationResult) -> list[tuple[str, float, float]]:
    """Name, first and second value of what the default rule set measures, Pr@X apart."""
    if one.headline is None or other.headline is None:
        return []
    return [
        (measure, value, other.headline.values[measure])
        for measure, value in one.headline.values.items()
        if not measure.startswith("Pr@")
    ]


def _find_checkpoint(runs: Path, text: str) -> tuple[RunDirectory, str]:
    """Return a run and which of its checkpoints is meant: the one at a path, or the best one of a run."""
    from ris_train.run import RunDirectory, find_run

    path = Path(text)
    if path.suffix == ".safetensors":
        return RunDirectory(path.parent.parent), path.stem
    return find_run(runs, text), "best"


def _score(
    first: Path, second: Path, run: RunDirectory, name: str, *, batch_size: int, device: str | None
) -> _Scored:
    from ris_cache.datasets import parse_selections
    from ris_cache.memory import keep_freed_memory
    from ris_cache.store.manifest import load_manifest
    from ris_train.checkpoint import read_metadata
    from ris_train.evaluation_run import evaluate_run

    metadata = read_metadata(run.checkpoint_path(name))
    chosen = choose_device(device)
    if chosen.type == "cpu":
        keep_freed_memory()
    scored = [
        evaluate_run(
            cache,
            run,
            checkpoint=name,
            selections=parse_selections(metadata.config.data.val),
            category_source=None,
            shuffle_seed=None,
            batch_size=batch_size,
            device=chosen,
            show_progress=True,
            is_comparison=True,
        )
        for cache in (first, second)
    ]
    same = [
        label
        for label, cache in (("A", first), ("B", second))
        if load_manifest(cache).fingerprint.digest == metadata.fingerprint
    ]
    others = {result.split: result for result in scored[1].results}
    return _Scored(
        checkpoint=run.checkpoint_path(name),
        trained_on=" and ".join(same) or "neither",
        pairs=tuple((one, others[one.split]) for one in scored[0].results if one.split in others),
        labels=scored[0].weight_labels,
    )


def _print_comparison(first: Path, second: Path, found: Comparison) -> None:
    print_table(
        f"A = {first}, B = {second}: {found.num_compared} of {found.num_common} images in common",
        ["feature", "cosine mean", "cosine min", "of image", "relative error", "largest difference"],
        [
            [
                name,
                f"{feature.cosine_mean:.8f}",
                f"{feature.cosine_min:.8f}",
                str(feature.worst_image_id),
                f"{feature.relative_error:.3g}",
                f"{feature.max_difference:.3g}",
            ]
            for name, feature in found.features.items()
        ],
        "from values decoded to float32; relative error: Frobenius norm of B - A over that of A",
    )
    if found.fields:
        print("The fingerprints differ (A, then B):")
        for field in found.fields:
            print(f"  {field.path}: {field.expected!r}, {field.found!r}")
    else:
        print("The fingerprints are the same.")
    for label, image_ids in (
        ("only in A", found.only_first),
        ("only in B", found.only_second),
        ("in both, but extracted from different image files", found.other_files),
    ):
        if image_ids:
            more = f" and {len(image_ids) - _MAX_LISTED} more" if len(image_ids) > _MAX_LISTED else ""
            listed = ", ".join(map(str, image_ids[:_MAX_LISTED]))
            print(f"Images {label}: {len(image_ids)} ({listed}{more}).")


def _print_scores(first: Path, second: Path, scored: _Scored) -> None:
    rows = []
    for one, other in scored.pairs:
        samples = f"{one.num_samples}, {other.num_samples}"
        rows += [
            [one.split, f"{measure} ({one.rules})", samples, percent(a), percent(b), f"{100 * (b - a):+.2f}"]
            for measure, a, b in _measures(one, other)
        ]
    print_table(
        f"Comparison, no result: {scored.checkpoint} on A = {first} and B = {second}",
        ["split", "measure", "samples (A, B)", "A", "B", "B - A"],
        rows,
        f"features of any fingerprint were allowed on purpose; trained on: {scored.trained_on} · weights: "
        + ", ".join(f"{role} {label}" for role, label in scored.labels.items()),
        left=["measure"],
    )

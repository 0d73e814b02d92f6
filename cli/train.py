"""`ris train`: stage 2."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cli.options import (
    DEFAULT_CACHE,
    DEFAULT_RUNS,
    CacheOption,
    DeviceOption,
    JsonOption,
    RunsOption,
    choose_device,
)
from cli.render import percent, print_json, print_table
from ris_cache.memory import keep_freed_memory

if TYPE_CHECKING:
    from ris_train.data.merge import TrainingSet


def train(
    cache: CacheOption = DEFAULT_CACHE,
    recipe: Annotated[
        str | None, typer.Option("--recipe", help="Shipped recipe; by default the one of the cache's preset.")
    ] = None,
    config: Annotated[Path | None, typer.Option("--config", help="YAML laid over the recipe.")] = None,
    set_: Annotated[
        list[str] | None, typer.Option("--set", help="section.key=value, laid over both; repeatable.")
    ] = None,
    split: Annotated[
        str | None,
        typer.Option(
            "--split",
            help="Datasets to train on, such as refcoco or refcoco,refcoco+,refcocog: their train splits, "
            "merged. data.val becomes the first one's val, unless it is of one of them already.",
        ),
    ] = None,
    run: Annotated[
        str | None, typer.Option("--run", help="Name of the run; recipe and time by default.")
    ] = None,
    runs: RunsOption = DEFAULT_RUNS,
    random_weights: Annotated[
        bool, typer.Option("--random-weights", help="Random BERT, for trials; labelled everywhere.")
    ] = False,
    device: DeviceOption = None,
    json: JsonOption = False,
) -> None:
    """Train from a cache alone and keep the checkpoint that is best on the validation split.

    Example: ris train --cache ./feats --split refcoco,refcoco+,refcocog --set train.steps=20000
    """
    from ris_cache import FeatureCache
    from ris_train.config import load_config
    from ris_train.run import new_run_path

    recipe = recipe or FeatureCache.open(cache).manifest.preset
    overrides = set_ or []
    resolved = load_config(recipe=recipe, config_path=config, overrides=overrides)
    if split is not None:
        from ris_train.data.merge import split_overrides

        is_val_chosen = any(override.replace(" ", "").startswith("data.val=") for override in overrides)
        meant = split_overrides(split, val=resolved.data.val, is_val_chosen=is_val_chosen)
        resolved = load_config(recipe=recipe, config_path=config, overrides=[*meant, *overrides])
    run_dir = runs / run if run is not None else new_run_path(runs, recipe)

    from ris_train.scoring import RULES
    from ris_train.trainer import train as run_training

    chosen = choose_device(device)
    if chosen.type == "cpu":
        keep_freed_memory()
    report = run_training(
        cache,
        resolved,
        run_dir,
        device=chosen,
        random_seed=resolved.train.seed if random_weights else None,
        show_progress=True,
    )
    if json:
        print_json(
            {
                "run": str(report.run.path),
                "best_step": report.best_step,
                "rules": report.best.rules,
                "headline": report.headline,
                **report.best.values,
                "num_samples": report.best.num_samples,
                "category_source": report.category_source,
                "weights": report.weights,
                "seconds": report.seconds,
                "left_out": report.training_set.left_out,
                "left_out_for_leakage": report.training_set.left_out_for_leakage,
                "training_set": [part.as_dict() for part in report.training_set.parts],
            }
        )
        return
    view = RULES[report.best.rules].view
    print_table(
        f"Run {report.run.path}",
        ["what", "value"],
        [
            ["best step", f"{report.best_step} of {resolved.train.steps}"],
            *[
                [f"{name} on {resolved.data.val}", percent(value)]
                for name, value in report.best.values.items()
            ],
            ["seconds", f"{report.seconds:.0f}"],
            ["checkpoint", str(report.run.checkpoint_path("best"))],
        ],
        caption=(
            f"{report.best.num_samples} of {report.val_size} expressions · best by: {report.headline} · "
            f"rules: {report.best.rules} · grid: {view.grid} · threshold: {view.threshold} · "
            f"category source: {report.category_source} · weights: "
            + ", ".join(f"{role} {label}" for role, label in report.weights.items())
        ),
    )
    _print_training_set(report.training_set)


def _print_training_set(training_set: TrainingSet) -> None:
    """Print what was trained on, and the leakage where there is any or where a merge looked for it."""
    parts = training_set.parts
    columns = ["split", "expressions", "images", "no target", "degenerate", "unreadable"]
    rows = [
        [part.selection, *map(str, (part.expressions, part.images))]
        + [str(left_out) for left_out in (part.no_target, part.degenerate, part.quarantined)]
        for part in parts
    ]
    caption = ""
    is_filtered = any(part.is_filtered for part in parts)
    if is_filtered or any(part.leaking_images for part in parts):
        columns += ["leaking", "on images"]
        for row, part in zip(rows, parts, strict=True):
            row += [str(part.leaking_expressions), str(part.leaking_images)]
        caption = (
            "leaking: on an image that a validation or test split of the cache holds; these expressions were "
            + ("left out" if is_filtered else "kept")
        )
        for part in parts:
            shared = ", ".join(f"{count} with {name}" for name, count in part.shared.items())
            caption += f" · {part.selection} shares images: {shared or 'none'}"
    print_table("Trained on; columns after images count expressions left out", columns, rows, caption)

"""`ris train`: stage 2."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

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


def train(
    cache: CacheOption = DEFAULT_CACHE,
    recipe: Annotated[
        str | None, typer.Option("--recipe", help="Shipped recipe; by default the one of the cache's preset.")
    ] = None,
    config: Annotated[Path | None, typer.Option("--config", help="YAML laid over the recipe.")] = None,
    set_: Annotated[
        list[str] | None, typer.Option("--set", help="section.key=value, laid over both; repeatable.")
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
    """Train from a cache alone and keep the best checkpoint by oIoU on the validation split.

    Example: ris train --cache ./feats --set train.steps=20000
    """
    from ris_cache import FeatureCache
    from ris_train.config import load_config
    from ris_train.run import new_run_path

    recipe = recipe or FeatureCache.open(cache).manifest.preset
    resolved = load_config(recipe=recipe, config_path=config, overrides=set_ or [])
    run_dir = runs / run if run is not None else new_run_path(runs, recipe)

    from ris_train.evaluate import BINARISATION, GRID
    from ris_train.evaluation_run import RULES_NAME
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
                "oIoU": report.best.overall_iou,
                "mIoU": report.best.mean_iou,
                "num_samples": report.best.num_samples,
                "category_source": report.category_source,
                "weights": report.weights,
                "seconds": report.seconds,
                "left_out": report.left_out,
            }
        )
        return
    print_table(
        f"Run {report.run.path}",
        ["what", "value"],
        [
            ["best step", f"{report.best_step} of {resolved.train.steps}"],
            [f"oIoU on {resolved.data.val}", percent(report.best.overall_iou)],
            [f"mIoU on {resolved.data.val}", percent(report.best.mean_iou)],
            ["seconds", f"{report.seconds:.0f}"],
            ["expressions left out of training", str(report.left_out)],
            ["checkpoint", str(report.run.checkpoint_path("best"))],
        ],
        caption=(
            f"{report.best.num_samples} of {report.val_size} expressions · grid: {GRID} · "
            f"rules: {RULES_NAME} · mask: {BINARISATION} · "
            f"category source: {report.category_source} · weights: "
            + ", ".join(f"{role} {label}" for role, label in report.weights.items())
        ),
    )

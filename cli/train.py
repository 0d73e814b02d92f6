"""`ris train`: stage 2."""

from __future__ import annotations

import os
import signal
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
from cli.train_report import print_plan, print_report
from ris_cache.errors import ConfigError, StoppedError
from ris_cache.memory import keep_freed_memory

if TYPE_CHECKING:
    from ris_train.config import RunConfig
    from ris_train.training import Progress


def train(
    cache: CacheOption = DEFAULT_CACHE,
    recipe: Annotated[
        str | None, typer.Option("--recipe", help="Shipped recipe; by default the one of the cache's preset.")
    ] = None,
    config: Annotated[
        Path | None,
        typer.Option("--config", help="YAML laid over the recipe; $RIS_TRAIN__LR and its like go over it."),
    ] = None,
    set_: Annotated[
        list[str] | None, typer.Option("--set", help="section.key=value, laid over everything; repeatable.")
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
    resume: Annotated[
        str,
        typer.Option(
            "--resume",
            help="auto: go on with the run that --run names, if it is there. never: refuse then. "
            "Or the directory of a run, or of one of its checkpoints/state-<step>.",
        ),
    ] = "auto",
    max_steps: Annotated[
        int | None, typer.Option("--max-steps", min=1, help="Short for --set train.steps=N.")
    ] = None,
    overfit: Annotated[
        int | None,
        typer.Option("--overfit", min=1, help="Train and validate on the first N usable expressions alone."),
    ] = None,
    deterministic: Annotated[
        bool, typer.Option("--deterministic", help="Refuse operations that may differ from run to run.")
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print samples, steps, memory and what trains; write nothing.")
    ] = False,
    random_weights: Annotated[
        bool, typer.Option("--random-weights", help="Random BERT, for trials; labelled everywhere.")
    ] = False,
    device: DeviceOption = None,
    json: JsonOption = False,
) -> None:
    """Train from a cache alone and keep the checkpoint that is best on the validation split.

    Ctrl-C, SIGTERM and SIGUSR1 save the state and end with 130, 143 and 138; the same command with --run NAME
    goes on from there. With several devices: torchrun --nproc-per-node N -m -- cli train …
    (without the bare -- torchrun takes --run for an option of its own).

    Example: ris train --cache ./feats --split refcoco,refcoco+,refcocog --set train.steps=20000
    """
    overrides = list(set_ or [])
    for key, value in (("steps", max_steps), ("overfit", overfit), ("deterministic", deterministic or None)):
        if value is not None:
            overrides.append(f"train.{key}={str(value).lower()}")
    from ris_train.run import new_run_path

    target, from_state = _target(runs, run, resume)
    resolved = _resolve(cache, recipe, config, overrides, split, target)
    run_dir = target or (runs / run if run is not None else new_run_path(runs, resolved.recipe))
    random_seed = resolved.train.seed if random_weights else None
    if dry_run:
        from ris_train.training.plan import make_plan

        print_plan(make_plan(cache, resolved, random_seed=random_seed), json=json)
        return
    _train(cache, resolved, run_dir, device, random_seed, target is not None, from_state, json=json)


def _target(runs: Path, run: str | None, resume: str) -> tuple[Path | None, Path | None]:
    """Say which run is to go on, if one is, and from which of its states, if one is named."""
    if resume == "never":
        return None, None
    if resume == "auto":
        is_there = run is not None and (runs / run / "config.yaml").is_file()
        return (runs / str(run) if is_there else None), None
    from ris_train.training.resume import resume_target

    found, state = resume_target(Path(resume))
    if run is not None and (runs / run).resolve() != found.path.resolve():
        raise ConfigError(
            f"--resume {resume} goes on with the run {found.path}, but --run names "
            f"{runs / run}. Leave one out.",
            run=run,
        )
    return found.path, state


def _resolve(
    cache: Path,
    recipe: str | None,
    config: Path | None,
    overrides: list[str],
    split: str | None,
    target: Path | None,
) -> RunConfig:
    """Resolve the configuration; a run that goes on starts from its own, unless a recipe or file is named."""
    from ris_train.config import load_config

    if target is not None and recipe is None and config is None:
        from ris_train.run import RunDirectory

        recipe, config = RunDirectory(target).read_config().recipe, target / "config.yaml"
    if recipe is None:
        from ris_cache import FeatureCache

        recipe = FeatureCache.open(cache).manifest.preset
    resolved = load_config(recipe=recipe, config_path=config, environment=os.environ, overrides=overrides)
    if split is None:
        return resolved
    from ris_train.data.merge import split_overrides

    is_val_chosen = any(override.replace(" ", "").startswith("data.val=") for override in overrides)
    meant = split_overrides(split, val=resolved.data.val, is_val_chosen=is_val_chosen)
    return load_config(
        recipe=recipe, config_path=config, environment=os.environ, overrides=[*meant, *overrides]
    )


def _train(
    cache: Path,
    config: RunConfig,
    run_dir: Path,
    device: str | None,
    random_seed: int | None,
    is_resumed: bool,
    from_state: Path | None,
    *,
    json: bool,
) -> None:
    from cli.signals import SIGNALS, StopRequest
    from cli.train_progress import TrainProgress
    from ris_train.training import train as run_training

    chosen = choose_device(device)
    if chosen.type == "cpu":
        keep_freed_memory()
    progress: Progress = TrainProgress()
    with StopRequest("after this step", signals=(*SIGNALS, signal.SIGUSR1)) as stop:
        try:
            report = run_training(
                cache,
                config,
                run_dir,
                device=chosen,
                random_seed=random_seed,
                resume=is_resumed,
                from_state=from_state,
                progress=progress,
                should_stop=stop,
            )
        except StoppedError as stopped:
            if int(os.environ.get("RANK", "0")) == 0:  # one of the processes of torchrun speaks for all
                typer.echo(f"stopped: {stopped}", err=True)
            raise typer.Exit(stop.exit_code) from None
    if not report.is_main:
        return
    if report.resumed_from == config.train.steps:
        typer.echo(
            f"{run_dir} is finished: it has taken all {config.train.steps} steps. Raise train.steps to go "
            "on.",
            err=True,
        )
    print_report(report, config, json=json)

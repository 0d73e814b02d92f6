"""`ris train`: stage 2."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
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
from cli.signals import SIGNALS, StopRequest
from cli.train_report import print_plan, print_report
from ris_cache.errors import ConfigError, RisError, StoppedError
from ris_cache.memory import keep_freed_memory

if TYPE_CHECKING:
    import torch

    from ris_train.config import RunConfig
    from ris_train.training import Progress

_SECONDS_FOR_FIRST = 10.0
"""How long a process waits for the first one to tell of an error, and for torchrun to end it then."""


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
        str | None,
        typer.Option(
            "--run", help="Name of the run, or path of one that is there; recipe and time by default."
        ),
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
        bool,
        typer.Option(
            "--deterministic",
            help="Operations that repeat themselves: another is an error on the CPU, a warning on CUDA.",
        ),
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
    from ris_train.run import RunDirectory, new_run_path

    with _told_by_first():
        target, from_state = _target(runs, run, resume)
        resolved = _resolve(cache, recipe, config, overrides, split, target)
        chosen = choose_device(device)
        if target is None and run is not None and _is_first():  # the others may find what it has made since
            RunDirectory(runs / run).require_none()
    run_dir = target or (runs / run if run is not None else new_run_path(runs, resolved.recipe))
    random_seed = resolved.train.seed if random_weights else None
    if dry_run:
        _plan(cache, resolved, target, from_state, random_seed, json=json)
        return
    is_named = target is not None or run is not None
    _train(cache, resolved, run_dir, chosen, random_seed, target is not None, from_state, is_named, json=json)


@contextmanager
def _told_by_first() -> Iterator[None]:
    """Leave it to the first process to tell of what fails in all of them, before they know of each other.

    torchrun ends the others as soon as the first has ended. One that is left after a while failed alone, and
    tells.
    """
    try:
        yield
    except (RisError, OSError):
        if not _is_first():
            time.sleep(_SECONDS_FOR_FIRST)
        raise


def _target(runs: Path, run: str | None, resume: str) -> tuple[Path | None, Path | None]:
    """Say which run is to go on, if one is, and from which of its states, if one is named.

    Raises:
        ConfigError: a new run is meant, of a name that can be none.
    """
    if resume == "never":
        _require_name(run)
        return None, None
    if resume == "auto":
        found = None if run is None else _run_that_is_there(runs, run)
        if found is None:
            _require_name(run)
        return found, None
    from ris_train.training.resume import resume_target

    resumed, state = resume_target(Path(resume))
    if run is not None and resumed.path not in ((runs / run).resolve(), Path(run).resolve()):
        raise ConfigError(
            f"--resume {resume} goes on with the run {resumed.path}, but --run names "
            f"{runs / run}. Leave one out.",
            run=run,
        )
    return resumed.path, state


def _run_that_is_there(runs: Path, run: str) -> Path | None:
    """Find a run by its name, or by a path, as the commands do that read runs."""
    candidates = [runs / run] if _is_name(run) else [runs / run, Path(run)]
    return next((path for path in candidates if (path / "config.yaml").is_file()), None)


def _require_name(run: str | None) -> None:
    """Refuse a name under which `ris runs list` would not find a new run.

    Raises:
        ConfigError: it is empty, a path, or holds what cannot be printed.
    """
    if run is not None and not _is_name(run):
        raise ConfigError(
            f"--run {run!r} cannot name a new run: that takes one folder name of printable characters, below "
            "--runs. To go on with one, give its name or path; `ris runs list` shows those there are.",
            run=run,
        )


def _is_name(run: str) -> bool:
    return run.isprintable() and bool(run.strip()) and run not in (".", "..") and "/" not in run


def _resolve(
    cache: Path,
    recipe: str | None,
    config: Path | None,
    overrides: list[str],
    split: str | None,
    target: Path | None,
) -> RunConfig:
    """Resolve the configuration; a run that goes on starts from its own, unless a recipe or file is named."""
    from ris_train.config import load_config, resolve_config
    from ris_train.config.loading import DEFAULT

    own = None
    if target is not None and recipe is None and config is None:
        from ris_train.run import RunDirectory

        own = target / "config.yaml"
        recipe, config = RunDirectory(target).read_config().recipe, own
    if recipe is None:
        from ris_cache import FeatureCache

        recipe = FeatureCache.open(cache).manifest.preset
    resolved = resolve_config(recipe=recipe, config_path=config, environment=os.environ, overrides=overrides)
    if split is None:
        return resolved.config
    from ris_train.data.merge import split_overrides

    origin = resolved.origins["data.val"]
    is_val_chosen = origin != DEFAULT and not origin.startswith("recipe ") and origin != f"file {own}"
    meant = split_overrides(split, val=resolved.config.data.val, is_val_chosen=is_val_chosen)
    return load_config(
        recipe=recipe, config_path=config, environment=os.environ, overrides=[*meant, *overrides]
    )


def _plan(
    cache: Path,
    config: RunConfig,
    target: Path | None,
    from_state: Path | None,
    random_seed: int | None,
    *,
    json: bool,
) -> None:
    from ris_train.run import RunDirectory
    from ris_train.training.plan import make_plan

    with _told_by_first():
        plan = make_plan(
            cache,
            config,
            random_seed=random_seed,
            resumed=None if target is None else RunDirectory(target),
            from_state=from_state,
            num_processes=_num_processes(),
            say=lambda message: typer.echo(message, err=True),
        )
    if _is_first():
        print_plan(plan, json=json)


def _train(
    cache: Path,
    config: RunConfig,
    run_dir: Path,
    device: torch.device,
    random_seed: int | None,
    is_resumed: bool,
    from_state: Path | None,
    is_named: bool,
    *,
    json: bool,
) -> None:
    from cli.train_progress import TrainProgress
    from ris_train.ranks import OtherRankError, leave_ranks
    from ris_train.training import train as run_training

    if device.type == "cpu":
        keep_freed_memory()
    progress: Progress = TrainProgress()
    is_one_of_several = _num_processes() > 1
    with _request(is_one_of_several=is_one_of_several) as stop:
        try:
            report = run_training(
                cache,
                config,
                run_dir,
                device=device,
                random_seed=random_seed,
                resume=is_resumed,
                from_state=from_state,
                is_named=is_named,
                progress=progress,
                should_stop=stop,
            )
        except StoppedError as stopped:
            if _is_first():  # one of the processes of torchrun speaks for all
                progress.say(f"stopped: {stopped}")
            code = stop.exit_code
            leave_ranks()
        except OtherRankError as error:  # the one that failed says why
            code = error.exit_code
        else:
            code = 0
            leave_ranks()
    if is_one_of_several:  # the launcher ends the others when one has ended; all is saved and said
        for number in SIGNALS:
            signal.signal(number, signal.SIG_IGN)
    if code:
        raise typer.Exit(code)
    if not report.is_main:
        return
    if report.resumed_from == config.train.steps:
        typer.echo(
            f"{run_dir} is finished: it has taken all {config.train.steps} steps. Raise train.steps to go "
            "on.",
            err=True,
        )
    print_report(report, config, json=json)


def _request(*, is_one_of_several: bool) -> StopRequest:
    """What signals ask for: the state is to be saved, and only Ctrl-C after Ctrl-C gives it up.

    Schedulers and launchers repeat signals and follow one by another, and end all by SIGKILL in time. Where
    several processes train together, they send SIGINT too.
    """
    return StopRequest(
        "all processes after this step or batch" if is_one_of_several else "after this step or batch",
        signals=(*SIGNALS, signal.SIGUSR1),
        interrupting=() if is_one_of_several else (signal.SIGINT,),
        is_silent=not _is_first(),
    )


def _num_processes() -> int:
    """How many processes torchrun started."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def _is_first() -> bool:
    """Whether this is rank 0 of the processes that torchrun started, or the only one."""
    return int(os.environ.get("RANK", "0")) == 0

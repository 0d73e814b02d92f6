"""The way into training: a new run, or one that goes on."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import torch

from ris_train.config import RunConfig
from ris_train.ranks import Ranks, join_ranks
from ris_train.run import RunDirectory, free_run
from ris_train.tracking import require_trackers
from ris_train.training.loop import Loop, TrainingReport
from ris_train.training.progress import Progress, Silent
from ris_train.training.randomness import deterministic
from ris_train.training.resume import ResumePoint, changed_settings, find_resume_point, require_same_data
from ris_train.training.setup import Setup, prepare
from ris_train.training.state import discard_later, read_state


def train(
    cache_root: Path,
    config: RunConfig,
    run_dir: Path,
    *,
    device: torch.device,
    random_seed: int | None,
    resume: bool = False,
    from_state: Path | None = None,
    is_named: bool = True,
    progress: Progress | None = None,
    should_stop: Callable[[], bool] = lambda: False,
) -> TrainingReport:
    """Train by the configuration and keep the best and the last checkpoint.

    On the CPU a run that is stopped at any instant and resumed ends with the very weights and metrics of one
    that never stopped.

    Args:
        cache_root: a cache directory; nothing else is read but BERT's weights.
        config: the whole configuration.
        run_dir: where the run's files go; must not hold a run, unless it is resumed.
        device: where the model trains.
        random_seed: seed of random BERT weights, if those were asked for; None loads real ones.
        resume: go on with the run that `run_dir` holds.
        from_state: one of its states; the latest whole one by default. Later ones are dropped.
        is_named: whether somebody chose the name of `run_dir`. Otherwise a new run takes the next free one.
        progress: is told how training goes.
        should_stop: asked after each step and within evaluations; on true the state is saved and the run
            ends. An evaluation that was cut short comes first when the run goes on.

    Raises:
        CacheError: the cache cannot be used, or lacks the selections.
        WeightsError: BERT's weights are missing.
        ConfigError: there is a run already; or it cannot go on with this configuration.
        DataError: nothing usable is selected; or other expressions than the run was begun on.
        CheckpointError: no whole state to go on from; or another process trains this run.
        NonFiniteError: the loss or a gradient is no number any more; names the step and the samples.
        DiskFullError: no space for a checkpoint; the earlier ones are whole.
        StoppedError: `should_stop` said so; names how to go on.
        RankError: another process of the run ended; OtherRankError if it failed, and says why itself.
    """
    ranks = join_ranks(device)
    told = progress if progress is not None and ranks.is_main else Silent()
    # Rank 0 looked first: the others may find the files that it has made since.
    run_dir, resume, from_state, is_named = ranks.from_main((run_dir, resume, from_state, is_named))
    run = RunDirectory(run_dir)
    with ExitStack() as held:
        held.enter_context(deterministic(ranks.device, is_wanted=config.train.deterministic))
        if resume:  # a new run is locked with its first file, so that one that cannot begin leaves nothing
            _on_main(ranks, lambda: held.enter_context(run.held()))
        point = _resume_point(run, config, ranks, from_state, told) if resume else None
        setup = ranks.together(lambda: _set_up(cache_root, config, ranks, random_seed, point, run))
        if not is_named and not resume:
            made = ranks.together(lambda: free_run(run_dir) if ranks.is_main else run_dir)
            run = RunDirectory(ranks.from_main(made))
        if not resume:
            _on_main(ranks, lambda: held.enter_context(run.held()))
        _on_main(ranks, lambda: _open_files(run, setup, point, told, is_resumed=resume))
        return ranks.together(lambda: Loop(setup, run, point, told, should_stop)).run_to_end()


def _on_main(ranks: Ranks, work: Callable[[], object]) -> None:
    """Do something on rank 0; nobody goes on before it is done, or if it fails."""
    ranks.together(lambda: work() if ranks.is_main else None)


def _resume_point(
    run: RunDirectory, config: RunConfig, ranks: Ranks, chosen: Path | None, told: Progress
) -> ResumePoint | None:
    """Find the state to go on from; rank 0 chooses it, so that all take the same."""
    point = ranks.together(
        lambda: find_resume_point(run, config, chosen=chosen, say=told.say) if ranks.is_main else None
    )
    sent = ranks.from_main(None if point is None else (point.path, point.state))
    if ranks.is_main or sent is None:
        return point
    path, state = sent
    return ResumePoint(path=path, state=state, metadata=read_state(path)[1])


def _set_up(
    cache_root: Path,
    config: RunConfig,
    ranks: Ranks,
    random_seed: int | None,
    point: ResumePoint | None,
    run: RunDirectory,
) -> Setup:
    """Load what is trained on what, and look that it is what the run was begun on."""
    require_trackers(config.train.trackers)  # before there are files
    resumed = None if point is None else point.metadata
    setup = prepare(cache_root, config, ranks, random_seed=random_seed, resumed=resumed, run=run)
    if point is not None:
        require_same_data(point, setup, run)
    return setup


def _open_files(
    run: RunDirectory, setup: Setup, point: ResumePoint | None, told: Progress, *, is_resumed: bool
) -> None:
    """Make the run's files, or cut them back to where it goes on."""
    if is_resumed:
        before = run.read_config() if point is None else point.metadata.config
        run.remove_unfinished()
        if point is not None:
            for path in discard_later(run, point.state.step):
                told.say(f"left behind: {path}")
        run.truncate_metrics(0 if point is None else point.state.metrics_bytes)
        run.write_config(setup.config)
        facts = setup.facts()
        run.add_resumption(
            {
                "step": 0 if point is None else point.state.step,
                **{name: facts[name] for name in ("processes", "device", "cache")},
                "changed": changed_settings(before, setup.config),
            },
            begun=facts,
        )
    else:
        RunDirectory.create(run.path, setup.config, facts=setup.facts())
    if not run.tokenizer_dir.is_dir() or point is None:
        setup.tokenizer.save(run.tokenizer_dir)

"""Where a run goes on: which state, and whether the configuration allows it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from ris_cache.errors import CheckpointError, ConfigError, DataError, FingerprintMismatchError
from ris_train.checkpoint import CheckpointMetadata, read_metadata
from ris_train.config import RunConfig
from ris_train.config.keys import leaves
from ris_train.run import RunDirectory
from ris_train.training.data_digest import DataDigest
from ris_train.training.setup import Setup
from ris_train.training.state import RunState, latest_state, read_state

MAY_CHANGE: Final = frozenset(
    {
        "data.integrity",
        "train.accumulate",
        "train.checkpoint_every",
        "train.clip_grad_norm",
        "train.eval_every",
        "train.keep_last",
        "train.log_every",
        "train.lr",
        "train.steps",
        "train.trackers",
    }
)
"""Keys that a resumed run may be given anew: how long, how often it looks, how it computes a batch, and what
tames one that has diverged."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ResumePoint:
    """A whole state to go on from.

    Attributes:
        metadata: of its weights, with the configuration that the steps before were taken with.
    """

    path: Path
    state: RunState
    metadata: CheckpointMetadata


def resume_target(path: Path) -> tuple[RunDirectory, Path | None]:
    """Say which run `--resume PATH` means, and which of its states, if it names one.

    Raises:
        CheckpointError: it is neither a run nor a state of one.
    """
    path = path.resolve()  # `state-4`, named from inside checkpoints/, says no run of itself
    if (path / "config.yaml").is_file():
        return RunDirectory(path), None
    run = RunDirectory(path.parent.parent)
    if path.name.startswith("state-") and path.is_dir() and run.config_path.is_file():
        return run, path
    raise CheckpointError(
        f"--resume {path}: there is neither a run nor a state of one. Name a run's directory, or one of its "
        "checkpoints/state-<step>.",
        path=path,
    )


def find_resume_point(
    run: RunDirectory, config: RunConfig, *, chosen: Path | None, say: Callable[[str], None]
) -> ResumePoint | None:
    """Find the state that a run goes on from; None if it was stopped before it had any.

    Args:
        run: a directory that holds a run.
        config: what it is to go on with.
        chosen: one of its states; the latest whole one by default.
        say: is told of damaged states that are passed over, and of settings that are others from here on.

    Raises:
        CheckpointError: the chosen state is damaged, or all are; or of another version of ris; or the run is
            of one that kept none; or its log is shorter than it was.
        ConfigError: the configuration differs from the run's in a key that may not change, or has fewer steps
            than the run has taken.
    """
    require_same(run.read_config(), config, run)
    found = latest_state(run, say) if chosen is None else (chosen, *read_state(chosen))
    if found is not None:
        path, state, metadata = found
        require_same(metadata.config, config, run)  # config.yaml may have been edited or cut short since
        _require_steps_left(run, state.step, config)
        run.require_metrics(state.metrics_bytes)
        for key, (before, now) in changed_settings(metadata.config, config).items():
            say(f"{key} was {before!r}, is {now!r} from step {state.step + 1} on")
        state = _with_checkpoints_that_are_there(run, state, config, say)
        return ResumePoint(path=path, state=state, metadata=metadata)
    if any(run.checkpoint_path(name).is_file() for name in ("best", "last")):
        raise CheckpointError(
            f"The run {run.path} has checkpoints but no state to go on from. Train another one: --run NAME.",
            path=run.path,
        )
    return None


def _require_steps_left(run: RunDirectory, step: int, config: RunConfig) -> None:
    """Refuse to end a run before where it is; at the very step it is complete."""
    if step > config.train.steps:
        raise ConfigError(
            f"The run {run.path} has taken {step} steps already; train.steps is {config.train.steps}. Ask "
            f"for {step} or more, go on from an earlier state (--resume "
            f"{run.checkpoints_dir}/state-<step>), or train another run with --run.",
            steps=config.train.steps,
            step=step,
        )


def _with_checkpoints_that_are_there(
    run: RunDirectory, state: RunState, config: RunConfig, say: Callable[[str], None]
) -> RunState:
    """Forget the best evaluation if its checkpoint was replaced by a later step's, or is gone.

    Otherwise the run could end with a checkpoint `best` whose score is another one's. A later step's is there
    if the run was killed between its evaluation and its state, or goes on from an earlier state. A run that
    is complete but for such a checkpoint is evaluated again, which writes its own. Checkpoints that somebody
    took from a complete run are not written again.
    """
    is_complete = state.step == state.evaluated_step == config.train.steps
    path = run.checkpoint_path("best")
    if state.best is not None and not (is_complete and not path.exists()):
        found = _other_than(path, state.best.step)
        if found:
            said = f"{path}, the best so far by step {state.best.step}, {found}"
            say(f"{said}; the best is chosen anew from here on.")
            state = state.model_copy(
                update={"best": None, "is_evaluation_due": state.is_evaluation_due or is_complete}
            )
    last = run.checkpoint_path("last")
    if is_complete and last.exists() and _other_than(last, state.step):
        state = state.model_copy(update={"is_evaluation_due": True})
    return state


def _other_than(path: Path, step: int) -> str:
    """What is wrong with the checkpoint of a step, in words; nothing if it is that."""
    try:
        found = read_metadata(path).step
    except CheckpointError:
        return "is damaged" if path.exists() else "is gone"
    return "" if found == step else f"is of step {found} now"


def require_same(before: RunConfig, now: RunConfig, run: RunDirectory) -> None:
    """Refuse to go on with another configuration.

    Raises:
        ConfigError: naming every key that differs and may not.
    """
    changed = changed_settings(before, now)
    refused = [key for key in changed if key not in MAY_CHANGE]
    if refused:
        listed = "; ".join(f"{key} was {changed[key][0]!r}, is {changed[key][1]!r}" for key in refused)
        raise ConfigError(
            f"The run {run.path} cannot go on with another configuration: {listed}. Leave these as they "
            "were (without --recipe and --config a run goes on with its own settings), or train another run "
            f"with --run. What may change: {', '.join(sorted(MAY_CHANGE))}.",
            keys=refused,
        )


def changed_settings(before: RunConfig, now: RunConfig) -> dict[str, tuple[Any, Any]]:
    """Value before and now of every setting that differs, by dotted key."""
    old, new = (dict(leaves(config.model_dump(mode="json"))) for config in (before, now))
    keys = sorted(key for key in old.keys() | new.keys() if old.get(key) != new.get(key))
    return {key: (old.get(key), new.get(key)) for key in keys}


def require_same_data(point: ResumePoint, setup: Setup, run: RunDirectory) -> None:
    """Refuse to go on from other features, or on other expressions.

    Raises:
        FingerprintMismatchError: the cache is not the run's.
        DataError: its tables are not those that the run was begun on.
    """
    require_same_features(point.metadata, setup.cache.fingerprint.digest, run)
    for what, before, now in (
        (setup.config.data.train, point.state.training, setup.training_digest),
        (setup.validation.label, point.state.validation, setup.validation_digest),
    ):
        _require_same_expressions(what, before, now, setup.cache.root, run)


def _require_same_expressions(
    what: str, before: DataDigest | None, now: DataDigest, cache_root: Path, run: RunDirectory
) -> None:
    if before is None or before == now:
        return
    found = f"{now.num_samples:,}{' others' if before.num_samples == now.num_samples else ''}"
    raise DataError(
        f"The run {run.path} was begun on {before.num_samples:,} expressions of {what}; the cache "
        f"{cache_root} gives {found} now. Its tables were made anew, or it holds a dataset more, on whose "
        "images data.leakage keeps the run from training. Name the run's own cache with --cache, or train "
        "another run with --run.",
        expected=before.num_samples,
        found=now.num_samples,
    )


def require_same_features(metadata: CheckpointMetadata, fingerprint: str, run: RunDirectory) -> None:
    """Refuse to go on from other features.

    Raises:
        FingerprintMismatchError: the cache is not the run's.
    """
    if metadata.fingerprint != fingerprint:
        raise FingerprintMismatchError(
            f"The run {run.path} was begun on features of fingerprint {metadata.fingerprint[:12]}; this "
            f"cache has {fingerprint[:12]}. Name the run's own with --cache.",
            expected=metadata.fingerprint,
            found=fingerprint,
        )

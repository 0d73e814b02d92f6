"""Where a run goes on: which state, and whether the configuration allows it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from ris_cache.errors import CheckpointError, ConfigError, FingerprintMismatchError
from ris_train.checkpoint import CheckpointMetadata, read_metadata
from ris_train.config import RunConfig
from ris_train.run import RunDirectory
from ris_train.training.state import RunState, latest_state, read_state

MAY_CHANGE: Final = frozenset(
    {
        "data.integrity",
        "train.accumulate",
        "train.checkpoint_every",
        "train.eval_every",
        "train.keep_last",
        "train.log_every",
        "train.steps",
        "train.trackers",
    }
)
"""Keys that a resumed run may be given anew: how long, how often it looks, and how it computes a batch."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ResumePoint:
    """A whole state to go on from."""

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
        say: is told of damaged states that are passed over.

    Raises:
        CheckpointError: the chosen state is damaged, or all are; or the run is of a version that kept none.
        ConfigError: the configuration differs from the run's in a key that may not change, or has fewer steps
            than the run has taken.
    """
    require_same(run.read_config(), config, run)
    found = latest_state(run, say) if chosen is None else (chosen, *read_state(chosen))
    if found is not None:
        path, state, metadata = found
        require_same(metadata.config, config, run)  # config.yaml may have been edited or cut short since
        _require_steps_left(run, state.step, config)
        if state.step < config.train.steps or not is_evaluated(run, state.step):
            state = _with_best_that_is_there(run, state, say)
        return ResumePoint(path=path, state=state, metadata=metadata)
    if any(run.checkpoint_path(name).is_file() for name in ("best", "last")):
        raise CheckpointError(
            f"The run {run.path} has checkpoints but no state to go on from. Train another one: --run NAME.",
            path=run.path,
        )
    return None


def is_evaluated(run: RunDirectory, step: int) -> bool:
    """Whether the last evaluation of a run is that of a step: each leaves its checkpoint `last`."""
    try:
        return read_metadata(run.checkpoint_path("last")).step == step
    except CheckpointError:
        return False


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


def _with_best_that_is_there(run: RunDirectory, state: RunState, say: Callable[[str], None]) -> RunState:
    """Forget the best evaluation if its checkpoint was replaced by a later step's, or is gone.

    Otherwise the run could end with a checkpoint `best` whose score is another one's. A later step's is there
    if the run was killed between its evaluation and its state, or goes on from an earlier state.
    """
    if state.best is None:
        return state
    path = run.checkpoint_path("best")
    try:
        found = f"is of step {step} now" if (step := read_metadata(path).step) != state.best.step else ""
    except CheckpointError:
        found = "is damaged" if path.exists() else "is gone"
    if not found:
        return state
    say(f"{path}, the best so far by step {state.best.step}, {found}; the best is chosen anew from here on.")
    return state.model_copy(update={"best": None})


def require_same(before: RunConfig, now: RunConfig, run: RunDirectory) -> None:
    """Refuse to go on with another configuration.

    Raises:
        ConfigError: naming every key that differs and may not.
    """
    old, new = (flat(config.model_dump(mode="json")) for config in (before, now))
    different = sorted(key for key in old.keys() | new.keys() if old.get(key) != new.get(key))
    refused = [key for key in different if key not in MAY_CHANGE]
    if refused:
        listed = "; ".join(f"{key} was {old.get(key)!r}, is {new.get(key)!r}" for key in refused)
        raise ConfigError(
            f"The run {run.path} cannot go on with another configuration: {listed}. Leave these as they "
            f"were, or train another run with --run. What may change: {', '.join(sorted(MAY_CHANGE))}.",
            keys=refused,
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


def flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Dotted keys to leaves."""
    found: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, Mapping):
            found |= flat(value, f"{prefix}{key}.")
        else:
            found[f"{prefix}{key}"] = value
    return found

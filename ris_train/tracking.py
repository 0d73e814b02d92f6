"""Training curves outside the run directory: TensorBoard, Weights & Biases, Trackio, through accelerate.

The run's own metrics.jsonl is always written and is what other commands read; trackers only show it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Any, Final, Protocol

from ris_cache.errors import ConfigError
from ris_train.config import RunConfig
from ris_train.config.keys import leaves
from ris_train.run import RunDirectory

PROJECT: Final = "ris"
"""Project in which Weights & Biases and Trackio keep the runs of every directory."""


class Tracker(Protocol):
    """What is used of accelerate's trackers."""

    def start(self) -> None:
        """Open what the tracker writes to."""
        ...

    def store_init_configuration(self, values: dict[str, Any]) -> None:
        """Keep the configuration of the run."""
        ...

    def log(self, values: dict[str, Any], step: int | None = None) -> None:
        """Keep values of one step."""
        ...

    def finish(self) -> None:
        """Write what is still to be written."""
        ...


@dataclass(frozen=True, slots=True)
class Trackers:
    """Open trackers; those of one run, used by the one process that writes it."""

    opened: Sequence[Tracker]

    def log(self, step: int, values: Mapping[str, Any]) -> None:
        """Show a line of the metrics.

        Numbers are named `val/<metric>` in an evaluation, which names its split as `val`, and `train/<name>`
        otherwise. Texts, and scores over nothing, are no points of a curve and are left out.

        Args:
            step: optimiser steps taken.
            values: as `RunDirectory.log` is given them.
        """
        group = "val" if "val" in values else "train"
        points = {
            f"{group}/{name}": value
            for name, value in values.items()
            if name != "step" and _is_number(value) and math.isfinite(value)
        }
        if points:
            for tracker in self.opened:
                tracker.log(points, step=step)

    def close(self) -> None:
        """Finish every tracker, also where another one fails; the first failure is raised at the end."""
        _finish(self.opened)


def open_trackers(names: Iterable[str], run: RunDirectory, config: RunConfig) -> Trackers:
    """Open the trackers that `train.trackers` names and give them the configuration.

    TensorBoard writes into the run, to `tensorboard/`; the others know the run by the name of its directory,
    and go on with it when training is resumed.

    Args:
        names: of `tensorboard`, `wandb`, `trackio`.
        run: on the one process that writes it; no other may call this.
        config: the run's.

    Raises:
        ConfigError: an unknown tracker, or one whose package is not installed, before any is opened.
    """
    wanted = tuple(dict.fromkeys(names))
    unknown = [name for name in wanted if name not in _MAKERS]
    if unknown:
        raise ConfigError(
            f"train.trackers: there is no tracker {unknown[0]!r}; there are {', '.join(_MAKERS)}.",
            tracker=unknown[0],
            known=tuple(_MAKERS),
        )
    missing = [name for name in wanted if not _is_installed(name)]
    if missing:
        raise ConfigError(
            f"train.trackers: {', '.join(missing)} {'is' if len(missing) == 1 else 'are'} not installed. "
            f"Install the extra: pip install 'ris[{','.join(missing)}]', or leave it out; metrics.jsonl is "
            "written all the same.",
            missing=tuple(missing),
        )
    settings = {key: _plain(value) for key, value in leaves(config.model_dump(mode="json"))}
    opened: list[Tracker] = []
    if wanted:
        _know_the_process()
    try:
        for name in wanted:
            tracker = _MAKERS[name](run)
            tracker.start()
            opened.append(tracker)
            tracker.store_init_configuration(settings)
    except BaseException:
        _finish(opened)
        raise
    return Trackers(tuple(opened))


def _is_installed(package: str) -> bool:
    # By its metadata: a mere folder named wandb, which that tracker makes, would pass for a module.
    try:
        version(package)
    except PackageNotFoundError:
        return False
    return True


def _know_the_process() -> None:
    """Set up accelerate's knowledge of this process, without which its trackers cannot even write a log."""
    from accelerate import PartialState

    PartialState()  # the one that is there already, where the training loop has set it up


def _finish(opened: Sequence[Tracker]) -> None:
    if not opened:
        return
    try:
        opened[0].finish()
    finally:
        _finish(opened[1:])


def _tensorboard(run: RunDirectory) -> Tracker:
    from accelerate.tracking import TensorBoardTracker

    return _as_tracker(TensorBoardTracker(run_name="tensorboard", logging_dir=run.path))


def _wandb(run: RunDirectory) -> Tracker:
    from accelerate.tracking import WandBTracker

    name = run.path.resolve().name
    return _as_tracker(WandBTracker(run_name=PROJECT, name=name, id=name, resume="allow", dir=str(run.path)))


def _trackio(run: RunDirectory) -> Tracker:
    from accelerate.tracking import TrackioTracker

    return _as_tracker(TrackioTracker(run_name=PROJECT, name=run.path.resolve().name, resume="allow"))


def _as_tracker(tracker: Any) -> Tracker:
    made: Tracker = tracker  # accelerate has no types
    return made


_MAKERS: Final[dict[str, Callable[[RunDirectory], Tracker]]] = {
    "tensorboard": _tensorboard,
    "wandb": _wandb,
    "trackio": _trackio,
}
TRACKERS: Final = tuple(_MAKERS)
"""Names that `train.trackers` may hold; each is also the name of a package and of an extra of ris."""


def _plain(value: object) -> str | bool | int | float:
    """A setting as every tracker takes it; a list, or null, becomes text."""
    return value if isinstance(value, (str, bool, int, float)) else str(value)


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)

"""Training curves outside the run directory: TensorBoard, Weights & Biases, Trackio, through accelerate.

The run's own metrics.jsonl is always written and is what other commands read; trackers only show it. So one
that cannot be opened is an error before the first step, and one that fails later is a warning.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext, redirect_stdout
from functools import partial
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


class Trackers:
    """Open trackers; those of one run, used by the one process that writes it.

    Args:
        opened: by name.
        say: is told of each tracker that fails, once; it is asked again at the next line all the same, since
            a connection may come back.
    """

    def __init__(self, opened: Mapping[str, Tracker], say: Callable[[str], None]) -> None:
        self._opened = dict(opened)
        self._say = say
        self._failed: set[str] = set()

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
            for name, tracker in self._opened.items():
                self._try(name, f"at step {step}", partial(tracker.log, points, step=step))

    def close(self) -> None:
        """Finish every tracker, also where another one fails."""
        for name, tracker in self._opened.items():
            self._try(name, "at the end", tracker.finish)

    def _try(self, name: str, when: str, do: Callable[[], None]) -> None:
        try:
            with _stdout_left_alone(name):
                do()
        except Exception as error:  # whatever its package raises: curves are no reason to end a training
            if name not in self._failed:
                self._say(
                    f"warning: the tracker {name} failed {when} ({_in_words(error)}), so its curves may have "
                    "gaps; training goes on, and metrics.jsonl has every value."
                )
            self._failed.add(name)


def open_trackers(
    names: Iterable[str], run: RunDirectory, config: RunConfig, *, say: Callable[[str], None]
) -> Trackers:
    """Open the trackers that `train.trackers` names and give them the configuration.

    TensorBoard writes into the run, to `tensorboard/`; the others name the run after its directory, and go on
    with it when training is resumed. They tell runs of one name apart by what env.json said when they began,
    so that a run trained anew is another one.

    Args:
        names: of `tensorboard`, `wandb`, `trackio`.
        run: on the one process that writes it; no other may call this.
        config: the run's.
        say: is told where one fails later.

    Raises:
        ConfigError: an unknown tracker, or one whose package is not installed, before any is opened; or one
            that cannot be opened: no network, not logged in.
    """
    wanted = require_trackers(names)
    settings = {key: _plain(value) for key, value in leaves(config.model_dump(mode="json"))}
    opened: dict[str, Tracker] = {}
    if wanted:
        _know_the_process()
    try:
        for name in wanted:
            _open(name, run, settings, opened)
    except BaseException:
        Trackers(opened, say).close()
        raise
    return Trackers(opened, say)


def require_trackers(names: Iterable[str]) -> tuple[str, ...]:
    """Refuse trackers that cannot be had here; returns each name once.

    Raises:
        ConfigError: an unknown tracker, or one whose package is not installed.
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
    return wanted


def _open(name: str, run: RunDirectory, settings: dict[str, Any], opened: dict[str, Tracker]) -> None:
    """Open one tracker into `opened`, where it is as soon as it is to be closed."""
    try:
        with _stdout_left_alone(name):
            tracker = _MAKERS[name](run)
            tracker.start()
            opened[name] = tracker
            tracker.store_init_configuration(settings)
    except Exception as error:  # each package has errors of its own, and none can be imported for sure
        raise ConfigError(
            f"train.trackers: {name} could not be started ({_in_words(error)}). {_HINTS[name]} Or leave it "
            "out of train.trackers; metrics.jsonl is written all the same.",
            tracker=name,
        ) from error


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


def _tensorboard(run: RunDirectory) -> Tracker:
    from accelerate.tracking import TensorBoardTracker

    return _as_tracker(TensorBoardTracker(run_name="tensorboard", logging_dir=run.path))


def _wandb(run: RunDirectory) -> Tracker:
    from accelerate.tracking import WandBTracker

    name = run.path.resolve().name
    run_id = run.identity()[:16]  # a digest has only letters that an id may have
    return _as_tracker(
        WandBTracker(run_name=PROJECT, name=name, id=run_id, resume="allow", dir=str(run.path))
    )


def _trackio(run: RunDirectory) -> Tracker:
    from accelerate.tracking import TrackioTracker

    # It joins runs of one name, and knows no other mark.
    name = f"{run.path.resolve().name}-{run.identity()[:8]}"
    return _as_tracker(TrackioTracker(run_name=PROJECT, name=name, resume="allow"))


def _as_tracker(tracker: Any) -> Tracker:
    made: Tracker = tracker  # accelerate has no types
    return made


_MAKERS: Final[dict[str, Callable[[RunDirectory], Tracker]]] = {
    "tensorboard": _tensorboard,
    "wandb": _wandb,
    "trackio": _trackio,
}
_HINTS: Final = {
    "tensorboard": "It writes to tensorboard/ in the run's directory.",
    "wandb": "Log in with `wandb login` or $WANDB_API_KEY; without network, set WANDB_MODE=offline and "
    "upload later with `wandb sync`.",
    "trackio": """Try it alone: python -c 'import trackio; trackio.init(project="ris")'.""",
}
TRACKERS: Final = tuple(_MAKERS)
"""Names that `train.trackers` may hold; each is also the name of a package and of an extra of ris."""


def _plain(value: object) -> str | bool | int | float:
    """A setting as every tracker takes it; a list, or null, becomes text."""
    return value if isinstance(value, (str, bool, int, float)) else str(value)


def _stdout_left_alone(name: str) -> AbstractContextManager[object]:
    """Keep what Trackio prints out of stdout, which is the result; Weights & Biases replaces it itself."""
    return redirect_stdout(sys.stderr) if name == "trackio" else nullcontext()


def _in_words(error: Exception) -> str:
    """Class and first line of an error, of which a package's own errors may have many."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0].strip()}" if lines else type(error).__name__


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)

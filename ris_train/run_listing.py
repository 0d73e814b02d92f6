"""What runs there are and how far each has come, read from their files without torch.

A damaged directory is part of the answer, never an error: the list exists to find such directories too.
"""

from __future__ import annotations

import fcntl
import math
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal

from ris_cache.errors import CheckpointError, ConfigError
from ris_cache.store.files import LOCK_NAME
from ris_train.config import RunConfig
from ris_train.json_reading import parse_object
from ris_train.run import RunDirectory
from ris_train.scoring import RULES

State = Literal["finished", "running", "stopped", "damaged"]
_MARKS: Final = ("config.yaml", "env.json", "metrics.jsonl", "checkpoints")
_STATE_PREFIX: Final = "state-"


@dataclass(frozen=True, slots=True, kw_only=True)
class BestScore:
    """The best evaluation of a run while it trained.

    Attributes:
        step: at which it was taken.
        split: `data.val`.
        rules: name of the rule set.
        metric: headline of the rule set, by which it is the best.
        values: every score, fractions; NaN where it is undefined.
        num_samples: expressions it was taken on.
    """

    step: int
    split: str
    rules: str
    metric: str
    values: dict[str, float]
    num_samples: int

    @property
    def value(self) -> float:
        """Score by `metric`."""
        return self.values[self.metric]

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {
            "step": self.step,
            "split": self.split,
            "rules": self.rules,
            "metric": self.metric,
            "value": self.value,
            "num_samples": self.num_samples,
            "scores": self.values,
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class RunSummary:
    """One run in a line. What a damaged one does not tell is None.

    Attributes:
        path: its directory.
        state: `running` while a process holds its lock; `stopped` if it ended before its last step.
        problems: why it is damaged; empty otherwise.
        step: the latest step that its files know.
        steps: how many it is to take.
        started: ISO 8601, UTC.
        fingerprint: digest of the cache that it was trained from.
    """

    path: Path
    state: State
    problems: tuple[str, ...]
    recipe: str | None
    step: int
    steps: int | None
    best: BestScore | None
    started: str | None
    fingerprint: str | None

    @property
    def name(self) -> str:
        """Name of the directory."""
        return self.path.name

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {
            "name": self.name,
            "path": str(self.path),
            "state": self.state,
            "problems": list(self.problems),
            "recipe": self.recipe,
            "step": self.step,
            "steps": self.steps,
            "best": self.best.as_dict() if self.best is not None else None,
            "started": self.started,
            "fingerprint": self.fingerprint,
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class RunFiles:
    """What could be read of a run's own files.

    Attributes:
        config: None if it is missing or unreadable.
        facts: content of env.json; empty likewise.
        metrics: lines of metrics.jsonl in their order.
        problems: what could not be read, and why.
    """

    config: RunConfig | None
    facts: dict[str, Any]
    metrics: tuple[dict[str, Any], ...]
    problems: tuple[str, ...]


def list_runs(runs_dir: Path) -> list[RunSummary]:
    """Summarise every run of a directory, the latest first.

    A directory is a run if it holds any of a run's files, or cannot be looked into; those without a readable
    start come last.

    Raises:
        CheckpointError: there is no such directory.
    """
    try:
        directories = sorted(path for path in runs_dir.iterdir() if _is_run(path))
    except OSError as error:
        raise CheckpointError(
            f"There are no runs in {runs_dir}: {error.strerror}. Train one with `ris train`, or name another "
            "place with --runs.",
            path=runs_dir,
        ) from error
    found = [summarise(RunDirectory(path)) for path in directories]
    return sorted(found, key=lambda run: run.started or "", reverse=True)


def find_any_run(runs_dir: Path, name: str) -> RunDirectory:
    """Find a run by name or path, damaged or not.

    Raises:
        CheckpointError: there is none.
    """
    for candidate in (runs_dir / name, Path(name)):
        if _is_run(candidate):
            return RunDirectory(candidate)
    known = [run.name for run in list_runs(runs_dir)] if runs_dir.is_dir() else []
    raise CheckpointError(
        f"There is no run {name!r} in {runs_dir}; there are {', '.join(sorted(known)) or 'none'}.", name=name
    )


def summarise(run: RunDirectory) -> RunSummary:
    """Say how far a run has come."""
    files = read_files(run)
    steps = files.config.train.steps if files.config is not None else None
    logged = [line["step"] for line in files.metrics]
    step = max([0, *logged, *state_steps(run)])
    return RunSummary(
        path=run.path,
        state=_state(run, files, step, steps),
        problems=files.problems,
        recipe=files.config.recipe if files.config is not None else None,
        step=step,
        steps=steps,
        best=best_score(files.metrics),
        started=_text(files.facts.get("started")),
        fingerprint=_text(files.facts.get("fingerprint")),
    )


def read_files(run: RunDirectory) -> RunFiles:
    """Read a run's configuration, environment and metrics, whatever of it is readable."""
    problems: list[str] = []
    config: RunConfig | None = None
    facts: dict[str, Any] = {}
    try:
        config = run.read_config()
    except CheckpointError:
        problems.append("config.yaml is missing")
    except ConfigError as error:
        problems.append(" ".join(str(error).split()).replace(f"{run.path}/", ""))
    except OSError as error:
        problems.append(_reason("config.yaml", error))
    try:
        facts = parse_object(_read_text(run.facts_path))
    except (OSError, ValueError) as error:
        problems.append(_reason("env.json", error))
    try:
        next(run.checkpoints_dir.iterdir(), None)
    except FileNotFoundError:
        pass  # it has none yet
    except OSError as error:
        problems.append(_reason("checkpoints", error))
    metrics, problem = _read_metrics(run.metrics_path)
    return RunFiles(
        config=config,
        facts=facts,
        metrics=metrics,
        problems=(*problems, *([problem] if problem else [])),
    )


def best_score(metrics: Iterable[Mapping[str, Any]]) -> BestScore | None:
    """Find the evaluation that is best by its rule set's headline; None if there was none.

    As in training, a later one must be greater to be better, and NaN is worse than any score.
    """
    best: BestScore | None = None
    for line in metrics:
        found = _as_score(line)
        if found is not None and (
            best is None or math.isnan(best.value) or found.value > best.value  # NaN is greater than nothing
        ):
            best = found
    return best


def state_steps(run: RunDirectory) -> list[int]:
    """Steps of the states that a run could go on from, ascending; names are read, not contents."""
    names = [path.name.removeprefix(_STATE_PREFIX) for path in run.path.glob(f"checkpoints/{_STATE_PREFIX}*")]
    return sorted(int(name) for name in names if name.isascii() and name.isdigit())


def is_training(run: RunDirectory) -> bool:
    """Whether a process holds the run's lock; False where that cannot be told."""
    try:
        descriptor = os.open(run.path / LOCK_NAME, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:  # no lock was ever taken, or it is not ours to look at
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:  # a file system without locks
        return False
    finally:
        os.close(descriptor)
    return False


def _is_run(path: Path) -> bool:
    """Whether a directory holds any of a run's files, or cannot be looked into and may."""
    try:
        return path.is_dir() and any((path / mark).exists() for mark in _MARKS)
    except OSError:
        return True


def _state(run: RunDirectory, files: RunFiles, step: int, steps: int | None) -> State:
    if is_training(run):
        return "running"
    if files.problems:
        return "damaged"
    return "finished" if steps is not None and step >= steps else "stopped"


def _read_metrics(path: Path) -> tuple[tuple[dict[str, Any], ...], str | None]:
    """Lines of the metrics up to the first damaged one, and what is wrong with it.

    A run that was stopped before its first line has no file, and one that was killed while it wrote ends
    with part of a line; both are as they should be.
    """
    try:
        content = _read_text(path)
    except FileNotFoundError:
        return (), None
    except (OSError, ValueError) as error:
        return (), _reason(path.name, error)
    lines: list[dict[str, Any]] = []
    whole = content.split("\n")[:-1]
    for number, line in enumerate(whole, start=1):
        try:
            record = parse_object(line)
        except ValueError as error:
            return tuple(lines), _reason(f"{path.name}, line {number}", error)
        if type(record.get("step")) is not int:  # a switch is an int to Python
            return tuple(lines), f"{path.name}, line {number}: names no step"
        lines.append(record)
    return tuple(lines), None


def _as_score(line: Mapping[str, Any]) -> BestScore | None:
    """A line of the metrics as an evaluation; None if it is none, or by rules that are not known here."""
    rules = RULES.get(line["rules"]) if isinstance(line.get("rules"), str) else None
    if rules is None:
        return None
    values = {name: _fraction(line.get(name)) for name in rules.metrics}
    samples = line.get("num_samples")
    return BestScore(
        step=line["step"],
        split=str(line.get("val")),
        rules=rules.name,
        metric=rules.headline,
        values=values,
        num_samples=samples if isinstance(samples, int) else 0,
    )


def _read_text(path: Path) -> str:
    return path.read_text(encoding="utf-8")


def _fraction(value: object) -> float:
    """A score as it is logged; NaN for what can be none."""
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        return math.nan
    return float(value) if 0 <= value <= 1 else math.nan


def _text(value: object) -> str | None:
    return value if isinstance(value, str) else None


def _reason(name: str, error: Exception) -> str:
    if isinstance(error, FileNotFoundError):
        return f"{name} is missing"
    text = (error.strerror if isinstance(error, OSError) else None) or str(error)
    return f"{name}: {' '.join(text.split())}"

"""One run at length: where it leaves its recipe, its checkpoints, its evaluations; read without torch.

What cannot be read is part of the answer: a name with its problem, never an error.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError
from safetensors import SafetensorError, safe_open

from ris_cache.errors import ConfigError
from ris_cache.store.files import sha256_file
from ris_train.config import RunConfig, load_config
from ris_train.config.keys import leaves
from ris_train.json_reading import parse_json, parse_object
from ris_train.run import RunDirectory
from ris_train.scoring import RULES

_METADATA_KEY = "ris"  # as in ris_train.checkpoint, whose import loads torch


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckpointFile:
    """One checkpoint of a run.

    Attributes:
        name: `best`, `last`, or `state-<step>` for what training can go on from; `checkpoints/` if that
            folder cannot be read.
        step: None if it cannot be read.
        written: ISO 8601, UTC; None if that cannot be told.
        problem: why it cannot be read; empty otherwise.
    """

    name: str
    step: int | None
    num_bytes: int
    written: str | None
    problem: str = ""

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self)


@dataclass(frozen=True, slots=True, kw_only=True)
class SplitScore:
    """One split of an evaluation by one rule set.

    Attributes:
        values: scores by metric, fractions, None where undefined.
        metric: headline of the rule set; None for rules that are not known here.
        refused: why there are no scores; empty otherwise.
    """

    split: str
    rules: str
    grid: str
    threshold: float | str
    num_samples: int
    category_source: str
    expressions: str
    values: dict[str, float | None]
    metric: str | None
    refused: str = ""

    @property
    def value(self) -> float | None:
        """Score by `metric`; None where there is none."""
        return self.values.get(self.metric) if self.metric is not None else None


@dataclass(frozen=True, slots=True, kw_only=True)
class EvaluationFile:
    """One file of `eval/`.

    Attributes:
        name: of the file, without its ending; `eval/` if that folder cannot be read.
        checkpoint, step: what was evaluated; None if the file does not say.
        checkpoint_sha256: of the checkpoint's file when it was evaluated; None likewise.
        scores: one per split and rule set.
        stale: why these are not the scores of the checkpoint that is there now; empty if they are.
        problem: why it cannot be read; empty otherwise.
    """

    name: str
    checkpoint: str | None = None
    step: int | None = None
    checkpoint_sha256: str | None = None
    scores: tuple[SplitScore, ...] = ()
    stale: str = ""
    problem: str = ""

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self)


def config_differences(config: RunConfig) -> list[tuple[str, Any, Any]] | None:
    """List where a run's configuration leaves its recipe.

    Returns:
        Dotted key, the recipe's value, the run's value; None if no recipe of that name ships here.
    """
    try:
        recipe = load_config(recipe=config.recipe)
    except ConfigError:
        return None
    expected, found = (dict(leaves(tree.model_dump(mode="json"))) for tree in (recipe, config))
    return [(key, expected[key], found[key]) for key in found if found[key] != expected[key]]


def checkpoint_files(run: RunDirectory) -> list[CheckpointFile]:
    """List what lies in `checkpoints/`, by step; only headers are read, so a damaged tensor goes unseen."""
    try:
        paths = _paths(run.checkpoints_dir)
    except OSError as error:
        problem = f"cannot be read: {error.strerror}"
        return [CheckpointFile(name="checkpoints/", step=None, num_bytes=0, written=None, problem=problem)]
    found = [
        *(_weights_file(path) for path in paths if path.suffix == ".safetensors"),
        *(_state_folder(path) for path in paths if path.name.startswith("state-") and path.is_dir()),
    ]
    return sorted(found, key=lambda checkpoint: (checkpoint.step or 0, checkpoint.name))


def evaluation_files(run: RunDirectory) -> list[EvaluationFile]:
    """Read every evaluation that is kept beside a run, by name; a damaged file says so itself."""
    try:
        paths = _paths(run.path / "eval")
    except OSError as error:
        return [EvaluationFile(name="eval/", problem=f"cannot be read: {error.strerror}")]

    @cache
    def digest_of(checkpoint: str) -> str | None:
        return checkpoint_digest(run, checkpoint)

    return [_evaluation(path, digest_of) for path in paths if path.suffix == ".json"]


def checkpoint_digest(run: RunDirectory, checkpoint: str) -> str | None:
    """SHA-256 (lower-case hex) of the file of `best` or `last`; None if it cannot be read."""
    try:
        return sha256_file(run.checkpoint_path(checkpoint)).sha256
    except OSError:
        return None


def staleness(recorded: object, found: str | None, checkpoint: str | None) -> str:
    """Say why an evaluation is not of the checkpoint that is there now.

    Args:
        recorded: digest of the file that was evaluated, as the evaluation has it.
        found: digest of the file that is there.
        checkpoint: which one it is; None if the evaluation does not say.

    Returns:
        Words, such as `of an earlier checkpoint best`; empty if it is of this very file.
    """
    name = "checkpoint" if checkpoint is None else f"checkpoint {checkpoint}"
    if recorded is None:
        return f"of a {name} that it does not identify"
    if found is None:
        return f"of a {name} that is not there"
    return "" if recorded == found else f"of an earlier {name}"


def _paths(directory: Path) -> list[Path]:
    """What lies in a directory, by name; nothing in one that is not there."""
    try:
        return sorted(path for path in directory.iterdir() if not path.name.startswith("."))
    except FileNotFoundError:
        return []


def _weights_file(path: Path) -> CheckpointFile:
    step, num_bytes, written, problem = None, 0, None, ""
    try:
        status = path.stat()
        num_bytes, written = status.st_size, _time(status.st_mtime)
        with safe_open(path, framework="np") as file:
            step = int(parse_object((file.metadata() or {})[_METADATA_KEY])["step"])
    except KeyError:
        problem = "not a checkpoint of ris"
    except (SafetensorError, OSError, ValueError, TypeError) as error:
        problem = f"damaged ({' '.join(str(error).split())})"
    return CheckpointFile(name=path.stem, step=step, num_bytes=num_bytes, written=written, problem=problem)


def _state_folder(path: Path) -> CheckpointFile:
    number = path.name.removeprefix("state-")
    is_named_well = number.isascii() and number.isdigit()
    num_bytes, written, problem = 0, None, "" if is_named_well else "not named after a step"
    try:
        written = _time(path.stat().st_mtime)
        num_bytes = sum(file.stat().st_size for file in path.iterdir())
    except OSError as error:  # not ours to read, or removed by the training that wrote it
        problem = f"cannot be read: {error.strerror}"
    return CheckpointFile(
        name=path.name,
        step=int(number) if is_named_well else None,
        num_bytes=num_bytes,
        written=written,
        problem=problem,
    )


class _Scores(BaseModel):
    """Scores by one rule set, as `EvaluationResult.as_dict` writes them; metrics are extra fields."""

    model_config = ConfigDict(extra="allow", strict=True, allow_inf_nan=False)

    __pydantic_extra__: dict[str, float | str | None]

    grid: str
    threshold: float | str
    num_samples: int
    refused: str = ""


class _Result(BaseModel):
    """One split of an evaluation."""

    model_config = ConfigDict(strict=True)

    split: str
    rules: str
    category_source: str
    expressions: str
    scores: dict[str, _Scores]


class _Document(BaseModel):
    """A file of `eval/`, as far as it is shown."""

    checkpoint: str | None = None
    step: int | None = None
    checkpoint_sha256: str | None = None
    results: list[_Result]


def _evaluation(path: Path, digest_of: Callable[[str], str | None]) -> EvaluationFile:
    try:
        document = _Document.model_validate(parse_json(path.read_text(encoding="utf-8")))
        scores = tuple(score for result in document.results for score in _split_scores(result))
    except (OSError, ValueError) as error:
        # Written by hand, cut short or by another version: what matters is that the others are shown.
        return EvaluationFile(name=path.stem, problem=f"cannot be read: {_reason(error)}")
    checkpoint = document.checkpoint
    is_named = checkpoint in ("best", "last")
    return EvaluationFile(
        name=path.stem,
        checkpoint=checkpoint,
        step=document.step,
        checkpoint_sha256=document.checkpoint_sha256,
        scores=scores,
        stale=staleness(
            document.checkpoint_sha256,
            digest_of(checkpoint) if checkpoint is not None and is_named else None,
            checkpoint,
        ),
    )


def _reason(error: Exception) -> str:
    if isinstance(error, ValidationError):
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "the document"
        return f"lacks {where!r}" if first["type"] == "missing" else f"{where}: {first['msg']}"
    return " ".join(str(error).split())


def _split_scores(result: _Result) -> list[SplitScore]:
    """Scores of one split, those of the rule set that comes first first."""
    names = sorted(result.scores, key=lambda name: name != result.rules)
    return [_split_score(result, name) for name in names]


def _split_score(result: _Result, name: str) -> SplitScore:
    found = result.scores[name]
    rules = RULES.get(name)
    values: dict[str, float | None] = {}
    for metric in rules.metrics if rules is not None else ():
        value = found.__pydantic_extra__.get(metric)
        if isinstance(value, str):
            raise ValueError(f"the score {metric} is text")
        if metric in found.__pydantic_extra__:
            values[metric] = value
    return SplitScore(
        split=result.split,
        rules=name,
        grid=found.grid,
        threshold=found.threshold,
        num_samples=found.num_samples,
        category_source=result.category_source,
        expressions=result.expressions,
        values=values,
        metric=rules.headline if rules is not None else None,
        refused=found.refused,
    )


def _time(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, tz=UTC).isoformat(timespec="seconds")

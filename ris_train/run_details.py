"""One run at length: where it leaves its recipe, its checkpoints, its evaluations; read without torch."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from ris_cache.errors import ConfigError
from ris_train.config import RunConfig, load_config
from ris_train.config.keys import leaves
from ris_train.run import RunDirectory
from ris_train.scoring import RULES

_METADATA_KEY = "ris"  # as in ris_train.checkpoint, whose import loads torch


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckpointFile:
    """One checkpoint of a run.

    Attributes:
        name: `best`, `last`, or `state-<step>` for what training can go on from.
        step: None if it cannot be read.
        written: ISO 8601, UTC.
        problem: why it cannot be read; empty otherwise.
    """

    name: str
    step: int | None
    num_bytes: int
    written: str
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
        name: of the file, without its ending.
        checkpoint, step: what was evaluated; None if the file does not say.
        scores: one per split and rule set.
        problem: why it cannot be read; empty otherwise.
    """

    name: str
    checkpoint: str | None = None
    step: int | None = None
    scores: tuple[SplitScore, ...] = ()
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
    found = [_weights_file(path) for path in sorted(run.path.glob("checkpoints/*.safetensors"))]
    found += [_state_folder(path) for path in sorted(run.path.glob("checkpoints/state-*")) if path.is_dir()]
    return sorted(found, key=lambda checkpoint: (checkpoint.step or 0, checkpoint.name))


def evaluation_files(run: RunDirectory) -> list[EvaluationFile]:
    """Read every evaluation that is kept beside a run, by name; a damaged file says so itself."""
    return [_evaluation(path) for path in sorted(run.path.glob("eval/*.json"))]


def _weights_file(path: Path) -> CheckpointFile:
    step, problem = None, ""
    try:
        with safe_open(path, framework="np") as file:
            step = int(json.loads((file.metadata() or {})[_METADATA_KEY])["step"])
    except KeyError:
        problem = "not a checkpoint of ris"
    except (SafetensorError, OSError, ValueError, TypeError) as error:
        problem = f"damaged ({' '.join(str(error).split())})"
    status = path.stat()
    return CheckpointFile(
        name=path.stem,
        step=step,
        num_bytes=status.st_size,
        written=_time(status.st_mtime),
        problem=problem,
    )


def _state_folder(path: Path) -> CheckpointFile:
    number = path.name.removeprefix("state-")
    is_named_well = number.isascii() and number.isdigit()
    return CheckpointFile(
        name=path.name,
        step=int(number) if is_named_well else None,
        num_bytes=sum(file.stat().st_size for file in path.rglob("*") if file.is_file()),
        written=_time(path.stat().st_mtime),
        problem="" if is_named_well else "not named after a step",
    )


def _evaluation(path: Path) -> EvaluationFile:
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
        return EvaluationFile(
            name=path.stem,
            checkpoint=document.get("checkpoint"),
            step=document.get("step"),
            scores=tuple(score for result in document["results"] for score in _split_scores(result)),
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        # Written by hand, cut short or by another version: what matters is that the others are shown.
        text = f"lacks {error}" if isinstance(error, KeyError) else " ".join(str(error).split())
        return EvaluationFile(name=path.stem, problem=f"cannot be read: {text}")


def _split_scores(result: dict[str, Any]) -> list[SplitScore]:
    """Scores of one split as `EvaluationResult.as_dict` writes them, the rule set that comes first first."""
    names = sorted(result["scores"], key=lambda name: name != result["rules"])
    return [_split_score(result, name) for name in names]


def _split_score(result: dict[str, Any], name: str) -> SplitScore:
    found = result["scores"][name]
    rules = RULES.get(name)
    metrics = rules.metrics if rules is not None else ()
    return SplitScore(
        split=result["split"],
        rules=name,
        grid=found["grid"],
        threshold=found["threshold"],
        num_samples=found["num_samples"],
        category_source=result["category_source"],
        expressions=result["expressions"],
        values={metric: found[metric] for metric in metrics if metric in found},
        metric=rules.headline if rules is not None else None,
        refused=found.get("refused", ""),
    )


def _time(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, tz=UTC).isoformat(timespec="seconds")

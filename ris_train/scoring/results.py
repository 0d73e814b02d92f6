"""The result of an evaluation: scores of one split by several rule sets, with all that their numbers mean."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final, Literal

from ris_train.scoring.counts import Counts
from ris_train.scoring.rules import RULES, RuleSet, Scores
from ris_train.scoring.views import View

AS_PREDICTED: Final = "as predicted"
"""Stands for a threshold that the maker of a prediction chose."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EvaluationResult:
    """Scores of one split, with what they mean.

    Attributes:
        split: `dataset.split_by:split`.
        rules: name of the rule set that comes first: the dataset's own if it is among them.
        scores: by name of the rule set, in the order asked for.
        refused: why a rule set has no scores, by its name.
        thresholds: by name of the rule set: the probability above which a pixel was predicted positive, None
            if the maker of the predictions chose it.
        num_samples: how many samples were evaluated.
        num_no_target: how many of them are annotated as referring to nothing.
        category_source: which category the model was given: `annotated`, `predicted`, `none`; `not stated`
            for predictions that do not say.
        expressions: `own`, or `shuffled` among the samples of each image.
        quarantined: expressions that could not be scored, since their image was unreadable at extraction.
        degenerate: expressions whose annotation encloses nothing; they are scored, with an empty truth.
        is_whole: whether these are all expressions of the split; a cache may hold a part.
        notes: what else a number rests on, by name of the rule set.
    """

    split: str
    rules: str
    scores: dict[str, Scores]
    refused: dict[str, str]
    thresholds: dict[str, float | None]
    num_samples: int
    num_no_target: int
    category_source: str
    expressions: str
    quarantined: int
    degenerate: int
    is_whole: bool = True
    notes: dict[str, str] = field(default_factory=dict)

    @property
    def headline(self) -> Scores | None:
        """Scores of the rule set that comes first; None if it was refused."""
        return self.scores.get(self.rules)

    @property
    def rule_names(self) -> tuple[str, ...]:
        """Every rule set asked for, scored or refused."""
        return tuple(self.thresholds)

    def as_dict(self) -> dict[str, object]:
        """Plain values for JSON; scores are fractions. Those of the first rule set stand on top, too."""
        return {
            "split": self.split,
            "rules": self.rules,
            **self._terms(self.rules),
            "category_source": self.category_source,
            "expressions": self.expressions,
            "num_samples": self.num_samples,
            "num_no_target": self.num_no_target,
            "quarantined": self.quarantined,
            "degenerate": self.degenerate,
            "is_whole": self.is_whole,
            **(self.headline.values if self.headline is not None else {}),
            "scores": {name: self._of_rules(name) for name in self.rule_names},
        }

    def _of_rules(self, name: str) -> dict[str, object]:
        found: dict[str, object] = self._terms(name)
        if name in self.notes:
            found["note"] = self.notes[name]
        if name in self.refused:
            return found | {"num_samples": 0, "refused": self.refused[name]}
        return found | {"num_samples": self.scores[name].num_samples, **self.scores[name].values}

    def _terms(self, name: str) -> dict[str, object]:
        view = RULES[name].view
        threshold = self.thresholds[name]
        return {
            "grid": view.grid,
            "ground_truth": ground_truth(view),
            "overlap": view.overlap,
            "threshold": AS_PREDICTED if threshold is None else threshold,
            "binarisation": binarisation(threshold),
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class RunEvaluation:
    """What a checkpoint scored.

    Attributes:
        run: name of the run.
        checkpoint: `best` or `last`.
        step: optimiser steps it had taken.
        checkpoint_sha256: of its file, lower-case hex; another checkpoint of the run may be of the same step.
        weight_labels: of all weights that the numbers rest on.
        results: one per split.
    """

    run: str
    checkpoint: str
    step: int
    checkpoint_sha256: str
    weight_labels: dict[str, str]
    results: tuple[EvaluationResult, ...]

    def as_dict(self) -> dict[str, object]:
        """Plain values for JSON."""
        return {
            "run": self.run,
            "checkpoint": self.checkpoint,
            "step": self.step,
            "checkpoint_sha256": self.checkpoint_sha256,
            "weights": self.weight_labels,
            "results": [result.as_dict() for result in self.results],
        }


def score_split(
    split: str,
    counts: Mapping[str, Counts],
    rules: Sequence[RuleSet],
    *,
    default_rules: str,
    category_source: str,
    expressions: str,
    quarantined: int,
    degenerate: int,
    is_whole: bool = True,
    thresholds: Mapping[str, float | None] | None = None,
    notes: Mapping[str, str] | None = None,
) -> EvaluationResult:
    """Apply rule sets to the counts of one split.

    Args:
        split: `dataset.split_by:split`.
        counts: of the split's samples, by name of the view; those of every rule set's view.
        rules: at least one. One that has no rule for no-target samples is refused where there are any.
        default_rules: the rule set that comes first if it is among them; else the first of them does.
        category_source: see `EvaluationResult`; the remaining arguments too.
        thresholds: by name of the view; by default the views' own.
        notes: by name of the view.
    """
    one = next(iter(counts.values()))
    num_no_target = int(one.is_no_target.sum())
    scores, refused = {}, {}
    for rule in rules:
        if num_no_target and not rule.takes_no_target:
            refused[rule.name] = f"no rule for no-target samples, of which there are {num_no_target}"
        else:
            scores[rule.name] = rule.score(counts[rule.view.name])
    names = [rule.name for rule in rules]
    used = thresholds or {rule.view.name: rule.view.threshold for rule in rules}
    return EvaluationResult(
        split=split,
        rules=default_rules if default_rules in names else names[0],
        scores=scores,
        refused=refused,
        thresholds={rule.name: used[rule.view.name] for rule in rules},
        num_samples=len(one),
        num_no_target=num_no_target,
        category_source=category_source,
        expressions=expressions,
        quarantined=quarantined,
        degenerate=degenerate,
        is_whole=is_whole,
        notes={rule.name: (notes or {})[rule.view.name] for rule in rules if rule.view.name in (notes or {})},
    )


def views_of(rules: Sequence[RuleSet]) -> tuple[View, ...]:
    """Return the views that rule sets ask for, each once."""
    return tuple({rule.view.name: rule.view for rule in rules}.values())


def ground_truth(view: View) -> Literal["polygons on the grid", "nearest from the original"]:
    """Say how the annotated polygons reach the view's grid."""
    return "nearest from the original" if view.raster == "nearest" else "polygons on the grid"


def binarisation(threshold: float | None) -> str:
    """Say when a pixel is predicted positive."""
    if threshold is None:
        return AS_PREDICTED
    return "logit > 0" if threshold == 0.5 else f"probability > {threshold:g}"

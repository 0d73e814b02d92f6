"""Tables of evaluation results, for every command that scores."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from cli.render import percent, print_table

if TYPE_CHECKING:
    from ris_train.scoring.results import EvaluationResult

NO_SCORE = "–"
_MOST_METRICS = 8
"""As many columns of scores as fit beside the others in a log's width."""


def print_results(
    results: Sequence[EvaluationResult], weights: Mapping[str, str], *, evaluated: str = ""
) -> None:
    """Print the scores of each split, its rows the rule sets, with all that the numbers mean.

    Args:
        results: of splits.
        weights: labels of all weights that the numbers rest on.
        evaluated: what made the predictions, in a line; empty if that is plain.
    """
    for result in results:
        metrics = _metrics(result)
        parts = [metrics]
        if len(metrics) > _MOST_METRICS:
            of_precision = [name for name in metrics if name.startswith("Pr@")]
            parts = [[name for name in metrics if name not in of_precision], of_precision]
        part = "" if result.is_whole else " (a part: the cache does not hold all of it)"
        title = f"{result.split}{part}, {result.expressions} expressions"
        meaning = [*([evaluated] if evaluated else []), *_meaning(result, weights)]
        is_alone = len(result.rule_names) == 1
        if is_alone:
            meaning.insert(0, " · ".join(f"{name}: {value}" for name, value in _terms(result, result.rules)))
        for columns in parts:
            print_table(
                title,
                ["rules", "samples", *columns],
                [_row(result, name, columns) for name in result.rule_names],
                caption="\n".join(meaning) if is_alone and columns is parts[-1] else "",
            )
        if not is_alone:
            print_table(
                f"{title}: what each rule set compares",
                [name for name, _ in _terms(result, result.rules)],
                [[value for _, value in _terms(result, rules)] for rules in result.rule_names],
                caption="\n".join(meaning),
                left=["grid", "ground truth", "overlapping parts", "mask"],
            )


def score_text(value: float | None) -> str:
    """A score in percent; a dash where there is none."""
    return NO_SCORE if value is None or math.isnan(value) else percent(value)


def weights_text(weights: Mapping[str, str]) -> str:
    """Labels of weights in one line."""
    return ", ".join(f"{role} {label}" for role, label in weights.items()) or "not stated"


def _metrics(result: EvaluationResult) -> list[str]:
    """Every metric that a rule set gives: those of all, then Pr@X by X, then the accuracies."""
    found = dict.fromkeys(name for scores in result.scores.values() for name in scores.values)
    order = ["oIoU", "cIoU", "mIoU", "gIoU"]
    known = [name for name in order if name in found]
    precision = sorted(name for name in found if name.startswith("Pr@"))
    return known + precision + [name for name in found if name not in known and name not in precision]


def _row(result: EvaluationResult, rules: str, columns: Sequence[str]) -> list[str]:
    if rules in result.refused:
        return [rules, NO_SCORE, *[NO_SCORE] * len(columns)]
    scores = result.scores[rules]
    return [rules, str(scores.num_samples), *[score_text(scores.values.get(name)) for name in columns]]


def _terms(result: EvaluationResult, rules: str) -> list[tuple[str, str]]:
    """What the rule set compares, each with its name."""
    from ris_train.scoring.results import binarisation, ground_truth
    from ris_train.scoring.rules import RULES

    view = RULES[rules].view
    return [
        ("rules", rules),
        ("grid", view.grid),
        ("ground truth", ground_truth(view)),
        ("overlapping parts", "union" if view.overlap == "union" else "exactly one"),
        ("mask", binarisation(result.thresholds[rules])),
    ]


def _meaning(result: EvaluationResult, weights: Mapping[str, str]) -> list[str]:
    """What all rule sets share, then why scores are missing and what else some rest on."""
    lines = [f"category source: {result.category_source} · weights: {weights_text(weights)}"]
    for found in (result.refused, result.notes):
        by_text: dict[str, list[str]] = {}
        for rules, text in found.items():
            by_text.setdefault(text, []).append(rules)
        lines += [f"{', '.join(names)}: {text}" for text, names in by_text.items()]
    return lines

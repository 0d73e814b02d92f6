"""Scores as ratios of sums over samples, so that resampling and splitting into bins need no rescoring.

Every metric of every rule set is (Σ numerator) / (Σ denominator + epsilon). Over all samples that is what the
rule set itself returns, but for the float32 in which some round their means; which value a sample adds is
asked of the rule set. N samples.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from ris_train.scoring.counts import Counts
from ris_train.scoring.rules import RuleSet

OVERALL_NAMES = ("oIoU", "cIoU")
MEAN_NAMES = ("mIoU", "gIoU")


@dataclass(frozen=True, slots=True, kw_only=True)
class Ratio:
    """What each sample adds to a metric.

    Attributes:
        numerator: float64[N].
        denominator: float64[N]; 0 for a sample that the metric is not over.
        epsilon: added to the sum of the denominators.
    """

    numerator: npt.NDArray[np.float64]
    denominator: npt.NDArray[np.float64]
    epsilon: float = 0.0

    @property
    def value(self) -> float:
        """The metric over all samples; NaN where it is over none."""
        total = float(self.denominator.sum())
        return float(self.numerator.sum()) / (total + self.epsilon) if total else math.nan

    def within(self, chosen: npt.NDArray[np.bool_]) -> Ratio:
        """The metric of some samples, as terms over all N.

        Args:
            chosen: bool[N].
        """
        return replace(
            self,
            numerator=np.where(chosen, self.numerator, 0.0),
            denominator=np.where(chosen, self.denominator, 0.0),
        )


def metric_terms(rules: RuleSet, counts: Counts) -> dict[str, Ratio]:
    """Return the terms of each metric of a rule set, in its order.

    Resamples without any no-target sample leave N-acc undefined here, where `rela` would print 0.

    Args:
        counts: of N samples on the rule set's view.

    Raises:
        DataError: samples annotated as no-target, for which there is no rule.
    """
    intersection, union = rules.summed_pixels(counts)
    overall = Ratio(
        numerator=intersection.astype(np.float64),
        denominator=union.astype(np.float64),
        epsilon=rules.sum_epsilon,
    )
    found: dict[str, Ratio] = dict.fromkeys(OVERALL_NAMES, overall)
    found["mIoU"] = _mean(_ious(rules, counts, "mIoU"))
    found["gIoU"] = _mean(_ious(rules, counts, "gIoU"), epsilon=rules.count_epsilon)
    found |= _accuracies(rules, counts)
    found |= _precision(rules, counts)
    constant = Ratio(numerator=np.zeros(len(counts)), denominator=np.ones(len(counts)))
    found |= dict.fromkeys(rules.constants, constant)
    return {name: found[name] for name in rules.metrics}


def overall_name(rules: RuleSet) -> str | None:
    """What a rule set calls Σ I / Σ U; None if it has no such metric."""
    return next((name for name in OVERALL_NAMES if name in rules.metrics), None)


def mean_name(rules: RuleSet) -> str | None:
    """What a rule set calls the mean of the samples' IoU; None if it has no such metric."""
    return next((name for name in MEAN_NAMES if name in rules.metrics), None)


def _ious(rules: RuleSet, counts: Counts, metric: str) -> npt.NDArray[np.float64]:
    """IoU of each sample as it enters a metric, NaN where it does not."""
    return replace(rules, metrics=(metric,)).sample_ious(counts)


def _mean(values: npt.NDArray[np.float64], *, epsilon: float = 0.0) -> Ratio:
    is_defined = ~np.isnan(values)
    return Ratio(
        numerator=np.where(is_defined, values, 0.0),
        denominator=is_defined.astype(np.float64),
        epsilon=epsilon,
    )


def _accuracies(rules: RuleSet, counts: Counts) -> Mapping[str, Ratio]:
    is_no_target, says_no_target = counts.is_no_target, rules.decisions(counts)
    of_none = _share(says_no_target, is_no_target)
    of_targets = _share(~says_no_target, ~is_no_target)
    if rules.no_accuracy_is_zero and not is_no_target.any():
        zero = Ratio(numerator=np.zeros(len(counts)), denominator=np.ones(len(counts)))
        of_none = of_targets = zero
    return {"N-acc": of_none, "T-acc": of_targets, "Acc": replace(of_none, epsilon=rules.acc_epsilon)}


def _precision(rules: RuleSet, counts: Counts) -> Mapping[str, Ratio]:
    precision = rules.precision
    if precision is None:
        return {}
    ious = _ious(rules, counts, "mIoU")
    is_counted = ~np.isnan(ious) & (rules.no_target == "alike" or ~counts.is_no_target)
    limits = np.array(precision.thresholds, dtype=np.float32 if precision.is_single else np.float64)
    return {
        name: _share(ious > limit if precision.is_strict else ious >= limit, is_counted)
        for name, limit in zip(precision.names, limits.astype(np.float64), strict=True)
    }


def _share(is_hit: npt.NDArray[np.bool_], is_counted: npt.NDArray[np.bool_]) -> Ratio:
    return Ratio(
        numerator=(is_hit & is_counted).astype(np.float64), denominator=is_counted.astype(np.float64)
    )

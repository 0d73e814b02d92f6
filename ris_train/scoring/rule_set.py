"""A rule set: a pure function from counts to scores, one for each published way to evaluate.

Per sample I, P, G and U = P + G − I on the pixels of the rule set's view; e: annotated as no-target (by the
annotation, not by G = 0); n: the model says no-target. Scores are fractions in [0, 1]; only what prints them
multiplies by 100. Which rule sets there are stands in `rules.py`; the tables of docs/metrics.md are made from
the fields below.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

from ris_cache.errors import DataError
from ris_train.scoring.arithmetic import (
    IouRule,
    Ious,
    Pixels,
    PrecisionRule,
    mean,
    mean_percent_single,
    ratio,
)
from ris_train.scoring.counts import Counts, with_empty_masks
from ris_train.scoring.views import View


@dataclass(frozen=True, slots=True, kw_only=True)
class Scores:
    """What a rule set makes of some samples.

    Attributes:
        rules: name of the rule set.
        values: score by metric in printing order, a fraction, NaN where it is undefined.
        num_samples: over how many samples, all that were given.
    """

    rules: str
    values: dict[str, float]
    num_samples: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """Where a rule set comes from.

    Attributes:
        project: whose rules they are.
        repository: `owner/name` on GitHub, empty for our own.
        evaluates: on which datasets it is used there.
        sentences: which sentences its authors' evaluation sees.
        scale: how its authors print scores.
        not_reproduced: what of their evaluation is no function of the counts, or not ours to repeat.
    """

    project: str
    repository: str
    evaluates: str
    sentences: str
    scale: str
    not_reproduced: str


@dataclass(frozen=True, slots=True, kw_only=True)
class RuleSet:
    """One way to evaluate: on which pixels, and how scores follow from their counts.

    Attributes:
        view: on which pixels a prediction meets its ground truth.
        metrics: names of the scores, in printing order.
        headline: the metric that chooses the best checkpoint.
        no_target: what becomes of no-target samples. `refused`: there is no rule for them; `alike`: they are
            scored as any other; `apart`: they enter Acc, the share of empty masks, and nothing else;
            `classified`: what counts is the decision n, right (IoU 1) or wrong (IoU 0).
        head: what becomes of the decision of a no-target head. `ignored`; `empties` the mask before all else;
            `decides` n. A model without a head has its masks as they are, and n := (P = 0).
        iou: of a sample, for mIoU, Pr@X, and gIoU unless that has a rule of its own.
        giou: of a sample, for gIoU, where it differs.
        precision: Pr@X, over targeted samples, or all of them where no-target samples are `alike`.
        is_single_mean: whether means are percentages in float32.
        count_epsilon: added to the number of samples that gIoU is divided by.
        acc_epsilon: added to the number of no-target samples that Acc is divided by.
        sum_epsilon: added to Σ U.
        constants: scores that its authors' code prints but never updates: 0.
        no_accuracy_is_zero: whether N-acc and T-acc are 0 when no sample is annotated as no-target.
        source: whose rules they are.
    """

    name: str
    view: View
    metrics: tuple[str, ...]
    headline: str
    no_target: Literal["refused", "alike", "apart", "classified"]
    head: Literal["ignored", "empties", "decides"]
    iou: IouRule
    precision: PrecisionRule | None
    source: Source
    giou: IouRule | None = None
    is_single_mean: bool = False
    count_epsilon: float = 0.0
    acc_epsilon: float = 0.0
    sum_epsilon: float = 0.0
    constants: tuple[str, ...] = ()
    no_accuracy_is_zero: bool = False

    @property
    def takes_no_target(self) -> bool:
        """Whether there is a rule for no-target samples; `score` refuses them otherwise."""
        return self.no_target != "refused"

    def score(self, counts: Counts) -> Scores:
        """Apply the rules.

        Args:
            counts: on the pixels of `view`.

        Raises:
            DataError: samples annotated as no-target, for which there is no rule.
        """
        intersection, union = self.summed_pixels(counts)
        is_averaged = self._is_averaged(counts)
        ious = self._ious(self.iou, counts)
        overall = ratio(int(intersection.sum()), int(union.sum()), epsilon=self.sum_epsilon)
        giou = self._ious(self.giou or self.iou, counts)[is_averaged]
        found = {
            "oIoU": overall,
            "cIoU": overall,
            "mIoU": self._mean(ious[is_averaged]),
            "gIoU": self._mean(giou, count_epsilon=self.count_epsilon),
            **self._accuracies(counts),
        }
        if self.precision is not None:
            over = is_averaged if self.no_target == "alike" else ~counts.is_no_target
            found |= self.precision.of(ious[over])
        found |= dict.fromkeys(self.constants, 0.0 if len(counts) else float("nan"))
        return Scores(
            rules=self.name, values={name: found[name] for name in self.metrics}, num_samples=len(counts)
        )

    def summed_pixels(self, counts: Counts) -> tuple[Pixels, Pixels]:
        """What each sample adds to Σ I and to Σ U: int64[N], int64[N].

        Raises:
            DataError: samples annotated as no-target, for which there is no rule.
        """
        self._check(counts)
        seen = self._seen(counts)
        intersection, union = seen.intersection, seen.union
        if self.no_target == "apart":
            return np.where(seen.is_no_target, 0, intersection), np.where(seen.is_no_target, 0, union)
        if self.no_target == "classified":
            says_no_target = self.decisions(counts)
            # A targeted sample that is called no-target loses its intersection; its mask stays in the union.
            is_correct = counts.is_no_target & says_no_target
            return np.where(says_no_target, 0, intersection), np.where(is_correct, 0, union)
        return intersection, union

    def sample_ious(self, counts: Counts) -> npt.NDArray[np.float64]:
        """IoU of each sample as it enters mIoU, or gIoU where there is no mIoU: float64[N].

        NaN for a sample that enters neither.

        Raises:
            DataError: samples annotated as no-target, for which there is no rule.
        """
        rule = self.iou if "mIoU" in self.metrics else self.giou or self.iou
        ious = self._ious(rule, counts).astype(np.float64)
        return np.where(self._is_averaged(counts), ious, np.nan)

    def decisions(self, counts: Counts) -> npt.NDArray[np.bool_]:
        """n as these rules take it: bool[N]. The head's decision if it counts, else P = 0."""
        if self.head == "decides" and counts.has_head:
            return counts.says_no_target
        is_empty: npt.NDArray[np.bool_] = self._seen(counts).predicted == 0
        return is_empty

    def _check(self, counts: Counts) -> None:
        num_no_target = int(np.count_nonzero(counts.is_no_target))
        if num_no_target and not self.takes_no_target:
            raise DataError(
                f"The rule set {self.name} has no rule for no-target samples, and {num_no_target} of "
                f"{len(counts)} samples are annotated so. Use one that has, such as gres or zom.",
                rules=self.name,
                num_no_target=num_no_target,
            )

    def _seen(self, counts: Counts) -> Counts:
        return with_empty_masks(counts, counts.says_no_target) if self.head == "empties" else counts

    def _is_averaged(self, counts: Counts) -> npt.NDArray[np.bool_]:
        return ~counts.is_no_target if self.no_target == "apart" else np.ones(len(counts), dtype=np.bool_)

    def _ious(self, rule: IouRule, counts: Counts) -> Ious:
        ious = rule.of(*self.summed_pixels(counts))
        if self.no_target == "classified":
            ious[counts.is_no_target & self.decisions(counts)] = 1
        return ious

    def _mean(self, ious: Ious, *, count_epsilon: float = 0.0) -> float:
        return mean_percent_single(ious) if self.is_single_mean else mean(ious, count_epsilon=count_epsilon)

    def _accuracies(self, counts: Counts) -> dict[str, float]:
        """N-acc and T-acc, and Acc, which is N-acc where the mask decides."""
        is_no_target, says_no_target = counts.is_no_target, self.decisions(counts)
        num_no_target = int(np.count_nonzero(is_no_target))
        correct = int(np.count_nonzero(is_no_target & says_no_target))
        if self.no_accuracy_is_zero and len(counts) and not num_no_target:
            return {"N-acc": 0.0, "T-acc": 0.0}
        return {
            "N-acc": ratio(correct, num_no_target),
            "T-acc": ratio(
                int(np.count_nonzero(~is_no_target & ~says_no_target)), len(counts) - num_no_target
            ),
            "Acc": ratio(correct, num_no_target, epsilon=self.acc_epsilon),
        }

"""Rule sets: from counts to scores. Fractions in [0, 1]; only what prints them multiplies by 100."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from ris_train.scoring.counts import Counts

THRESHOLDS = (0.5, 0.6, 0.7, 0.8, 0.9)


@dataclass(frozen=True, slots=True, kw_only=True)
class Scores:
    """Scores of one rule set on one grid.

    Attributes:
        overall_iou: oIoU, also called cIoU: Σ I / Σ U.
        mean_iou: mIoU, the mean of I / U over the samples.
        precision: Pr@X by threshold X: share of samples with IoU ≥ X.
        num_samples: how many samples the scores are over.

    All scores are NaN over no samples; `overall_iou` is NaN where Σ U = 0.
    """

    overall_iou: float
    mean_iou: float
    precision: dict[float, float]
    num_samples: int


def ris_scores(counts: Counts) -> Scores:
    """Score by the rules of the RefCOCO family (LAVT's): no epsilon, IoU 0 where U = 0, Pr@X with ≥.

    No-target samples have no meaning under these rules.

    Raises:
        ValueError: a sample is annotated as no-target.
    """
    if counts.is_no_target.any():
        raise ValueError("The rule set `ris` has no rule for no-target samples; use one that does.")
    union = counts.union
    iou = np.divide(counts.intersection, union, out=np.zeros(len(counts)), where=union > 0)
    total_union = int(union.sum())
    return Scores(
        overall_iou=int(counts.intersection.sum()) / total_union if total_union else float("nan"),
        mean_iou=float(iou.mean()) if len(iou) else float("nan"),
        precision={
            threshold: float((iou >= threshold).mean()) if len(iou) else float("nan")
            for threshold in THRESHOLDS
        },
        num_samples=len(counts),
    )


RULES: dict[str, Callable[[Counts], Scores]] = {"ris": ris_scores}

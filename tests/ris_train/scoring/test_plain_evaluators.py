"""Every rule set against a plain evaluator that loops over masks and knows no counts."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ris_train.scoring.counts import collect, count_pixels
from ris_train.scoring.rules import RULES

Sample = tuple[np.ndarray, np.ndarray, bool, bool]
"""Prediction, truth, annotated as no-target, the head says no-target."""


def by_loop_without_epsilon(samples: Sequence[Sample], *, targeted_only: bool) -> dict[str, float]:
    ious, found, covered, hits = [], 0, 0, []
    for prediction, truth, is_no_target, _ in samples:
        if is_no_target and targeted_only:
            hits.append(not prediction.any())
            continue
        inside = sum(bool(p and t) for p, t in zip(prediction.flat, truth.flat, strict=True))
        either = sum(bool(p or t) for p, t in zip(prediction.flat, truth.flat, strict=True))
        ious.append(inside / either if either else 0.0)
        found, covered = found + inside, covered + either
    result = {
        "oIoU": found / covered if covered else math.nan,
        "mIoU": float(np.mean(ious)) if ious else math.nan,
    }
    for threshold in (0.5, 0.6, 0.7, 0.8, 0.9):
        result[f"Pr@{threshold}"] = float(np.mean([iou >= threshold for iou in ious])) if ious else math.nan
    if targeted_only:
        result["Acc"] = float(np.mean(hits)) if hits else math.nan
    return result


def ris_by_loop(samples: Sequence[Sample]) -> dict[str, float]:
    return by_loop_without_epsilon(samples, targeted_only=False)


def dmmi_by_loop(samples: Sequence[Sample]) -> dict[str, float]:
    return by_loop_without_epsilon(samples, targeted_only=True)


def zom_by_loop(samples: Sequence[Sample]) -> dict[str, float]:
    emptied = [(p & (not n), t, e, n) for p, t, e, n in samples]
    return by_loop_without_epsilon(emptied, targeted_only=True)


def rela_by_loop(samples: Sequence[Sample]) -> dict[str, float]:
    giou, found, covered = 0.0, 0, 0
    right = {True: 0, False: 0}
    total = {True: 0, False: 0}
    reached = dict.fromkeys((0.7, 0.8, 0.9), 0)
    for prediction, truth, is_no_target, says_no_target in samples:
        total[is_no_target] += 1
        right[is_no_target] += is_no_target == says_no_target
        either = int(np.logical_or(prediction, truth).sum())
        if is_no_target:
            giou += says_no_target
            covered += 0 if says_no_target else either
            continue
        inside = 0 if says_no_target else int(np.logical_and(prediction, truth).sum())
        iou = inside / either if either else 0.0
        giou, found, covered = giou + iou, found + inside, covered + either
        for threshold in reached:
            reached[threshold] += iou >= threshold
    return {
        "gIoU": giou / len(samples) if samples else math.nan,
        "cIoU": found / covered if covered else math.nan,
        "N-acc": right[True] / total[True] if total[True] else (0.0 if samples else math.nan),
        "T-acc": (
            (right[False] / total[False] if total[False] else math.nan)
            if total[True]
            else (0.0 if samples else math.nan)
        ),
        **{f"Pr@{x}": hits / total[False] if total[False] else math.nan for x, hits in reached.items()},
    }


def dfam_by_torch(samples: Sequence[Sample]) -> dict[str, float]:
    if not samples:
        return dict.fromkeys(("oIoU", "mIoU", "gIoU", *(f"Pr@0.{x}" for x in range(5, 10))), math.nan)
    predictions = torch.stack([torch.from_numpy(p & (not n)) for p, _, _, n in samples]).flatten(1)
    truths = torch.stack([torch.from_numpy(t) for _, t, _, _ in samples]).flatten(1)
    inside, either = (predictions & truths).sum(1), (predictions | truths).sum(1)
    iou, giou = inside / (either + 1e-6), inside / (either + 1e-5)
    giou[either == 0] = 1
    return {
        "oIoU": (inside.sum().double() / either.sum()).item() if either.sum() else math.nan,
        "mIoU": iou.mean().item(),
        "gIoU": giou.mean().item(),
        **{f"Pr@{x}": (iou >= x).double().mean().item() for x in (0.5, 0.6, 0.7, 0.8, 0.9)},
    }


def with_histograms(samples: Sequence[Sample], epsilon: float) -> dict[str, float]:
    """As the evaluators with language models count: class histograms in float32."""
    inside = either = giou = torch.zeros(())
    for prediction, truth, _, _ in samples:
        labels, wanted = torch.from_numpy(prediction).float(), torch.from_numpy(truth).float()
        both = torch.histc(labels[labels == wanted], bins=2, min=0, max=1)[1]
        union = (
            torch.histc(labels, bins=2, min=0, max=1)[1] + torch.histc(wanted, bins=2, min=0, max=1)[1] - both
        )
        inside, either = inside + both, either + union
        giou = giou + (both / (union + epsilon) if union else torch.ones(()))
    return {
        "gIoU": giou.item() / (len(samples) + 1e-5) if samples else math.nan,
        "cIoU": inside.item() / (either.item() + 1e-10) if either else math.nan,
    }


def lisa_by_torch(samples: Sequence[Sample]) -> dict[str, float]:
    return with_histograms(samples, 1e-5)


def evf_sam_by_torch(samples: Sequence[Sample]) -> dict[str, float]:
    return with_histograms(samples, 1e-10)


def cgformer_by_torch(samples: Sequence[Sample]) -> dict[str, float]:
    if not samples:
        return dict.fromkeys(("oIoU", "mIoU", *(f"Pr@0.{x}" for x in range(5, 10))), math.nan)
    inside = np.array([np.sum(p & t) for p, t, _, _ in samples])
    either = np.array([np.sum(p | t) for p, t, _, _ in samples])
    ious = torch.from_numpy(inside / (either + 1e-6))
    limits = torch.arange(0.5, 1.0, 0.1)
    return {
        "oIoU": inside.sum() / either.sum() if either.sum() else math.nan,
        "mIoU": ious.mean().item(),
        **{f"Pr@0.{5 + i}": (ious > limit).double().mean().item() for i, limit in enumerate(limits)},
    }


ORACLES: dict[str, Callable[[Sequence[Sample]], dict[str, float]]] = {
    "ris": ris_by_loop,
    "ris@1024": ris_by_loop,
    "ris@480": ris_by_loop,
    "lavt": ris_by_loop,
    "dmmi": dmmi_by_loop,
    "zom": zom_by_loop,
    "rela": rela_by_loop,
    "dfam": dfam_by_torch,
    "lisa": lisa_by_torch,
    "evf-sam": evf_sam_by_torch,
    "cgformer": cgformer_by_torch,
}

masks = st.integers(0, 2**10 - 1).map(lambda bits: np.array([bits >> i & 1 for i in range(10)], dtype=bool))


@st.composite
def drawn(draw: st.DrawFn, *, no_target: bool) -> Sample:
    is_no_target = no_target and draw(st.booleans())
    truth = np.zeros(10, dtype=bool) if is_no_target else draw(masks)
    # Often the truth itself or nothing, so that ties, exact masks and empty unions are met.
    prediction = draw(st.one_of(masks, st.just(truth), st.just(np.zeros(10, dtype=bool))))
    return prediction, truth, is_no_target, draw(st.booleans())


@pytest.mark.parametrize("rules", ORACLES)
@given(data=st.data())
@settings(max_examples=40, deadline=None)
def test_every_rule_set_equals_a_plain_evaluator(rules: str, data: st.DataObject) -> None:
    samples = data.draw(st.lists(drawn(no_target=RULES[rules].takes_no_target), max_size=8))
    counts = collect(
        (count_pixels(p, t, is_no_target=e, says_no_target=n) for p, t, e, n in samples), has_head=True
    )
    expected = ORACLES[rules](samples)
    found = RULES[rules].score(counts).values
    assert set(found) == set(expected)
    for name, value in expected.items():
        single = rules in ("dfam", "lisa", "evf-sam") and name in ("mIoU", "gIoU")
        assert found[name] == pytest.approx(value, rel=5e-7 if single else 1e-12, nan_ok=True), name


def test_every_rule_set_has_an_oracle_or_equals_one_that_has() -> None:
    related = {"gres", "gres@1024", "gres@480", "dfam-zom", "cris"}
    assert set(ORACLES) | related == set(RULES)

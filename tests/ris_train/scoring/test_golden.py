"""Every rule set on ten samples whose scores are known to the printed digits.

The 4 × 4 masks are given by the row-major indices of their pixels, as (truth, prediction). Worked by hand, as
(I, P, G, U): A (4, 4, 4, 4) · B (4, 4, 8, 8) · C (0, 0, 4, 4) · D (4, 6, 4, 6) · J (9, 9, 10, 10) · I (2, 3, 4,
5), which the head calls no-target · and of the no-target samples F P = 3 · G P = 2, the head agrees · H P = 0 ·
E P = 0, the head agrees. The figures of DFAM and ReLA were printed by their released evaluators on these masks.
"""

from __future__ import annotations

import math
from decimal import Decimal

import numpy as np
import pytest

from ris_train.scoring.counts import Counts, SampleCount, collect, count_pixels
from ris_train.scoring.documentation import SAMPLES
from ris_train.scoring.rules import RULES

MASKS = {
    "A": ([0, 1, 4, 5], [0, 1, 4, 5]),
    "B": (range(8), range(4)),
    "C": (range(4), []),
    "D": ([5, 6, 9, 10], [5, 6, 9, 10, 11, 15]),
    "J": (range(10), range(9)),
    "I": (range(12, 16), [0, 12, 13]),
    "F": ([], [0, 1, 2]),
    "G": ([], [0, 1]),
    "H": ([], []),
    "E": ([], []),
}
NO_TARGET = "FGHE"
SAYS_NO_TARGET = "IGE"

# Percent, except LISA's and EVF-SAM's, which are printed as ratios, and N-acc and T-acc.
TARGETED = {
    "lavt": {"oIoU": "65.625", "mIoU": "61.3333", "Pr": "80 60 40 40 40"},
    "dmmi": {"oIoU": "65.625", "mIoU": "61.3333", "Pr": "80 60 40 40 40"},
    "ris": {"oIoU": "65.625", "mIoU": "61.3333", "Pr": "80 60 40 40 40"},
    "zom": {"oIoU": "65.625", "mIoU": "61.3333", "Pr": "80 60 40 40 40"},
    "dfam": {"oIoU": "65.625", "mIoU": "61.333324", "gIoU": "61.333233", "Pr": "60 60 40 40 20"},
    "rela": {"cIoU": "65.625", "gIoU": "61.333333", "N-acc": "0", "T-acc": "0", "Pr": "40 40 40"},
    "lisa": {"cIoU": "0.65625", "gIoU": "0.613331"},
    "evf-sam": {"cIoU": "0.65625", "gIoU": "0.613332"},
    "cris": {"mIoU": "61.333323", "Pr": "60 60 40 40 20"},
    "cgformer": {"oIoU": "65.625", "mIoU": "61.333323", "Pr": "60 60 40 40 20"},
}
EVERY = {
    "rela": {
        "cIoU": "52.5",
        "gIoU": "50.666667",
        "T-acc": "0.8333333",
        "N-acc": "0.5",
        "Pr": "33.333333 33.333333 33.333333",
    },
    "gres": {
        "cIoU": "52.5",
        "gIoU": "50.666667",
        "T-acc": "0.8333333",
        "N-acc": "0.5",
        "Pr": "33.333333 33.333333 33.333333",
    },
    "dfam": {"oIoU": "53.846153", "gIoU": "60.666618", "mIoU": "30.666662", "Pr": "30 30 20 20 10"},
    "dfam-zom": {
        "oIoU": "58.333332",
        "gIoU": "0",
        "mIoU": "51.111103",
        "Acc": "74.998125",
        "Pr": "0 0 0 0 0",
    },
    "dmmi": {"oIoU": "62.162162", "mIoU": "57.777778", "Acc": "50.0", "Pr": "66.667 50 33.333 33.333 33.333"},
    "lisa": {"cIoU": "0.547619", "gIoU": "0.546666"},
}
RATIOS = {("lisa", "cIoU"), ("lisa", "gIoU"), ("evf-sam", "cIoU"), ("evf-sam", "gIoU")}


def mask(pixels) -> np.ndarray:
    drawn = np.zeros(16, dtype=bool)
    drawn[list(pixels)] = True
    return drawn.reshape(4, 4)


def sample(name: str) -> SampleCount:
    truth, predicted = MASKS[name]
    return count_pixels(
        mask(predicted),
        mask(truth),
        is_no_target=name in NO_TARGET,
        says_no_target=name in SAYS_NO_TARGET,
    )


def counts_of(names: str, *, has_head: bool) -> Counts:
    return collect(map(sample, names), has_head=has_head)


def as_printed(rules: str, metric: str, value: float, digits: int) -> str:
    scaled = value if (rules, metric) in RATIOS or metric in ("N-acc", "T-acc") else 100 * value
    # DFAM's evaluator hands out percentages in float32, whose neighbours are 4e-6 apart here.
    return f"{np.float32(scaled) if rules.startswith('dfam') and metric != 'Acc' else scaled:.{digits}f}"


def check(rules: str, counts: Counts, expected: dict[str, str]) -> None:
    scores = RULES[rules].score(counts)
    assert scores.rules == rules
    assert scores.num_samples == len(counts)
    golden = {name: text for name, text in expected.items() if name != "Pr"}
    precisions = [name for name in scores.values if name.startswith("Pr@")]
    golden |= dict(zip(precisions, expected.get("Pr", "").split(), strict=True))
    assert {name for name in scores.values if not math.isnan(scores.values[name])} == set(golden)
    for name, text in golden.items():
        digits = -int(Decimal(text).as_tuple().exponent)
        assert as_printed(rules, name, scores.values[name], digits) == text, name


@pytest.mark.parametrize("rules", TARGETED)
def test_golden_values_of_five_targeted_samples(rules: str) -> None:
    check(rules, counts_of("ABCDJ", has_head=rules == "rela"), TARGETED[rules])


@pytest.mark.parametrize("rules", EVERY)
def test_golden_values_of_all_ten_samples(rules: str) -> None:
    check(rules, counts_of("ABCDJIFGHE", has_head=True), EVERY[rules])


def test_the_overall_iou_of_all_ten_samples_as_fractions() -> None:
    every = counts_of("ABCDJIFGHE", has_head=True)
    names = {"rela": "cIoU", "dfam": "oIoU", "dfam-zom": "oIoU", "dmmi": "oIoU", "lisa": "cIoU"}
    found = {rules: RULES[rules].score(every).values[name] for rules, name in names.items()}
    assert found == {
        "rela": 21 / 40,
        "dfam": 21 / 39,
        "dfam-zom": 21 / 36,
        "dmmi": 23 / 37,
        "lisa": pytest.approx(23 / 42, abs=1e-11),
    }


def test_rules_of_our_own_on_all_ten_samples() -> None:
    """zom: the head empties I, so IoU 0 and U = 4; the no-target masks are empty but for F's, so Acc 3/4."""
    scores = RULES["zom"].score(counts_of("ABCDJIFGHE", has_head=True))
    assert scores.values["oIoU"] == 21 / 36
    assert scores.values["mIoU"] == pytest.approx((1 + 1 / 2 + 2 / 3 + 9 / 10) / 6)
    assert scores.values["Acc"] == 3 / 4
    assert [scores.values[f"Pr@0.{x}"] for x in (5, 6, 7, 8, 9)] == [4 / 6, 3 / 6, 2 / 6, 2 / 6, 2 / 6]


def test_gres_without_a_head_takes_an_empty_mask_for_a_decision() -> None:
    """C, H, E are empty: H and E are right, C is one of six targeted that are called no-target."""
    rows = [sample(name) for name in "ABCDJIFGHE"]
    plain = [SampleCount(r.intersection, r.predicted, r.annotated, r.is_no_target) for r in rows]
    values = RULES["gres"].score(collect(plain)).values
    assert values["N-acc"] == 2 / 4
    assert values["T-acc"] == 5 / 6
    assert values["cIoU"] == 23 / (4 + 8 + 4 + 6 + 10 + 5 + 3 + 2)
    assert values["gIoU"] == pytest.approx((1 + 1 / 2 + 2 / 3 + 9 / 10 + 2 / 5 + 1 + 1) / 10)


def test_the_document_shows_the_same_ten_samples() -> None:
    assert {name: sample(name) for name in MASKS} == SAMPLES


@pytest.mark.parametrize("union", [100, 1_000, 10_000, 1_000_000])
@pytest.mark.parametrize(
    ("rules", "counted"),
    [
        ("ris", {0.5, 0.6, 0.7, 0.8, 0.9}),
        ("lavt", {0.5, 0.6, 0.7, 0.8, 0.9}),
        ("dmmi", {0.5, 0.6, 0.7, 0.8, 0.9}),
        ("rela", {0.7, 0.8, 0.9}),
        ("gres", {0.7, 0.8, 0.9}),
        ("dfam", {0.5, 0.6, 0.7, 0.8, 0.9}),
        ("cris", {0.7, 0.9}),
        ("cgformer", {0.7, 0.9}),
    ],
)
def test_exact_ties(rules: str, counted: set[float], union: int) -> None:
    found = set()
    for tenths in (5, 6, 7, 8, 9):
        scores = RULES[rules].score(collect([SampleCount(union * tenths // 10, union, union * tenths // 10)]))
        if scores.values.get(f"Pr@0.{tenths}"):
            found.add(tenths / 10)
    assert found == counted


@pytest.mark.parametrize(("union", "counts"), [(10, False), (30, False), (40, True)])
def test_dfam_misses_exact_ties_of_small_unions(union: int, counts: bool) -> None:
    for tenths in (5, 6, 7, 8, 9):
        found = union * tenths // 10
        values = RULES["dfam"].score(collect([SampleCount(found, found, union)])).values
        assert values[f"Pr@0.{tenths}"] == counts


def test_cris_needs_a_union_of_about_sixty_for_a_tie_of_seven_tenths() -> None:
    """0.7 − float32(0.7) = 1.19e-8 must exceed 0.7e-6 / U: U > 58.7; for 0.9, 2.38e-8 and U > 37.7."""
    for tenths, smallest in ((7, 60), (9, 40)):
        for union in (smallest - 10, smallest):
            found = union * tenths // 10
            values = RULES["cris"].score(collect([SampleCount(found, found, union)])).values
            assert values[f"Pr@0.{tenths}"] == (union == smallest)

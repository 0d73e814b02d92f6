"""Rule sets against one another, on single samples, and as pure functions of counts."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ris_cache.errors import ConfigError, DataError
from ris_train.scoring.counts import Counts, SampleCount, collect, concatenate
from ris_train.scoring.rules import RULES, default_rules, rules_named

# Samples.


@st.composite
def rows(draw: st.DrawFn, *, no_target: bool, head: bool, max_area: int = 60) -> SampleCount:
    is_no_target = no_target and draw(st.booleans())
    annotated = 0 if is_no_target else draw(st.integers(0, max_area))
    predicted = draw(st.integers(0, max_area))
    return SampleCount(
        intersection=draw(st.integers(0, min(annotated, predicted))),
        predicted=predicted,
        annotated=annotated,
        is_no_target=is_no_target,
        says_no_target=head and draw(st.booleans()),
    )


def many(*, no_target: bool, head: bool, min_size: int = 0) -> st.SearchStrategy[Counts]:
    lists = st.lists(rows(no_target=no_target, head=head), min_size=min_size, max_size=12)
    return lists.map(lambda samples: collect(samples, has_head=head))


def takable(rules: str) -> st.SearchStrategy[Counts]:
    """Any counts that the rule set accepts, of models with and without a head."""
    accepts = RULES[rules].takes_no_target
    return st.booleans().flatmap(lambda head: many(no_target=accepts, head=head))


def values(rules: str, counts: Counts) -> dict[str, float]:
    return RULES[rules].score(counts).values


# Agreement.


@given(many(no_target=False, head=True))
def test_lavt_and_ris_and_dmmi_agree_on_equal_counts_of_targeted_samples(counts: Counts) -> None:
    expected = values("ris", counts)
    for rules in ("ris@1024", "ris@480", "lavt"):
        np.testing.assert_equal(values(rules, counts), expected)
    np.testing.assert_equal(values("dmmi", counts), expected | {"Acc": math.nan})


@given(many(no_target=True, head=False))
def test_zom_is_dmmi_for_a_model_without_a_head(counts: Counts) -> None:
    np.testing.assert_equal(values("zom", counts), values("dmmi", counts))


@given(many(no_target=True, head=True, min_size=1))
def test_gres_is_rela_on_any_grid_but_for_accuracies_that_are_undefined(counts: Counts) -> None:
    expected = values("rela", counts)
    for rules in ("gres", "gres@1024", "gres@480"):
        found = values(rules, counts)
        if not counts.is_no_target.any():
            assert (expected["N-acc"], expected["T-acc"]) == (0, 0)
            assert math.isnan(found["N-acc"])
            assert found["T-acc"] == np.mean(~counts.says_no_target)
            found |= {"N-acc": 0.0, "T-acc": 0.0}
        np.testing.assert_equal(found, expected)


@given(st.lists(rows(no_target=False, head=False), max_size=12))
def test_rela_is_ris_where_everything_has_a_target_and_is_called_so(samples: list[SampleCount]) -> None:
    counts = collect(samples, has_head=True)
    ris, rela = values("ris", counts), values("rela", counts)
    np.testing.assert_equal(rela["gIoU"], ris["mIoU"])
    np.testing.assert_equal(rela["cIoU"], ris["oIoU"])
    for name in ("Pr@0.7", "Pr@0.8", "Pr@0.9"):
        np.testing.assert_equal(rela[name], ris[name])


@given(many(no_target=False, head=False))
def test_cris_is_cgformer_without_the_overall_iou(counts: Counts) -> None:
    np.testing.assert_equal(
        {"oIoU": values("cgformer", counts)["oIoU"]} | values("cris", counts), values("cgformer", counts)
    )


@given(many(no_target=True, head=True))
def test_dfams_ref_zom_branch_is_zom_but_for_epsilons_and_what_it_never_updates(counts: Counts) -> None:
    zom, dfam = values("zom", counts), values("dfam-zom", counts)
    np.testing.assert_equal(dfam["oIoU"], zom["oIoU"])
    assert dfam["mIoU"] == pytest.approx(zom["mIoU"], abs=2e-6, nan_ok=True)
    hits = int(counts.is_no_target.sum()) and zom["Acc"] * counts.is_no_target.sum()
    expected = hits / (counts.is_no_target.sum() + 1e-4) if counts.is_no_target.any() else math.nan
    assert dfam["Acc"] == pytest.approx(expected, nan_ok=True)
    rest = [dfam[name] for name in dfam if name == "gIoU" or name.startswith("Pr@")]
    assert all(value == 0 for value in rest) if len(counts) else all(map(math.isnan, rest))


@given(many(no_target=False, head=False, min_size=1), st.sampled_from([32, 1000, 17_000]))
def test_epsilons_vanish_as_areas_grow(counts: Counts, factor: int) -> None:
    """Unions of 32 to 2²⁰ pixels: in float32 a quotient below X stays below X, and 1e-6 is nothing."""
    counts = counts.select(counts.union > 0)
    grown = Counts(
        intersection=counts.intersection * factor,
        predicted=counts.predicted * factor,
        annotated=counts.annotated * factor,
        is_no_target=counts.is_no_target,
        says_no_target=counts.says_no_target,
        has_head=False,
    )
    ris, dfam, lisa = (values(rules, grown) for rules in ("ris", "dfam", "lisa"))
    for name in ("oIoU", *(f"Pr@0.{x}" for x in range(5, 10))):
        np.testing.assert_equal(dfam[name], ris[name])
    assert dfam["mIoU"] == pytest.approx(ris["mIoU"], abs=3e-7, nan_ok=True)
    assert dfam["gIoU"] == pytest.approx(ris["mIoU"], abs=3e-7 + 1e-5 / factor, nan_ok=True)
    assert lisa["cIoU"] == pytest.approx(ris["oIoU"], abs=1e-10, nan_ok=True)
    slack = 1e-7 + 1e-5 / factor + (1e-5 / len(grown) if len(grown) else 0)
    assert lisa["gIoU"] == pytest.approx(ris["mIoU"], abs=slack, nan_ok=True)


# One sample, by the table of rules.

EMPTY_TRUTH = SampleCount(0, 0, 0)
MISSED_BY_HEAD = SampleCount(7, 8, 9, says_no_target=True)
CORRECT = SampleCount(0, 0, 0, is_no_target=True, says_no_target=True)
EMPTY_MASK_ONLY = SampleCount(0, 0, 0, is_no_target=True)
HEAD_ONLY = SampleCount(0, 5, 0, is_no_target=True, says_no_target=True)
WRONG = SampleCount(0, 5, 0, is_no_target=True)


@pytest.mark.parametrize(
    ("rules", "sample", "metric", "score", "pixels"),
    [
        ("ris", EMPTY_TRUTH, "mIoU", 0, (0, 0)),
        ("lavt", EMPTY_TRUTH, "mIoU", 0, (0, 0)),
        ("cris", EMPTY_TRUTH, "mIoU", 0, (0, 0)),
        ("dfam", EMPTY_TRUTH, "mIoU", 0, (0, 0)),
        ("dfam", EMPTY_TRUTH, "gIoU", 1, (0, 0)),
        ("lisa", EMPTY_TRUTH, "gIoU", 1, (0, 0)),
        ("evf-sam", EMPTY_TRUTH, "gIoU", 1, (0, 0)),
        ("rela", EMPTY_TRUTH, "gIoU", 0, (0, 0)),
        ("rela", MISSED_BY_HEAD, "gIoU", 0, (0, 10)),
        ("dfam", MISSED_BY_HEAD, "gIoU", 0, (0, 9)),
        ("zom", MISSED_BY_HEAD, "mIoU", 0, (0, 9)),
        ("dmmi", MISSED_BY_HEAD, "mIoU", 0.7, (7, 10)),
        ("lisa", MISSED_BY_HEAD, "gIoU", 0.7, (7, 10)),
        ("rela", CORRECT, "gIoU", 1, (0, 0)),
        ("dfam", CORRECT, "gIoU", 1, (0, 0)),
        ("lisa", CORRECT, "gIoU", 1, (0, 0)),
        ("zom", CORRECT, "Acc", 1, (0, 0)),
        ("rela", EMPTY_MASK_ONLY, "gIoU", 0, (0, 0)),
        ("rela", EMPTY_MASK_ONLY, "N-acc", 0, (0, 0)),
        ("dfam", EMPTY_MASK_ONLY, "gIoU", 1, (0, 0)),
        ("dmmi", EMPTY_MASK_ONLY, "Acc", 1, (0, 0)),
        ("rela", HEAD_ONLY, "gIoU", 1, (0, 0)),
        ("dfam", HEAD_ONLY, "gIoU", 1, (0, 0)),
        ("zom", HEAD_ONLY, "Acc", 1, (0, 0)),
        ("dmmi", HEAD_ONLY, "Acc", 0, (0, 0)),
        ("lisa", HEAD_ONLY, "gIoU", 0, (0, 5)),
        ("rela", WRONG, "gIoU", 0, (0, 5)),
        ("dfam", WRONG, "gIoU", 0, (0, 5)),
        ("lisa", WRONG, "gIoU", 0, (0, 5)),
        ("zom", WRONG, "Acc", 0, (0, 0)),
    ],
)
def test_one_sample(
    rules: str, sample: SampleCount, metric: str, score: float, pixels: tuple[int, int]
) -> None:
    counts = collect([sample], has_head=True)
    assert values(rules, counts)[metric] == pytest.approx(score, abs=2e-5)
    (intersection,), (union,) = RULES[rules].summed_pixels(counts)
    assert (intersection, union) == pixels


# Pure functions.


@pytest.mark.parametrize("rules", RULES)
@given(data=st.data())
@settings(max_examples=30)
def test_neither_order_nor_processes_change_a_digit(rules: str, data: st.DataObject) -> None:
    counts = data.draw(takable(rules))
    expected = values(rules, counts)
    order = data.draw(st.permutations(range(len(counts))))
    np.testing.assert_equal(values(rules, counts.select(np.array(order, dtype=np.intp))), expected)
    for ranks in (1, 2, 3):
        parts = [counts.select(np.arange(rank, len(counts), ranks)) for rank in range(ranks)]
        np.testing.assert_equal(values(rules, concatenate(parts)), expected)


@pytest.mark.parametrize("rules", RULES)
@given(data=st.data())
@settings(max_examples=30)
def test_scores_are_fractions_of_the_samples_or_undefined(rules: str, data: st.DataObject) -> None:
    counts = data.draw(takable(rules))
    scores = RULES[rules].score(counts)
    assert scores.num_samples == len(counts)
    assert tuple(scores.values) == RULES[rules].metrics
    assert all(math.isnan(value) or 0 <= value <= 1 for value in scores.values.values())
    assert {type(value) for value in scores.values.values()} == {float}
    precisions = [value for name, value in scores.values.items() if name.startswith("Pr@")]
    assert precisions == sorted(precisions, reverse=True) or any(map(math.isnan, precisions))


@pytest.mark.parametrize("rules", RULES)
@given(data=st.data())
@settings(max_examples=30)
def test_the_mean_of_the_samples_is_the_score(rules: str, data: st.DataObject) -> None:
    counts = data.draw(takable(rules))
    ious = RULES[rules].sample_ious(counts)
    assert len(ious) == len(counts)
    name = "mIoU" if "mIoU" in RULES[rules].metrics else "gIoU"
    expected = np.nanmean(ious) if not np.isnan(ious).all() else math.nan
    assert values(rules, counts)[name] == pytest.approx(expected, rel=2e-5, nan_ok=True)


@pytest.mark.parametrize("rules", RULES)
def test_a_perfect_prediction_scores_one(rules: str) -> None:
    samples = [SampleCount(area, area, area) for area in (40, 900, 70_000)]
    if RULES[rules].takes_no_target and rules != "dfam":
        samples.append(CORRECT)
    found = values(rules, collect(samples, has_head=True))
    perfect = {name: 0.0 if name in RULES[rules].constants else 1.0 for name in RULES[rules].metrics}
    assert found == pytest.approx(perfect, abs=1e-4)


def test_no_target_samples_spoil_dfams_mean_even_when_all_is_right() -> None:
    found = values("dfam", collect([SampleCount(900, 900, 900), CORRECT], has_head=True))
    assert (found["oIoU"], found["mIoU"], found["gIoU"], found["Pr@0.5"]) == (1, 0.5, 1, 0.5)


@pytest.mark.parametrize("rules", RULES)
def test_nothing_to_score_is_undefined(rules: str) -> None:
    assert all(map(math.isnan, values(rules, collect([])).values()))
    overall = values(rules, collect([EMPTY_TRUTH])).get("oIoU", math.nan)
    assert math.isnan(overall)
    assert math.isnan(values(rules, collect([EMPTY_TRUTH])).get("cIoU", math.nan))


@pytest.mark.parametrize("rules", [name for name, rules in RULES.items() if rules.takes_no_target])
def test_only_no_target_samples_are_no_crash(rules: str) -> None:
    found = values(rules, collect([CORRECT, CORRECT], has_head=True))
    for name in ("oIoU", "cIoU", "T-acc"):
        assert math.isnan(found.get(name, math.nan))
    for name in ("Acc", "N-acc"):
        assert found.get(name, 1) == pytest.approx(1, abs=1e-4)


@pytest.mark.parametrize("rules", [name for name, rules in RULES.items() if not rules.takes_no_target])
def test_no_target_samples_without_a_rule_are_refused(rules: str) -> None:
    with pytest.raises(DataError, match=f"{rules} has no rule for no-target samples, and 2 of 3") as caught:
        values(rules, collect([WRONG, CORRECT, SampleCount(1, 1, 1)], has_head=True))
    assert caught.value.facts["num_no_target"] == 2


def test_sums_beyond_float32_and_int32_stay_exact() -> None:
    counts = collect([SampleCount(2**24 + 1, 2**24 + 1, 2**24 + 3)] * 300)
    assert values("ris", counts)["oIoU"] == (2**24 + 1) / (2**24 + 3)
    assert values("lisa", counts)["cIoU"] == pytest.approx((2**24 + 1) / (2**24 + 3), rel=1e-15)


# Names.


def test_the_headline_is_a_metric_and_names_are_their_own() -> None:
    for name, rules in RULES.items():
        assert rules.name == name
        assert rules.headline in rules.metrics
        assert rules.headline not in rules.constants
        assert set(rules.constants) <= set(rules.metrics)


@pytest.mark.parametrize(
    ("dataset", "has_no_target", "expected"),
    [
        ("refcoco", False, "ris"),
        ("refcoco+", False, "ris"),
        ("refcocog", False, "ris"),
        ("grefcoco", True, "gres"),
        ("grefcoco", False, "gres"),
        ("ref-zom", True, "zom"),
        ("custom", True, "gres"),
        ("custom", False, "ris"),
    ],
)
def test_every_dataset_has_default_rules(dataset: str, has_no_target: bool, expected: str) -> None:
    assert default_rules(dataset, has_no_target=has_no_target) == expected


def test_rules_are_found_by_name_in_the_order_asked_for() -> None:
    assert [rules.name for rules in rules_named(" dfam, ris ,dfam")] == ["dfam", "ris"]
    assert rules_named("all") == tuple(RULES.values())


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("ris,dfma", "no rule set 'dfma'. Did you mean dfam?"),
        ("gres@1042", "Did you mean gres@1024?"),
        ("ris,all", "or all, alone"),
        ("nonsense", "Known: ris, ris@1024"),
        ("", "No rule set is named"),
        (",", "No rule set is named"),
    ],
)
def test_unknown_names_are_refused_with_the_nearest(text: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        rules_named(text)
    assert message in str(caught.value)


def test_rule_sets_cannot_be_changed_by_their_users() -> None:
    rules: Any = RULES["ris"]
    with pytest.raises(AttributeError):
        rules.headline = "mIoU"


@pytest.mark.parametrize(
    ("name", "metric", "value"),
    [
        ("ris", "mIoU", 0.0),
        ("gres", "gIoU", 0.0),
        ("zom", "mIoU", 0.0),
        ("lisa", "gIoU", 1.0),
        ("dfam", "gIoU", 1.0),
    ],
)
@pytest.mark.parametrize("has_head", [False, True])
def test_a_target_without_a_pixel_and_an_empty_mask_score_as_the_rule_says(
    name: str, metric: str, value: float, has_head: bool
) -> None:
    """A tiny object can vanish on the grid: G = 0 though the annotation names a target."""
    counts = collect([SampleCount(intersection=0, predicted=0, annotated=0)], has_head=has_head)
    assert RULES[name].score(counts).values[metric] == pytest.approx(
        value, abs=1e-4
    )  # LISA divides by N + 1e-5

"""Terms of every metric against the rule sets themselves."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ris_cache.errors import DataError
from ris_train.compare.terms import metric_terms
from ris_train.scoring.counts import Counts
from ris_train.scoring.rules import RULES, RuleSet


@st.composite
def counts(draw, *, with_no_target: bool) -> Counts:
    has_head = draw(st.booleans())
    rows = []
    for _ in range(draw(st.integers(0, 12))):
        is_no_target = with_no_target and draw(st.booleans())
        annotated = 0 if is_no_target else draw(st.integers(0, 40))
        predicted = draw(st.integers(0, 40))
        says = has_head and draw(st.booleans())
        rows.append(
            (draw(st.integers(0, min(annotated, predicted))), predicted, annotated, is_no_target, says)
        )
    columns = list(zip(*rows, strict=True)) or [()] * 5
    return Counts(
        intersection=np.array(columns[0], dtype=np.int64),
        predicted=np.array(columns[1], dtype=np.int64),
        annotated=np.array(columns[2], dtype=np.int64),
        is_no_target=np.array(columns[3], dtype=np.bool_),
        says_no_target=np.array(columns[4], dtype=np.bool_),
        has_head=has_head,
    )


def tolerance(rules: RuleSet) -> float:
    """Means that a rule set rounds to float32 are not rounded in their terms."""
    return 3e-7 if rules.is_single_mean else 1e-12


@pytest.mark.parametrize("name", RULES)
@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_the_terms_of_a_rule_set_give_its_scores(name, data):
    rules = RULES[name]
    counted = data.draw(counts(with_no_target=rules.takes_no_target))
    expected = rules.score(counted).values
    found = {metric: ratio.value for metric, ratio in metric_terms(rules, counted).items()}
    assert list(found) == list(expected)
    for metric, value in expected.items():
        assert found[metric] == pytest.approx(value, rel=tolerance(rules), nan_ok=True), metric


@pytest.mark.parametrize("name", ["ris", "gres", "zom", "dfam"])
@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_terms_within_a_part_give_the_scores_of_that_part(name, data):
    rules = RULES[name]
    counted = data.draw(counts(with_no_target=rules.takes_no_target))
    chosen = np.array(
        data.draw(st.lists(st.booleans(), min_size=len(counted), max_size=len(counted))), dtype=bool
    )
    expected = rules.score(counted.select(chosen)).values
    for metric, ratio in metric_terms(rules, counted).items():
        assert ratio.within(chosen).value == pytest.approx(
            expected[metric], rel=tolerance(rules), nan_ok=True
        ), metric


def test_nothing_is_undefined_not_zero():
    empty = np.zeros(0, dtype=np.int64)
    flags = np.zeros(0, dtype=np.bool_)
    none = Counts(
        intersection=empty,
        predicted=empty,
        annotated=empty,
        is_no_target=flags,
        says_no_target=flags,
        has_head=False,
    )
    assert all(math.isnan(ratio.value) for ratio in metric_terms(RULES["ris"], none).values())


def test_rules_without_no_target_refuse_such_samples(make_table):
    counted = make_table(no_target=0.5).counts("original")
    with pytest.raises(DataError, match="no rule for no-target"):
        metric_terms(RULES["ris"], counted)

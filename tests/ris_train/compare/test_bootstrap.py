"""The vectorised bootstrap against a plain loop, and what intervals promise."""

from __future__ import annotations

import math

import numpy as np
import pytest

from ris_train.compare.bootstrap import Interval, draw_weights, interval_of, resampled_values
from ris_train.compare.comparison import compare
from ris_train.compare.terms import Ratio, metric_terms
from ris_train.scoring.rules import RULES


def plain_resamples(rules, counts, images, *, num_resamples, seed) -> dict[str, list[float]]:
    """Resample by repeating samples, image by image, and score the repeated samples by the rule set itself."""
    found: dict[str, list[float]] = {metric: [] for metric in rules.metrics}
    names = sorted(set(images.tolist()))
    for chunk in draw_weights(len(names), num_resamples=num_resamples, seed=seed):
        for weights in chunk.tolist():
            chosen: list[int] = []
            for name, times in zip(names, weights, strict=True):
                chosen += [row for row, image in enumerate(images.tolist()) if image == name] * times
            scores = rules.score(counts.select(np.array(chosen, dtype=np.intp))).values
            for metric in found:
                found[metric].append(scores[metric])
    return found


@pytest.mark.parametrize("name", RULES)
def test_the_matrix_product_equals_the_plain_loop(make_table, name):
    rules = RULES[name]
    no_target = 0.4 if rules.takes_no_target else 0.0
    tables = [
        make_table(seed, no_target=no_target, has_head=True, views=(rules.view.name,)) for seed in (1, 2)
    ]
    images = np.asarray(tables[0].columns["image_id"])
    found = resampled_values(
        [metric_terms(rules, table.counts(rules.view.name)) for table in tables],
        images,
        num_resamples=40,
        seed=5,
    )
    for table, values in zip(tables, found, strict=True):
        expected = plain_resamples(rules, table.counts(rules.view.name), images, num_resamples=40, seed=5)
        assert list(values) == list(rules.metrics)
        for metric in rules.metrics:
            # A mean that the rule set rounds to float32 is not rounded in the product.
            tolerance = 3e-7 if rules.is_single_mean else 1e-12
            np.testing.assert_allclose(values[metric], expected[metric], rtol=tolerance)


def test_integer_metrics_of_the_loop_and_of_the_product_agree_to_the_last_bit(make_table):
    table, rules = make_table(3), RULES["ris"]
    images = np.asarray(table.columns["image_id"])
    (found,) = resampled_values(
        [metric_terms(rules, table.counts("original"))], images, num_resamples=50, seed=1
    )
    expected = plain_resamples(rules, table.counts("original"), images, num_resamples=50, seed=1)
    for metric in ("oIoU", "Pr@0.5", "Pr@0.9"):
        assert found[metric].tolist() == expected[metric]


def test_draws_hold_every_image_as_often_as_was_drawn_and_do_not_depend_on_the_method():
    chunks = list(draw_weights(7, num_resamples=600, seed=2))
    weights = np.concatenate(chunks)
    assert len(chunks) > 1
    assert weights.shape == (600, 7)
    assert (weights.sum(axis=1) == 7).all()
    assert weights.mean() == 1
    again = np.concatenate(list(draw_weights(7, num_resamples=600, seed=2)))
    assert (weights == again).all()
    assert (weights != np.concatenate(list(draw_weights(7, num_resamples=600, seed=3)))).any()


def test_the_draws_are_multinomial():
    """Each image's number of draws has mean 1 and variance 1 − 1/K; numbers of two images go against each other."""
    weights = np.concatenate(list(draw_weights(5, num_resamples=20_000, seed=0)))
    covariance = np.cov(weights.T)
    expected = np.eye(5) - 1 / 5
    assert np.abs(covariance - expected).max() < 0.03


def test_a_method_against_itself_differs_by_nothing(make_table, method_of):
    table = make_table(1)
    one, other = method_of("one", table), method_of("other", table)
    (split,) = compare([one, other], num_resamples=100).by_rules["ris"]
    for estimate in split.estimates[1].values():
        assert estimate.difference == 0
        assert estimate.difference_interval == Interval(0.0, 0.0)


def test_pairing_makes_a_constant_gain_certain_though_each_score_is_not():
    """One method is better by 0.1 on every image: scores vary by image, their difference does not."""
    rng = np.random.default_rng(0)
    images = np.arange(60)
    base = rng.uniform(0.1, 0.8, 60)
    terms = [{"mIoU": Ratio(numerator=values, denominator=np.ones(60))} for values in (base, base + 0.1)]
    one, other = resampled_values(terms, images, num_resamples=400, seed=0)
    alone, difference = interval_of(one["mIoU"]), interval_of(other["mIoU"] - one["mIoU"])
    assert alone is not None
    assert difference is not None
    assert alone.high - alone.low > 0.05
    assert difference.low == pytest.approx(0.1)
    assert difference.high == pytest.approx(0.1)


def test_expressions_of_one_image_are_drawn_together():
    """Ten copies of each image's sample tell nothing new, so the interval stays as wide."""
    rng = np.random.default_rng(1)
    values = rng.uniform(0, 1, 40)
    single = {"mIoU": Ratio(numerator=values, denominator=np.ones(40))}
    copied = {"mIoU": Ratio(numerator=np.repeat(values, 10), denominator=np.ones(400))}
    (one,) = resampled_values([single], np.arange(40), num_resamples=300, seed=0)
    (ten,) = resampled_values([copied], np.repeat(np.arange(40), 10), num_resamples=300, seed=0)
    np.testing.assert_allclose(one["mIoU"], ten["mIoU"])


def test_about_95_percent_of_intervals_hold_the_true_mean():
    """400 made-up datasets of 80 images with 3 correlated expressions each; the true mean is known."""
    rng = np.random.default_rng(4)
    held = 0
    for dataset in range(400):
        values = np.clip(np.repeat(rng.normal(0.5, 0.1, 80), 3) + rng.normal(0, 0.05, 240), 0, 1)
        terms = {"mIoU": Ratio(numerator=values, denominator=np.ones(240))}
        (drawn,) = resampled_values([terms], np.repeat(np.arange(80), 3), num_resamples=200, seed=dataset)
        interval = interval_of(drawn["mIoU"])
        assert interval is not None
        held += interval.low <= 0.5 <= interval.high
    assert 0.91 <= held / 400 <= 0.98


def test_an_interval_is_the_percentiles_and_leaves_undefined_resamples_out():
    interval = interval_of(np.arange(1001) / 1000)
    assert interval is not None
    assert (interval.low, interval.high) == (pytest.approx(0.025), pytest.approx(0.975))
    assert interval_of(np.array([0.5, 0.5, math.nan])) == Interval(0.5, 0.5)
    assert interval_of(np.array([0.5, math.nan, math.nan])) is None
    assert interval_of(np.array([])) is None


def test_one_image_says_nothing_about_others():
    terms = {"mIoU": Ratio(numerator=np.array([0.5, 0.7]), denominator=np.ones(2))}
    (drawn,) = resampled_values([terms], np.array([3, 3]), num_resamples=10, seed=0)
    assert interval_of(drawn["mIoU"]) is None


def test_an_undefined_score_has_no_interval_and_no_difference_interval(make_table, method_of):
    """T-acc of samples that are all no-target, and N-acc of samples of which none is."""
    splits = {("grefcoco.unc", "val"): 6}
    methods = [method_of(str(seed), make_table(seed, splits, no_target=1.0)) for seed in (1, 2)]
    (split,) = compare(methods, num_resamples=20).by_rules["gres"]
    found = split.estimates[1]["T-acc"]
    assert math.isnan(found.value)
    assert found.interval is found.difference_interval is None

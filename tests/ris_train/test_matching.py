"""Matching against brute force and against matching sample by sample, and its costs against the losses."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from unittest.mock import patch

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from ris_cache.errors import NonFiniteError
from ris_train.config import LossConfig
from ris_train.losses import dice_loss
from ris_train.matching import Matching, assign, match_queries, matching_costs
from ris_train.model.dfam import DfamPrediction
from ris_train.points import sample_at

CONFIG = LossConfig(dfam_dice=5, dfam_bce=3, dfam_vl=2)


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    """At these sizes, handing work to a second thread costs more than it saves."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def random_prediction(generator: torch.Generator, *, samples: int, queries: int) -> DfamPrediction:
    return DfamPrediction(
        mask_logits=torch.randn(samples, queries, 4, 4, generator=generator) * 3,
        text_logits=torch.randn(samples, queries, samples, generator=generator) * 3,
        queries=torch.zeros(samples, queries, 2),
    )


def least_cost(costs: Tensor) -> float:
    """Least sum over all ways to give each row its own column, or each column its own row."""
    if costs.shape[0] > costs.shape[1]:
        costs = costs.T
    rows = range(costs.shape[0])
    return min(
        sum(costs[row, column].item() for row, column in zip(rows, columns, strict=True))
        for columns in itertools.permutations(range(costs.shape[1]), len(rows))
    )


@given(st.lists(st.integers(0, 4), min_size=1, max_size=4), st.integers(1, 5), st.integers(0, 100_000))
def test_matching_costs_no_more_than_any_other_assignment(
    counts: list[int], num_queries: int, seed: int
) -> None:
    """`counts` targets per sample; a sample may have none, or more than there are queries."""
    generator = torch.Generator().manual_seed(seed)
    samples = torch.tensor([row for row, count in enumerate(counts) for _ in range(count)], dtype=torch.int64)
    costs = torch.randn(len(samples), num_queries, generator=generator)
    prediction = random_prediction(generator, samples=len(counts), queries=num_queries)
    with patch("ris_train.matching.matching_costs", return_value=costs):
        (matching,) = match_queries(
            [prediction], torch.zeros(len(samples), 4, 4), samples, torch.rand(1, 3, 2), LossConfig()
        )
    assert torch.equal(samples[matching.instances], matching.samples)
    assert len(set(matching.instances.tolist())) == len(matching.instances)
    pairs = list(zip(matching.samples.tolist(), matching.queries.tolist(), strict=True))
    assert len(set(pairs)) == len(pairs)
    for sample, count in enumerate(counts):
        own = matching.samples == sample
        assert int(own.sum()) == min(count, num_queries)
        if count:
            found = costs[matching.instances[own], matching.queries[own]].sum().item()
            assert found == pytest.approx(least_cost(costs[samples == sample]), abs=1e-5)


def assign_sample_by_sample(costs: np.ndarray, samples: np.ndarray) -> list[tuple[int, int, int]]:
    """The same pairs (sample, query, instance), from one small problem per sample."""
    pairs = []
    for sample in np.unique(samples):
        instances = np.flatnonzero(samples == sample)
        rows, queries = linear_sum_assignment(costs[instances])
        pairs += [
            (int(sample), int(query), int(instances[row])) for row, query in zip(rows, queries, strict=True)
        ]
    return pairs


COUNTS = st.lists(st.integers(0, 6), max_size=7)


@given(COUNTS, st.integers(1, 5), st.integers(0, 100_000))
def test_all_samples_at_once_give_the_pairs_of_each_by_itself(
    counts: list[int], num_queries: int, seed: int
) -> None:
    """Costs are drawn from a continuum, so no two assignments cost the same."""
    samples = np.repeat(np.arange(len(counts)), counts)
    costs = np.random.default_rng(seed).normal(size=(len(samples), num_queries)) * 10
    found = assign(costs, samples)
    assert found.dtype == np.int64
    assert [tuple(pair) for pair in found.T.tolist()] == assign_sample_by_sample(costs, samples)


@given(COUNTS, st.integers(1, 5), st.integers(0, 100_000))
def test_where_several_assignments_are_best_one_of_them_is_found(
    counts: list[int], num_queries: int, seed: int
) -> None:
    """Costs of 0, 1 and 2 alone: which pairs are chosen is free, what they cost is not."""
    samples = np.repeat(np.arange(len(counts)), counts)
    costs = np.random.default_rng(seed).integers(0, 3, size=(len(samples), num_queries)).astype(np.float64)
    owners, queries, instances = assign(costs, samples)
    assert (owners == samples[instances]).all()
    assert len(set(zip(owners.tolist(), queries.tolist(), strict=True))) == len(instances)
    assert (np.diff(instances) > 0).all()
    expected = assign_sample_by_sample(costs, samples)
    assert sorted(owners) == sorted(sample for sample, _, _ in expected)
    assert costs[instances, queries].sum() == sum(costs[instance, query] for _, query, instance in expected)


def test_layers_are_matched_by_their_own_costs_with_one_move_to_the_host() -> None:
    moves: list[torch.Size] = []
    generator = torch.Generator().manual_seed(0)
    layers = [random_prediction(generator, samples=3, queries=4) for _ in range(3)]
    masks = (torch.rand(6, 8, 8, generator=generator) < 0.5).float()
    samples = torch.tensor([0, 1, 1, 2, 2, 2])
    points = torch.rand(3, 20, 2, generator=generator)
    move = Tensor.cpu
    with patch.object(Tensor, "cpu", lambda tensor: moves.append(tensor.shape) or move(tensor)):
        together = match_queries(layers, masks, samples, points, CONFIG)
    assert len(moves) == 1
    for index, matching in enumerate(together):
        (alone,) = match_queries(layers[index : index + 1], masks, samples, points[index : index + 1], CONFIG)
        for name in ("samples", "queries", "instances"):
            assert torch.equal(getattr(matching, name), getattr(alone, name))
    assert len({tuple(matching.queries.tolist()) for matching in together}) > 1


@settings(max_examples=30)
@given(st.lists(st.integers(0, 1), min_size=1, max_size=5), st.integers(1, 4), st.integers(0, 100_000))
def test_samples_of_one_instance_are_matched_on_the_device_to_the_same_pairs(
    counts: list[int], num_queries: int, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    layers = [random_prediction(generator, samples=len(counts), queries=num_queries) for _ in range(2)]
    samples = torch.tensor([row for row, count in enumerate(counts) if count], dtype=torch.int64)
    masks = (torch.rand(len(samples), 8, 8, generator=generator) < 0.5).float()
    points = torch.rand(2, 20, 2, generator=generator)
    expected = match_queries(layers, masks, samples, points, CONFIG)
    refuse = patch.object(Tensor, "cpu", side_effect=AssertionError("the host need not wait"))
    with refuse:
        found = match_queries(layers, masks, samples, points, CONFIG, most_instances=max(counts))
    for one, other in zip(found, expected, strict=True):
        for name in ("samples", "queries", "instances"):
            assert torch.equal(getattr(one, name), getattr(other, name))


@settings(max_examples=30)
@given(st.integers(0, 100_000))
def test_matching_of_real_masks_is_best_among_all_assignments(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    prediction = random_prediction(generator, samples=2, queries=4)
    masks = (torch.rand(5, 8, 8, generator=generator) < 0.5).float()
    samples = torch.tensor([0, 0, 0, 1, 1])
    points = torch.rand(20, 2, generator=generator)
    (matching,) = match_queries([prediction], masks, samples, points.unsqueeze(0), CONFIG)
    costs = costs_by_losses(prediction, masks, samples, points)
    for sample in range(2):
        own = matching.samples == sample
        found = costs[matching.instances[own], matching.queries[own]].sum().item()
        assert found == pytest.approx(least_cost(costs[samples == sample]), rel=1e-4)


def costs_by_losses(prediction: DfamPrediction, masks: Tensor, samples: Tensor, points: Tensor) -> Tensor:
    """The same costs, pair by pair, from the functions of the loss: float[T, Q]."""
    rows = []
    for mask, sample in zip(masks, samples.tolist(), strict=True):
        labels = sample_at(mask.unsqueeze(0), points.unsqueeze(0))
        row = []
        for query in range(prediction.mask_logits.shape[1]):
            logits = sample_at(prediction.mask_logits[sample, query].unsqueeze(0), points.unsqueeze(0))
            dice = dice_loss(logits, labels)[0]
            bce = F.binary_cross_entropy_with_logits(logits, labels)
            own = prediction.text_logits[sample, query, sample]
            vl = F.binary_cross_entropy_with_logits(own, torch.ones_like(own))
            row.append(CONFIG.dfam_dice * dice + CONFIG.dfam_bce * bce + CONFIG.dfam_vl * vl)
        rows.append(torch.stack(row))
    return torch.stack(rows)


@settings(max_examples=30)
@given(st.integers(0, 100_000))
def test_the_cost_of_a_pair_is_its_loss(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    prediction = random_prediction(generator, samples=3, queries=4)
    masks = (torch.rand(4, 8, 8, generator=generator) < 0.5).float()
    samples = torch.tensor([0, 1, 1, 2])
    points = torch.rand(20, 2, generator=generator)
    torch.testing.assert_close(
        matching_costs(prediction, masks, samples, points, CONFIG),
        costs_by_losses(prediction, masks, samples, points),
        rtol=1e-4,
        atol=1e-4,
    )


def test_the_cost_by_hand() -> None:
    """Logits ln 3 (p = 3/4) on a map whose target fills it, read at two points at the centre.

    Dice = 1 − (2·3/2 + 1)/(3/2 + 2 + 1) = 1/9, BCE = ln 4/3, text logit −ln 3: VL = −ln 1/4 = ln 4.
    5·1/9 + 3·ln 4/3 + 2·ln 4.
    """
    prediction = DfamPrediction(
        mask_logits=torch.full((1, 1, 2, 2), math.log(3)),
        text_logits=torch.full((1, 1, 1), -math.log(3)),
        queries=torch.zeros(1, 1, 2),
    )
    cost = matching_costs(prediction, torch.ones(1, 4, 4), torch.tensor([0]), torch.full((2, 2), 0.5), CONFIG)
    assert cost.item() == pytest.approx(5 / 9 + 3 * math.log(4 / 3) + 2 * math.log(4))


def find_in_two_samples(text_logits: Tensor) -> Matching:
    """Two samples whose two queries show the same mask, so that the text decides."""
    prediction = DfamPrediction(torch.zeros(2, 2, 4, 4), text_logits, torch.zeros(2, 2, 2))
    return match_queries([prediction], torch.ones(2, 4, 4), torch.arange(2), torch.rand(1, 5, 2), CONFIG)[0]


def test_the_text_cost_is_that_of_the_samples_own_expression() -> None:
    """Query 1 of sample 0 fits expression 0, query 0 of sample 1 fits expression 1; the rest misleads."""
    text_logits = torch.tensor([[[-1.0, 9.0], [1.0, -9.0]], [[-9.0, 1.0], [9.0, -1.0]]])
    assert find_in_two_samples(text_logits).queries.tolist() == [1, 0]


def test_samples_of_a_part_are_matched_as_in_the_whole_batch() -> None:
    """Their expressions are not the first of the batch; the text decides, as in the batch above."""
    text_logits = torch.tensor([[[-1.0, 9.0], [1.0, -9.0]], [[-9.0, 1.0], [9.0, -1.0]]])
    whole = find_in_two_samples(text_logits).queries.tolist()
    for row in range(2):
        prediction = DfamPrediction(torch.zeros(1, 2, 4, 4), text_logits[row : row + 1], torch.zeros(1, 2, 2))
        (part,) = match_queries(
            [prediction],
            torch.ones(1, 4, 4),
            torch.tensor([0]),
            torch.rand(1, 5, 2),
            CONFIG,
            first_sample=row,
        )
        assert part.queries.tolist() == whole[row : row + 1]


def test_points_are_x_then_y() -> None:
    """The target fills the right half; query 0 shows the lower half, query 1 the right one."""
    target = torch.zeros(1, 8, 8)
    target[0, :, 4:] = 1
    shown = torch.stack([target[0].T, target[0]]).unsqueeze(0) * 20 - 10
    prediction = DfamPrediction(shown, torch.zeros(1, 2, 1), torch.zeros(1, 2, 2))
    upper_right = torch.tensor([[0.75, 0.25]])
    costs = matching_costs(prediction, target, torch.tensor([0]), upper_right, CONFIG)
    assert costs[0, 1] < costs[0, 0]


def test_matching_carries_no_gradient() -> None:
    prediction = DfamPrediction(
        torch.randn(1, 2, 4, 4, requires_grad=True),
        torch.randn(1, 2, 1, requires_grad=True),
        torch.zeros(1, 2, 2),
    )
    (matching,) = match_queries(
        [prediction], torch.ones(1, 4, 4), torch.tensor([0]), torch.rand(1, 5, 2), CONFIG
    )
    assert not matching.queries.requires_grad
    assert matching.queries.dtype == torch.int64


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_outputs_that_are_not_finite_stop_the_run(value: float) -> None:
    prediction = DfamPrediction(torch.full((1, 2, 4, 4), value), torch.zeros(1, 2, 1), torch.zeros(1, 2, 2))
    with pytest.raises(NonFiniteError, match="diverged"):
        match_queries([prediction], torch.ones(1, 4, 4), torch.tensor([0]), torch.rand(1, 5, 2), CONFIG)

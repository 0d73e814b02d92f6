"""Batches with expressions that refer to nothing, or to more than there are queries: what they cost, and finitely."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ris_train.config import LossConfig, load_config
from ris_train.losses import Part, Targets, dfam_losses, no_target_loss, related_pairs, text_loss, total_loss
from ris_train.matching import Matching, match_queries
from ris_train.model.dfam import DfamPrediction
from ris_train.model.segmenter import ModelOutputs

SIDE = 8
CONFIG = LossConfig(num_points=16, mask_size=SIDE)


def batch(
    targets_per_sample: Sequence[int], *, num_queries: int = 5, seed: int = 0
) -> tuple[ModelOutputs, Targets]:
    """Random outputs that carry gradients, and as many random targets for each sample as asked for."""
    generator = torch.Generator().manual_seed(seed)
    size = len(targets_per_sample)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, requires_grad=True)

    owners = torch.tensor([row for row, count in enumerate(targets_per_sample) for _ in range(count)])
    instance_masks = (torch.rand(len(owners), SIDE, SIDE, generator=generator) < 0.5).float()
    masks = torch.zeros(size, SIDE, SIDE)
    for row, mask in zip(owners.tolist(), instance_masks, strict=True):
        masks[row] = torch.maximum(masks[row], mask)
    outputs = ModelOutputs(
        mask_logits=random(size, 4, 4),
        dfam=[
            DfamPrediction(
                random(size, num_queries, 4, 4), random(size, num_queries, size), random(size, num_queries, 3)
            )
            for _ in range(2)
        ],
        no_target_logits=random(size, 2),
    )
    targets = Targets(
        masks=masks,
        instance_masks=instance_masks,
        instance_samples=owners.to(torch.int64),
        is_related=torch.zeros(size, size, dtype=torch.bool),
    )
    return outputs, targets


def leaves(outputs: ModelOutputs) -> dict[str, torch.Tensor]:
    assert outputs.dfam is not None
    assert outputs.no_target_logits is not None
    found = {"mask": outputs.mask_logits, "no_target": outputs.no_target_logits}
    for layer, prediction in enumerate(outputs.dfam):
        found |= {f"dfam_mask_{layer}": prediction.mask_logits, f"dfam_text_{layer}": prediction.text_logits}
    return found


def test_the_settings_are_those_of_the_supplement() -> None:
    assert (LossConfig().no_target, LossConfig().no_target_weights) == (0.1, (0.9, 1.1))
    for recipe in ("gres", "ref-zom"):
        config = load_config(recipe=recipe)
        assert (config.loss.no_target, config.loss.no_target_weights) == (0.1, (0.9, 1.1))
        assert (config.model.no_target_head, config.model.sparse_prompt) == (True, "cls")


@given(st.lists(st.sampled_from([0, 0, 1, 2, 9]), min_size=1, max_size=6), st.integers(0, 1000))
@settings(max_examples=60, deadline=None)
def test_any_mix_of_samples_gives_finite_losses_and_gradients(mix: list[int], seed: int) -> None:
    """None, one, two, or more targets than the five queries; all of one kind as well."""
    torch.manual_seed(seed)
    outputs, targets = batch(mix, seed=seed)
    assert targets.is_no_target.tolist() == [count == 0 for count in mix]
    loss, terms = total_loss(outputs, targets, CONFIG)
    assert loss.isfinite()
    assert all(term.isfinite() for term in terms.values())
    loss.backward()
    for name, leaf in leaves(outputs).items():
        assert leaf.grad is not None, name
        assert leaf.grad.isfinite().all(), name


@given(st.lists(st.integers(0, 2), min_size=1, max_size=5), st.integers(0, 1000))
@settings(max_examples=40, deadline=None)
def test_masks_of_samples_without_a_target_get_no_gradient(mix: list[int], seed: int) -> None:
    """And those with one do, as do the text logits of all."""
    torch.manual_seed(seed)
    outputs, targets = batch(mix, seed=seed)
    total_loss(outputs, targets, CONFIG)[0].backward()
    found = leaves(outputs)
    for row, count in enumerate(mix):
        for name, leaf in found.items():
            assert leaf.grad is not None
            is_mask = "mask" in name
            assert bool(leaf.grad[row].any()) == (count > 0 or not is_mask), (name, row)


@given(st.lists(st.integers(1, 3), min_size=1, max_size=3), st.integers(0, 3), st.integers(0, 1000))
@settings(max_examples=30, deadline=None)
def test_mask_losses_do_not_feel_samples_without_a_target(
    counts: list[int], num_none: int, seed: int
) -> None:
    """M_SAM's terms are averages over the targeted samples, whatever else is in the batch."""
    outputs, targets = batch([*counts, *[0] * num_none], seed=seed)
    kept = len(counts)
    assert outputs.dfam is not None
    alone = ModelOutputs(
        mask_logits=outputs.mask_logits[:kept],
        dfam=[
            DfamPrediction(one.mask_logits[:kept], one.text_logits[:kept, :, :kept], one.queries[:kept])
            for one in outputs.dfam
        ],
    )
    targets_alone = Targets(
        masks=targets.masks[:kept],
        instance_masks=targets.instance_masks,
        instance_samples=targets.instance_samples,
        is_related=targets.is_related[:kept, :kept],
    )
    _, mixed = total_loss(outputs, targets, CONFIG)
    _, pure = total_loss(alone, targets_alone, CONFIG)
    for name in ("mask_dice", "mask_bce"):
        assert mixed[name].item() == pytest.approx(pure[name].item(), rel=1e-5)


def test_a_batch_of_no_target_samples_costs_text_and_head_alone() -> None:
    outputs, targets = batch([0, 0, 0])
    loss, terms = total_loss(outputs, targets, CONFIG)
    assert {name for name, term in terms.items() if term != 0} == {"dfam_vl", "no_target"}
    expected = CONFIG.dfam_vl * terms["dfam_vl"] + CONFIG.no_target * terms["no_target"]
    assert loss.item() == pytest.approx(expected.item())


def test_a_model_without_a_head_has_no_such_term() -> None:
    outputs, targets = batch([1, 2])
    bare = ModelOutputs(mask_logits=outputs.mask_logits, dfam=outputs.dfam)
    torch.manual_seed(0)
    loss, terms = total_loss(bare, targets, CONFIG)
    torch.manual_seed(0)
    with_head, more = total_loss(outputs, targets, CONFIG)
    assert more.keys() - terms.keys() == {"no_target"}
    assert with_head.item() == pytest.approx(loss.item() + 0.1 * more["no_target"].item(), rel=1e-5)


def test_the_heads_loss_by_hand() -> None:
    """Probabilities 3/4 for the right class of a targeted sample, 1/2 for a no-target one, weights 0.9 and 1.1:
    (0.9·ln 4/3 + 1.1·ln 2) / (0.9 + 1.1)."""
    logits = torch.tensor([[math.log(3), 0.0], [0.0, 0.0]])
    loss = no_target_loss(logits, torch.tensor([False, True]), (0.9, 1.1), Part.cut([1, 0], 0, num_queries=2))
    assert loss.item() == pytest.approx((0.9 * math.log(4 / 3) + 1.1 * math.log(2)) / 2.0)


def test_an_expression_for_nothing_is_a_negative_of_every_query() -> None:
    """Sample 0 is matched by its query 0, sample 1 by none: of 2 · 2 · 2 pairs all but one are negatives.

    All logits are 0, so each pair costs ln 2; one matched query and one sample without any are counted.
    """
    logits = torch.zeros(2, 2, 2, requires_grad=True)
    matching = Matching(samples=torch.tensor([0]), queries=torch.tensor([0]), instances=torch.tensor([0]))
    loss = text_loss(
        logits, matching, torch.zeros(2, 2, dtype=torch.bool), Part.cut([1, 0], 0, num_queries=2)
    )
    assert loss.item() == pytest.approx(8 * math.log(2) / 2)
    loss.backward()
    assert logits.grad is not None
    # A negative pair is pushed down, the positive one up.
    assert (logits.grad < 0).nonzero().tolist() == [[0, 0, 0]]


def test_matching_without_instances_matches_nothing() -> None:
    outputs, targets = batch([0, 0])
    assert outputs.dfam is not None
    (matching,) = match_queries(
        outputs.dfam[:1], targets.instance_masks, targets.instance_samples, torch.rand(1, 7, 2), CONFIG
    )
    for indices in (matching.samples, matching.queries, matching.instances):
        assert indices.dtype == torch.int64
        assert indices.shape == (0,)
    part = Part.whole(targets, num_queries=outputs.dfam[0].mask_logits.shape[1])
    assert [term.item() for term in dfam_losses(outputs.dfam[:1], targets, CONFIG, part)[:2]] == [0, 0]


def test_with_more_targets_than_queries_each_query_gets_another_target() -> None:
    outputs, targets = batch([12, 0, 1], num_queries=5)
    assert outputs.dfam is not None
    (matching,) = match_queries(
        outputs.dfam[:1], targets.instance_masks, targets.instance_samples, torch.rand(1, 32, 2), CONFIG
    )
    of_first = matching.samples == 0
    assert sorted(matching.queries[of_first].tolist()) == [0, 1, 2, 3, 4]
    assert len(set(matching.instances[of_first].tolist())) == 5
    assert matching.samples[~of_first].tolist() == [2]


@pytest.mark.parametrize("exclude", ["referent", "category"])
def test_expressions_for_nothing_are_negatives_of_each_other_and_of_all(exclude: str) -> None:
    """0 and 1 refer to nothing in one image, 2 and 3 to one target of it; −1 is no category that is shared."""
    related = related_pairs(
        [5, 5, 5, 5],
        [frozenset(), frozenset(), frozenset({1}), frozenset({1, 2})],
        [-1, -1, 3, 4],
        exclude=exclude,
    )
    assert related.nonzero().tolist() == [[2, 3], [3, 2]]

"""The losses against values worked out by hand, and the points they are read at."""

from __future__ import annotations

import itertools
import math
from unittest.mock import patch

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import ris_train.losses
from ris_cache.store.tables import NO_CATEGORY
from ris_train.config import LossConfig
from ris_train.losses import (
    Part,
    Targets,
    dfam_losses,
    dice_loss,
    related_pairs,
    text_loss,
    total_loss,
)
from ris_train.matching import Matching
from ris_train.model.dfam import DfamPrediction
from ris_train.model.segmenter import ModelOutputs
from ris_train.points import sample_at, uncertain_points

LN3 = math.log(3)  # sigmoid(ln 3) = 3/4, sigmoid(−ln 3) = 1/4


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def matching_of(samples: list[int], queries: list[int]) -> Matching:
    return Matching(
        samples=torch.tensor(samples, dtype=torch.int64),
        queries=torch.tensor(queries, dtype=torch.int64),
        instances=torch.arange(len(samples)),
    )


def test_the_weights_are_those_of_the_supplement() -> None:
    config = LossConfig()
    assert (config.mask_dice, config.mask_bce, config.dfam) == (2, 0.5, 1)
    assert (config.dfam_dice, config.dfam_bce, config.dfam_vl) == (5, 5, 1)
    assert (config.mask_size, config.num_points) == (1024, 12544)
    assert (config.oversample, config.importance_ratio) == (3, 0.75)
    assert config.vl_exclude == "referent"


def test_dice_by_hand() -> None:
    """p = (3/4, 3/4, 1/4, 1/4).

    Labels (1, 0, 0, 0): Σpg = 3/4, Σp = 2, Σg = 1, 1 − (3/2 + 1)/(2 + 1 + 1) = 3/8.
    Labels (0, 0, 0, 0): 1 − (0 + 1)/(2 + 0 + 1) = 2/3. Labels (1, 1, 1, 1): 1 − (4 + 1)/(2 + 4 + 1) = 2/7.
    """
    logits = torch.tensor([LN3, LN3, -LN3, -LN3]).expand(3, 4)
    labels = torch.tensor([[1.0, 0, 0, 0], [0, 0, 0, 0], [1, 1, 1, 1]])
    torch.testing.assert_close(dice_loss(logits, labels), torch.tensor([3 / 8, 2 / 3, 2 / 7]))


def test_dice_vanishes_for_a_sure_and_right_mask() -> None:
    labels = torch.tensor([[1.0, 0, 1, 0], [0, 0, 0, 0]])
    torch.testing.assert_close(dice_loss(200 * labels - 100, labels), torch.zeros(2))


# Two samples with two queries each; text logits are 0 (p = 1/2), ln 3 (p = 3/4) or −ln 3 (p = 1/4).
TEXT_LOGITS = torch.tensor([[[LN3, 0.0], [0.0, -LN3]], [[LN3, -LN3], [-LN3, LN3]]])

NO_PAIR = torch.zeros(2, 2, dtype=torch.bool)


def part_of(*instances: int) -> Part:
    """A whole batch, by the number of its samples' instances."""
    return Part.cut(instances, 0, num_queries=4)


def test_the_text_loss_by_hand() -> None:
    """Query 0 of sample 0 and query 1 of sample 1 are matched; nothing is left out.

    Matched, label 1: −ln 3/4 twice. Others, label 0: sample 0 has −ln 1/2 (query 0, expression 1),
    −ln 1/2 and −ln 3/4 (query 1); sample 1 has −ln 1/4 and −ln 3/4 (query 0), −ln 3/4 (query 1,
    expression 0). Sum: 5·ln 4/3 + 2·ln 2 + ln 4, over two matched queries.
    """
    loss = text_loss(TEXT_LOGITS, matching_of([0, 1], [0, 1]), NO_PAIR, part_of(1, 1))
    assert loss.item() == pytest.approx((5 * math.log(4 / 3) + 2 * math.log(2) + math.log(4)) / 2)


def test_the_text_loss_averaged_over_all_pairs_by_hand() -> None:
    """The same sum over 2 · 2 · 2 pairs; those left out count as pairs that cost nothing."""
    of_all = {"matching": matching_of([0, 1], [0, 1]), "part": part_of(1, 1), "average": "pairs"}
    loss = text_loss(TEXT_LOGITS, is_related=NO_PAIR, **of_all)
    assert loss.item() == pytest.approx((5 * math.log(4 / 3) + 2 * math.log(2) + math.log(4)) / 8)
    is_related = torch.tensor([[False, True], [False, False]])
    loss = text_loss(TEXT_LOGITS, is_related=is_related, **of_all)
    assert loss.item() == pytest.approx((4 * math.log(4 / 3) + math.log(2) + math.log(4)) / 8)


def test_the_text_loss_leaves_out_a_pair_with_all_its_queries() -> None:
    """Without sample 0 and expression 1, −ln 1/2 and −ln 3/4 are missing from the sum above."""
    is_related = torch.tensor([[False, True], [False, False]])
    loss = text_loss(TEXT_LOGITS, matching_of([0, 1], [0, 1]), is_related, part_of(1, 1))
    assert loss.item() == pytest.approx((4 * math.log(4 / 3) + math.log(2) + math.log(4)) / 2)


def test_the_text_loss_counts_every_matched_query_of_a_sample() -> None:
    """Both queries of sample 0 match its expression: −ln 3/4 and −ln 1/2, over two; all else left out."""
    logits = TEXT_LOGITS[:1, :, :1]
    loss = text_loss(logits, matching_of([0, 0], [0, 1]), NO_PAIR[:1, :1], part_of(2))
    assert loss.item() == pytest.approx((math.log(4 / 3) + math.log(2)) / 2)


def test_the_text_loss_without_a_match_is_finite() -> None:
    loss = text_loss(TEXT_LOGITS, matching_of([], []), NO_PAIR, part_of(0, 0))
    assert loss.isfinite()


@given(
    st.integers(0, 2),
    st.integers(0, 3),
    st.integers(0, 2),
    st.integers(0, 10_000),
)
def test_only_logits_of_pairs_left_out_may_change_freely(
    sample: int, query: int, expression: int, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(3, 4, 3, generator=generator)
    is_related = torch.rand(3, 3, generator=generator) < 0.5
    is_related.fill_diagonal_(False)
    matching = matching_of([0, 1, 1, 2], [1, 0, 3, 2])
    changed = logits.clone()
    changed[sample, query, expression] += 3
    before, after = (
        text_loss(each, matching, is_related, part_of(1, 2, 1)).item() for each in (logits, changed)
    )
    assert (before == after) == bool(is_related[sample, expression])


IMAGES = [10, 10, 10, 20, 20]
ANNOTATIONS = [frozenset({1}), frozenset({1}), frozenset({1, 2}), frozenset({7}), frozenset({8})]
CATEGORIES = [3, 3, 3, 3, 5]


def pairs_of(related: Tensor) -> set[tuple[int, int]]:
    assert torch.equal(related, related.T)
    return {(first, second) for first, second in related.nonzero().tolist() if first < second}


def test_expressions_of_one_referent_or_of_a_shared_target_are_related() -> None:
    """0 and 1 describe one referent; 2 shares a target with both; 3 and 4 share the image alone."""
    related = related_pairs(IMAGES, ANNOTATIONS, CATEGORIES, exclude="referent")
    assert related.dtype == torch.bool
    assert pairs_of(related) == {(0, 1), (0, 2), (1, 2)}


def test_the_category_option_adds_pairs_of_the_same_category() -> None:
    related = related_pairs(IMAGES, ANNOTATIONS, CATEGORIES, exclude="category")
    assert pairs_of(related) == {(0, 1), (0, 2), (1, 2), (0, 3), (1, 3), (2, 3)}


def test_the_same_number_in_another_image_is_another_target() -> None:
    related = related_pairs([1, 2], [frozenset({5}), frozenset({5})], [1, 2], exclude="referent")
    assert not related.any()


@given(
    st.lists(
        st.tuples(st.integers(0, 2), st.frozensets(st.integers(0, 3), min_size=1), st.integers(0, 2)),
        max_size=6,
    ),
    st.sampled_from(["referent", "category"]),
)
def test_a_sample_is_never_left_out_of_its_own_expression(
    samples: list[tuple[int, frozenset[int], int]], exclude: str
) -> None:
    related = related_pairs(
        [image_id for image_id, _, _ in samples],
        [ann_ids for _, ann_ids, _ in samples],
        [category_id for _, _, category_id in samples],
        exclude=exclude,
    )
    assert related.shape == (len(samples), len(samples))
    assert not related.diagonal().any()
    assert torch.equal(related, related.T)


def related_pair_by_pair(
    image_ids: list[int], ann_ids: list[frozenset[int]], category_ids: list[int], *, exclude: str
) -> Tensor:
    """As the docstring of `related_pairs` says it."""
    related = torch.zeros(len(image_ids), len(image_ids), dtype=torch.bool)
    for first, second in itertools.permutations(range(len(image_ids)), 2):
        shares_target = image_ids[first] == image_ids[second] and bool(ann_ids[first] & ann_ids[second])
        shares_category = category_ids[first] == category_ids[second] != NO_CATEGORY
        related[first, second] = (exclude != "none" and shares_target) or (
            exclude == "category" and shares_category
        )
    return related


@given(
    st.lists(
        st.tuples(
            st.integers(-1, 2),
            st.frozensets(st.integers(0, 4) | st.just(2**40), max_size=4),
            st.integers(0, 2) | st.just(NO_CATEGORY),
        ),
        max_size=8,
    ),
    st.sampled_from(["referent", "category", "none"]),
)
def test_related_pairs_are_those_found_pair_by_pair(
    samples: list[tuple[int, frozenset[int], int]], exclude: str
) -> None:
    columns = [list(column) for column in zip(*samples, strict=True)] or [[], [], []]
    found = related_pairs(*columns, exclude=exclude)
    assert torch.equal(found, related_pair_by_pair(*columns, exclude=exclude))


def test_a_mask_read_at_its_cell_centres_is_itself() -> None:
    """The centre of row r, column c is x = (c + 1/2)/W, y = (r + 1/2)/H."""
    height, width = 3, 5
    masks = torch.randn(2, height, width)
    points = torch.tensor(
        [[(column + 0.5) / width, (row + 0.5) / height] for row in range(height) for column in range(width)]
    )
    torch.testing.assert_close(sample_at(masks, points.expand(2, -1, -1)), masks.flatten(1))


def test_a_mask_is_read_linearly_between_centres() -> None:
    """Cells 0, 4 over 8, 20: halfway in x 2 and 14, halfway in both 8, a quarter of the way in y 2."""
    masks = torch.tensor([[[0.0, 4.0], [8.0, 20.0]]])
    points = torch.tensor([[[0.5, 0.25], [0.5, 0.75], [0.5, 0.5], [0.25, 0.375]]])
    torch.testing.assert_close(sample_at(masks, points), torch.tensor([[2.0, 14.0, 8.0, 2.0]]))


def test_the_most_uncertain_candidates_are_kept() -> None:
    """Candidates lie on cell centres of a 4 × 5 grid, so their logits are the cells' own."""
    height, width, num_points = 4, 5, 8
    logits = torch.randn(2, height, width)
    cells = torch.stack([torch.randperm(height * width) for _ in range(2)])[:, : 2 * num_points]
    candidates = torch.stack([(cells % width + 0.5) / width, (cells // width + 0.5) / height], dim=-1)
    uniform = torch.rand(2, 2, 2)
    with patch("torch.rand", side_effect=[candidates, uniform]) as rand:
        points = uncertain_points(logits, num_points=num_points, oversample=2, importance_ratio=0.75)
    assert rand.call_args_list[0].args == (2, 16, 2)
    assert rand.call_args_list[1].args == (2, 2, 2)
    assert points.shape == (2, num_points, 2)
    for row in range(2):
        own = logits[row].flatten()[cells[row]]
        nearest_to_zero = own[own.abs().argsort()[:6]]
        found = sample_at(logits[row : row + 1], points[row : row + 1])[0]
        torch.testing.assert_close(found[:6].sort().values, nearest_to_zero.sort().values)
    assert torch.equal(points[:, 6:], uniform)


def test_points_of_several_layers_are_drawn_for_each() -> None:
    """Row l, m of the layers' points has its own candidates, and a part gets its rows of the whole batch's."""
    logits = torch.randn(3, 5, 6, 6)
    options = {"num_points": 40, "oversample": 3.0, "importance_ratio": 0.75}
    whole = uncertain_points(logits, **options, generator=torch.Generator().manual_seed(1))
    assert whole.shape == (3, 5, 40, 2)
    assert len({row.sum().item() for row in whole.flatten(0, 1)}) == 15
    part = uncertain_points(
        logits[:, 1:3], **options, first=1, total=5, generator=torch.Generator().manual_seed(1)
    )
    assert torch.equal(part, whole[:, 1:3])


def test_three_quarters_of_the_points_lie_where_the_logits_are_near_zero() -> None:
    """The left half is undecided in one mask, the upper half in the other; 3·K candidates suffice."""
    logits = torch.full((2, 16, 16), 9.0)
    logits[0, :, :8] = 0
    logits[1, :8, :] = 0
    points = uncertain_points(logits, num_points=400, oversample=3, importance_ratio=0.75)
    assert points.shape == (2, 400, 2)
    for mask, axis in ((0, 0), (1, 1)):
        inside = points[mask, :, axis] < 0.5
        assert inside[:300].all()
        # The other hundred are uniform: half inside, within four standard deviations of 5.
        assert 30 <= int(inside[300:].sum()) <= 70


@given(st.integers(1, 30), st.floats(1, 4), st.floats(0, 1), st.integers(0, 3), st.integers(0, 1000))
def test_there_are_as_many_points_as_asked_for_and_all_lie_on_the_mask(
    num_points: int, oversample: float, importance_ratio: float, num_masks: int, seed: int
) -> None:
    torch.manual_seed(seed)
    points = uncertain_points(
        torch.randn(num_masks, 5, 4),
        num_points=num_points,
        oversample=oversample,
        importance_ratio=importance_ratio,
    )
    assert points.shape == (num_masks, num_points, 2)
    assert ((points >= 0) & (points <= 1)).all()


def whole(targets: Targets, prediction: DfamPrediction) -> Part:
    return Part.whole(targets, num_queries=prediction.mask_logits.shape[1])


def test_dfam_losses_of_one_layer_by_hand() -> None:
    """Two queries over a 2 × 2 map, one target that fills it, all points at its centre (value: the mean).

    Query 0: logits −ln 3 everywhere; query 1: ln 3, so it is matched. With K = 4 points, p = 3/4 and g = 1:
    Dice = 1 − (2·3 + 1)/(3 + 4 + 1) = 1/8, BCE = −ln 3/4. Text logits 0 and 0: VL = 2·ln 2 over one match.
    """
    prediction = DfamPrediction(
        mask_logits=torch.tensor([-LN3, LN3]).view(1, 2, 1, 1).expand(1, 2, 2, 2),
        text_logits=torch.zeros(1, 2, 1),
        queries=torch.zeros(1, 2, 3),
    )
    targets = Targets(
        masks=torch.ones(1, 6, 6),
        instance_masks=torch.ones(1, 6, 6),
        instance_samples=torch.tensor([0]),
        is_related=torch.zeros(1, 1, dtype=torch.bool),
    )
    with patch("torch.rand", side_effect=lambda *size, **_: torch.full(size, 0.5)):
        dice, bce, vl = dfam_losses(
            [prediction], targets, LossConfig(num_points=4), whole(targets, prediction)
        )
    assert dice.item() == pytest.approx(1 / 8)
    assert bce.item() == pytest.approx(math.log(4 / 3))
    assert vl.item() == pytest.approx(2 * math.log(2))


def test_a_query_is_compared_with_the_target_it_is_matched_to() -> None:
    """One query that fills the map; of two targets, the empty one is left unmatched and the full one fits."""
    prediction = DfamPrediction(
        mask_logits=torch.full((1, 1, 2, 2), 100.0),
        text_logits=torch.zeros(1, 1, 1),
        queries=torch.zeros(1, 1, 3),
    )
    targets = Targets(
        masks=torch.ones(1, 6, 6),
        instance_masks=torch.stack([torch.zeros(6, 6), torch.ones(6, 6)]),
        instance_samples=torch.tensor([0, 0]),
        is_related=torch.zeros(1, 1, dtype=torch.bool),
    )
    with patch("torch.rand", side_effect=lambda *size, **_: torch.full(size, 0.5)):
        dice, bce, _ = dfam_losses(
            [prediction], targets, LossConfig(num_points=4), whole(targets, prediction)
        )
    assert dice.item() == pytest.approx(0, abs=1e-6)
    assert bce.item() == pytest.approx(0, abs=1e-6)


def resize_by_hand(image: np.ndarray, side: int) -> np.ndarray:
    """Bilinear, half-pixel centres, edges repeated; float[S, S] → float[side, side]."""
    size = image.shape[0]
    position = np.clip((np.arange(side) + 0.5) * size / side - 0.5, 0, size - 1)
    near = np.minimum(np.floor(position).astype(int), size - 2)
    weights = np.zeros((side, size))
    weights[np.arange(side), near] = 1 - (position - near)
    weights[np.arange(side), near + 1] = position - near
    return weights @ image @ weights.T


def random_batch() -> tuple[ModelOutputs, Targets]:
    """Two samples, three targets, four sets of predictions with five queries."""
    instance_masks = (torch.rand(3, 8, 8) < 0.5).float()
    outputs = ModelOutputs(
        mask_logits=torch.randn(2, 4, 4),
        dfam=[
            DfamPrediction(torch.randn(2, 5, 4, 4), torch.randn(2, 5, 2), torch.randn(2, 5, 3))
            for _ in range(4)
        ],
    )
    targets = Targets(
        masks=torch.stack([instance_masks[:2].amax(dim=0), instance_masks[2]]),
        instance_masks=instance_masks,
        instance_samples=torch.tensor([0, 0, 1]),
        is_related=torch.zeros(2, 2, dtype=torch.bool),
    )
    return outputs, targets


def test_the_loss_is_the_weighted_sum_of_its_terms() -> None:
    """All weights differ; M_SAM is resized to the targets' size, DFAM's terms are summed over l = 0 … 3."""
    config = LossConfig(
        mask_dice=2, mask_bce=3, dfam=0.5, dfam_dice=7, dfam_bce=11, dfam_vl=13, num_points=32
    )
    outputs, targets = random_batch()
    assert outputs.dfam is not None
    dice, bce = [], []
    for logits, mask in zip(outputs.mask_logits.double().numpy(), targets.masks.numpy(), strict=True):
        p = 1 / (1 + np.exp(-resize_by_hand(logits, 8)))
        dice.append(1 - (2 * (p * mask).sum() + 1) / (p.sum() + mask.sum() + 1))
        bce.append(-(mask * np.log(p) + (1 - mask) * np.log(1 - p)).mean())
    torch.manual_seed(4)
    spread = torch.rand(3 * config.num_points, 2)
    fixed = patch("torch.rand", side_effect=lambda *size, **_: spread[: size[-2]].expand(size))
    with fixed:
        layers = [dfam_losses([layer], targets, config, whole(targets, layer)) for layer in outputs.dfam]
    dfam_dice, dfam_bce, dfam_vl = (sum(layer[i].item() for layer in layers) for i in range(3))
    expected = 2 * np.mean(dice) + 3 * np.mean(bce) + 0.5 * (7 * dfam_dice + 11 * dfam_bce + 13 * dfam_vl)

    with fixed:
        loss, terms = total_loss(outputs, targets, config)
    assert loss.item() == pytest.approx(expected, rel=1e-5)
    assert {name: term.item() for name, term in terms.items()} == pytest.approx(
        {
            "mask_dice": np.mean(dice),
            "mask_bce": np.mean(bce),
            "dfam_dice": dfam_dice,
            "dfam_bce": dfam_bce,
            "dfam_vl": dfam_vl,
        },
        rel=1e-5,
    )


def test_the_masks_of_the_targets_are_taken_for_one_layer_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """At 1024 × 1024, 32 of them are 134 MB; four layers at once would be four times that."""
    outputs, targets = random_batch()
    read: list[int] = []

    def noting(masks: Tensor, points: Tensor) -> Tensor:
        read.append(masks.shape.numel() if masks.shape[-2:] == targets.masks.shape[-2:] else 0)
        return sample_at(masks, points)

    monkeypatch.setattr(ris_train.losses, "sample_at", noting)
    total_loss(outputs, targets, LossConfig(num_points=8))
    assert sum(read) == 4 * targets.instance_masks.numel()
    assert max(read) == targets.instance_masks.numel()


def test_reported_terms_carry_no_gradient() -> None:
    outputs, targets = random_batch()
    outputs.mask_logits.requires_grad_()
    loss, terms = total_loss(outputs, targets, LossConfig(num_points=32))
    assert loss.requires_grad
    assert not any(term.requires_grad for term in terms.values())


def test_a_batch_without_dfam_cannot_be_trained_on() -> None:
    outputs, targets = random_batch()
    with pytest.raises(AssertionError, match="DFAM"):
        total_loss(ModelOutputs(mask_logits=outputs.mask_logits, dfam=None), targets, LossConfig())


def test_right_predictions_cost_less_than_wrong_ones() -> None:
    """Both samples' first queries match their targets, and their text, or the other sample's."""
    masks = torch.zeros(2, 8, 8)
    masks[0, :, :4] = 1
    masks[1, :4, :] = 1
    targets = Targets(
        masks=masks,
        instance_masks=masks,
        instance_samples=torch.arange(2),
        is_related=torch.zeros(2, 2, dtype=torch.bool),
    )

    def loss_of(shown: Tensor, text: Tensor) -> float:
        logits = 20 * shown - 10
        prediction = DfamPrediction(logits.unsqueeze(1), 20 * text.unsqueeze(1) - 10, torch.zeros(2, 1, 3))
        outputs = ModelOutputs(mask_logits=logits, dfam=[prediction])
        return total_loss(outputs, targets, LossConfig(num_points=64))[0].item()

    right, swapped = torch.eye(2), torch.eye(2).flip(0)
    # Each wrong text logit of size 10 costs 10: four of them over two matches are 20.
    assert loss_of(masks, swapped) - loss_of(masks, right) == pytest.approx(20, abs=3)
    assert loss_of(masks.flip(0), right) > loss_of(masks, right) + 10


def test_the_loss_is_a_function_of_the_seed() -> None:
    outputs, targets = random_batch()
    losses = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        losses.append(total_loss(outputs, targets, LossConfig(num_points=32))[0].item())
    assert losses[0] == losses[1] != losses[2]

"""The losses (method Sec. 3.5; supplement Sec. 2 and "Implementations").

B samples, E expressions (E = B), Q queries, T target instances over the whole batch, K points,
S side of the loss grid. Points are (x, y) in [0, 1] over the squashed input frame.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ris_cache.store.tables import NO_CATEGORY
from ris_train.config import LossConfig
from ris_train.matching import Matching, match_queries
from ris_train.model.dfam import DfamPrediction
from ris_train.model.segmenter import ModelOutputs


@dataclass(frozen=True, slots=True, kw_only=True)
class Targets:
    """What the model should have said.

    Attributes:
        masks: float[B, S, S] of 0 and 1, union of each sample's targets over the squashed input frame.
        instance_masks: float[T, S, S], each target instance.
        instance_samples: int64[T], the sample that each instance belongs to, in ascending order.
        is_related: bool[B, E], pairs left out of the text loss: expression e describes a target of
            sample b, though it is another sample's. False on the diagonal.
    """

    masks: Tensor
    instance_masks: Tensor
    instance_samples: Tensor
    is_related: Tensor

    @property
    def is_no_target(self) -> Tensor:
        """bool[B], the samples without an instance: their expression refers to nothing."""
        is_no_target = torch.ones(len(self.masks), dtype=torch.bool, device=self.masks.device)
        is_no_target[self.instance_samples] = False
        return is_no_target


def total_loss(
    outputs: ModelOutputs, targets: Targets, config: LossConfig
) -> tuple[Tensor, dict[str, Tensor]]:
    """Add up all losses with their weights.

    L = λ_Dice·Dice(M_SAM) + λ_BCE·BCE(M_SAM) + λ_DFAM·Σ_l(λ_Dice,l·Dice + λ_BCE,l·BCE + λ_VL,l·VL) + λ_nt·CE.
    Samples without a target take part in the text loss and in the no-target head's alone: the mask losses
    are means over the others, 0 if there are none.

    Args:
        outputs: with DFAM's predictions, and with the no-target head's if the model has one.
        targets: of the same batch.
        config: the λ and the points.

    Returns:
        The loss, and its terms before weighting (DFAM's summed over l), detached.
    """
    assert outputs.dfam is not None, "training needs DFAM's predictions"
    is_no_target = targets.is_no_target
    masks = targets.masks[~is_no_target]
    mask_logits = F.interpolate(
        outputs.mask_logits[~is_no_target].unsqueeze(1),
        size=targets.masks.shape[-2:],
        mode="bilinear",
        align_corners=False,
    ).squeeze(1)
    mask_dice = _mean(dice_loss(mask_logits.flatten(1), masks.flatten(1)))
    mask_bce = _mean(F.binary_cross_entropy_with_logits(mask_logits, masks, reduction="none"))
    dfam = [dfam_losses(prediction, targets, config) for prediction in outputs.dfam]
    dfam_dice, dfam_bce, dfam_vl = (torch.stack(terms).sum() for terms in zip(*dfam, strict=True))
    loss = (
        config.mask_dice * mask_dice
        + config.mask_bce * mask_bce
        + config.dfam * (config.dfam_dice * dfam_dice + config.dfam_bce * dfam_bce + config.dfam_vl * dfam_vl)
    )
    terms = {
        "mask_dice": mask_dice,
        "mask_bce": mask_bce,
        "dfam_dice": dfam_dice,
        "dfam_bce": dfam_bce,
        "dfam_vl": dfam_vl,
    }
    if outputs.no_target_logits is not None:
        terms["no_target"] = no_target_loss(outputs.no_target_logits, is_no_target, config.no_target_weights)
        loss = loss + config.no_target * terms["no_target"]
    return loss, {name: term.detach() for name, term in terms.items()}


def dfam_losses(
    prediction: DfamPrediction, targets: Targets, config: LossConfig
) -> tuple[Tensor, Tensor, Tensor]:
    """Match one layer's queries to the targets and compare (Dice, BCE, VL), each a scalar."""
    device = prediction.mask_logits.device
    points = torch.rand(config.num_points, 2, device=device)
    matching = match_queries(prediction, targets.instance_masks, targets.instance_samples, points, config)
    matched = prediction.mask_logits[matching.samples, matching.queries]
    with torch.no_grad():
        points = uncertain_points(
            matched,
            num_points=config.num_points,
            oversample=config.oversample,
            importance_ratio=config.importance_ratio,
        )
        labels = sample_at(targets.instance_masks[matching.instances], points)
    logits = sample_at(matched, points)
    return (
        _mean(dice_loss(logits, labels)),
        _mean(F.binary_cross_entropy_with_logits(logits, labels, reduction="none")),
        text_loss(prediction.text_logits, matching, targets.is_related),
    )


def dice_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Compute 1 − (2·Σpg + 1) / (Σp + Σg + 1) per mask, p = sigmoid(logits) (Milletari et al. 2016).

    Args:
        logits: float[T, K].
        labels: float[T, K] in [0, 1].

    Returns:
        float[T].
    """
    probabilities = logits.sigmoid()
    overlap = (probabilities * labels).sum(dim=1)
    return 1 - (2 * overlap + 1) / (probabilities.sum(dim=1) + labels.sum(dim=1) + 1)


def text_loss(text_logits: Tensor, matching: Matching, is_related: Tensor) -> Tensor:
    """Compute the vision-language loss: binary cross-entropy of every (query, expression) pair.

    The label is 1 where a matched query meets its own sample's expression; an expression that refers to
    nothing is a negative of every query. Nearly all pairs are negative, so the sum over pairs is divided not
    by their number but by that of matched queries, where a sample without any counts as one.

    Args:
        text_logits: float[B, Q, E].
        matching: which queries are matched.
        is_related: bool[B, E], pairs that are no true negatives and are left out.

    Returns:
        A scalar.
    """
    labels = torch.zeros_like(text_logits)
    labels[matching.samples, matching.queries, matching.samples] = 1
    losses = F.binary_cross_entropy_with_logits(text_logits, labels, reduction="none")
    kept = losses.masked_fill(is_related.unsqueeze(1), 0)
    num_unmatched = len(text_logits) - len(torch.unique(matching.samples))
    return kept.sum() / (len(matching.samples) + num_unmatched)


def no_target_loss(logits: Tensor, is_no_target: Tensor, weights: Sequence[float]) -> Tensor:
    """Compute the weighted cross-entropy of the no-target head (supplement Eq. 2), before λ_nt.

    Args:
        logits: float[B, 2], index 1 for "refers to nothing".
        is_no_target: bool[B].
        weights: of the two classes; the weighted sum is divided by the sum of the weights.

    Returns:
        A scalar.
    """
    return F.cross_entropy(logits, is_no_target.long(), weight=logits.new_tensor(weights))


def sample_at(masks: Tensor, points: Tensor) -> Tensor:
    """Read masks at points, bilinearly; beyond the border cells counts as 0.

    Args:
        masks: float[T, H, W].
        points: float[T, K, 2].

    Returns:
        float[T, K].
    """
    grid = 2 * points.unsqueeze(1) - 1
    return F.grid_sample(masks.unsqueeze(1), grid, mode="bilinear", align_corners=False)[:, 0, 0]


def uncertain_points(
    logits: Tensor, *, num_points: int, oversample: float, importance_ratio: float
) -> Tensor:
    """Draw points, most of them where the logits are nearest to 0 (PointRend, Kirillov et al. 2020).

    Args:
        logits: float[T, H, W].
        num_points: K.
        oversample: K·oversample candidates are drawn uniformly.
        importance_ratio: share of K taken from the candidates by uncertainty; the rest is uniform.

    Returns:
        float[T, K, 2].
    """
    num_masks = logits.shape[0]
    num_important = int(importance_ratio * num_points)
    candidates = torch.rand(num_masks, int(num_points * oversample), 2, device=logits.device)
    uncertainty = -sample_at(logits, candidates).abs()
    chosen = uncertainty.topk(num_important, dim=1).indices
    important = candidates.gather(1, chosen.unsqueeze(-1).expand(-1, -1, 2))
    uniform = torch.rand(num_masks, num_points - num_important, 2, device=logits.device)
    return torch.cat([important, uniform], dim=1)


def related_pairs(
    image_ids: Sequence[int],
    ann_ids: Sequence[frozenset[int]],
    category_ids: Sequence[int],
    *,
    exclude: str,
) -> Tensor:
    """Find the pairs that are not true negatives of the text loss.

    An expression that refers to nothing shares neither targets nor a category with any other.

    Args:
        image_ids: of each sample.
        ann_ids: target instances of each sample.
        category_ids: first target category of each sample, `NO_CATEGORY` without one.
        exclude: `referent` or `category`, see `LossConfig.vl_exclude`.

    Returns:
        bool[B, B], false on the diagonal. Instances belong to one image, so sharing one means sharing the
        image as well.
    """
    size = len(image_ids)
    related = torch.zeros(size, size, dtype=torch.bool)
    for first in range(size):
        for second in range(first + 1, size):
            shares_target = image_ids[first] == image_ids[second] and not ann_ids[first].isdisjoint(
                ann_ids[second]
            )
            shares_category = (
                exclude == "category" and category_ids[first] == category_ids[second] != NO_CATEGORY
            )
            related[first, second] = related[second, first] = shares_target or shares_category
    return related


def _mean(values: Tensor) -> Tensor:
    """Average over all values; 0, with gradients of 0, where there are none."""
    return values.sum() / max(values.numel(), 1)

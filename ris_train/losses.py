"""The losses (method Sec. 3.5; supplement Sec. 2 and "Implementations").

B samples, E expressions (E = B), Q queries, T target instances over the whole batch, M matched pairs,
N layers of DFAM, K points, S side of the loss grid. Points are (x, y) in [0, 1] over the squashed input
frame.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ris_cache.store.tables import NO_CATEGORY
from ris_train.config import LossConfig
from ris_train.matching import Matching, match_queries
from ris_train.model.dfam import DfamPrediction
from ris_train.model.segmenter import ModelOutputs
from ris_train.points import sample_at, uncertain_points


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


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """Which part of a batch is compared, where one process computes only some samples of it at once.

    The losses of all parts add up to those of the whole batch: means are taken over the batch, and random
    points are drawn for the whole of it.

    Attributes:
        first_sample: place of the part's first sample in the batch.
        num_samples: of the batch; the E expressions of the text logits.
        num_targeted: samples of the batch that refer to something.
        first_pair: matched pairs of the samples before the part.
        num_pairs: of the batch; a sample of n instances has min(n, Q).
        most_instances: of one sample of the batch.
    """

    first_sample: int
    num_samples: int
    num_targeted: int
    first_pair: int
    num_pairs: int
    most_instances: int

    @classmethod
    def cut(cls, instances: Sequence[int], first_sample: int, *, num_queries: int) -> Part:
        """Describe the part that begins at a sample.

        Args:
            instances: how many target instances each sample of the batch has.
            first_sample: where the part begins.
            num_queries: Q.
        """
        pairs = [min(count, num_queries) for count in instances]
        return cls(
            first_sample=first_sample,
            num_samples=len(pairs),
            num_targeted=sum(count > 0 for count in pairs),
            first_pair=sum(pairs[:first_sample]),
            num_pairs=sum(pairs),
            most_instances=max(instances, default=0),
        )

    @classmethod
    def whole(cls, targets: Targets, *, num_queries: int) -> Part:
        """Describe a batch that is computed at once."""
        instances = torch.bincount(targets.instance_samples, minlength=len(targets.masks))
        return cls.cut(instances.tolist(), 0, num_queries=num_queries)


def total_loss(
    outputs: ModelOutputs,
    targets: Targets,
    config: LossConfig,
    *,
    part: Part | None = None,
    generator: torch.Generator | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Add up all losses with their weights.

    L = λ_Dice·Dice(M_SAM) + λ_BCE·BCE(M_SAM) + λ_DFAM·Σ_l(λ_Dice,l·Dice + λ_BCE,l·BCE + λ_VL,l·VL) + λ_nt·CE.
    Samples without a target take part in the text loss and in the no-target head's alone: the mask losses
    are means over the others, 0 if there are none; with `config.mask_average` "all", M_SAM's are divided by
    the number of all samples instead.

    Args:
        outputs: with DFAM's predictions, and with the no-target head's if the model has one.
        targets: of the same batch.
        config: the λ and the points.
        part: what these samples are of the batch; they are the whole of it by default.
        generator: where random points are drawn from, on the device of the outputs; torch's own by default.
            The parts of a batch are given generators of the same state.

    Returns:
        The loss, and its terms before weighting (DFAM's summed over l), detached.
    """
    assert outputs.dfam is not None, "training needs DFAM's predictions"
    part = part or Part.whole(targets, num_queries=outputs.dfam[0].mask_logits.shape[1])
    is_no_target = targets.is_no_target
    mask_logits = F.interpolate(
        outputs.mask_logits.unsqueeze(1), size=targets.masks.shape[-2:], mode="bilinear", align_corners=False
    ).squeeze(1)
    num_masks = part.num_samples if config.mask_average == "all" else part.num_targeted
    # Losses of the others are set to 0, as choosing rows by a mask would wait for the device.
    dice = dice_loss(mask_logits.flatten(1), targets.masks.flatten(1))
    bce = F.binary_cross_entropy_with_logits(mask_logits, targets.masks, reduction="none").mean(dim=(1, 2))
    mask_dice = _mean(dice.masked_fill(is_no_target, 0), num_masks)
    mask_bce = _mean(bce.masked_fill(is_no_target, 0), num_masks)
    dfam_dice, dfam_bce, dfam_vl = dfam_losses(outputs.dfam, targets, config, part, generator)
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
        terms["no_target"] = no_target_loss(
            outputs.no_target_logits, is_no_target, config.no_target_weights, part
        )
        loss = loss + config.no_target * terms["no_target"]
    return loss, {name: term.detach() for name, term in terms.items()}


def dfam_losses(
    predictions: Sequence[DfamPrediction],
    targets: Targets,
    config: LossConfig,
    part: Part,
    generator: torch.Generator | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Match each layer's queries to the targets and compare: Dice, BCE and VL, summed over the layers."""
    device = targets.masks.device
    points = torch.rand(len(predictions), config.num_points, 2, device=device, generator=generator)
    matchings = match_queries(
        predictions,
        targets.instance_masks,
        targets.instance_samples,
        points,
        config,
        first_sample=part.first_sample,
        most_instances=part.most_instances,
    )
    pairs = list(zip(predictions, matchings, strict=True))
    # From here on masks of all layers together, [N, M, …].
    matched = torch.stack([layer.mask_logits[found.samples, found.queries] for layer, found in pairs])
    with torch.no_grad():
        points = uncertain_points(
            matched,
            num_points=config.num_points,
            oversample=config.oversample,
            importance_ratio=config.importance_ratio,
            first=part.first_pair,
            total=part.num_pairs,
            generator=generator,
        )
        # The masks of the targets are large, so those of one layer are taken at a time.
        labels = torch.cat(
            [
                sample_at(_matched_masks(targets, found), layer_points)
                for found, layer_points in zip(matchings, points, strict=True)
            ]
        )
    logits = sample_at(matched, points).flatten(0, 1)
    vl = [
        text_loss(layer.text_logits, found, targets.is_related, part, average=config.vl_average)
        for layer, found in pairs
    ]
    return (
        _mean(dice_loss(logits, labels), part.num_pairs),
        _mean(F.binary_cross_entropy_with_logits(logits, labels, reduction="none"), part.num_pairs),
        torch.stack(vl).sum(),
    )


def _matched_masks(targets: Targets, matching: Matching) -> Tensor:
    """float[M, S, S], not copied where every instance is matched: pairs come by instance."""
    if len(matching.instances) == len(targets.instance_masks):
        return targets.instance_masks
    return targets.instance_masks[matching.instances]


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


def text_loss(
    text_logits: Tensor, matching: Matching, is_related: Tensor, part: Part, *, average: str = "matched"
) -> Tensor:
    """Compute the vision-language loss: binary cross-entropy of every (query, expression) pair.

    The label is 1 where a matched query meets its own sample's expression; an expression that refers to
    nothing is a negative of every query. Nearly all pairs are negative, so by default the sum over pairs is
    divided not by their number but by that of matched queries, where a sample without any counts as one; so
    are sigmoid losses between images and texts (SigLIP, Zhai et al. 2023), whose learned bias DFAM has.

    Args:
        text_logits: float[B, Q, E].
        matching: which queries are matched.
        is_related: bool[B, E], pairs that are no true negatives and are left out.
        part: what the B samples are of the batch whose E expressions they meet.
        average: `matched`, or `pairs` for a mean over all pairs of the batch; see `LossConfig.vl_average`.

    Returns:
        A scalar.
    """
    labels = torch.zeros_like(text_logits)
    labels[matching.samples, matching.queries, matching.samples + part.first_sample] = 1
    losses = F.binary_cross_entropy_with_logits(text_logits, labels, reduction="none")
    kept = losses.masked_fill(is_related.unsqueeze(1), 0)
    if average == "pairs":
        return kept.sum() / (part.num_samples * text_logits[0].numel())
    return kept.sum() / (part.num_pairs + part.num_samples - part.num_targeted)


def no_target_loss(logits: Tensor, is_no_target: Tensor, weights: Sequence[float], part: Part) -> Tensor:
    """Compute the weighted cross-entropy of the no-target head (supplement Eq. 2), before λ_nt.

    Args:
        logits: float[B, 2], index 1 for "refers to nothing".
        is_no_target: bool[B].
        weights: of the two classes; the weighted sum is divided by the sum of the weights.
        part: what the B samples are of the batch that this sum is over.

    Returns:
        A scalar.
    """
    labels = is_no_target.long()
    class_weights = torch.tensor(weights, dtype=logits.dtype).to(logits.device, non_blocking=True)
    num_without = part.num_samples - part.num_targeted
    total = part.num_targeted * weights[0] + num_without * weights[1]
    return F.cross_entropy(logits, labels, weight=class_weights, reduction="sum") / total


def related_pairs(
    image_ids: Sequence[int],
    ann_ids: Sequence[frozenset[int]],
    category_ids: Sequence[int],
    *,
    exclude: str,
) -> Tensor:
    """Find the pairs that are not true negatives of the text loss.

    An expression that refers to nothing shares neither targets nor a category with any other. With `none`,
    no pair is left out.

    Args:
        image_ids: of each sample.
        ann_ids: target instances of each sample.
        category_ids: first target category of each sample, `NO_CATEGORY` without one.
        exclude: `referent`, `category` or `none`, see `LossConfig.vl_exclude`.

    Returns:
        bool[B, B], false on the diagonal. Instances belong to one image, so sharing one means sharing the
        image as well.
    """
    size = len(image_ids)
    related = np.zeros((size, size), dtype=bool)
    if exclude == "none" or not size:
        return torch.from_numpy(related)
    # Which sample has which target, a target being a pair of image and instance: two share one where the
    # product counts any.
    owners = np.repeat(np.arange(size), [len(ids) for ids in ann_ids])
    images = np.asarray(image_ids, dtype=np.int64)[owners]
    instances = np.fromiter(itertools.chain.from_iterable(ann_ids), dtype=np.int64, count=len(owners))
    found, columns = np.unique(np.stack([images, instances]), axis=1, return_inverse=True)
    has_target = np.zeros((size, found.shape[1]), dtype=np.float32)
    has_target[owners, columns.reshape(-1)] = 1
    related = has_target @ has_target.T > 0
    if exclude == "category":
        categories = np.asarray(category_ids, dtype=np.int64)
        related |= (categories[:, None] == categories) & (categories != NO_CATEGORY)
    np.fill_diagonal(related, False)
    return torch.from_numpy(related)


def _mean(values: Tensor, num_rows: int) -> Tensor:
    """Average as if there were `num_rows` rows; 0, with gradients of 0, where there are none.

    Args:
        values: [n, …], rows of the same size; those that are not here count 0.
        num_rows: rows of the whole batch, at least n.
    """
    return values.sum() / max(num_rows * values[:1].numel(), num_rows, 1)

"""Assign each target instance to one query of its sample (Hungarian; DETR, Carion et al. 2020).

B samples, Q queries, T target instances over the whole batch, K points.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from ris_cache.errors import NonFiniteError
from ris_train.config import LossConfig
from ris_train.model.dfam import DfamPrediction


@dataclass(frozen=True, slots=True, kw_only=True)
class Matching:
    """Matched pairs, one per target instance (or per query, should a sample have fewer queries).

    Attributes:
        samples: int64[M], the sample of each pair.
        queries: int64[M], the query within that sample.
        instances: int64[M], index into the batch's T instances.
    """

    samples: Tensor
    queries: Tensor
    instances: Tensor


@torch.no_grad()
def match_queries(
    prediction: DfamPrediction,
    instance_masks: Tensor,
    instance_samples: Tensor,
    points: Tensor,
    config: LossConfig,
) -> Matching:
    """Find the assignment of least cost within each sample.

    Args:
        prediction: one layer's.
        instance_masks: float[T, S, S].
        instance_samples: int64[T], ascending.
        points: float[K, 2], where masks are compared; shared by all queries and targets.
        config: the weights λ_Dice,l, λ_BCE,l and λ_VL,l of the cost, those of the loss.

    Raises:
        NonFiniteError: the cost is not finite, since the model's outputs are not.
    """
    costs = (
        matching_costs(prediction, instance_masks, instance_samples, points, config).cpu().double().numpy()
    )
    if not np.isfinite(costs).all():
        raise NonFiniteError("The matching cost is not finite: the model's outputs have diverged.")
    samples = instance_samples.cpu().numpy()
    pairs: list[tuple[int, int, int]] = []
    for sample in np.unique(samples):
        instances = np.flatnonzero(samples == sample)
        rows, queries = linear_sum_assignment(costs[instances])
        pairs += [
            (int(sample), int(query), int(instances[row])) for row, query in zip(rows, queries, strict=True)
        ]
    columns = torch.tensor(pairs, dtype=torch.int64).reshape(-1, 3).to(instance_masks.device)
    return Matching(samples=columns[:, 0], queries=columns[:, 1], instances=columns[:, 2])


def matching_costs(
    prediction: DfamPrediction,
    instance_masks: Tensor,
    instance_samples: Tensor,
    points: Tensor,
    config: LossConfig,
) -> Tensor:
    """Cost of each instance for each query of its own sample.

    Returns:
        float[T, Q]: λ_Dice,l·Dice + λ_BCE,l·BCE + λ_VL,l·VL, the last for "this query is what its own
        sample's expression refers to".
    """
    grid = (2 * points - 1).view(1, -1, 1, 2)
    mask_logits = at_least_float32(prediction.mask_logits)
    logits = _read(mask_logits, grid)[instance_samples]
    labels = _read(instance_masks.unsqueeze(1).to(mask_logits.dtype), grid).squeeze(1)
    num_points = points.shape[0]

    probabilities = logits.sigmoid()
    overlap = torch.einsum("tqk,tk->tq", probabilities, labels)
    dice = 1 - (2 * overlap + 1) / (probabilities.sum(-1) + labels.sum(-1, keepdim=True) + 1)
    # BCE(x, g) = softplus(x) − x·g
    bce = (F.softplus(logits).sum(-1) - torch.einsum("tqk,tk->tq", logits, labels)) / num_points
    own = at_least_float32(prediction.text_logits)[instance_samples, :, instance_samples]
    return config.dfam_dice * dice + config.dfam_bce * bce + config.dfam_vl * F.softplus(-own)


def at_least_float32(tensor: Tensor) -> Tensor:
    """Take half precision to float32; wider tensors stay as they are."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def _read(masks: Tensor, grid: Tensor) -> Tensor:
    """float[B, N, H, W] at shared points → float[B, N, K]."""
    expanded = grid.expand(masks.shape[0], -1, -1, -1)
    return F.grid_sample(masks, expanded, mode="bilinear", align_corners=False).squeeze(-1)

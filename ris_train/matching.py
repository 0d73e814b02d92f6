"""Assign each target instance to one query of its sample (Hungarian; DETR, Carion et al. 2020).

Where every sample has one instance at most, each takes its cheapest query, and the host need not wait for the
device. Otherwise all layers' costs go to the host at once, and a layer's samples are matched at once: in one
sparse graph, in which an instance meets its own sample's queries alone.

B samples, Q queries, T target instances over the whole batch, N layers, K points, P side of predicted masks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from scipy.sparse import csr_matrix
from scipy.sparse.csgraph import min_weight_full_bipartite_matching
from torch import Tensor

from ris_cache.errors import NonFiniteError
from ris_train.config import LossConfig
from ris_train.model.dfam import DfamPrediction


@dataclass(frozen=True, slots=True, kw_only=True)
class Matching:
    """Matched pairs, one per target instance (or per query, should a sample have fewer queries), by sample.

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
    predictions: Sequence[DfamPrediction],
    instance_masks: Tensor,
    instance_samples: Tensor,
    points: Tensor,
    config: LossConfig,
    *,
    first_sample: int = 0,
    most_instances: int | None = None,
) -> list[Matching]:
    """Find the assignment of least cost within each sample, for each layer by itself.

    Args:
        predictions: of the N layers.
        instance_masks: float[T, S, S].
        instance_samples: int64[T], ascending.
        points: float[N, K, 2], where a layer's masks are compared; shared by all queries and targets.
        config: the weights λ_Dice,l, λ_BCE,l and λ_VL,l of the cost, those of the loss.
        first_sample: place of these samples' first in the batch, whose expressions the text logits are for.
        most_instances: of one sample, at most, where that is known on the host.

    Returns:
        Each layer's pairs, by instance; all layers have as many, of the same samples.

    Raises:
        NonFiniteError: the cost is not finite, since the model's outputs are not. Where every sample has one
            instance at most, that is left to the losses to show.
    """
    is_single = most_instances is not None and most_instances <= 1
    costs = [
        matching_costs(
            prediction,
            instance_masks,
            instance_samples,
            layer_points,
            config,
            first_sample=first_sample,
            is_one_each=is_single and len(instance_samples) == len(prediction.mask_logits),
        )
        for prediction, layer_points in zip(predictions, points, strict=True)
    ]
    if is_single:
        all_instances = torch.arange(len(instance_samples), device=instance_samples.device)
        return [
            Matching(samples=instance_samples, queries=cost.argmin(dim=1), instances=all_instances)
            for cost in costs
        ]
    # The host waits for the device: for all it needs, in one piece.
    table = (
        torch.cat([*costs, instance_samples.unsqueeze(1).to(costs[0].dtype)], dim=1).cpu().double().numpy()
    )
    if not np.isfinite(table).all():
        raise NonFiniteError("The matching cost is not finite: the model's outputs have diverged.")
    samples = table[:, -1].astype(np.int64)
    num_queries = costs[0].shape[1]
    pairs = [
        assign(table[:, layer * num_queries : (layer + 1) * num_queries], samples)
        for layer in range(len(costs))
    ]
    columns = torch.from_numpy(np.stack(pairs)).to(instance_masks.device, non_blocking=True)
    return [Matching(samples=layer[0], queries=layer[1], instances=layer[2]) for layer in columns]


def assign(costs: npt.NDArray[np.float64], samples: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """Assign instances to queries of their own sample, at the least cost.

    Args:
        costs: float64[T, Q], finite.
        samples: int64[T], of each instance, ascending.

    Returns:
        int64[3, M]: sample, query and instance of each pair, by instance.
    """
    num_instances, num_queries = costs.shape
    if num_instances == 0:
        return np.empty((3, 0), dtype=np.int64)
    _, own, counts = np.unique(samples, return_inverse=True, return_counts=True)
    most = int(counts.max())
    siblings = counts[own][:, None]
    # Of n instances, each needs only its n cheapest queries: the others of its sample cannot take them all.
    nearest = np.argsort(costs, axis=1)[:, :most]
    rows, ranks = (np.arange(nearest.shape[1]) < siblings).nonzero()
    # Instances beyond the queries stay unmatched: each takes one of as many further columns of its sample,
    # which cost all of its instances the same, so that they decide nothing.
    more_rows, more = (np.arange(num_queries, max(most, num_queries)) < siblings).nonzero()
    columns = np.concatenate([nearest[rows, ranks], num_queries + more])
    prices = np.concatenate([costs[rows, nearest[rows, ranks]], np.full(len(more), costs.max())])
    rows = np.concatenate([rows, more_rows])
    width = max(most, num_queries)
    # Every instance is assigned, so that all prices may be raised alike; one of 0 would be no edge.
    edges = (prices - prices.min() + 1, (rows, own[rows] * width + columns))
    graph = csr_matrix(edges, shape=(num_instances, len(counts) * width))
    instances, found = min_weight_full_bipartite_matching(graph)
    pairs = np.stack([samples[instances], found - own[instances] * width, instances]).astype(np.int64)
    return pairs[:, pairs[1] < num_queries]


def matching_costs(
    prediction: DfamPrediction,
    instance_masks: Tensor,
    instance_samples: Tensor,
    points: Tensor,
    config: LossConfig,
    *,
    first_sample: int = 0,
    is_one_each: bool = False,
) -> Tensor:
    """Cost of each instance for each query of its own sample; arguments as in `match_queries`, of one layer.

    Args:
        is_one_each: whether every sample has just one instance.

    Returns:
        float[T, Q]: λ_Dice,l·Dice + λ_BCE,l·BCE + λ_VL,l·VL, the last for "this query is what its own
        sample's expression refers to".
    """
    grid = (2 * points - 1).view(1, -1, 1, 2)
    mask_logits = at_least_float32(prediction.mask_logits)
    logits = _read(mask_logits, grid)
    if not is_one_each:  # which would copy the logits as they are
        logits = logits[instance_samples]
    labels = _read(instance_masks.unsqueeze(1).to(mask_logits.dtype), grid).squeeze(1)
    num_points = points.shape[0]

    probabilities = logits.sigmoid()
    overlap = torch.einsum("tqk,tk->tq", probabilities, labels)
    dice = 1 - (2 * overlap + 1) / (probabilities.sum(-1) + labels.sum(-1, keepdim=True) + 1)
    # BCE(x, g) = softplus(x) − x·g
    bce = (F.softplus(logits).sum(-1) - torch.einsum("tqk,tk->tq", logits, labels)) / num_points
    own = at_least_float32(prediction.text_logits)[instance_samples, :, instance_samples + first_sample]
    return config.dfam_dice * dice + config.dfam_bce * bce + config.dfam_vl * F.softplus(-own)


def at_least_float32(tensor: Tensor) -> Tensor:
    """Take half precision to float32; wider tensors stay as they are."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def _read(masks: Tensor, grid: Tensor) -> Tensor:
    """float[B, N, H, W] at shared points → float[B, N, K]."""
    expanded = grid.expand(masks.shape[0], -1, -1, -1)
    return F.grid_sample(masks, expanded, mode="bilinear", align_corners=False).squeeze(-1)

"""Points that masks are compared at, and masks read there.

M masks, K points as (x, y) in [0, 1] over a mask.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def sample_at(masks: Tensor, points: Tensor) -> Tensor:
    """Read masks at points, bilinearly; beyond the border cells counts as 0.

    Args:
        masks: float[…, H, W].
        points: float[…, K, 2].

    Returns:
        float[…, K].
    """
    *leading, num_points, _ = points.shape
    grid = 2 * points.reshape(-1, 1, num_points, 2) - 1
    flat = masks.reshape(-1, 1, *masks.shape[-2:])
    return F.grid_sample(flat, grid, mode="bilinear", align_corners=False).view(*leading, num_points)


def uncertain_points(
    logits: Tensor,
    *,
    num_points: int,
    oversample: float,
    importance_ratio: float,
    first: int = 0,
    total: int | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Draw points, most of them where the logits are nearest to 0 (PointRend, Kirillov et al. 2020).

    Args:
        logits: float[…, M, H, W].
        num_points: K.
        oversample: K·oversample candidates are drawn uniformly.
        importance_ratio: share of K taken from the candidates by uncertainty; the rest is uniform.
        first: masks of the batch before these M; theirs are drawn too, so that all parts draw alike.
        total: masks of the batch; M by default.
        generator: where to draw from, on the device of the logits; torch's own by default.

    Returns:
        float[…, M, K, 2].
    """
    *leading, num_masks, _, _ = logits.shape
    num_important = int(importance_ratio * num_points)

    def draw(count: int) -> Tensor:
        shape = (*leading, total or num_masks, count, 2)
        drawn = torch.rand(*shape, device=logits.device, generator=generator)
        return drawn[..., first : first + num_masks, :, :]

    candidates = draw(int(num_points * oversample))
    uncertainty = -sample_at(logits, candidates).abs()
    chosen = uncertainty.topk(num_important, dim=-1).indices
    important = candidates.gather(-2, chosen.unsqueeze(-1).expand(*chosen.shape, 2))
    return torch.cat([important, draw(num_points - num_important)], dim=-2)

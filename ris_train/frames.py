"""From the squashed input frame to the grid on which masks are compared.

B samples, S side of the logits' grid, H and W the image's own size, h and w the size of a grid.
"""

from __future__ import annotations

import math

import torch.nn.functional as F
from torch import Tensor


def to_grid(mask_logits: Tensor, size: tuple[int, int]) -> Tensor:
    """Resize logits over the squashed input frame to a grid over the same frame.

    Logits, not masks, are resized (bilinear, half-pixel centres), so the outline is not stair-stepped. To the
    image's own size this undoes the squash.

    Args:
        mask_logits: float[B, S, S] over the squashed input frame.
        size: (h, w) of the grid.

    Returns:
        float32[B, h, w].
    """
    resized = F.interpolate(mask_logits[:, None].float(), size=size, mode="bilinear", align_corners=False)
    return resized[:, 0]


def logit_of(probability: float) -> float:
    """Return the logit of a probability in (0, 1): a pixel is more probable if its logit is greater."""
    return math.log(probability / (1 - probability))


def to_original_frame(mask_logits: Tensor, size: tuple[int, int]) -> Tensor:
    """Undo the squash, then decide each pixel by the sign of its logit.

    Args:
        mask_logits: float[S, S] over the squashed input frame.
        size: (H, W) of the original frame.

    Returns:
        bool[H, W], logit > 0.
    """
    return to_grid(mask_logits[None], size)[0] > 0

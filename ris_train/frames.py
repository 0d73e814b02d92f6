"""From the squashed input frame back to the original one.

S side of the logits' grid, H and W the image's own size.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def to_original_frame(mask_logits: Tensor, size: tuple[int, int]) -> Tensor:
    """Undo the squash: resize logits to the image's own size, then decide each pixel by its sign.

    Logits, not masks, are resized (bilinear, half-pixel centres), so the outline is not stair-stepped.

    Args:
        mask_logits: float[S, S] over the squashed input frame.
        size: (H, W) of the original frame.

    Returns:
        bool[H, W], logit > 0.
    """
    resized = F.interpolate(mask_logits[None, None].float(), size=size, mode="bilinear", align_corners=False)
    return resized[0, 0] > 0

"""Layer norm over the channels of feature maps."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn


class ChannelLayerNorm(nn.LayerNorm):
    """Layer norm over C of [B, C, H, W], each cell on its own."""

    def forward(self, input: Tensor) -> Tensor:
        """Normalise float[B, C, H, W] over its channels; same shape."""
        cells_last = input.permute(0, 2, 3, 1)
        normed = F.layer_norm(cells_last, self.normalized_shape, self.weight, self.bias, self.eps)
        return normed.permute(0, 3, 1, 2)

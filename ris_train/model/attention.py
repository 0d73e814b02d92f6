"""Multi-head attention with a boolean mask, as DFAM and the sparse prompt use it.

B samples, I images, Q queries, K keys, C channels, H heads.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from ris_train.model.rows import per_sample


class Attention(nn.Module):
    """Multi-head attention over separate query, key and value inputs; 4·(C² + C) parameters.

    Args:
        channels: C, a multiple of `num_heads`.
        num_heads: H.
    """

    def __init__(self, channels: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.q_proj = nn.Linear(channels, channels)
        self.k_proj = nn.Linear(channels, channels)
        self.v_proj = nn.Linear(channels, channels)
        self.out_proj = nn.Linear(channels, channels)
        for projection in (self.q_proj, self.k_proj, self.v_proj, self.out_proj):
            nn.init.xavier_uniform_(projection.weight)
            nn.init.zeros_(projection.bias)

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Tensor | None = None,
        *,
        image_index: Tensor | None = None,
    ) -> Tensor:
        """Attend.

        Args:
            query: float[B, Q, C].
            key: float[B, K, C].
            value: float[B, K, C].
            mask: bool, broadcastable to [B, H, Q, K], true where a query may attend; every query needs
                at least one true key.
            image_index: int64[B]; given, key and value hold one row per image, [I, K, C], which is projected
                once, and image_index says which row each sample attends to.

        Returns:
            float[B, Q, C].
        """
        attended = F.scaled_dot_product_attention(
            self._split(self.q_proj(query)),
            self._split(per_sample(self.k_proj(key), image_index)),
            self._split(per_sample(self.v_proj(value), image_index)),
            attn_mask=mask,
        )
        merged: Tensor = self.out_proj(attended.transpose(1, 2).flatten(2))
        return merged

    def _split(self, tokens: Tensor) -> Tensor:
        """[B, T, C] → [B, H, T, C/H]."""
        batch_size, length, channels = tokens.shape
        heads = tokens.reshape(batch_size, length, self.num_heads, channels // self.num_heads)
        return heads.transpose(1, 2)

"""Pixel-word attention: each CLIP cell gathers the words that concern it (PWAM of LAVT, Yang et al. 2022).

B samples, I images, N = P_clip² patch tokens, L words, D_clip channels of the patch tokens, C unified width.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from ris_train.model.rows import per_sample


class PixelWordAttention(nn.Module):
    """Fuse patch tokens with word features; 787,968 parameters at D_clip 1024, C 256.

    Linear layers over tokens stand for the 1 × 1 convolutions of the original; instance norm is over the N
    cells of one image and one channel and has no parameters.

    Args:
        clip_width: D_clip.
        channels: C.
    """

    def __init__(self, clip_width: int, channels: int) -> None:
        super().__init__()
        self.query = nn.Linear(clip_width, channels)
        self.key = nn.Linear(channels, channels)
        self.value = nn.Linear(channels, channels)
        self.attended = nn.Linear(channels, channels)
        self.gate = nn.Linear(clip_width, channels)
        self.output = nn.Linear(channels, channels)

    def forward(
        self,
        clip_features: Tensor,
        words: Tensor,
        text_mask: Tensor,
        *,
        image_index: Tensor | None = None,
    ) -> Tensor:
        """Fuse.

        Args:
            clip_features: float[B, N, D_clip], N a square number, cells row by row.
            words: float[B, L, C].
            text_mask: bool[B, L], true on real tokens; padding gets exactly no weight.
            image_index: int64[B]; given, clip_features hold one row per image, [I, N, D_clip], and what
                depends on them alone is computed once per image.

        Returns:
            float[B, C, P_clip, P_clip], F_fused.
        """
        query = per_sample(_instance_norm(self.query(clip_features)), image_index).unsqueeze(1)
        gate = per_sample(F.gelu(self.gate(clip_features)), image_index)
        gathered = F.scaled_dot_product_attention(
            query,
            self.key(words).unsqueeze(1),
            self.value(words).unsqueeze(1),
            attn_mask=text_mask[:, None, None, :],
        ).squeeze(1)
        gathered = _instance_norm(self.attended(gathered))
        fused = F.gelu(self.output(gathered * gate))
        grid = int(clip_features.shape[1] ** 0.5)
        return fused.transpose(1, 2).reshape(fused.shape[0], -1, grid, grid)


def _instance_norm(tokens: Tensor) -> Tensor:
    """Normalise float[B, N, C] over N, per sample and channel."""
    return F.instance_norm(tokens.transpose(1, 2)).transpose(1, 2)

"""Pixel decoder: deformable attention across the CLIP pyramid, then a top-down path (Mask2Former's design).

B samples, C channels, levels i = 0 (finest) … 2 (coarsest) of size H_i × W_i, S = Σ H_i·W_i cells,
M heads, K sampling points.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ris_cache.encoders.kept import kept
from ris_cache.encoders.positions import sine_positions
from ris_train.model.deformable import DeformableAttention

NUM_LEVELS = 3


class PixelDecoderOutput(NamedTuple):
    """What the pixel decoder gives.

    Attributes:
        dense_prompt: float[B, C, H_0, W_0], p_dense.
        levels: float[B, C, H_i, W_i], encoded levels, finest first.
    """

    dense_prompt: Tensor
    levels: list[Tensor]


class PixelDecoder(nn.Module):
    """Encode three levels jointly, then merge them top-down into one map.

    Args:
        channels: C.
        num_layers: deformable encoder layers.
        num_heads: M.
        num_points: K, sampling points per head and level.
        ffn_dim: hidden width of the feed-forward blocks.
        norm_groups: groups of the group norms.
    """

    def __init__(
        self,
        channels: int,
        *,
        num_layers: int,
        num_heads: int,
        num_points: int,
        ffn_dim: int,
        norm_groups: int,
    ) -> None:
        super().__init__()
        self.input_projections = nn.ModuleList(
            nn.Sequential(nn.Conv2d(channels, channels, kernel_size=1), nn.GroupNorm(norm_groups, channels))
            for _ in range(NUM_LEVELS)
        )
        self.level_embed = nn.Parameter(torch.empty(NUM_LEVELS, channels))
        self.layers = nn.ModuleList(
            DeformableEncoderLayer(channels, num_heads=num_heads, num_points=num_points, ffn_dim=ffn_dim)
            for _ in range(num_layers)
        )
        self.laterals = nn.ModuleList(
            _normed_conv(channels, norm_groups, kernel_size=1) for _ in range(NUM_LEVELS)
        )
        self.outputs = nn.ModuleList(
            _normed_conv(channels, norm_groups, kernel_size=3) for _ in range(NUM_LEVELS)
        )
        self.dense_projection = nn.Conv2d(channels, channels, kernel_size=1)
        nn.init.normal_(self.level_embed)
        for projection in self.input_projections:
            nn.init.xavier_uniform_(projection[0].weight)  # type: ignore[index]
            nn.init.zeros_(projection[0].bias)  # type: ignore[index]

    def forward(self, pyramid: Sequence[Tensor]) -> PixelDecoderOutput:
        """Decode.

        Args:
            pyramid: three maps float[B, C, H_i, W_i], finest first.
        """
        projected = [project(level) for project, level in zip(self.input_projections, pyramid, strict=True)]
        sizes = tuple((level.shape[2], level.shape[3]) for level in projected)
        tokens = torch.cat([_to_tokens(level) for level in projected], dim=1)
        positions = torch.cat(
            [
                _to_tokens(sine_positions(height, width, tokens.shape[2], device=tokens.device)) + embed
                for (height, width), embed in zip(sizes, self.level_embed, strict=True)
            ],
            dim=1,
        ).to(tokens.dtype)[0]
        centres = _cell_centres(sizes, device=tokens.device)
        for layer in self.layers:
            tokens = layer(tokens, positions, centres, sizes)
        parts = torch.split(tokens, [height * width for height, width in sizes], dim=1)
        levels = [
            part.transpose(1, 2).reshape(part.shape[0], -1, height, width)
            for part, (height, width) in zip(parts, sizes, strict=True)
        ]
        return PixelDecoderOutput(self._merge(levels), levels)

    def _merge(self, levels: list[Tensor]) -> Tensor:
        """Top-down path: from the coarsest level to the finest; returns float[B, C, H_0, W_0]."""
        merged: Tensor | None = None
        for level, lateral, output in zip(
            reversed(levels), reversed(self.laterals), reversed(self.outputs), strict=True
        ):
            current = lateral(level)
            if merged is not None:
                current = current + F.interpolate(
                    merged, size=current.shape[-2:], mode="bilinear", align_corners=False
                )
            merged = F.relu(output(current))
        dense: Tensor = self.dense_projection(merged)
        return dense


class DeformableEncoderLayer(nn.Module):
    """Deformable self-attention and a feed-forward block, both post-norm.

    Args:
        channels: C.
        num_heads: M.
        num_points: K.
        ffn_dim: hidden width of the feed-forward block.
    """

    def __init__(self, channels: int, *, num_heads: int, num_points: int, ffn_dim: int) -> None:
        super().__init__()
        self.attention = DeformableAttention(
            channels, num_heads=num_heads, num_levels=NUM_LEVELS, num_points=num_points
        )
        self.attention_norm = nn.LayerNorm(channels)
        self.ffn = nn.Sequential(nn.Linear(channels, ffn_dim), nn.ReLU(), nn.Linear(ffn_dim, channels))
        self.ffn_norm = nn.LayerNorm(channels)

    def forward(
        self, tokens: Tensor, positions: Tensor, centres: Tensor, sizes: Sequence[tuple[int, int]]
    ) -> Tensor:
        """Update float[B, S, C] tokens; arguments as `DeformableAttention.forward` takes them."""
        attended = self.attention(tokens, positions, centres, sizes)
        tokens = self.attention_norm(tokens + attended)
        normed: Tensor = self.ffn_norm(tokens + self.ffn(tokens))
        return normed


def _normed_conv(channels: int, norm_groups: int, *, kernel_size: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(channels, channels, kernel_size, padding=kernel_size // 2, bias=False),
        nn.GroupNorm(norm_groups, channels),
    )


def _to_tokens(level: Tensor) -> Tensor:
    """[B, C, H, W] → [B, H·W, C]."""
    return level.flatten(2).transpose(1, 2)


@kept
def _cell_centres(sizes: tuple[tuple[int, int], ...], *, device: torch.device) -> Tensor:
    """Centre of every cell, level after level, as (x, y) in [0, 1]: float32[S, 2]; not to be written to."""
    centres = []
    for height, width in sizes:
        y, x = torch.meshgrid(
            (torch.arange(height, device=device, dtype=torch.float32) + 0.5) / height,
            (torch.arange(width, device=device, dtype=torch.float32) + 0.5) / width,
            indexing="ij",
        )
        centres.append(torch.stack([x, y], dim=-1).flatten(0, 1))
    return torch.cat(centres)

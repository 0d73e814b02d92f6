"""Two-dimensional sine positions, as DETR defines them."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ris_cache.encoders.kept import kept


@kept
def sine_positions(height: int, width: int, channels: int, *, device: torch.device) -> Tensor:
    """Encode each cell's normalised position by sines and cosines (DETR, Sec. 3.2 and its supplement).

    Args:
        height: H of the grid.
        width: W of the grid.
        channels: C, a multiple of 4; the first half encodes y, the second x.
        device: where the result is made.

    Returns:
        float32[1, C, H, W]; kept, not to be written to.
    """
    frequencies = channels // 2
    index = torch.arange(frequencies, device=device)
    period = 10000.0 ** (2 * (index // 2).to(torch.float32) / frequencies)

    def encode(length: int) -> Tensor:
        # Cells count from 1 to length, scaled so that the last is 2π, as the original does.
        position = torch.arange(1, length + 1, device=device, dtype=torch.float32) * (
            2 * math.pi / (length + 1e-6)
        )
        angle = position[:, None] / period
        return torch.where(index % 2 == 0, angle.sin(), angle.cos())

    y = encode(height)[:, None, :].expand(height, width, frequencies)
    x = encode(width)[None, :, :].expand(height, width, frequencies)
    return torch.cat([y, x], dim=-1).permute(2, 0, 1).unsqueeze(0)


RANDOM_POSITION_STD = 0.29
"""Scale of position embeddings in random encoders: half of what a patch of unit variance embeds to (1/√3)."""


def random_position_embedding(grid: int, channels: int) -> Tensor:
    """Draw a position embedding that tells where a token is, as trained ones do.

    Trained position embeddings are smooth and as large as content; what the libraries draw is neither, and
    random encoders would hide from the trainer where anything is. So: sine positions, plus small noise from
    torch's current generator.

    Returns:
        float32[grid², channels], row by row.
    """
    sines = sine_positions(grid, grid, channels, device=torch.device("cpu"))[0].flatten(1).T
    smooth = sines * (RANDOM_POSITION_STD / sines.std())
    return smooth + 0.1 * RANDOM_POSITION_STD * torch.randn(grid * grid, channels)

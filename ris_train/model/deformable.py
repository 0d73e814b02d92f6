"""Multi-scale deformable attention (Deformable DETR, Zhu et al. 2021), laid out so that nothing is moved.

Every cell asks a few points of every level. Projections multiply from the left and so put the cells last,
[B, channels, S]. Heads, levels and points are then parts of that tensor as it lies, which `grid_sample` reads
and writes in long rows, and sums over points run over such rows. With the cells first, each of these steps
would copy, and the rows would be as short as the number of points.

B samples, C channels, M heads, L levels of size h × w, S = Σ h·w cells, K points.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ris_cache.encoders.kept import kept


class DeformableAttention(nn.Module):
    """Attention of each cell to K points around it, in each head and level.

    The parameters have the names and shapes of Mask2Former's.

    Args:
        channels: C, a multiple of `num_heads`.
        num_heads: M.
        num_levels: L.
        num_points: K.
    """

    def __init__(self, channels: int, *, num_heads: int, num_levels: int, num_points: int) -> None:
        super().__init__()
        self.num_heads, self.num_levels, self.num_points = num_heads, num_levels, num_points
        total_points = num_heads * num_levels * num_points
        self.sampling_offsets = nn.Linear(channels, total_points * 2)
        self.attention_weights = nn.Linear(channels, total_points)
        self.value_proj = nn.Linear(channels, channels)
        self.output_proj = nn.Linear(channels, channels)
        self._initialise()

    def _initialise(self) -> None:
        """Initialise as Appendix A.4 says.

        Offsets start independent of the query: head m looks along the m-th of M directions around its cell,
        point k at k + 1 cells' distance; attention over the points starts uniform.
        """
        angle = torch.arange(self.num_heads) * (2 * math.pi / self.num_heads)
        direction = torch.stack([angle.cos(), angle.sin()], dim=-1)
        direction = direction / direction.abs().amax(dim=-1, keepdim=True)
        distance = torch.arange(1, self.num_points + 1)
        offsets = direction[:, None, None, :] * distance[None, None, :, None]
        with torch.no_grad():
            self.sampling_offsets.bias.copy_(offsets.expand(-1, self.num_levels, -1, -1).reshape(-1))
        for weight in (self.sampling_offsets.weight, self.attention_weights.weight):
            nn.init.zeros_(weight)
        nn.init.zeros_(self.attention_weights.bias)
        for projection in (self.value_proj, self.output_proj):
            nn.init.xavier_uniform_(projection.weight)
            nn.init.zeros_(projection.bias)

    def forward(
        self, tokens: Tensor, positions: Tensor, centres: Tensor, sizes: Sequence[tuple[int, int]]
    ) -> Tensor:
        """Let every cell attend to all levels.

        Args:
            tokens: float[B, S, C], levels one after another, each row by row.
            positions: float[S, C], added to the tokens where these say where to look and what counts.
            centres: float[S, 2], where each cell's offsets start, in every level, as (x, y) in [0, 1].
            sizes: (h, w) of each level. An offset of 1 is one cell of the level it points into.

        Returns:
            float[B, S, C]. Beyond the border of a level its values count as 0.
        """
        batch_size, num_cells, channels = tokens.shape
        heads, levels, points = self.num_heads, self.num_levels, self.num_points
        num_weights = heads * levels * points
        turned = tokens.transpose(1, 2)
        weight = torch.cat([self.sampling_offsets.weight, self.attention_weights.weight])
        bias = torch.cat([self.sampling_offsets.bias, self.attention_weights.bias])
        # Positions are the same for all samples, and so is what they add to the projections.
        asked = _multiply(torch.addmm(bias[:, None], weight, positions.T), weight, turned)
        maps = _multiply(self.value_proj.bias[:, None], self.value_proj.weight, turned)
        offsets, scores = torch.split(asked, [2 * num_weights, num_weights], dim=1)
        weights = scores.view(batch_size, heads, levels * points, num_cells).softmax(dim=2)
        summed = sample_levels(
            maps.view(batch_size * heads, channels // heads, num_cells),
            sizes,
            self._grids(offsets, centres, sizes),
            weights.view(batch_size * heads, levels, points, num_cells),
        )
        # The product reads the cells as they lie, last, and writes them first.
        return torch.baddbmm(
            self.output_proj.bias,
            summed.view(batch_size, channels, num_cells).transpose(1, 2),
            self.output_proj.weight.T.expand(batch_size, -1, -1),
        )

    def _grids(self, offsets: Tensor, centres: Tensor, sizes: Sequence[tuple[int, int]]) -> Tensor:
        """Places from −1 to 1, as `grid_sample` counts, from offsets in cells.

        Args:
            offsets: float[B, M·L·K·2, S].

        Returns:
            float[B·M, L, K, S, 2].
        """
        parts = offsets.unflatten(1, (self.num_heads, self.num_levels, self.num_points, 2))  # type: ignore[no-untyped-call]
        # 2·(centre + offset / size) − 1, in one pass.
        steps = _cell_steps(tuple(sizes), dtype=centres.dtype, device=centres.device)
        grids = torch.addcmul((2 * centres - 1).T.contiguous(), parts, steps)
        return grids.flatten(0, 1).transpose(-1, -2)


@kept
def _cell_steps(sizes: tuple[tuple[int, int], ...], *, dtype: torch.dtype, device: torch.device) -> Tensor:
    """How far one cell is from −1 to 1 in each level, as (x, y): float[L, 1, 2, 1]; not to be written to."""
    cells = torch.tensor([(width, height) for height, width in sizes], dtype=dtype)
    return (2 / cells)[:, None, :, None].to(device)


def sample_levels(maps: Tensor, sizes: Sequence[tuple[int, int]], grids: Tensor, weights: Tensor) -> Tensor:
    """Read every level at its points, bilinearly, and add up by weight.

    Args:
        maps: float[N, C, Σ h·w], levels one after another.
        sizes: (h, w) of each level.
        grids: float[N, L, K, S, 2] as (x, y), −1 and 1 being the borders of a level.
        weights: float[N, L, K, S].

    Returns:
        float[N, C, S].
    """
    total: Tensor | None = None
    levels = torch.split(maps, [height * width for height, width in sizes], dim=2)
    for level, size, grid, weight in zip(levels, sizes, grids.unbind(1), weights.unbind(1), strict=True):
        read = F.grid_sample(level.view(*level.shape[:2], *size), grid, mode="bilinear", align_corners=False)
        summed = (read * weight.unsqueeze(1)).sum(dim=2)
        total = summed if total is None else total + summed
    assert total is not None, "there is a level"
    return total


def _multiply(added: Tensor, weight: Tensor, turned: Tensor) -> Tensor:
    """`weight` [O, C] times each [C, S] of [B, C, S], plus [O, S] or [O, 1]: float[B, O, S]."""
    return torch.baddbmm(added, weight.expand(len(turned), -1, -1), turned)

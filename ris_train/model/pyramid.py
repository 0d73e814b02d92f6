"""Simple feature pyramid: several scales from one map (SFP of ViTDet, Li et al. 2022).

B samples, C channels, P side of the input map.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ris_train.model.norms import ChannelLayerNorm


class SimpleFeaturePyramid(nn.Module):
    """Rescale one map to several sizes, each through its own 1 × 1 and 3 × 3 convolution.

    Args:
        channels: C of the input and of every level.
        scales: size of each level relative to the input, finest first; each of 2, 1, 1/2, 1/4.
    """

    def __init__(self, channels: int, scales: Sequence[float]) -> None:
        super().__init__()
        self.levels = nn.ModuleList(_level(channels, scale) for scale in scales)

    def forward(self, features: Tensor) -> list[Tensor]:
        """Build the levels.

        Args:
            features: float[B, C, P, P].

        Returns:
            float[B, C, P·scale, P·scale] for each scale, finest first.
        """
        # The norms put channels last for what follows them; beginning so saves each level a conversion, and
        # pooling runs over rows of channels.
        features = features.contiguous(memory_format=torch.channels_last)
        return [level(features) for level in self.levels]


def _level(channels: int, scale: float) -> nn.Sequential:
    resize: nn.Module
    width = channels
    if scale == 2:
        width = channels // 2
        resize = nn.ConvTranspose2d(channels, width, kernel_size=2, stride=2)
    elif scale == 1:
        resize = nn.Identity()
    else:
        stride = round(1 / scale)
        resize = nn.MaxPool2d(kernel_size=stride, stride=stride)
    return nn.Sequential(
        resize,
        nn.Conv2d(width, channels, kernel_size=1, bias=False),
        ChannelLayerNorm(channels),
        nn.Conv2d(channels, channels, kernel_size=3, padding=1, bias=False),
        ChannelLayerNorm(channels),
    )

"""The no-target head: does the expression refer to anything in the image? (supplement Sec. 2, Eq. 1).

B samples, Q queries, C channels.
"""

from __future__ import annotations

from torch import Tensor, nn


class NoTargetHead(nn.Module):
    """y_nt = max over queries of ω_nt(o), ω_nt a two-layer MLP as wide as its input.

    Args:
        channels: C.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(channels, channels), nn.ReLU(), nn.Linear(channels, 2))

    def forward(self, queries: Tensor) -> Tensor:
        """Judge each sample.

        Args:
            queries: float[B, Q, C], DFAM's query embeddings of its last layer.

        Returns:
            float[B, 2] logits; index 1 stands for "refers to nothing".
        """
        logits: Tensor = self.layers(queries).amax(dim=1)
        return logits

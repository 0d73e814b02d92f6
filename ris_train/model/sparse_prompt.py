"""The sparse prompt: one token that tells SAM's decoder what to look for (supplement Sec. 1 and Eq. 3-4).

B samples, L words, C unified width.
"""

from __future__ import annotations

from torch import Tensor, nn

from ris_train.model.attention import Attention


class SparsePrompt(nn.Module):
    """LayerNorm(q + CrossAttn(q, words)), where q is a category feature or the sentence's [CLS].

    Args:
        channels: C.
        num_heads: attention heads.
    """

    def __init__(self, channels: int, num_heads: int) -> None:
        super().__init__()
        self.cross_attention = Attention(channels, num_heads)
        self.norm = nn.LayerNorm(channels)

    def forward(self, query: Tensor, words: Tensor, text_mask: Tensor) -> Tensor:
        """Build the prompt.

        Args:
            query: float[B, C], the projected category embedding or L_cls.
            words: float[B, L, C].
            text_mask: bool[B, L], true on real tokens.

        Returns:
            float[B, 1, C].
        """
        token = query.unsqueeze(1)
        attended = self.cross_attention(token, words, words, mask=text_mask[:, None, None, :])
        prompt: Tensor = self.norm(token + attended)
        return prompt

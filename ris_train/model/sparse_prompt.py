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
        ffn_dim: hidden width of a feed-forward block that follows, as in the authors' code; None for the
            supplement's prompt, which has no such block.
        reads_padding: whether the attention reads padding as if it were words, as in the authors' code.
    """

    def __init__(
        self, channels: int, num_heads: int, *, ffn_dim: int | None = None, reads_padding: bool = False
    ) -> None:
        super().__init__()
        self.reads_padding = reads_padding
        self.cross_attention = Attention(channels, num_heads)
        self.norm = nn.LayerNorm(channels)
        self.ffn, self.ffn_norm = None, None
        if ffn_dim is not None:
            self.ffn = nn.Sequential(nn.Linear(channels, ffn_dim), nn.ReLU(), nn.Linear(ffn_dim, channels))
            self.ffn_norm = nn.LayerNorm(channels)

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
        mask = None if self.reads_padding else text_mask[:, None, None, :]
        prompt: Tensor = self.norm(token + self.cross_attention(token, words, words, mask=mask))
        if self.ffn is not None and self.ffn_norm is not None:
            prompt = self.ffn_norm(prompt + self.ffn(prompt))
        return prompt

"""BERT and its projection to the unified width.

B expressions, L word pieces, D_text width of BERT, C unified width.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor, nn

from ris_cache.vision_imports import ensure_torchvision

ensure_torchvision()

from transformers import BertModel  # noqa: E402


class TextFeatures(NamedTuple):
    """What the model knows of each expression.

    Attributes:
        words: float[B, L, C], L_bert.
        sentence: float[B, C], L_cls, the projected [CLS].
        raw_sentence: float[B, D_text], BERT's own [CLS].
    """

    words: Tensor
    sentence: Tensor
    raw_sentence: Tensor


class LanguageEncoder(nn.Module):
    """L_bert = Linear(BERT(tokens)); all of BERT is trainable (supplement Table 2).

    Args:
        bert: a BERT without pooler.
        channels: C.
    """

    def __init__(self, bert: BertModel, channels: int) -> None:
        super().__init__()
        self.bert = bert
        bert.set_attn_implementation("sdpa")  # torch's own, which takes the mask as booleans
        self.projection = nn.Linear(bert.config.hidden_size, channels)

    def forward(self, token_ids: Tensor, text_mask: Tensor) -> TextFeatures:
        """Encode.

        Args:
            token_ids: int64[B, L], word pieces with [CLS] first.
            text_mask: bool[B, L], true on real tokens.
        """
        # As [B, 1, 1, L]: given [B, L], transformers waits for the device to see whether anything is padded.
        attended = text_mask[:, None, None, :]
        hidden = self.bert(input_ids=token_ids, attention_mask=attended).last_hidden_state
        words = self.projection(hidden)
        return TextFeatures(words=words, sentence=words[:, 0], raw_sentence=hidden[:, 0])

"""Word pieces: from expressions to token ids.

B expressions, L word pieces of the longest one in the batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ris_cache.errors import WeightsError
from ris_cache.vision_imports import ensure_torchvision
from ris_train.config import BertConfig
from ris_train.hub import hub_problem, quiet_hub

ensure_torchvision()

from transformers import AutoTokenizer, BertTokenizer  # noqa: E402

TINY_VOCABULARY = "package:tiny"
TINY_VOCABULARY_PATH = Path(__file__).parent / "tiny_vocab.txt"


class Tokenizer:
    """BERT's word pieces, cut to a length.

    Args:
        pieces: a transformers tokenizer of the BERT family.
        max_tokens: at most so many pieces, [CLS] and [SEP] included.
        keep_sep: whether an expression that is cut still ends with [SEP]; the projects of this field take one
            word piece more and lose it.
    """

    def __init__(self, pieces: Any, max_tokens: int, *, keep_sep: bool = True) -> None:
        self._pieces = pieces
        self.max_tokens = max_tokens
        self._keep_sep = keep_sep

    @classmethod
    def load(cls, config: BertConfig, max_tokens: int, *, keep_sep: bool = True) -> Tokenizer:
        """Load the tokenizer that the configuration names.

        Raises:
            WeightsError: it is neither a folder nor to be had from the hub.
        """
        source = config.vocabulary or config.weights
        if source == TINY_VOCABULARY:
            return cls(BertTokenizer(str(TINY_VOCABULARY_PATH)), max_tokens, keep_sep=keep_sep)
        if source is None:
            raise WeightsError(
                "model.bert names neither weights nor a vocabulary. Set model.bert.vocabulary to a tokenizer "
                f"folder, a hub name, or {TINY_VOCABULARY}."
            )
        return cls.from_folder(source, max_tokens, keep_sep=keep_sep)

    @classmethod
    def from_folder(cls, source: str | Path, max_tokens: int, *, keep_sep: bool = True) -> Tokenizer:
        """Load from a folder written by `save`, or from a hub name.

        Raises:
            WeightsError: nothing usable is there.
        """
        problem = hub_problem(str(source))
        try:
            with quiet_hub():
                pieces = AutoTokenizer.from_pretrained(str(source), local_files_only=bool(problem))
            return cls(pieces, max_tokens, keep_sep=keep_sep)
        except (OSError, ValueError) as error:
            raise WeightsError(
                f"No BERT tokenizer at {source!s}{problem}. Give a folder with vocab.txt or tokenizer.json, "
                "or a hub name that can be reached from here (model.bert.vocabulary or model.bert.weights).",
                source=str(source),
            ) from error

    def save(self, folder: Path) -> None:
        """Write the tokenizer's files, so that a run needs nothing outside its directory."""
        self._pieces.save_pretrained(str(folder))

    @property
    def vocab_size(self) -> int:
        """Number of word pieces; ids lie below it."""
        return len(self._pieces)

    def encode(self, texts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Cut expressions into word pieces; a blank one becomes [CLS][SEP].

        Returns:
            token_ids int64[B, L] and text_mask bool[B, L], true on real tokens.
        """
        longest = self.max_tokens if self._keep_sep else self.max_tokens + 1  # [SEP] is what is cut off then
        encoded = self._pieces(
            list(texts), padding=True, truncation=True, max_length=longest, return_tensors="pt"
        )
        token_ids, mask = (encoded[name][:, : self.max_tokens] for name in ("input_ids", "attention_mask"))
        return token_ids, mask.to(torch.bool)

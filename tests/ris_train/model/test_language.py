"""BERT and its projection: what is given out, and what padding may not do to it."""

from __future__ import annotations

import torch

from ris_train.model.segmenter import ModelInputs, RisModel


def test_sentence_and_words_are_projections_of_what_bert_says(
    tiny_model: RisModel, inputs: ModelInputs
) -> None:
    language = tiny_model.language
    text = language(inputs.token_ids, inputs.text_mask)
    assert text.words.shape == (4, 6, 64)
    # One expression at a time, padding cut off rather than masked.
    for row, length in enumerate(inputs.text_mask.sum(dim=1).tolist()):
        hidden = language.bert(input_ids=inputs.token_ids[row : row + 1, :length]).last_hidden_state[0]
        words = hidden @ language.projection.weight.T + language.projection.bias
        torch.testing.assert_close(text.words[row, :length], words, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(text.sentence[row], words[0], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(text.raw_sentence[row], hidden[0], rtol=1e-4, atol=1e-5)


def test_what_stands_on_padding_changes_no_real_word(tiny_model: RisModel, inputs: ModelInputs) -> None:
    other_ids = torch.where(inputs.text_mask, inputs.token_ids, (inputs.token_ids + 7) % 50)
    assert not torch.equal(other_ids, inputs.token_ids)
    before = tiny_model.language(inputs.token_ids, inputs.text_mask)
    after = tiny_model.language(other_ids, inputs.text_mask)
    assert torch.equal(before.words[inputs.text_mask], after.words[inputs.text_mask])
    assert torch.equal(before.raw_sentence, after.raw_sentence)

"""Dropout is drawn for the whole batch, whatever part of it is computed where."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from ris_train.config import BertConfig
from ris_train.model.bert import random_bert
from ris_train.training.dropout import BatchDropout
from ris_train.training.randomness import dropout_generator

CPU = torch.device("cpu")
BATCH = 6


def dropping(first: int = 0, total: int = BATCH, step: int = 1) -> BatchDropout:
    return BatchDropout(dropout_generator(0, step, CPU), first=first, total=total)


def encoder(attention: str) -> Callable[..., torch.Tensor]:
    """BERT with dropout, in training, that encodes some rows of a batch."""
    sizes = BertConfig(
        vocabulary="shapes", hidden_size=32, num_layers=2, num_heads=2, ffn_dim=64, dropout=0.3, weights=None
    )
    bert, _ = random_bert(sizes, vocab_size=50, seed=0)
    bert.set_attn_implementation(attention)
    bert.train()
    token_ids = torch.randint(1, 50, (BATCH, 7), generator=torch.Generator().manual_seed(1))
    is_token = torch.arange(7) < torch.tensor([7, 3, 5, 7, 2, 6])[:, None]

    def encode(rows: slice = slice(None)) -> torch.Tensor:
        return bert(input_ids=token_ids[rows], attention_mask=is_token[rows].long()).last_hidden_state

    return encode


@pytest.fixture(scope="module", params=["sdpa", "eager"])
def encode(request):
    return encoder(request.param)


@given(borders=st.sets(st.integers(1, BATCH - 1)))
def test_parts_of_a_batch_drop_what_the_whole_drops(encode, borders):
    with dropping():
        whole = encode()
    places = [0, *sorted(borders), BATCH]
    for start, stop in pairwise(places):
        with dropping(start):
            torch.testing.assert_close(encode(slice(start, stop)), whole[start:stop])


def test_each_step_and_each_row_draws_its_own(encode):
    with dropping():
        found = encode()
    with dropping(step=2):
        assert not torch.allclose(encode(), found)
    values = torch.ones(BATCH, 100)
    with dropping():
        assert len(nn.Dropout(0.5)(values).unique(dim=0)) == BATCH


def test_attention_written_out_drops_what_that_of_transformers_drops():
    found = []
    for attention in ("sdpa", "eager"):
        with dropping():
            found.append(encoder(attention)())
    torch.testing.assert_close(*found)


def test_without_dropout_nothing_changes():
    query, key, value = torch.randn(3, 2, 2, 5, 8, generator=torch.Generator().manual_seed(0))
    mask = torch.rand(2, 1, 5, 5, generator=torch.Generator().manual_seed(0)) > 0.3
    expected = F.scaled_dot_product_attention(query, key, value, mask, scale=0.5)
    with dropping():
        assert torch.equal(F.scaled_dot_product_attention(query, key, value, mask, scale=0.5), expected)
        # So small a probability drops none of these, but has the attention written out.
        written = F.scaled_dot_product_attention(query, key, value, mask, dropout_p=1e-9, scale=0.5)
        torch.testing.assert_close(written, expected)
        added = torch.zeros(mask.shape).masked_fill(~mask, -torch.inf)
        written = F.scaled_dot_product_attention(query, key, value, added, dropout_p=1e-9, scale=0.5)
        torch.testing.assert_close(written, expected)
        assert torch.equal(F.dropout(query, 0.5, training=False), query)
        assert torch.equal(nn.Dropout(0.0)(query), query)


def test_it_drops_so_many_and_scales_the_rest():
    values = torch.ones(BATCH, 5_000)
    with dropping():
        dropped = nn.Dropout(0.2)(values)
    assert dropped.unique().tolist() == [0.0, pytest.approx(1.25)]
    assert dropped.count_nonzero() / dropped.numel() == pytest.approx(0.8, abs=0.01)
    with dropping():
        half = F.dropout(values.bfloat16(), 0.2)
    assert half.dtype == torch.bfloat16
    with dropping():
        exact = F.dropout(torch.full((BATCH, 8), 9.0, dtype=torch.bfloat16), 0.1)
    assert exact.unique().tolist() == [0.0, 10.0], "the factor is not rounded to half precision"
    assert torch.equal(half != 0, dropped != 0)

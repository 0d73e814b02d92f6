"""The sparse prompt against Eq. 3-4, and what padding may not do to it."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ris_train.model.sparse_prompt import SparsePrompt

BATCH, WORDS, CHANNELS, HEADS = 3, 5, 16, 4
LENGTHS = torch.tensor([5, 2, 3])


@pytest.fixture
def prompt() -> SparsePrompt:
    return SparsePrompt(CHANNELS, HEADS)


@pytest.fixture
def query() -> Tensor:
    return torch.randn(BATCH, CHANNELS)


@pytest.fixture
def words() -> Tensor:
    return torch.randn(BATCH, WORDS, CHANNELS)


@pytest.fixture
def text_mask() -> Tensor:
    return torch.arange(WORDS) < LENGTHS[:, None]


def test_the_prompt_is_the_norm_of_the_query_and_what_it_gathers(
    prompt: SparsePrompt, query: Tensor, words: Tensor, text_mask: Tensor
) -> None:
    """LayerNorm(q + CrossAttn(q, words)), with torch's attention over the real words alone."""
    ours = prompt.cross_attention
    theirs = nn.MultiheadAttention(CHANNELS, HEADS, batch_first=True)
    with torch.no_grad():
        theirs.in_proj_weight.copy_(torch.cat([ours.q_proj.weight, ours.k_proj.weight, ours.v_proj.weight]))
        theirs.in_proj_bias.copy_(torch.cat([ours.q_proj.bias, ours.k_proj.bias, ours.v_proj.bias]))
        theirs.out_proj.load_state_dict(ours.out_proj.state_dict())
    found = prompt(query, words, text_mask)
    assert found.shape == (BATCH, 1, CHANNELS)
    for sample, length in enumerate(LENGTHS.tolist()):
        token, real = query[sample].view(1, 1, -1), words[sample : sample + 1, :length]
        gathered, _ = theirs(token, real, real)
        expected = F.layer_norm(token + gathered, (CHANNELS,), prompt.norm.weight, prompt.norm.bias)
        torch.testing.assert_close(found[sample : sample + 1], expected)


def test_what_stands_on_padding_changes_nothing(
    prompt: SparsePrompt, query: Tensor, words: Tensor, text_mask: Tensor
) -> None:
    other = torch.where(text_mask[:, :, None], words, torch.full_like(words, 1e3))
    assert torch.equal(prompt(query, other, text_mask), prompt(query, words, text_mask))


def test_more_padding_changes_nothing(
    prompt: SparsePrompt, query: Tensor, words: Tensor, text_mask: Tensor
) -> None:
    longer = torch.cat([words, torch.randn(BATCH, 4, CHANNELS)], dim=1)
    longer_mask = F.pad(text_mask, (0, 4), value=False)
    torch.testing.assert_close(prompt(query, longer, longer_mask), prompt(query, words, text_mask))


def test_a_real_word_changes_its_own_sample_alone(
    prompt: SparsePrompt, query: Tensor, words: Tensor, text_mask: Tensor
) -> None:
    other = words.clone()
    other[1, 1] += 1
    before, after = prompt(query, words, text_mask), prompt(query, other, text_mask)
    assert torch.equal(before[[0, 2]], after[[0, 2]])
    assert not torch.allclose(before[1], after[1])


def test_the_prompt_has_the_counted_size() -> None:
    """Four 256 → 256 projections and one norm: 4·(256² + 256) + 512."""
    count = sum(parameter.numel() for parameter in SparsePrompt(256, 8).parameters())
    assert count == 4 * (256 * 256 + 256) + 2 * 256 == 263_680

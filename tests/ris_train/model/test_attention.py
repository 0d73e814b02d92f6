"""Attention against torch's own."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from ris_train.model.attention import Attention

BATCH, QUERIES, KEYS, CHANNELS, HEADS = 3, 5, 7, 24, 4


def torch_attention(ours: Attention, channels: int) -> nn.MultiheadAttention:
    """Give torch's attention the same weights; it keeps the three input projections in one matrix."""
    theirs = nn.MultiheadAttention(channels, ours.num_heads, batch_first=True)
    projections = (ours.q_proj, ours.k_proj, ours.v_proj)
    with torch.no_grad():
        theirs.in_proj_weight.copy_(torch.cat([projection.weight for projection in projections]))
        theirs.in_proj_bias.copy_(torch.cat([projection.bias for projection in projections]))
        theirs.out_proj.load_state_dict(ours.out_proj.state_dict())
    return theirs


@pytest.fixture
def attention() -> Attention:
    attention = Attention(CHANNELS, HEADS)
    with torch.no_grad():
        for projection in (attention.q_proj, attention.k_proj, attention.v_proj, attention.out_proj):
            # Biases start at zero, which would hide one that is used in the wrong place.
            projection.bias.normal_()
    return attention


@pytest.fixture
def query_key_value() -> tuple[Tensor, Tensor, Tensor]:
    return (
        torch.randn(BATCH, QUERIES, CHANNELS),
        torch.randn(BATCH, KEYS, CHANNELS),
        torch.randn(BATCH, KEYS, CHANNELS),
    )


def test_attention_equals_torchs_without_a_mask(
    attention: Attention, query_key_value: tuple[Tensor, Tensor, Tensor]
) -> None:
    expected, _ = torch_attention(attention, CHANNELS)(*query_key_value)
    torch.testing.assert_close(attention(*query_key_value), expected)


def test_attention_equals_torchs_under_a_mask_of_each_query(
    attention: Attention, query_key_value: tuple[Tensor, Tensor, Tensor]
) -> None:
    """Ours is true where a query may look, torch's where it may not."""
    allowed = torch.rand(BATCH, QUERIES, KEYS) < 0.5
    allowed[..., 0] = True
    expected, _ = torch_attention(attention, CHANNELS)(
        *query_key_value, attn_mask=~allowed.repeat_interleave(HEADS, dim=0)
    )
    found = attention(*query_key_value, mask=allowed.unsqueeze(1))
    torch.testing.assert_close(found, expected)
    assert not torch.allclose(found, attention(*query_key_value), atol=1e-2)


def test_attention_has_four_projections_with_biases(attention: Attention) -> None:
    """4·(24² + 24) = 2,400."""
    assert sum(parameter.numel() for parameter in attention.parameters()) == 2_400

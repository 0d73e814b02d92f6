"""Pixel-word attention against its formula, and what padding may not do to it."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ris_train.model.pwam import PixelWordAttention

BATCH, GRID, WORDS, CLIP_WIDTH, CHANNELS = 3, 4, 5, 20, 12
LENGTHS = torch.tensor([5, 2, 3])


@pytest.fixture
def pwam() -> PixelWordAttention:
    return PixelWordAttention(CLIP_WIDTH, CHANNELS)


@pytest.fixture
def features() -> Tensor:
    return torch.randn(BATCH, GRID * GRID, CLIP_WIDTH)


@pytest.fixture
def words() -> Tensor:
    return torch.randn(BATCH, WORDS, CHANNELS)


@pytest.fixture
def text_mask() -> Tensor:
    return torch.arange(WORDS) < LENGTHS[:, None]


def convolve(layer: nn.Linear, maps: Tensor) -> Tensor:
    """The layer as a 1 × 1 convolution of float[B, C, H, W]."""
    return F.conv2d(maps, layer.weight[:, :, None, None], layer.bias)


def normalise(maps: Tensor) -> Tensor:
    """Instance norm by its definition: over the cells of one image and one channel."""
    mean = maps.mean(dim=(2, 3), keepdim=True)
    variance = ((maps - mean) ** 2).mean(dim=(2, 3), keepdim=True)
    return (maps - mean) / (variance + 1e-5).sqrt()


def fuse_by_formula(pwam: PixelWordAttention, features: Tensor, words: Tensor, lengths: Tensor) -> Tensor:
    """Method Sec. 2, item 2, one sample at a time, padding cut off rather than masked."""
    fused = []
    for sample, length in enumerate(lengths.tolist()):
        clip_map = features[sample].T.reshape(1, CLIP_WIDTH, GRID, GRID)
        sentence = words[sample, :length].T.reshape(1, CHANNELS, length, 1)
        query = normalise(convolve(pwam.query, clip_map)).flatten(2)[0]
        key = convolve(pwam.key, sentence).flatten(2)[0]
        value = convolve(pwam.value, sentence).flatten(2)[0]
        scores = torch.einsum("cn,cl->nl", query, key) / math.sqrt(CHANNELS)
        weights = scores.exp() / scores.exp().sum(dim=1, keepdim=True)
        gathered = torch.einsum("nl,cl->cn", weights, value).reshape(1, CHANNELS, GRID, GRID)
        gathered = normalise(convolve(pwam.attended, gathered))
        gated = gathered * F.gelu(convolve(pwam.gate, clip_map))
        fused.append(F.gelu(convolve(pwam.output, gated)))
    return torch.cat(fused)


def test_pwam_equals_its_formula(
    pwam: PixelWordAttention, features: Tensor, words: Tensor, text_mask: Tensor
) -> None:
    expected = fuse_by_formula(pwam, features, words, LENGTHS)
    found = pwam(features, words, text_mask)
    assert found.shape == (BATCH, CHANNELS, GRID, GRID)
    # Instance norm of nearly equal cells magnifies rounding, hence not the default tolerance.
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_cells_lie_row_by_row(
    pwam: PixelWordAttention, features: Tensor, words: Tensor, text_mask: Tensor
) -> None:
    """Swapping two patch tokens swaps the two cells they belong to: token 1 is row 0, column 1."""
    swapped = features.clone()
    swapped[:, [1, 4]] = features[:, [4, 1]]
    before, after = pwam(features, words, text_mask), pwam(swapped, words, text_mask)
    torch.testing.assert_close(after[:, :, 0, 1], before[:, :, 1, 0], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(after[:, :, 1, 0], before[:, :, 0, 1], rtol=1e-4, atol=1e-5)


def test_what_stands_on_padding_changes_nothing(
    pwam: PixelWordAttention, features: Tensor, words: Tensor, text_mask: Tensor
) -> None:
    other = torch.where(text_mask[:, :, None], words, torch.full_like(words, 1e3))
    assert torch.equal(pwam(features, other, text_mask), pwam(features, words, text_mask))


def test_more_padding_changes_nothing(
    pwam: PixelWordAttention, features: Tensor, words: Tensor, text_mask: Tensor
) -> None:
    longer = torch.cat([words, torch.randn(BATCH, 4, CHANNELS)], dim=1)
    longer_mask = F.pad(text_mask, (0, 4), value=False)
    torch.testing.assert_close(
        pwam(features, longer, longer_mask), pwam(features, words, text_mask), rtol=1e-4, atol=1e-5
    )


def test_a_real_word_changes_its_own_sample_alone(
    pwam: PixelWordAttention, features: Tensor, words: Tensor, text_mask: Tensor
) -> None:
    other = words.clone()
    other[1, 1] += 1
    before, after = pwam(features, words, text_mask), pwam(features, other, text_mask)
    assert torch.equal(before[[0, 2]], after[[0, 2]])
    assert not torch.allclose(before[1], after[1])


def test_pwam_has_the_counted_size() -> None:
    """Two 1024 → 256 layers, 2·(1024·256 + 256), and four 256 → 256 layers, 4·(256² + 256)."""
    count = sum(parameter.numel() for parameter in PixelWordAttention(1024, 256).parameters())
    assert count == 2 * (1024 * 256 + 256) + 4 * (256 * 256 + 256) == 787_968

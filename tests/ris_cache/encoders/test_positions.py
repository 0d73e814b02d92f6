"""Sine positions against DETR's formula and against Mask2Former's module."""

from __future__ import annotations

import math

import pytest
import torch

from ris_cache.encoders.positions import sine_positions
from ris_cache.vision_imports import ensure_torchvision

CPU = torch.device("cpu")


@pytest.mark.parametrize(("height", "width", "channels"), [(6, 6, 32), (5, 9, 16), (1, 3, 64)])
def test_positions_equal_those_of_mask2former(height: int, width: int, channels: int) -> None:
    ensure_torchvision()
    from transformers.models.mask2former.modeling_mask2former import Mask2FormerSinePositionEmbedding

    module = Mask2FormerSinePositionEmbedding(num_position_features=channels // 2, normalize=True)
    expected = module(torch.Size([1, channels, height, width]), device="cpu", dtype=torch.float32)
    torch.testing.assert_close(sine_positions(height, width, channels, device=CPU), expected)


def test_positions_follow_the_formula_of_detr_cell_by_cell() -> None:
    """Half the channels for y, half for x; channel 2i is sin(p / T^(2i/(C/2))), 2i + 1 its cosine.

    p runs from 2π/length at the first cell to 2π at the last, T = 10000, C = 8.
    """
    height, width, channels = 3, 4, 8
    found = sine_positions(height, width, channels, device=CPU)
    assert found.shape == (1, channels, height, width)
    assert found.dtype == torch.float32
    for row in range(height):
        for column in range(width):
            y = (row + 1) / height * 2 * math.pi
            x = (column + 1) / width * 2 * math.pi
            expected = [
                function(position / 10000 ** (2 * pair / (channels / 2)))
                for position in (y, x)
                for pair in range(2)
                for function in (math.sin, math.cos)
            ]
            assert found[0, :, row, column].tolist() == pytest.approx(expected, abs=1e-5)

"""The simple feature pyramid: sizes, counts and each level's formula."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ris_train.model.norms import ChannelLayerNorm
from ris_train.model.pyramid import SimpleFeaturePyramid


def num_parameters(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def norm_by_hand(features: Tensor, norm: nn.LayerNorm) -> Tensor:
    """(x − mean) / √(variance + ε), over the channels of each cell."""
    mean = features.mean(dim=1, keepdim=True)
    variance = ((features - mean) ** 2).mean(dim=1, keepdim=True)
    scaled = (features - mean) / (variance + norm.eps).sqrt()
    return scaled * norm.weight[:, None, None] + norm.bias[:, None, None]


def test_the_norm_is_over_the_channels_of_each_cell() -> None:
    norm = ChannelLayerNorm(12)
    nn.init.normal_(norm.weight)
    nn.init.normal_(norm.bias)
    features = torch.randn(2, 12, 3, 5) * 4 + 1
    torch.testing.assert_close(norm(features), norm_by_hand(features, norm))


@pytest.mark.parametrize(
    ("scales", "side", "sizes"),
    [((2, 1, 0.5), 24, (48, 24, 12)), ((1, 0.5, 0.25), 64, (64, 32, 16)), ((2, 1, 0.5), 12, (24, 12, 6))],
)
def test_levels_have_the_sizes_of_the_paper_finest_first(
    scales: tuple[float, ...], side: int, sizes: tuple[int, ...]
) -> None:
    levels = SimpleFeaturePyramid(8, scales)(torch.randn(2, 8, side, side))
    assert [level.shape for level in levels] == [(2, 8, size, size) for size in sizes]


def test_the_clip_pyramid_has_the_counted_size() -> None:
    """At C = 256, two norms a level are 2·512 and a 3 × 3 convolution is 9·256² = 589,824.

    Scale 2: 2 × 2 transposed convolution 256 → 128, 4·256·128 + 128 = 131,200; 1 × 1, 128·256 = 32,768;
    with the rest 754,816. Scales 1 and 1/2: 256² + 589,824 + 1,024 = 656,384 each. Together 2,067,584.
    """
    assert num_parameters(SimpleFeaturePyramid(256, (2, 1, 0.5))) == 2_067_584


def test_the_sam_pyramid_has_the_counted_size() -> None:
    """3 · 656,384, see above."""
    assert num_parameters(SimpleFeaturePyramid(256, (1, 0.5, 0.25))) == 1_969_152


@pytest.mark.parametrize("scale", [2, 1, 0.5, 0.25])
def test_a_level_is_its_resize_then_two_normed_convolutions(scale: float) -> None:
    pyramid = SimpleFeaturePyramid(8, (scale,))
    level = pyramid.levels[0]
    assert isinstance(level, nn.Sequential)
    resize, pointwise, first_norm, spatial, second_norm = level
    features = torch.randn(2, 8, 8, 8)
    if scale == 2:
        # Stride 2 and kernel 2: the four pixels of a cell are four linear maps of it, side by side.
        blocks = torch.einsum("bchw,cdij->bdhiwj", features, resize.weight)
        resized = blocks.reshape(2, 4, 16, 16) + resize.bias[:, None, None]
    elif scale == 1:
        resized = features
    else:
        stride = round(1 / scale)
        windows = features.unfold(2, stride, stride).unfold(3, stride, stride)
        resized = windows.amax(dim=(-2, -1))
    hidden = norm_by_hand(torch.einsum("bchw,dc->bdhw", resized, pointwise.weight[:, :, 0, 0]), first_norm)
    expected = norm_by_hand(F.conv2d(hidden, spatial.weight, padding=1), second_norm)
    torch.testing.assert_close(pyramid(features)[0], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("scales", [(2, 1, 0.5), (1, 0.5, 0.25)])
def test_how_the_map_lies_in_memory_changes_nothing(scales: tuple[float, ...]) -> None:
    """Levels and gradients; every level comes out with its channels last, so that nothing converts them."""
    pyramid = SimpleFeaturePyramid(8, scales)
    found = []
    for layout in (torch.contiguous_format, torch.channels_last):
        features = torch.linspace(-1, 1, 2 * 8 * 12 * 12).sin().view(2, 8, 12, 12)
        features = features.contiguous(memory_format=layout).requires_grad_()
        levels = pyramid(features)
        assert all(level.is_contiguous(memory_format=torch.channels_last) for level in levels)
        gradient = torch.autograd.grad([level.square().sum() for level in levels], [features])
        found.append([*levels, *gradient])
    torch.testing.assert_close(found[0], found[1])


def test_pooling_runs_over_rows_of_channels() -> None:
    pyramid = SimpleFeaturePyramid(8, (1, 0.5, 0.25))
    given: list[Tensor] = []
    for level in pyramid.levels:
        level.register_forward_pre_hook(lambda _, inputs: given.append(inputs[0]))
    pyramid(torch.randn(2, 8, 16, 16))
    assert len(given) == 3
    assert all(features.is_contiguous(memory_format=torch.channels_last) for features in given)

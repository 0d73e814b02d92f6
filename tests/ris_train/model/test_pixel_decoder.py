"""The pixel decoder: levels, places, that all of it learns, and how large it is."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from ris_train.model.deformable import DeformableAttention
from ris_train.model.pixel_decoder import PixelDecoder

LEVELS = 3
SIZES = [(6, 5), (3, 4), (2, 2)]


def test_attention_of_every_layer_starts_as_deformable_detr_says() -> None:
    decoder = PixelDecoder(32, num_layers=2, num_heads=8, num_points=4, ffn_dim=64, norm_groups=8)
    reference = DeformableAttention(32, num_heads=8, num_levels=LEVELS, num_points=4)
    for layer in decoder.layers:
        assert torch.equal(layer.attention.sampling_offsets.bias, reference.sampling_offsets.bias)
        for weight in (layer.attention.sampling_offsets.weight, layer.attention.attention_weights.weight):
            assert not weight.any()


@pytest.fixture
def decoder() -> PixelDecoder:
    return PixelDecoder(16, num_layers=2, num_heads=4, num_points=4, ffn_dim=32, norm_groups=4)


def pyramid(batch: int, channels: int) -> list[Tensor]:
    return [torch.randn(batch, channels, side, side) for side in (12, 6, 3)]


def test_levels_keep_their_sizes_and_the_dense_prompt_is_as_fine_as_the_finest(decoder: PixelDecoder) -> None:
    levels = pyramid(2, 16)
    decoded = decoder(levels)
    assert decoded.dense_prompt.shape == (2, 16, 12, 12)
    assert [level.shape for level in decoded.levels] == [level.shape for level in levels]


def test_a_sample_is_decoded_alone(decoder: PixelDecoder) -> None:
    levels = pyramid(3, 16)
    together = decoder(levels)
    alone = decoder([level[1:2] for level in levels])
    torch.testing.assert_close(together.dense_prompt[1:2], alone.dense_prompt, rtol=1e-4, atol=1e-5)
    for batched, single in zip(together.levels, alone.levels, strict=True):
        torch.testing.assert_close(batched[1:2], single, rtol=1e-4, atol=1e-5)


def test_cells_of_a_level_keep_their_places() -> None:
    """Without layers, a decoded level is its projected input, row by row."""
    decoder = PixelDecoder(16, num_layers=0, num_heads=4, num_points=4, ffn_dim=32, norm_groups=4)
    levels = pyramid(2, 16)
    for projection, level, decoded in zip(
        decoder.input_projections, levels, decoder(levels).levels, strict=True
    ):
        torch.testing.assert_close(decoded, projection(level))


def test_a_cell_looks_around_its_own_centre_at_every_level(decoder: PixelDecoder) -> None:
    """Levels that are not square tell x from y."""
    calls: list[tuple[object, ...]] = []
    for layer in decoder.layers:
        layer.register_forward_pre_hook(lambda _, arguments: calls.append(arguments))
    decoder([torch.randn(1, 16, height, width) for height, width in SIZES])
    assert len(calls) == 2
    expected = [
        [(column + 0.5) / width, (row + 0.5) / height]
        for height, width in SIZES
        for row in range(height)
        for column in range(width)
    ]
    for _, _, centres, sizes in calls:
        assert list(sizes) == SIZES
        torch.testing.assert_close(centres, torch.tensor(expected))


def test_every_scale_reaches_the_dense_prompt(decoder: PixelDecoder) -> None:
    levels = pyramid(1, 16)
    before = decoder(levels).dense_prompt
    for index in range(LEVELS):
        changed = [level + torch.randn_like(level) * (index == i) for i, level in enumerate(levels)]
        assert not torch.allclose(decoder(changed).dense_prompt, before, atol=1e-3), index


def parameters_without_gradient(decoder: PixelDecoder) -> list[str]:
    decoded = decoder(pyramid(2, 16))
    outputs = (decoded.dense_prompt, *decoded.levels)
    decoder.zero_grad()
    torch.stack([(output * torch.randn_like(output)).sum() for output in outputs]).sum().backward()
    gradients = {name: parameter.grad for name, parameter in decoder.named_parameters()}
    assert all(gradient is not None and gradient.isfinite().all() for gradient in gradients.values())
    return [name for name, gradient in gradients.items() if gradient is None or not gradient.any()]


def test_a_gradient_reaches_every_parameter(decoder: PixelDecoder) -> None:
    """The level embeddings are part of the query, which the first step's zero weights do not read yet."""
    assert parameters_without_gradient(decoder) == ["level_embed"]
    for layer in decoder.layers:
        for projection in (layer.attention.sampling_offsets, layer.attention.attention_weights):
            nn.init.normal_(projection.weight, std=1e-3)
    assert parameters_without_gradient(decoder) == []


def num_parameters(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def test_the_decoder_has_the_counted_size() -> None:
    """C = 256, M = 8, K = 4, three levels, FFN 1024, six layers; C² = 65,536, a norm has 512.

    Layer: offsets 257·192 = 49,344; weights 257·96 = 24,672; value and output 2·65,792 = 131,584;
    FFN 257·1024 + 1025·256 = 525,568; two norms 1,024: together 732,192, times six 4,393,152.
    Input projections 3·(65,792 + 512) = 198,912; level embeddings 768; laterals 3·(65,536 + 512) = 198,144;
    outputs 3·(589,824 + 512) = 1,771,008; dense projection 65,792. Sum 6,627,776.
    """
    decoder = PixelDecoder(256, num_layers=6, num_heads=8, num_points=4, ffn_dim=1024, norm_groups=32)
    assert num_parameters(decoder) == 6_627_776

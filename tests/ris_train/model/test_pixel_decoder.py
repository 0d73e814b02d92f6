"""The pixel decoder: how its attention starts, what it samples, and that all of it learns."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from ris_train.model.pixel_decoder import (
    DeformableAttention,
    PixelDecoder,
    initialise_deformable_attention,
)

LEVELS = 3
SIZES = [(6, 5), (3, 4), (2, 2)]
NUM_CELLS = sum(height * width for height, width in SIZES)


def start_attention(*, channels: int, heads: int, points: int) -> DeformableAttention:
    attention = DeformableAttention(embed_dim=channels, num_heads=heads, n_levels=LEVELS, n_points=points)
    initialise_deformable_attention(attention)
    return attention


def cell_centres() -> Tensor:
    """(x, y) of every cell, level after level, row by row: float[S, 2]."""
    return torch.tensor(
        [
            [(column + 0.5) / width, (row + 0.5) / height]
            for height, width in SIZES
            for row in range(height)
            for column in range(width)
        ]
    )


def attend(attention: DeformableAttention, queries: Tensor, values: Tensor) -> Tensor:
    attended, _ = attention(
        hidden_states=queries,
        encoder_hidden_states=values,
        position_embeddings=torch.zeros_like(queries),
        reference_points=cell_centres()[None, :, None, :].expand(1, -1, LEVELS, 2),
        spatial_shapes_list=SIZES,
    )
    return attended


def test_offsets_start_as_deformable_detr_says() -> None:
    """Appendix A.4, M = 8, K = 4: (−k, −k), (−k, 0), (−k, k), (0, −k), (0, k), (k, −k), (k, 0), (k, k).

    Each head has one of the eight directions, at every level the same, and point k lies k cells away.
    """
    attention = start_attention(channels=32, heads=8, points=4)
    offsets = attention.sampling_offsets.bias.detach().view(8, LEVELS, 4, 2)
    assert not attention.sampling_offsets.weight.any()
    for k in range(1, 5):
        expected = {(x * k, y * k) for x in (-1, 0, 1) for y in (-1, 0, 1) if (x, y) != (0, 0)}
        for level in range(LEVELS):
            found = offsets[:, level, k - 1]
            torch.testing.assert_close(found, found.round(), rtol=0, atol=1e-5)
            assert {(int(x), int(y)) for x, y in found.round().tolist()} == expected


def test_a_head_keeps_its_direction_at_every_distance() -> None:
    attention = start_attention(channels=32, heads=8, points=4)
    offsets = attention.sampling_offsets.bias.detach().view(8, LEVELS, 4, 2)
    distances = torch.arange(1.0, 5.0)[None, None, :, None]
    expected = (offsets[:, :1, :1] * distances).expand_as(offsets)
    torch.testing.assert_close(offsets, expected)


def test_attention_over_the_points_starts_uniform_and_projections_start_without_bias() -> None:
    attention = start_attention(channels=32, heads=8, points=4)
    assert not attention.attention_weights.weight.any()
    assert not attention.attention_weights.bias.any()
    for projection in (attention.value_proj, attention.output_proj):
        assert not projection.bias.any()
        # Xavier: uniform within ±√(6 / (fan_in + fan_out)).
        bound = math.sqrt(6 / 64)
        assert projection.weight.abs().max() <= bound
        assert projection.weight.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.1)


def test_every_layer_of_the_decoder_starts_so() -> None:
    decoder = PixelDecoder(32, num_layers=2, num_heads=8, num_points=4, ffn_dim=64, norm_groups=8)
    reference = start_attention(channels=32, heads=8, points=4)
    for layer in decoder.layers:
        assert torch.equal(layer.attention.sampling_offsets.bias, reference.sampling_offsets.bias)
        for weight in (layer.attention.sampling_offsets.weight, layer.attention.attention_weights.weight):
            assert not weight.any()


def test_at_the_start_the_query_does_not_matter_but_the_values_do() -> None:
    attention = start_attention(channels=32, heads=8, points=4)
    values = torch.randn(2, NUM_CELLS, 32)
    first = attend(attention, torch.randn(2, NUM_CELLS, 32), values)
    second = attend(attention, torch.randn(2, NUM_CELLS, 32), values)
    assert torch.equal(first, second)
    assert not torch.allclose(first, attend(attention, values, values + torch.randn_like(values)))


def read_bilinearly(level: Tensor, x: float, y: float) -> Tensor:
    """float[H, W, C] at (x, y) in [0, 1] from the four cells around; cells outside count as 0."""
    height, width, channels = level.shape
    column, row = x * width - 0.5, y * height - 0.5
    total = torch.zeros(channels)
    for near_row in (math.floor(row), math.floor(row) + 1):
        for near_column in (math.floor(column), math.floor(column) + 1):
            if 0 <= near_row < height and 0 <= near_column < width:
                weight = (1 - abs(row - near_row)) * (1 - abs(column - near_column))
                total += weight * level[near_row, near_column]
    return total


def test_at_the_start_a_cell_averages_the_points_of_its_directions() -> None:
    """Identity projections leave, for head m, the mean over 3 levels and 2 points of the sampled values.

    M = 4 heads look right, down, left and up (angles 0, π/2, π, 3π/2; y grows downwards), at 1 and 2 cells'
    distance measured in cells of the level looked at.
    """
    heads, points, channels = 4, 2, 8
    attention = start_attention(channels=channels, heads=heads, points=points)
    with torch.no_grad():
        for projection in (attention.value_proj, attention.output_proj):
            projection.weight.copy_(torch.eye(channels))
    values = torch.randn(1, NUM_CELLS, channels)
    found = attend(attention, values, values)[0].detach()

    parts = values[0].split([height * width for height, width in SIZES])
    maps = [part.view(height, width, channels) for part, (height, width) in zip(parts, SIZES, strict=True)]
    directions = [(1, 0), (0, 1), (-1, 0), (0, -1)]
    for cell, (x, y) in enumerate(cell_centres().tolist()):
        for head, (dx, dy) in enumerate(directions):
            own = slice(head * 2, head * 2 + 2)
            sampled = [
                read_bilinearly(level[..., own], x + dx * k / level.shape[1], y + dy * k / level.shape[0])
                for level in maps
                for k in (1, 2)
            ]
            torch.testing.assert_close(found[cell, own], torch.stack(sampled).mean(0), rtol=1e-4, atol=1e-4)


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
    for _, _, reference_points, sizes in calls:
        assert sizes == SIZES
        assert isinstance(reference_points, Tensor)
        expected = cell_centres()[None, :, None, :].expand(1, -1, LEVELS, 2)
        torch.testing.assert_close(reference_points, expected)


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

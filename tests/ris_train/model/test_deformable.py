"""Deformable attention: how it starts, what it samples, and that it equals Mask2Former's."""

from __future__ import annotations

import math
from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from ris_cache.vision_imports import ensure_torchvision
from ris_train.model.deformable import DeformableAttention, sample_levels

ensure_torchvision()

from transformers.models.mask2former.modeling_mask2former import (  # noqa: E402
    Mask2FormerPixelDecoderEncoderMultiscaleDeformableAttention as TheirAttention,
)

LEVELS = 3
SIZES = [(6, 5), (3, 4), (2, 2)]
NUM_CELLS = sum(height * width for height, width in SIZES)


def start_attention(*, channels: int, heads: int, points: int) -> DeformableAttention:
    return DeformableAttention(channels, num_heads=heads, num_levels=LEVELS, num_points=points)


def cell_centres(sizes: list[tuple[int, int]]) -> Tensor:
    """(x, y) of every cell, level after level, row by row: float[S, 2]."""
    return torch.tensor(
        [
            [(column + 0.5) / width, (row + 0.5) / height]
            for height, width in sizes
            for row in range(height)
            for column in range(width)
        ]
    )


def attend(attention: DeformableAttention, tokens: Tensor, positions: Tensor | None = None) -> Tensor:
    positions = torch.zeros_like(tokens[0]) if positions is None else positions
    return attention(tokens, positions, cell_centres(SIZES), SIZES)


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


def test_at_the_start_positions_do_not_matter_but_the_values_do() -> None:
    attention = start_attention(channels=32, heads=8, points=4)
    tokens = torch.randn(2, NUM_CELLS, 32)
    first, second = (attend(attention, tokens, torch.randn(NUM_CELLS, 32)) for _ in range(2))
    assert torch.equal(first, second)
    assert not torch.allclose(first, attend(attention, tokens + torch.randn_like(tokens)))


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
    found = attend(attention, values)[0].detach()

    parts = values[0].split([height * width for height, width in SIZES])
    maps = [part.view(height, width, channels) for part, (height, width) in zip(parts, SIZES, strict=True)]
    directions = [(1, 0), (0, 1), (-1, 0), (0, -1)]
    for cell, (x, y) in enumerate(cell_centres(SIZES).tolist()):
        for head, (dx, dy) in enumerate(directions):
            own = slice(head * 2, head * 2 + 2)
            sampled = [
                read_bilinearly(level[..., own], x + dx * k / level.shape[1], y + dy * k / level.shape[0])
                for level in maps
                for k in (1, 2)
            ]
            torch.testing.assert_close(found[cell, own], torch.stack(sampled).mean(0), rtol=1e-4, atol=1e-4)


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    """At these sizes, handing work to a second thread costs more than it saves."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def read_levels_by_hand(
    maps: Tensor, sizes: list[tuple[int, int]], locations: Tensor, weights: Tensor
) -> Tensor:
    """Weighted sum of the four cells around every point: maps [N, C, V] → [N, C, S], (x, y) in [0, 1]."""
    num, channels, _ = maps.shape
    total = torch.zeros(num, channels, locations.shape[3], dtype=maps.dtype)
    levels = maps.split([height * width for height, width in sizes], dim=2)
    for index, (level, (height, width)) in enumerate(zip(levels, sizes, strict=True)):
        x = locations[:, index, ..., 0] * width - 0.5  # [N, K, S]
        y = locations[:, index, ..., 1] * height - 0.5
        for column in (x.detach().floor(), x.detach().floor() + 1):
            for row in (y.detach().floor(), y.detach().floor() + 1):
                inside = (column >= 0) & (column < width) & (row >= 0) & (row < height)
                cell = (row.clamp(0, height - 1) * width + column.clamp(0, width - 1)).long()
                read = level.gather(2, cell.flatten(1).unsqueeze(1).expand(-1, channels, -1))
                share = (1 - (x - column).abs()) * (1 - (y - row).abs()) * inside * weights[:, index]
                total = total + (read.view(num, channels, *x.shape[1:]) * share.unsqueeze(1)).sum(dim=2)
    return total


SHAPES = st.lists(st.tuples(st.integers(1, 6), st.integers(1, 6)), min_size=1, max_size=4)


@settings(max_examples=40, deadline=None)
@given(SHAPES, st.integers(1, 3), st.integers(1, 4), st.integers(1, 3), st.integers(0, 100_000))
def test_levels_are_read_as_by_hand_and_so_are_their_gradients(
    sizes: list[tuple[int, int]], num_maps: int, channels: int, points: int, seed: int
) -> None:
    """In float64; some points lie outside."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=generator, dtype=torch.float64)

    cells = 5
    maps = draw(num_maps, channels, sum(height * width for height, width in sizes)).requires_grad_()
    locations = (draw(num_maps, len(sizes), points, cells, 2) * 1.6 - 0.3).requires_grad_()
    weights = draw(num_maps, len(sizes), points, cells).requires_grad_()
    outputs = (
        sample_levels(maps, sizes, 2 * locations - 1, weights),
        read_levels_by_hand(maps, sizes, locations, weights),
    )
    upstream = draw(*outputs[0].shape)
    ours, by_hand = (torch.autograd.grad(output, (maps, locations, weights), upstream) for output in outputs)
    torch.testing.assert_close(outputs[0], outputs[1])
    for one, other in zip(ours, by_hand, strict=True):
        torch.testing.assert_close(one, other)


def both(
    heads: int, width: int, levels: int, points: int, seed: int
) -> tuple[DeformableAttention, nn.Module]:
    """Ours and Mask2Former's with the same weights, loaded by their names, in float64."""
    torch.manual_seed(seed)
    ours = DeformableAttention(heads * width, num_heads=heads, num_levels=levels, num_points=points)
    theirs = TheirAttention(embed_dim=heads * width, num_heads=heads, n_levels=levels, n_points=points)
    for parameter in ours.parameters():
        nn.init.normal_(parameter, std=0.5)
    theirs.load_state_dict(ours.state_dict(), strict=True)
    return ours.double(), theirs.double()


@settings(max_examples=30, deadline=None)
@given(
    SHAPES,
    st.integers(1, 3),
    st.sampled_from([1, 2, 4]),
    st.sampled_from([1, 2, 4]),
    st.integers(1, 3),
    st.integers(0, 100_000),
)
def test_outputs_and_gradients_equal_mask2formers(
    sizes: list[tuple[int, int]], batch: int, heads: int, width: int, points: int, seed: int
) -> None:
    ours, theirs = both(heads, width, len(sizes), points, seed)
    centres = cell_centres(sizes).double()
    tokens = torch.randn(batch, len(centres), heads * width, dtype=torch.float64, requires_grad=True)
    positions = torch.randn(len(centres), heads * width, dtype=torch.float64, requires_grad=True)
    found = ours(tokens, positions, centres, sizes)
    expected, _ = theirs(
        hidden_states=tokens,
        encoder_hidden_states=tokens,
        position_embeddings=positions,
        reference_points=centres[None, :, None, :].expand(1, -1, len(sizes), 2),
        spatial_shapes_list=sizes,
    )
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)
    upstream = torch.randn_like(found)
    gradients = [
        torch.autograd.grad(output, (tokens, positions, *module.parameters()), upstream)
        for output, module in ((found, ours), (expected, theirs))
    ]
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_in_half_precision_it_is_near_and_gradients_flow(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    attention = start_attention(channels=16, heads=4, points=2)
    for layer in (attention.sampling_offsets, attention.attention_weights):
        nn.init.normal_(layer.weight, std=0.01)
    tokens = torch.randn(2, NUM_CELLS, 16)
    expected = attend(attention, tokens)
    with torch.autocast("cpu", dtype=dtype):
        found = attend(attention, tokens)
    torch.testing.assert_close(found.float(), expected, rtol=0, atol=0.1)
    found.float().square().sum().backward()
    for name, parameter in attention.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name


def test_every_sample_is_attended_to_at_once() -> None:
    """As many operators for twenty samples as for two: there is no loop over the batch."""
    attention = start_attention(channels=8, heads=2, points=2)
    counts = []
    for batch in (2, 20):
        tokens = torch.randn(batch, NUM_CELLS, 8, requires_grad=True)
        with torch.profiler.profile() as profile:
            attended = attend(attention, tokens)
            attended.backward(torch.randn_like(attended))
        counts.append(sum(event.count for event in profile.key_averages() if "aten::" in event.key))
    assert counts[1] < counts[0] + 20  # torch chooses other kernels for other sizes

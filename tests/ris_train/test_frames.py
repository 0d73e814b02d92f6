"""The way back to the original frame against an independent bilinear interpolation."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ris_train.frames import logit_of, to_grid, to_original_frame


def resize_bilinearly(image: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Read each output pixel's centre from the four input pixels around it; edges are repeated."""
    height, width = size
    resized = np.empty(size)
    for row in range(height):
        for column in range(width):
            y = (row + 0.5) * image.shape[0] / height - 0.5
            x = (column + 0.5) * image.shape[1] / width - 0.5
            top, left = int(np.floor(y)), int(np.floor(x))
            value = 0.0
            for near_row in (top, top + 1):
                for near_column in (left, left + 1):
                    weight = (1 - abs(y - near_row)) * (1 - abs(x - near_column))
                    clamped_row = min(max(near_row, 0), image.shape[0] - 1)
                    clamped_column = min(max(near_column, 0), image.shape[1] - 1)
                    value += weight * image[clamped_row, clamped_column]
            resized[row, column] = value
    return resized


@given(
    st.integers(2, 9),
    st.tuples(st.integers(1, 24), st.integers(1, 24)),
    st.integers(0, 100_000),
)
def test_each_pixel_is_the_sign_of_the_interpolated_logit(
    side: int, size: tuple[int, int], seed: int
) -> None:
    logits = np.random.default_rng(seed).normal(size=(side, side)).astype(np.float32)
    expected = resize_bilinearly(logits, size)
    found = to_original_frame(torch.from_numpy(logits), size).numpy()
    assert found.shape == size
    assert found.dtype == np.bool_
    # Two ways of rounding may disagree about what is zero.
    is_clear = np.abs(expected) > 1e-5
    assert (found == (expected > 0))[is_clear].all()


def test_logits_of_the_images_own_size_are_only_thresholded() -> None:
    logits = torch.randn(7, 7, generator=torch.Generator().manual_seed(0))
    assert torch.equal(to_original_frame(logits, (7, 7)), logits > 0)


def test_a_logit_of_zero_is_background() -> None:
    assert not to_original_frame(torch.zeros(4, 4), (3, 5)).any()


@pytest.mark.parametrize("size", [(10, 30), (30, 10)])
def test_height_comes_first_and_rows_stay_rows(size: tuple[int, int]) -> None:
    """The upper half and the right half of a square stay upper and right in a landscape and a portrait."""
    height, width = size
    upper, right = -torch.ones(8, 8), -torch.ones(8, 8)
    upper[:4] = 1
    right[:, 4:] = 1
    expected_upper = torch.zeros(size, dtype=torch.bool)
    expected_upper[: height // 2] = True
    expected_right = torch.zeros(size, dtype=torch.bool)
    expected_right[:, width // 2 :] = True
    assert torch.equal(to_original_frame(upper, size), expected_upper)
    assert torch.equal(to_original_frame(right, size), expected_right)


def test_half_precision_logits_are_accepted() -> None:
    logits = torch.randn(6, 6, generator=torch.Generator().manual_seed(0)).bfloat16()
    assert torch.equal(to_original_frame(logits, (9, 4)), to_original_frame(logits.float(), (9, 4)))


def test_logits_are_resized_before_they_are_thresholded() -> None:
    """Logits 3 and −1: the zero lies three quarters of the way from centre to centre, not halfway.

    Eight pixels over two: centres 1.5/8 … pixel i lies at (i + ½)/4 − ½ cells; 3 − 4·t > 0 for t < 3/4, where
    t = (i + ½)/4 − ½, so i < 4.5: five pixels. A resized mask would give four.
    """
    logits = torch.tensor([[3.0, -1.0], [3.0, -1.0]])
    assert to_original_frame(logits, (2, 8))[0].tolist() == [True] * 5 + [False] * 3


@pytest.mark.parametrize("size", [(5, 9), (48, 48), (7, 3)])
def test_a_batch_is_resized_as_each_of_its_logits_alone(size: tuple[int, int]) -> None:
    logits = torch.from_numpy(np.random.default_rng(0).normal(size=(5, 8, 8)).astype(np.float32))
    whole = to_grid(logits, size)
    assert whole.shape == (5, *size)
    for one, expected in zip(whole, logits, strict=True):
        assert torch.equal(one, to_grid(expected[None], size)[0])
        assert torch.equal(one > 0, to_original_frame(expected, size))


@pytest.mark.parametrize("probability", [0.35, 0.5, 0.9])
def test_a_logit_beyond_the_thresholds_is_a_probability_beyond_it(probability: float) -> None:
    assert torch.sigmoid(torch.tensor(logit_of(probability), dtype=torch.float64)).item() == pytest.approx(
        probability, abs=1e-15
    )
    assert logit_of(0.5) == 0

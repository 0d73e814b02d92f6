"""The order of training: permutations, purity, and batches that lose and repeat nothing."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ris_train.data.sampler import batches, epoch_order

FINGERPRINT = "3f9c01a2b4d5e6f708192a3b4c5d6e7f" * 2
OTHER_FINGERPRINT = "a117d2" + FINGERPRINT[6:]

fingerprints = st.text("0123456789abcdef", min_size=64, max_size=64)


@given(st.integers(0, 300), st.integers(0, 2**31), st.integers(0, 1000), fingerprints)
def test_an_epoch_is_a_permutation(num_samples: int, seed: int, epoch: int, fingerprint: str) -> None:
    order = epoch_order(num_samples, seed=seed, epoch=epoch, fingerprint=fingerprint)
    assert order.dtype == np.int64
    assert sorted(order.tolist()) == list(range(num_samples))


@given(st.integers(0, 2**31), st.integers(0, 1000), fingerprints, st.integers(0, 2**31))
def test_the_order_is_a_function_of_its_arguments_alone(
    seed: int, epoch: int, fingerprint: str, global_seed: int
) -> None:
    first = epoch_order(50, seed=seed, epoch=epoch, fingerprint=fingerprint)
    # The global generator is what must not matter.
    np.random.seed(global_seed)
    second = epoch_order(50, seed=seed, epoch=epoch, fingerprint=fingerprint)
    assert np.array_equal(first, second)


@pytest.mark.parametrize(
    "change",
    [{"seed": 1}, {"epoch": 1}, {"fingerprint": OTHER_FINGERPRINT}],
    ids=["seed", "epoch", "fingerprint"],
)
def test_another_seed_epoch_or_cache_gives_another_order(change: dict[str, int | str]) -> None:
    """Of 50! orders, two are the same by chance never."""
    arguments = {"seed": 0, "epoch": 0, "fingerprint": FINGERPRINT}
    order = epoch_order(50, **arguments)
    assert not np.array_equal(order, epoch_order(50, **(arguments | change)))


def test_seed_and_epoch_do_not_trade_places() -> None:
    """Run 1's first epoch is not run 0's second."""
    first = epoch_order(50, seed=1, epoch=0, fingerprint=FINGERPRINT)
    assert not np.array_equal(first, epoch_order(50, seed=0, epoch=1, fingerprint=FINGERPRINT))


@given(st.integers(1, 20), st.integers(1, 30), st.integers(1, 12), st.integers(0, 1000))
def test_batches_are_the_epochs_laid_end_to_end(
    num_samples: int, batch_size: int, num_batches: int, seed: int
) -> None:
    """A batch may straddle epochs, even several."""
    drawn = list(
        itertools.islice(batches(num_samples, batch_size, seed=seed, fingerprint=FINGERPRINT), num_batches)
    )
    assert all(batch.shape == (batch_size,) and batch.dtype == np.int64 for batch in drawn)
    num_epochs = -(-num_batches * batch_size // num_samples)
    laid = np.concatenate(
        [
            epoch_order(num_samples, seed=seed, epoch=epoch, fingerprint=FINGERPRINT)
            for epoch in range(num_epochs)
        ]
    )
    assert np.array_equal(np.concatenate(drawn), laid[: num_batches * batch_size])


def test_a_batch_that_is_kept_does_not_change_later() -> None:
    stream = batches(7, 3, seed=0, fingerprint=FINGERPRINT)
    first = next(stream)
    kept = first.copy()
    for _ in range(10):
        next(stream)
    assert np.array_equal(first, kept)

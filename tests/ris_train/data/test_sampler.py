"""The order of training: permutations, purity, groups of one image, and batches that lose and repeat nothing."""

from __future__ import annotations

import itertools
from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ris_train.data.sampler import SampleOrder, order

FINGERPRINT = "3f9c01a2b4d5e6f708192a3b4c5d6e7f" * 2
ARGUMENTS = {"seed": 0, "epoch": 0, "fingerprint": FINGERPRINT, "selection": "refcoco:train"}

images = st.lists(st.integers(1, 12), max_size=80)


@given(images, st.integers(0, 2**31), st.integers(0, 1000), st.integers(1, 5))
def test_an_epoch_is_a_permutation(image_ids: list[int], seed: int, epoch: int, k: int) -> None:
    found = order(image_ids, **(ARGUMENTS | {"seed": seed, "epoch": epoch}), expressions_per_image=k)
    assert found.dtype == np.int64
    assert sorted(found.tolist()) == list(range(len(image_ids)))


@given(images, st.integers(1, 5), st.integers(0, 2**31))
def test_the_order_is_a_function_of_its_arguments_alone(
    image_ids: list[int], k: int, global_seed: int
) -> None:
    first = order(image_ids, **ARGUMENTS, expressions_per_image=k)
    np.random.seed(global_seed)  # the global generator is what must not matter
    assert np.array_equal(first, order(image_ids, **ARGUMENTS, expressions_per_image=k))


@pytest.mark.parametrize(
    "change",
    [{"seed": 1}, {"epoch": 1}, {"fingerprint": "a" + FINGERPRINT[1:]}, {"selection": "refcoco+:train"}],
    ids=["seed", "epoch", "fingerprint", "selection"],
)
def test_another_seed_epoch_cache_or_selection_gives_another_order(change: dict[str, int | str]) -> None:
    """Of 50! orders, two are the same by chance never."""
    found = order(range(50), **ARGUMENTS)
    assert not np.array_equal(found, order(range(50), **(ARGUMENTS | change)))


def test_seed_and_epoch_do_not_trade_places() -> None:
    """Run 1's first epoch is not run 0's second."""
    first = order(range(50), **(ARGUMENTS | {"seed": 1}))
    assert not np.array_equal(first, order(range(50), **(ARGUMENTS | {"epoch": 1})))


@given(st.lists(st.integers(1, 8), min_size=1, max_size=80), st.integers(2, 5))
def test_the_samples_of_an_image_stand_in_groups_next_to_each_other(image_ids: list[int], k: int) -> None:
    """Groups of one image may meet by chance, so a stretch of one image holds at least one group."""
    found = order(image_ids, **ARGUMENTS, expressions_per_image=k)
    stretches = [
        (image, len(list(members))) for image, members in itertools.groupby(image_ids[i] for i in found)
    ]
    num_stretches = Counter(image for image, _ in stretches)
    for image, count in Counter(image_ids).items():
        assert num_stretches[image] <= -(-count // k)
        assert sum(length % k != 0 for found_image, length in stretches if found_image == image) <= 2


def test_groups_are_cut_anew_each_epoch() -> None:
    image_ids = [1] * 6
    pairs = {
        frozenset(
            map(
                frozenset,
                order(image_ids, **(ARGUMENTS | {"epoch": e}), expressions_per_image=2)
                .reshape(3, 2)
                .tolist(),
            )
        )
        for e in range(8)
    }
    assert len(pairs) > 1


@given(st.integers(1, 20), st.integers(1, 30), st.integers(0, 60), st.integers(1, 3))
def test_what_is_taken_is_the_epochs_laid_end_to_end(num: int, count: int, consumed: int, k: int) -> None:
    """A batch may straddle epochs, even several, and starts anywhere without the ones before it."""
    image_ids = [position // 2 for position in range(num)]
    rest = {"seed": 4, "fingerprint": FINGERPRINT, "selection": "s", "expressions_per_image": k}
    taken = SampleOrder(image_ids, **rest).take(consumed, count)
    epochs = (order(image_ids, epoch=epoch, **rest) for epoch in range((consumed + count) // num + 1))
    laid = np.concatenate(list(epochs))
    assert np.array_equal(taken, laid[consumed : consumed + count])


def test_taking_in_parts_is_taking_at_once() -> None:
    rest = {"seed": 4, "fingerprint": FINGERPRINT, "selection": "s"}
    stream = SampleOrder(range(7), **rest)
    parts = [stream.take(start, 3) for start in range(0, 30, 3)]
    assert np.array_equal(np.concatenate(parts), SampleOrder(range(7), **rest).take(0, 30))

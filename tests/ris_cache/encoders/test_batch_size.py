"""Finding a batch size: the arithmetic, the search against an imitated device, and a real one."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ris_cache.encoders.batch_size import (
    cpu_batch_size,
    find_batch_size,
    predict_batch_size,
    search_batch_size,
)
from ris_cache.encoders.frozen import FrozenEncoders
from ris_cache.encoders.spec import PAPER, TINY
from ris_cache.encoders.weights import RandomWeights
from ris_cache.errors import ConfigError

GIB = 1 << 30


class ImitatedDevice:
    """Takes `fixed + per_image * size` bytes for a batch, has `memory` bytes, and keeps a list of what ran."""

    def __init__(self, *, fixed: int, per_image: int, memory: int) -> None:
        self.fixed, self.per_image, self.memory = fixed, per_image, memory
        self.ran: list[int] = []

    def measure(self, size: int) -> int:
        self.ran.append(size)
        needed = self.fixed + self.per_image * size
        if needed > self.memory:
            raise torch.OutOfMemoryError(f"{needed} bytes")
        return needed

    def fits(self, size: int) -> bool:
        try:
            self.measure(size)
        except torch.OutOfMemoryError:
            return False
        return True

    def search(self, *, budget: int, limit: int) -> int | None:
        return search_batch_size(self.measure, self.fits, budget=budget, limit=limit)


@pytest.fixture(scope="module")
def tiny() -> FrozenEncoders:
    return FrozenEncoders.load(TINY, sam_source=RandomWeights(0), clip_source=RandomWeights(0))


@pytest.mark.parametrize(
    ("peaks", "budget", "limit", "expected"),
    [
        ((3, 5), 33, 64, 16),  # 1 + 2n bytes: 16 images take exactly 33
        ((3, 5), 32, 64, 8),
        ((3, 5), 10**9, 64, 64),
        ((3, 5), 10**9, 48, 32),
        ((3, 5), 2, 64, 1),  # over budget even alone: the run that follows decides
        ((3, 3), 10, 64, 64),  # no growth to be seen
        ((3, 3), 2, 64, 1),
        ((3, 5), 33, 1, 1),
    ],
)
def test_the_prediction_is_a_straight_line(
    peaks: tuple[int, int], budget: int, limit: int, expected: int
) -> None:
    assert predict_batch_size(*peaks, budget=budget, limit=limit) == expected


@given(
    fixed=st.integers(0, 10 * GIB),
    per_image=st.integers(1, 4 * GIB),
    budget=st.integers(0, 200 * GIB),
    limit=st.integers(1, 300),
)
def test_the_prediction_is_the_largest_power_of_two_within_budget_and_limit(
    fixed: int, per_image: int, budget: int, limit: int
) -> None:
    found = predict_batch_size(fixed + per_image, fixed + 2 * per_image, budget=budget, limit=limit)
    allowed = [2**i for i in range(9) if 2**i <= limit and fixed + per_image * 2**i <= budget]
    assert found == max(allowed, default=1)


def test_a_search_runs_one_two_and_the_batch_that_it_returns() -> None:
    device = ImitatedDevice(fixed=GIB, per_image=2 * GIB, memory=80 * GIB)
    assert device.search(budget=64 * GIB, limit=64) == 16
    assert device.ran == [1, 2, 16]


def test_a_prediction_that_does_not_run_is_halved_until_one_does() -> None:
    device = ImitatedDevice(fixed=0, per_image=2 * GIB, memory=17 * GIB)
    assert device.search(budget=80 * GIB, limit=64) == 8  # someone else took the rest meanwhile
    assert device.ran == [1, 2, 32, 16, 8]


@pytest.mark.parametrize(("memory", "expected"), [(5, None), (10, 1), (19, 1), (20, 2)])
def test_a_device_with_hardly_any_room(memory: int, expected: int | None) -> None:
    device = ImitatedDevice(fixed=0, per_image=10, memory=memory)
    assert device.search(budget=memory, limit=64) == expected


def test_the_limit_holds_for_the_trials_too() -> None:
    device = ImitatedDevice(fixed=0, per_image=1, memory=100)
    assert device.search(budget=100, limit=1) == 1
    assert set(device.ran) == {1}


def test_on_a_cpu_full_size_images_go_one_by_one_and_tiny_ones_in_eights(tiny: FrozenEncoders) -> None:
    assert cpu_batch_size(PAPER, limit=64) == 1
    assert find_batch_size(tiny) == 8
    assert find_batch_size(tiny, limit=7) == 4


def test_a_limit_below_one_is_refused(tiny: FrozenEncoders) -> None:
    with pytest.raises(ConfigError, match="at least 1 image, but the limit is 0"):
        find_batch_size(tiny, limit=0)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_cuda_device_takes_the_batch_that_was_found() -> None:
    on_device = FrozenEncoders.load(
        TINY, sam_source=RandomWeights(0), clip_source=RandomWeights(0), device="cuda"
    )
    size = find_batch_size(on_device, limit=16)
    assert size in (1, 2, 4, 8, 16)
    free, _ = torch.cuda.mem_get_info()
    torch.cuda.reset_peak_memory_stats()
    sam, clip = (
        torch.zeros((size, side, side, 3), dtype=torch.uint8)
        for side in (TINY.sam.image_size, TINY.clip.image_size)
    )
    before = torch.cuda.memory_allocated()
    on_device.encode(sam, clip)
    assert torch.cuda.max_memory_allocated() - before <= free

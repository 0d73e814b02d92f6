"""A batch of features: views, and two ways to the same numbers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from ris_cache.store.batch import FeatureBatch
from ris_cache.store.cache import FeatureCache
from ris_cache.store.layout import StoredArray

pytestmark = pytest.mark.usefixtures("no_waiting_for_the_disk")

NAMES = {"sam", "clip", "clip_pooled"}


@pytest.fixture
def batch(drawn_cache: Path) -> FeatureBatch:
    return FeatureCache.open(drawn_cache).read([7, 0, 7, 9])


def test_numpy_and_torch_decode_to_the_same_bits(batch: FeatureBatch) -> None:
    decoded, moved = batch.decoded(), batch.to("cpu")
    assert set(decoded) == set(moved) == NAMES
    for name in NAMES:
        assert decoded[name].dtype == np.float32
        assert moved[name].dtype == torch.float32
        np.testing.assert_array_equal(decoded[name].view(np.uint32), moved[name].numpy().view(np.uint32))


def test_decoding_gives_what_the_format_says(any_drawing: Any, batch: FeatureBatch) -> None:
    stored = any_drawing.stored([7, 0, 7, 9])
    decoded = batch.decoded()
    match any_drawing.dtype:
        case "float16" | "float32":
            expected = {name: stored[name].astype(np.float32) for name in NAMES}
        case "bfloat16":
            expected = {
                name: torch.from_numpy(stored[name].view(np.int16)).view(torch.bfloat16).float().numpy()
                for name in NAMES
            }
        case _:
            expected = {name: stored[name] * stored[f"{name}_scale"] for name in ("sam", "clip")}
            expected["clip_pooled"] = stored["clip_pooled"].astype(np.float32)
    for name in NAMES:
        np.testing.assert_array_equal(decoded[name], expected[name])


def test_other_dtypes_are_the_decoded_values_rounded(batch: FeatureBatch) -> None:
    for name, tensor in batch.to("cpu", torch.bfloat16).items():
        assert tensor.dtype == torch.bfloat16
        assert torch.equal(tensor, torch.from_numpy(batch.decoded()[name]).to(torch.bfloat16))


def test_on_the_cpu_no_copy_is_waited_for(batch: FeatureBatch) -> None:
    batch.to("cpu")
    assert batch.copies == []
    batch.wait_for_copies()


def test_what_is_stored_has_names_of_its_own(batch: FeatureBatch) -> None:
    assert batch.sam is batch.stored["sam"]
    assert batch.clip is batch.stored["clip"]
    assert batch.clip_pooled is batch.stored["clip_pooled"]
    assert len(batch) == 4


def test_the_first_images_are_views_that_share_the_copies_to_wait_for(batch: FeatureBatch) -> None:
    first = batch.first(2)
    assert (len(first), first.image_ids.tolist()) == (2, [7, 0])
    for name, array in batch.stored.items():
        assert np.shares_memory(first.stored[name], array)
        np.testing.assert_array_equal(first.stored[name], array[:2])

    class Event:
        waited = 0

        def synchronize(self) -> None:
            Event.waited += 1

    first.copies.append(Event())
    first.copies.append(Event())
    batch.wait_for_copies()
    assert Event.waited == 2
    batch.wait_for_copies()
    assert Event.waited == 2


def test_buffers_have_the_stored_shapes_and_dtypes(any_drawing: Any) -> None:
    arrays = any_drawing.recipe.arrays
    buffers = FeatureBatch.allocate(arrays, 3, dtype=any_drawing.dtype, pinned=False)
    assert list(buffers.stored) == [array.name for array in arrays]
    for array in arrays:
        buffer = buffers.stored[array.name]
        assert (buffer.shape, buffer.dtype) == ((3, *array.shape), array.numpy_dtype)
        assert buffer.flags.c_contiguous
        assert buffer.flags.writeable
    assert buffers.image_ids.dtype == np.int64


@pytest.mark.parametrize("num_images", [1, 2, 3, 7])
def test_buffers_lie_where_the_disk_can_write_into_them(num_images: int) -> None:
    arrays = [
        StoredArray(name="sam", shape=(256, 64, 64), dtype="float16"),
        StoredArray(name="clip", shape=(576, 1024), dtype="float16"),
        StoredArray(name="clip_pooled", shape=(768,), dtype="float16"),
    ]
    buffers = FeatureBatch.allocate(arrays, num_images, dtype="float16", pinned=False)
    for array in buffers.stored.values():
        assert array.ctypes.data % (2 << 20 if array.nbytes >= 4 << 20 else 4096) == 0
        assert array.flags.c_contiguous
        assert not array.any()


@pytest.mark.parametrize("offset", [0, 64, 4095])
def test_pinned_buffers_begin_with_a_page_wherever_their_memory_begins(
    offset: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    allocated = []

    def zeros(size: int, *, dtype: torch.dtype, pin_memory: bool) -> torch.Tensor:
        assert pin_memory
        allocated.append(size)
        memory = np.zeros(size + 2 * 4096, np.uint8)
        start = -memory.ctypes.data % 4096 + offset
        return torch.from_numpy(memory[start : start + size])

    monkeypatch.setattr(torch, "zeros", zeros)
    array = StoredArray(name="sam", shape=(3000,), dtype="float16")
    sam = FeatureBatch.allocate([array], 2, dtype="float16", pinned=True).sam
    assert (sam.shape, sam.dtype, sam.ctypes.data % 4096) == ((2, 3000), np.float16, 0)
    assert allocated == ([12000] if offset == 0 else [12000, 12000 + 4096])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_pinned_buffers_reach_the_gpu_unchanged(any_drawing: Any, drawn_cache: Path) -> None:
    cache = FeatureCache.open(drawn_cache)
    buffers = cache.allocate(4, pinned=True)
    batch = cache.read([7, 0, 7, 9], out=buffers)
    assert torch.from_numpy(batch.stored["sam"]).is_pinned()
    moved = batch.to("cuda")
    assert len(buffers.copies) == 1
    buffers.wait_for_copies()
    for name, array in batch.decoded().items():
        np.testing.assert_array_equal(moved[name].cpu().numpy(), array)

"""Batches of a run: streamed from the cache ahead of their use, and those that reading one by one gives."""

from __future__ import annotations

import gc
import shutil
import threading
from collections.abc import Callable, Iterator
from dataclasses import fields, is_dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch

from ris_cache import FeatureCache
from ris_cache.errors import CorruptShardError
from ris_train.config import RunConfig
from ris_train.data.sampler import SampleOrder
from ris_train.ranks import Ranks
from ris_train.training.setup import Setup, masks_of, prepare
from ris_train.training.step import StepBatch, build_step_batch

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _no_thread_is_left_behind() -> Iterator[None]:
    before = set(threading.enumerate())
    yield
    assert set(threading.enumerate()) <= before


@pytest.fixture
def make(tiny_cache: Path, short_config: Callable[..., RunConfig]) -> Callable[..., Setup]:
    """Prepare a run of batches that do not divide the epoch."""

    def prepared(*overrides: str, rank: int = 0, world: int = 1, cache: Path = tiny_cache) -> Setup:
        config = short_config("train.batch_size=37", "train.steps=9", *overrides)
        return prepare(cache, config, Ranks(rank, world, CPU), random_seed=0)

    return prepared


def plain_batches(setup: Setup, consumed: int, first_step: int) -> Iterator[StepBatch]:
    """Batches one by one, their features read when they are built."""
    samples, config = setup.training_set.samples, setup.config
    order = SampleOrder(
        [sample.image_id for sample in samples],
        seed=config.train.seed,
        fingerprint=setup.cache.fingerprint.digest,
        selection=config.data.train,
        expressions_per_image=config.train.expressions_per_image,
    )
    masks = masks_of(setup.cache, config, setup.training_set)
    for step in range(first_step, config.train.steps + 1):
        chosen = [samples[index] for index in order.take(consumed, config.train.batch_size).tolist()]
        yield build_step_batch(step, chosen, setup.builder, masks, config, setup.ranks)
        consumed += config.train.batch_size


def assert_same(found: Any, expected: Any, name: str = "batch") -> None:
    """Compare bit for bit, whatever lies in it."""
    assert type(found) is type(expected), name
    if isinstance(expected, torch.Tensor):
        assert found.dtype == expected.dtype, name
        assert torch.equal(found, expected), name
    elif isinstance(expected, tuple):
        assert len(found) == len(expected), name
        for index, (one, other) in enumerate(zip(found, expected, strict=True)):
            assert_same(one, other, f"{name}[{index}]")
    elif is_dataclass(expected):
        for field in fields(expected):
            assert_same(getattr(found, field.name), getattr(expected, field.name), f"{name}.{field.name}")
    else:
        assert found == expected, name


@pytest.mark.parametrize(
    ("overrides", "rank", "world", "steps_before"),
    [
        ((), 0, 1, 0),
        (("train.accumulate=3",), 0, 1, 0),
        (("train.accumulate=2",), 1, 2, 4),
        (("train.expressions_per_image=3", "train.accumulate=2"), 0, 2, 3),
        (("model.sparse_prompt=category", "train.accumulate=40"), 0, 1, 8),
    ],
)
def test_streamed_batches_are_those_read_one_by_one(
    make: Callable[..., Setup], overrides: tuple[str, ...], rank: int, world: int, steps_before: int
) -> None:
    """All are held until the end, so a buffer that is used again under a batch would show."""
    setup = make(*overrides, rank=rank, world=world)
    consumed = 37 * steps_before
    streamed = list(setup.batches(consumed, steps_before + 1))
    expected = list(plain_batches(setup, consumed, steps_before + 1))
    assert [batch.step for batch in streamed] == list(range(steps_before + 1, 10))
    assert_same(tuple(streamed), tuple(expected))


def test_features_are_read_into_the_same_few_buffers(
    make: Callable[..., Setup], monkeypatch: pytest.MonkeyPatch
) -> None:
    allocated: list[int] = []
    original = FeatureCache.allocate

    def allocate(self: FeatureCache, batch_size: int, **options: Any) -> Any:
        allocated.append(batch_size)
        return original(self, batch_size, **options)

    monkeypatch.setattr(FeatureCache, "allocate", allocate)
    setup = make("train.accumulate=2")
    assert len(list(setup.batches(0, 1))) == 9
    assert allocated[:3] == [18, 19, 18]
    assert len(allocated) <= 6  # a buffer grows once, for the longer part


@pytest.mark.parametrize("taken", [1, 3])
def test_training_that_stops_early_leaves_no_thread(make: Callable[..., Setup], taken: int) -> None:
    """Closed, or forgotten as an error forgets it; the fixture looks."""
    setup = make()
    closed, forgotten = setup.batches(0, 1), setup.batches(0, 1)
    for batches in (closed, forgotten):
        assert len(list(islice(batches, taken))) == taken
    closed.close()
    assert any(thread.name.startswith(("ahead", "prefetch")) for thread in threading.enumerate())
    del forgotten, batches
    gc.collect()


def test_a_run_that_is_complete_has_no_batches(make: Callable[..., Setup]) -> None:
    assert list(make().batches(37 * 9, 10)) == []


def test_a_damaged_shard_is_said_where_its_batch_would_have_come(
    make: Callable[..., Setup], tiny_cache: Path, tmp_path: Path
) -> None:
    """One byte of one image, so that the batches before come as usual."""
    root = tmp_path / "feats"
    shutil.copytree(tiny_cache, root)
    (shard,) = (path for path in root.glob("features.zarr/sam/c/**/*") if path.is_file())
    content = bytearray(shard.read_bytes())
    content[len(content) // 3] ^= 1
    shard.write_bytes(content)
    setup = make("train.batch_size=2", "train.steps=1000", cache=root)
    expected = []
    with pytest.raises(CorruptShardError):
        expected.extend(plain_batches(setup, 0, 1))
    assert expected
    batches = setup.batches(0, 1)
    found = [next(batches) for _ in expected]
    with pytest.raises(CorruptShardError, match="ris cache verify"):
        next(batches)
    assert list(batches) == []
    assert_same(tuple(found), tuple(expected))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_batches_on_a_gpu_are_those_on_the_cpu(
    tiny_cache: Path, short_config: Callable[..., RunConfig]
) -> None:
    config = short_config("train.batch_size=37", "train.steps=9", "model.sparse_prompt=category")
    cpu, gpu = (
        list(prepare(tiny_cache, config, Ranks(0, 1, device), random_seed=0).batches(0, 1))
        for device in (CPU, torch.device("cuda"))
    )

    def on_cpu(value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            assert value.is_cuda
            return value.cpu()
        if isinstance(value, tuple):
            return tuple(map(on_cpu, value))
        if is_dataclass(value) and not isinstance(value, type):
            return type(value)(**{field.name: on_cpu(getattr(value, field.name)) for field in fields(value)})
        return value

    assert_same(on_cpu(tuple(gpu)), tuple(cpu))

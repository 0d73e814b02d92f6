"""From image files to stored features: against a plain loop over the same images."""

from __future__ import annotations

import hashlib
import shutil
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import ris_cache.extraction.pipeline as pipeline_module
from ris_cache.datasets import parse_selections
from ris_cache.encoders.frozen import FrozenEncoders
from ris_cache.encoders.images import decode_image
from ris_cache.errors import DataError, NonFiniteError
from ris_cache.extraction.pipeline import BufferPool, Pipeline
from ris_cache.extraction.sources import load_sources
from ris_cache.store.journal import PlannedImage
from ris_cache.store.precision import encode, stored_arrays

BATCH_SIZE = 2


@dataclass(frozen=True)
class Shard:
    images: Sequence[PlannedImage]


@dataclass(frozen=True)
class Drawn:
    """Eight images on disk."""

    images: list[PlannedImage]
    paths: dict[int, Path | None]

    def shards(self, *sizes: int) -> list[Shard]:
        left = iter(self.images)
        return [Shard([next(left) for _ in range(size)]) for size in sizes]


@pytest.fixture
def drawn(data: Path, tmp_path: Path) -> Drawn:
    own = Path(shutil.copytree(data, tmp_path / "data"))
    sources = load_sources(parse_selections("refcoco:val"), own)
    images = [
        PlannedImage(
            image_id=record.image_id,
            namespace="coco",
            row=row,
            file_name=record.file_name,
            height=record.height,
            width=record.width,
        )
        for row, record in enumerate(sources.images.values())
    ]
    return Drawn(images, dict(sources.paths))


@pytest.fixture
def compute(drawn: Drawn, encoders: FrozenEncoders) -> Callable[..., list[Any]]:
    """Compute shards; arrays are copied, since their buffers are used again."""

    def compute(works: Sequence[Shard], dtype: str = "float16", **options: Any) -> list[Any]:
        terms = {"batch_size": BATCH_SIZE, "workers": 2, "strict": False, "paths": drawn.paths}
        pipeline = Pipeline(encoders=encoders, dtype=dtype, **(terms | options))
        pool = BufferPool(stored_arrays(dtype, encoders.spec.feature_shapes()), 8, 2)
        done = []
        for shard in pipeline.compute(works, pool):
            copied = {name: array.copy() for name, array in shard.arrays.items()}
            done.append((shard.work, copied, shard.outcomes))
            pool.give_back(shard.buffers)
        return done

    return compute


def plain_loop(
    images: Sequence[PlannedImage], paths: dict[int, Path | None], encoders: FrozenEncoders, dtype: str
) -> dict[str, Any]:
    """The same in the simplest way: batch after batch, nothing ahead."""
    batches = []
    for start in range(0, len(images), BATCH_SIZE):
        prepared = [
            encoders.prepare(decode_image(paths[image.image_id], expected_size=None))
            for image in images[start : start + BATCH_SIZE]
        ]
        features = encoders.encode(
            *(torch.from_numpy(np.stack(frames)) for frames in zip(*prepared, strict=True))
        )
        batches.append(encode(dtype, features).arrays)
    return {name: torch.cat([batch[name] for batch in batches]).numpy() for name in batches[0]}


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16", "int8"])
def test_features_are_those_of_a_plain_loop_bit_for_bit(dtype, compute, drawn, encoders):
    shards = drawn.shards(4, 3, 1)

    for (work, arrays, outcomes), shard in zip(compute(shards, dtype), shards, strict=True):
        expected = plain_loop(shard.images, drawn.paths, encoders, dtype)
        assert work is shard
        assert list(arrays) == list(expected)
        for name in expected:
            np.testing.assert_array_equal(arrays[name], expected[name])
        assert [outcome.reason for outcome in outcomes] == [None] * len(shard.images)
        assert [outcome.sha256 for outcome in outcomes] == [
            hashlib.sha256(drawn.paths[image.image_id].read_bytes()).hexdigest() for image in shard.images
        ]


def test_a_shard_does_not_depend_on_those_before_it(compute, drawn):
    """A batch never spans two shards, so a shard computed alone after a kill has the bytes it would have had."""
    first, second = drawn.shards(3, 4)

    _, (_, after, _) = compute([first, second])
    ((_, alone, _),) = compute([second])

    for name in alone:
        np.testing.assert_array_equal(after[name], alone[name])


def test_each_image_is_decoded_once_for_both_encoders(compute, drawn, monkeypatch):
    decoded: list[Path] = []

    def counted(path: Path, **options: Any) -> Any:
        decoded.append(path)
        return decode_image(path, **options)

    monkeypatch.setattr(pipeline_module, "decode_image", counted)
    compute(drawn.shards(4, 4))

    assert sorted(decoded) == sorted(drawn.paths.values())


def test_decoding_runs_ahead_of_the_encoders_but_not_without_bound(compute, drawn, monkeypatch):
    """While the first batch is being encoded, others are decoded; two batches at most are waiting."""
    decoded: list[Path] = []
    has_decoded = threading.Condition()
    counts: list[int] = []

    def counted(path: Path, **options: Any) -> Any:
        pixels = decode_image(path, **options)
        with has_decoded:
            decoded.append(path)
            has_decoded.notify_all()
        return pixels

    plain_encode = FrozenEncoders.encode

    def waiting_encode(self: FrozenEncoders, *pixels: torch.Tensor) -> dict[str, torch.Tensor]:
        with has_decoded:
            if not counts:
                assert has_decoded.wait_for(lambda: len(decoded) >= 2 * BATCH_SIZE, timeout=20)
            counts.append(len(decoded))
        return plain_encode(self, *pixels)

    monkeypatch.setattr(pipeline_module, "decode_image", counted)
    monkeypatch.setattr(FrozenEncoders, "encode", waiting_encode)
    compute(drawn.shards(8))

    assert counts[0] <= BATCH_SIZE + 2 * BATCH_SIZE + 1


def test_images_without_a_file_or_with_a_bad_one_leave_no_row(compute, drawn, encoders):
    missing, torn = drawn.images[1], drawn.images[2]
    drawn.paths[torn.image_id].write_bytes(b"no image")
    drawn.paths[missing.image_id] = None

    ((_, arrays, outcomes),) = compute(drawn.shards(5))

    kept = [image for image in drawn.images[:5] if image not in (missing, torn)]
    expected = plain_loop(kept, drawn.paths, encoders, "float16")
    for name in expected:
        np.testing.assert_array_equal(arrays[name], expected[name])
    assert [outcome.reason is None for outcome in outcomes] == [True, False, False, True, True]
    assert outcomes[1].sha256 is None
    assert outcomes[1].reason == f"No image file {missing.file_name} in the image folders."
    assert outcomes[2].sha256 == hashlib.sha256(b"no image").hexdigest()
    assert torn.file_name in outcomes[2].reason


def test_a_shard_of_bad_images_alone_has_no_rows(compute, drawn):
    for image in drawn.images[:2]:
        drawn.paths[image.image_id] = None

    (_, arrays, outcomes), (_, others, _) = compute(drawn.shards(2, 3))

    assert {len(array) for array in arrays.values()} == {0}
    assert len(outcomes) == 2
    assert {len(array) for array in others.values()} == {3}


def test_features_that_cannot_be_stored_leave_no_row(compute, drawn, encoders, monkeypatch):
    plain_encode = FrozenEncoders.encode
    expected = plain_loop(drawn.images[:4], drawn.paths, encoders, "float16")

    def spoiling_encode(self: FrozenEncoders, *pixels: torch.Tensor) -> dict[str, torch.Tensor]:
        features = plain_encode(self, *pixels)
        features["sam"][0, 0, 0, 0] = 1e6
        return features

    monkeypatch.setattr(FrozenEncoders, "encode", spoiling_encode)
    ((_, arrays, outcomes),) = compute(drawn.shards(4))

    for name in expected:
        np.testing.assert_array_equal(arrays[name], expected[name][1::2])
    assert [outcome.reason is None for outcome in outcomes] == [False, True, False, True]
    assert outcomes[0].reason == (
        f"{drawn.images[0].file_name}: sam reaches 1000000 in magnitude, but float16 holds at most 65504; store "
        "the features as bfloat16 or float32"
    )
    assert outcomes[0].sha256 is not None, "without it the image would be tried again and again"
    with pytest.raises(NonFiniteError, match=drawn.images[0].file_name):
        compute(drawn.shards(4), strict=True)


@pytest.mark.parametrize("is_missing", [True, False])
def test_strict_stops_at_the_first_image_that_cannot_be_read(is_missing, compute, drawn):
    image = drawn.images[1]
    if is_missing:
        drawn.paths[image.image_id] = None
    else:
        drawn.paths[image.image_id].write_bytes(b"no image")

    with pytest.raises(DataError, match=image.file_name):
        compute(drawn.shards(4), strict=True)


def test_no_thread_outlives_an_error(compute, drawn):
    before = threading.active_count()
    drawn.paths[drawn.images[1].image_id].write_bytes(b"no image")

    with pytest.raises(DataError):
        compute(drawn.shards(4), strict=True)

    assert threading.active_count() == before


def test_a_request_to_stop_ends_it_at_the_border_of_a_shard(compute, drawn):
    heard: list[str | None] = []

    done = compute(drawn.shards(3, 3, 2), on_image=heard.append, should_stop=lambda: len(heard) >= 1)

    assert [len(outcomes) for _, _, outcomes in done] == [3]
    assert heard == [None] * 3


def test_every_image_is_announced_with_its_reason(compute, drawn):
    heard: list[str | None] = []
    drawn.paths[drawn.images[1].image_id] = None

    compute(drawn.shards(4, 4), on_image=heard.append)

    assert len(heard) == 8
    assert [reason for reason in heard if reason] == [
        f"No image file {drawn.images[1].file_name} in the image folders."
    ]


def test_buffers_are_made_once_and_used_again(encoders):
    arrays = stored_arrays("float16", encoders.spec.feature_shapes())
    pool = BufferPool(arrays, 4, 2)

    first, second = pool.take(), pool.take()
    pool.give_back(first)

    assert pool.take() is first
    assert second is not first
    assert sum(array.nbytes for array in first.values()) == 4 * sum(array.row_bytes for array in arrays)


def test_whoever_takes_a_buffer_waits_until_one_is_free(encoders):
    pool = BufferPool(stored_arrays("float16", encoders.spec.feature_shapes()), 1, 1)
    taken, later = pool.take(), []
    waiter = threading.Thread(target=lambda: later.append(pool.take()))
    waiter.start()
    waiter.join(timeout=0.05)
    assert waiter.is_alive()

    pool.give_back(taken)
    waiter.join(timeout=20)

    assert later == [taken]

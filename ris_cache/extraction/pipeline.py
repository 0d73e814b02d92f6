"""From image files to the features of shards, with decoding, encoding and writing side by side.

Threads decode and squash images ahead of the encoders, across the borders of shards; this thread feeds the
encoders; whoever takes a finished shard may write it on a thread of its own, since the next shard fills other
buffers. A batch never spans two shards, so the bytes of a shard depend on its own images and on the batch
size alone.

Memory: `2 * batch_size` decoded images, a batch on the device, and one shard per buffer in use.
"""

from __future__ import annotations

import hashlib
import queue
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Generic, Protocol, TypeVar

import numpy as np
import numpy.typing as npt
import torch

from ris_cache.ahead import map_ahead
from ris_cache.encoders.frozen import FrozenEncoders
from ris_cache.encoders.images import decode_image
from ris_cache.errors import DataError, NonFiniteError
from ris_cache.store.files import sha256_file
from ris_cache.store.layout import Array, StoredArray
from ris_cache.store.precision import encode
from ris_cache.store.writer import Outcome

if TYPE_CHECKING:
    from ris_cache.store.journal import PlannedImage


class Work(Protocol):
    """A shard to compute."""

    @property
    def images(self) -> Sequence[PlannedImage]:
        """Its images, by row."""
        ...


W = TypeVar("W", bound=Work)


@dataclass(frozen=True, slots=True, kw_only=True)
class ComputedShard(Generic[W]):
    """The features of one shard.

    Attributes:
        arrays: [n, ...] of every stored array: the images without a reason, in order; views of `buffers`.
        outcomes: of every image.
        buffers: to be given back to the pool once `arrays` are no longer needed.
    """

    work: W
    arrays: dict[str, Array]
    outcomes: tuple[Outcome, ...]
    buffers: dict[str, Array]


class BufferPool:
    """Buffers for whole shards, made at most `size` times and used again; `take` waits for one."""

    def __init__(self, arrays: Iterable[StoredArray], shard_rows: int, size: int) -> None:
        self._arrays = tuple(arrays)
        self._shard_rows = shard_rows
        self._free: queue.SimpleQueue[dict[str, Array] | None] = queue.SimpleQueue()
        for _ in range(size):
            self._free.put(None)

    def take(self) -> dict[str, Array]:
        """Return buffers [S, ...] by array name, waiting until some are free."""
        return self._free.get() or {
            array.name: np.empty((self._shard_rows, *array.shape), array.numpy_dtype)
            for array in self._arrays
        }

    def give_back(self, buffers: dict[str, Array]) -> None:
        """Let buffers be used again; to be called for all that were taken, whatever happened to them."""
        self._free.put(buffers)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Decoded:
    """One image ready for the encoders, or why it is not."""

    file_name: str
    outcome: Outcome
    sam_pixels: npt.NDArray[np.uint8] | None = None
    clip_pixels: npt.NDArray[np.uint8] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Pipeline:
    """What turns images into stored features.

    Attributes:
        paths: of every image by image_id; None where there is no file.
        dtype: of the cache.
        workers: decoding threads.
        strict: whether an image that cannot be read or stored is an error instead of being quarantined.
        on_image: called after each image, with the reason if it was quarantined.
        should_stop: looked at before each shard is begun.
    """

    encoders: FrozenEncoders
    paths: Mapping[int, Path | None]
    dtype: str
    batch_size: int
    workers: int
    strict: bool
    on_image: Callable[[str | None], None] = lambda reason: None
    should_stop: Callable[[], bool] = lambda: False

    def compute(self, works: Iterable[W], pool: BufferPool) -> Iterator[ComputedShard[W]]:
        """Compute shards in order.

        Args:
            works: looked at a little ahead of the shard being computed.
            pool: of at least two buffers, if the caller holds one while it asks for the next shard.

        Raises:
            DataError: an image whose size is not the annotated one, since masks would not fit it; with
                `strict`, any that cannot be read.
            NonFiniteError: with `strict`, features that cannot be stored.
        """
        items = ((work, image) for work in works for image in [*work.images, None])
        decoded = map_ahead(
            lambda item: (item[0], None if item[1] is None else self._decode(item[1])),
            items,
            workers=self.workers,
            depth=2 * self.batch_size,
        )
        shard: _OpenShard | None = None
        for work, item in decoded:
            if shard is None:
                if self.should_stop():
                    return
                shard = _OpenShard(self, pool.take())
            if item is not None:
                shard.add(item)
                continue
            arrays, outcomes = shard.close()
            yield ComputedShard(work=work, arrays=arrays, outcomes=outcomes, buffers=shard.buffers)
            shard = None

    def _decode(self, image: PlannedImage) -> _Decoded:
        path = self.paths[image.image_id]
        if path is None:
            reason = f"No image file {image.file_name} in the image folders."
            if self.strict:
                raise DataError(f"{reason} Add it, or leave out --strict.", image_id=image.image_id)
            return _Decoded(file_name=image.file_name, outcome=Outcome(sha256=None, reason=reason))
        try:
            pixels = decode_image(path, expected_size=(image.height, image.width))
        except DataError as error:
            if self.strict or "expected" in error.facts:
                raise
            # By name: the cache outlives the place where the images lie today.
            reason = str(error).replace(str(path), image.file_name)
            return _Decoded(
                file_name=image.file_name,
                outcome=Outcome(sha256=_digest_if_readable(path), reason=reason),
            )
        sam_pixels, clip_pixels = self.encoders.prepare(pixels)
        return _Decoded(
            file_name=image.file_name,
            outcome=Outcome(sha256=hashlib.sha256(path.read_bytes()).hexdigest()),
            sam_pixels=sam_pixels,
            clip_pixels=clip_pixels,
        )


class _OpenShard:
    """A shard being filled: a batch waiting for the encoders, one on the device, and rows that are done."""

    def __init__(self, pipeline: Pipeline, buffers: dict[str, Array]) -> None:
        self.buffers = buffers
        self._pipeline = pipeline
        self._outcomes: list[Outcome] = []
        self._waiting: list[tuple[int, _Decoded]] = []
        self._on_device: _DeviceBatch | None = None
        self._num_rows = 0

    def add(self, item: _Decoded) -> None:
        self._outcomes.append(item.outcome)
        if item.outcome.reason is not None:
            self._pipeline.on_image(item.outcome.reason)
            return
        self._waiting.append((len(self._outcomes) - 1, item))
        if len(self._waiting) == self._pipeline.batch_size:
            self._launch()

    def close(self) -> tuple[dict[str, Array], tuple[Outcome, ...]]:
        if self._waiting:
            self._launch()
        self._collect()
        return (
            {name: buffer[: self._num_rows] for name, buffer in self.buffers.items()},
            tuple(self._outcomes),
        )

    def _launch(self) -> None:
        """Start the next batch before the last one is fetched, so that a GPU has work while this waits."""
        started = _DeviceBatch(self._pipeline, self._waiting)
        self._waiting = []
        self._collect()
        self._on_device = started

    def _collect(self) -> None:
        batch, self._on_device = self._on_device, None
        if batch is None:
            return
        problems = batch.fetch(self.buffers, self._num_rows)
        for position, (index, file_name) in enumerate(zip(batch.indices, batch.file_names, strict=True)):
            reason = problems.get(position)
            if reason is not None:
                reason = f"{file_name}: {reason}"
                if self._pipeline.strict:
                    raise NonFiniteError(f"Features of an image cannot be stored. {reason}.", reason=reason)
                self._outcomes[index] = Outcome(sha256=self._outcomes[index].sha256, reason=reason)
            self._pipeline.on_image(reason)
        self._num_rows += len(batch.indices) - len(problems)


class _DeviceBatch:
    """One batch on its way through the encoders.

    On a GPU the encoders run on the current stream; converting and copying back run on another one that waits
    for them, beside the next batch.
    """

    def __init__(self, pipeline: Pipeline, waiting: Sequence[tuple[int, _Decoded]]) -> None:
        self.indices = [index for index, _ in waiting]
        self.file_names = [item.file_name for _, item in waiting]
        self._pipeline = pipeline
        encoders = pipeline.encoders
        self._is_cuda = encoders.device.type == "cuda"
        # Another batch size would be compiled anew, which takes longer than a full batch.
        padding = [waiting[-1]] * (pipeline.batch_size - len(waiting)) if encoders.compiled else []
        frames = [item for _, item in (*waiting, *padding)]
        features = encoders.encode(
            self._stack([item.sam_pixels for item in frames]),
            self._stack([item.clip_pixels for item in frames]),
        )
        self._features = {name: tensor[: len(waiting)] for name, tensor in features.items()}
        self._done = torch.cuda.Event() if self._is_cuda else None  # type: ignore[no-untyped-call]
        if self._done is not None:
            self._done.record()

    def fetch(self, buffers: dict[str, Array], first: int) -> dict[int, str]:
        """Copy what can be stored into the buffers, from row `first` on; returns why the rest cannot."""
        if self._done is None:
            return self._convert(buffers, first)
        side = torch.cuda.Stream(self._pipeline.encoders.device)  # type: ignore[no-untyped-call]
        with torch.cuda.stream(side):
            side.wait_event(self._done)
            for tensor in self._features.values():
                tensor.record_stream(side)
            problems = self._convert(buffers, first)
            side.synchronize()
        return problems

    def _convert(self, buffers: dict[str, Array], first: int) -> dict[int, str]:
        encoded = encode(self._pipeline.dtype, self._features)
        good = [i for i in range(len(self.indices)) if i not in encoded.problems]
        for name, tensor in encoded.arrays.items():
            rows = torch.from_numpy(buffers[name][first : first + len(good)])
            rows.copy_(tensor if len(good) == len(tensor) else tensor[good])
        return encoded.problems

    def _stack(self, pixels: Sequence[npt.NDArray[np.uint8] | None]) -> torch.Tensor:
        stacked = torch.from_numpy(np.stack([frame for frame in pixels if frame is not None]))
        return stacked.pin_memory() if self._is_cuda else stacked


def _digest_if_readable(path: Path) -> str | None:
    try:
        return sha256_file(path).sha256
    except OSError:
        return None

"""One batch of features, as it comes out of a cache.

Axes: B images, C channels, P side of SAM's embedding grid, N CLIP patch tokens, D their width, E CLIP's joint
width.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import numpy.typing as npt

from ris_cache.store.layout import Array, StoredArray
from ris_cache.store.page_cache import ALIGNMENT
from ris_cache.store.precision import decode, decode_tensors

if TYPE_CHECKING:
    import torch

_HUGE_PAGE_BYTES: Final = 2 << 20
_HUGE_FROM_BYTES: Final = 4 << 20
"""Smallest array for which numpy asks the operating system for huge pages."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class FeatureBatch:
    """Features of B images, as the cache stores them.

    Attributes:
        image_ids: int64[B]; row i of every array belongs to image_ids[i].
        dtype: of the cache: float16 and float32 are stored as they are; bfloat16 as uint16 of the same bits;
            int8 as codes, with scales in further arrays.
        stored: [B, ...] of every stored array by name.
        copies: events of copies to a GPU that may still read the arrays; views share them.
    """

    image_ids: npt.NDArray[np.int64]
    dtype: str
    stored: dict[str, Array]
    copies: list[Any] = field(default_factory=list, repr=False)

    @classmethod
    def allocate(
        cls, arrays: Iterable[StoredArray], batch_size: int, *, dtype: str, pinned: bool
    ) -> FeatureBatch:
        """Make buffers for a batch, filled with zeros.

        Arrays of 4 MiB and more start at a multiple of 2 MiB, on huge pages where the system has them, others
        and pinned ones at a multiple of 4096.

        Args:
            pinned: in page-locked memory; needs torch and a GPU.
        """
        return cls(
            image_ids=np.zeros(batch_size, np.int64),
            dtype=dtype,
            stored={
                array.name: _buffer((batch_size, *array.shape), array.numpy_dtype, pinned=pinned)
                for array in arrays
            },
        )

    def __len__(self) -> int:
        """B."""
        return len(self.image_ids)

    @property
    def sam(self) -> npt.NDArray[Any]:
        """[B, C, P, P], SAM's image embeddings on the squashed input frame, as stored."""
        return self.stored["sam"]

    @property
    def clip(self) -> npt.NDArray[Any]:
        """[B, N, D], CLIP's patch tokens, row by row over its grid, as stored."""
        return self.stored["clip"]

    @property
    def clip_pooled(self) -> npt.NDArray[Any]:
        """[B, E], CLIP's projected image embedding, as stored."""
        return self.stored["clip_pooled"]

    def first(self, size: int) -> FeatureBatch:
        """Return the first `size` images, as views of the same memory."""
        return self.rows(0, size)

    def rows(self, start: int, stop: int) -> FeatureBatch:
        """Return the images from `start` to before `stop`, as views of the same memory."""
        return FeatureBatch(
            image_ids=self.image_ids[start:stop],
            dtype=self.dtype,
            stored={name: array[start:stop] for name, array in self.stored.items()},
            copies=self.copies,
        )

    def wait_for_copies(self) -> None:
        """Wait until no copy that `to` started reads the arrays; they may be overwritten then."""
        while self.copies:
            self.copies.pop().synchronize()

    def decoded(self) -> dict[str, npt.NDArray[np.float32]]:
        """Return `sam`, `clip` and `clip_pooled` as float32, whatever they are stored as."""
        return decode(self.dtype, self.stored)

    def to(self, device: torch.device | str, dtype: torch.dtype | None = None) -> dict[str, torch.Tensor]:
        """Return `sam`, `clip` and `clip_pooled` as tensors on a device.

        The stored bytes travel, and are decoded there: half as many for int8 as for float16. From pinned
        buffers the copy goes on in the background: call `wait_for_copies` before overwriting them, as
        `FeatureCache.prefetch` does.

        Args:
            dtype: float32 by default.
        """
        import torch

        moved = {
            name: torch.from_numpy(array).to(device, non_blocking=True) for name, array in self.stored.items()
        }
        # On the stream that copies: another thread's current device may be another GPU.
        for place in {tensor.device for tensor in moved.values() if tensor.is_cuda}:
            event = torch.cuda.Event()  # type: ignore[no-untyped-call]
            event.record(torch.cuda.current_stream(place))
            self.copies.append(event)
        return decode_tensors(self.dtype, moved, to=dtype or torch.float32)


def _buffer(shape: tuple[int, ...], dtype: np.dtype[Any], *, pinned: bool) -> Array:
    """Zeros, aligned so that the disk can write into them by itself."""
    num_bytes = math.prod(shape) * dtype.itemsize
    if pinned:
        flat = _pinned(num_bytes)
    else:
        # Of 4 KiB pages a request to the disk would consist of as many pieces, more than it takes at once.
        alignment = _HUGE_PAGE_BYTES if num_bytes >= _HUGE_FROM_BYTES else ALIGNMENT
        flat = _aligned(np.zeros(num_bytes + alignment, np.uint8), num_bytes, alignment)
    return flat.view(dtype).reshape(shape)


def _pinned(num_bytes: int) -> npt.NDArray[np.uint8]:
    """Page-locked zeros that begin with a page.

    They do of themselves, as far as known; asking for more than needed could double what is locked, since
    torch rounds sizes up to powers of two.
    """
    import torch

    for spare in (0, ALIGNMENT):
        memory: npt.NDArray[np.uint8] = torch.zeros(
            num_bytes + spare, dtype=torch.uint8, pin_memory=True
        ).numpy()
        if memory.ctypes.data % ALIGNMENT == 0:
            break
    return _aligned(memory, num_bytes, ALIGNMENT)


def _aligned(memory: npt.NDArray[np.uint8], num_bytes: int, alignment: int) -> npt.NDArray[np.uint8]:
    """The first `num_bytes` that start at a multiple of `alignment`."""
    start = -memory.ctypes.data % alignment
    return memory[start : start + num_bytes]

"""How many images one forward pass takes.

On CUDA more images per pass keep the device busier, until its memory is full; how much a pass needs depends
on encoders, arithmetic and kernels, so it is measured. On a CPU nothing is gained beyond a few images.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from ris_cache.encoders.frozen import FrozenEncoders
from ris_cache.encoders.spec import EncoderSpec
from ris_cache.errors import ConfigError

_MEMORY_SHARE = 0.8
"""Of the free device memory; the rest is for batches that wait on the device and for fragmentation."""
_CPU_PIXELS = 1 << 20
_CPU_LIMIT = 8


def find_batch_size(encoders: FrozenEncoders, *, limit: int = 64) -> int:
    """Find how many images to encode at once, a power of two.

    CUDA: measures the memory of one and of two blank images, extrapolates, and runs the result once. That
    compiles encoders for this size, if they are to be compiled. CPU: a fixed number, nothing is run.

    Args:
        limit: not more than this many images.

    Raises:
        ConfigError: the limit is below 1, or the device has no room for one image.
    """
    if limit < 1:
        raise ConfigError(f"A batch holds at least 1 image, but the limit is {limit}.", limit=limit)
    if encoders.device.type != "cuda":
        return cpu_batch_size(encoders.spec, limit=limit)
    with torch.cuda.device(encoders.device):
        torch.cuda.empty_cache()  # what torch keeps for itself would count as taken
        free, _ = torch.cuda.mem_get_info()
        batch_size = search_batch_size(
            lambda size: _peak_bytes(encoders, size),
            lambda size: _fits(encoders, size),
            budget=int(_MEMORY_SHARE * free),
            limit=limit,
        )
        torch.cuda.empty_cache()
    if batch_size is None:
        raise ConfigError(
            f"One image does not fit into the {free / 2**30:.1f} GiB that are free on {encoders.device}. End "
            "what else runs there, or use --device cpu.",
            device=str(encoders.device),
            free_bytes=free,
        )
    return batch_size


def cpu_batch_size(spec: EncoderSpec, *, limit: int) -> int:
    """Choose a batch size for a CPU: as many images as make a megapixel for SAM, at most 8.

    At full size one image keeps every core busy: 2 and 4 at once are no faster, and take 0.9 and 1.2 GB
    beside the weights instead of 0.4. The tiny encoders are fastest at 8 to 16 images, in 50 to 90 MB.
    """
    images = _CPU_PIXELS // spec.sam.image_size**2
    return _power_of_two(max(1, min(images, _CPU_LIMIT, limit)))


def search_batch_size(
    measure: Callable[[int], int], fits: Callable[[int], bool], *, budget: int, limit: int
) -> int | None:
    """Predict the largest batch within a memory budget from batches of 1 and 2, and halve until it runs.

    Args:
        measure: peak bytes that a batch of this size takes beyond what lies there anyway; raises
            torch.OutOfMemoryError.
        fits: run a batch of this size and say whether it had room.
        budget: bytes.
        limit: at least 1.

    Returns:
        A power of two, at most `limit`; None if one image does not fit.
    """
    try:
        peak_of_one = measure(1)
    except torch.OutOfMemoryError:
        return None
    try:
        peak_of_two = measure(min(2, limit))
    except torch.OutOfMemoryError:
        return 1
    batch_size = predict_batch_size(peak_of_one, peak_of_two, budget=budget, limit=limit)
    while not fits(batch_size):
        if batch_size == 1:
            return None
        batch_size //= 2
    return batch_size


def predict_batch_size(peak_of_one: int, peak_of_two: int, *, budget: int, limit: int) -> int:
    """Extrapolate the peak memory of batches in a straight line.

    Args:
        peak_of_one, peak_of_two: bytes that one and two images take at once.
        budget: bytes that a batch may take.

    Returns:
        The largest power of two, within the limit, whose predicted peak is within the budget; at least 1.
    """
    per_image = peak_of_two - peak_of_one
    if per_image <= 0:  # too small to show in the allocator's steps
        return _power_of_two(limit) if peak_of_two <= budget else 1
    images = 1 + (budget - peak_of_one) // per_image
    return _power_of_two(max(1, min(images, limit)))


def _power_of_two(number: int) -> int:
    """Round down; `number` is at least 1."""
    return 1 << (number.bit_length() - 1)


def _encode_blank(encoders: FrozenEncoders, batch_size: int) -> None:
    sides = (encoders.spec.sam.image_size, encoders.spec.clip.image_size)
    sam_pixels, clip_pixels = (
        torch.zeros((batch_size, side, side, 3), dtype=torch.uint8, device=encoders.device) for side in sides
    )
    encoders.encode(sam_pixels, clip_pixels)
    torch.cuda.synchronize()


def _peak_bytes(encoders: FrozenEncoders, batch_size: int) -> int:
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    # Uncompiled: each size would be compiled for itself, and needs about as much memory either way.
    with torch.compiler.set_stance("force_eager"):
        _encode_blank(encoders, batch_size)
    return torch.cuda.max_memory_allocated() - before


def _fits(encoders: FrozenEncoders, batch_size: int) -> bool:
    try:
        _encode_blank(encoders, batch_size)
    except torch.OutOfMemoryError:
        has_room = False
    else:
        has_room = True
    torch.cuda.empty_cache()  # after the error is gone, and with it the frames that hold its tensors
    return has_room

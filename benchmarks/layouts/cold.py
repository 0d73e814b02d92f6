"""Cold reading: the cache's files are not in memory, and the disk sets the pace.

Each measurement has a neighbour in time: one large file of the same size read from end to end, its page
cache emptied before too. Integrity is `off` but where said: once a shard has been checked, reading it again
costs what is measured here, and the first check has rows of its own.
"""

from __future__ import annotations

import gc
import os
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from layouts.contract import Features
from layouts.ours import HDF5, ZARR, image_ids
from layouts.page_cache import drop, files_below, resident_share
from layouts.timing import draw_batches
from ris_cache import FeatureCache
from ris_cache.store.checking import Integrity

_BLOCK_BYTES = 8 << 20

_Pair = tuple[tuple[float, float], tuple[float, float]]
"""Seconds, and share in memory at the start, of the sequential read and of the measured one."""

Consume = Callable[[FeatureCache, Sequence[Sequence[int]]], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Cold:
    """What was measured of one way to read random batches.

    Attributes:
        ratio: the sequential read's seconds over this one's, median over the rounds.
        worst, best: of the rounds' ratios.
        images_per_s: median over the rounds.
        read_gb_per_s: in 1e9 bytes of features.
        kept: largest share of the files that was still in memory when reading began; above 0 the file
            system does not let go, and the figures are not cold.
    """

    name: str
    description: str
    ratio: float
    worst: float
    best: float
    images_per_s: float
    read_gb_per_s: float
    kept: float


@dataclass(frozen=True, slots=True, kw_only=True)
class _Mode:
    name: str
    description: str
    directory: str
    integrity: Integrity
    consume: Consume


def measure_cold(
    features: Features,
    root: Path,
    sequential: Path,
    *,
    batch_size: int,
    rounds: int,
    seed: int,
    depth: int | None,
    threads: int | None,
) -> list[Cold]:
    """Time random batches from caches that lie below `root`, against a sequential read.

    No memory map of the files may be open in this process.

    Args:
        sequential: the flat file of the features.
        depth: batches read ahead by the prefetching iterator; None leaves it to the cache.
        threads: of the prefetching iterator; None leaves it to the cache.

    Raises:
        ConfigError: the operating system cannot empty the page cache of a file.
    """
    assert sequential.stat().st_size == features.num_bytes, f"{sequential} is no flat file of the features"
    options: dict[str, Any] = {"depth": depth, "threads": threads}
    options = {name: value for name, value in options.items() if value is not None}

    def plainly(cache: FeatureCache, batches: Sequence[Sequence[int]]) -> None:
        buffers = cache.allocate(batch_size)
        for images in batches:
            cache.read(image_ids(images), out=buffers)

    def ahead(cache: FeatureCache, batches: Sequence[Sequence[int]]) -> None:
        for _ in cache.prefetch([image_ids(images) for images in batches], page_cache=True, **options):
            pass

    def past(cache: FeatureCache, batches: Sequence[Sequence[int]]) -> None:
        for _ in cache.prefetch([image_ids(images) for images in batches], page_cache=False, **options):
            pass

    ways: tuple[tuple[str, str, Integrity, Consume], ...] = (
        ("read", "cache.read, one batch after another", "off", plainly),
        ("prefetch", "cache.prefetch, page_cache=True", "off", ahead),
        ("prefetch past the page cache", "cache.prefetch, page_cache=False", "off", past),
        ("prefetch first-open", "page_cache=True, every checksum compared", "first-open", ahead),
        (
            "prefetch first-open past the page cache",
            "page_cache=False, every checksum compared",
            "first-open",
            past,
        ),
    )
    modes = [
        _Mode(
            name=f"{layout.name} {way}",
            description=description,
            directory=layout.directory,
            integrity=integrity,
            consume=consume,
        )
        for layout in (ZARR, HDF5)
        for way, description, integrity, consume in ways
    ]
    generator = np.random.default_rng(seed)
    timings: dict[str, list[_Pair]] = {mode.name: [] for mode in modes}
    for number in range(rounds):
        batches = draw_batches(features.num_images, batch_size, generator)
        for mode in modes:
            turns = [partial(_sequential_seconds, sequential), partial(_seconds, mode, root, batches)]
            order = (0, 1) if number % 2 == 0 else (1, 0)  # so that neither always follows the other
            results = {turn: turns[turn]() for turn in order}
            timings[mode.name].append((results[0], results[1]))
    every_pair = [pair for pairs in timings.values() for pair in pairs]
    return [
        _summary("sequential", "one file from end to end", features, [(one, one) for one, _ in every_pair]),
        *(_summary(mode.name, mode.description, features, timings[mode.name]) for mode in modes),
    ]


def _sequential_seconds(path: Path) -> tuple[float, float]:
    """Read a file from end to end; return the seconds and the share that was in memory at the start."""
    drop([path])
    kept = resident_share([path])
    block = memoryview(bytearray(_BLOCK_BYTES))
    with path.open("rb", buffering=0) as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_SEQUENTIAL)
        start = time.perf_counter()
        while file.readinto(block):
            pass
        return time.perf_counter() - start, kept


def _seconds(mode: _Mode, root: Path, batches: Sequence[Sequence[int]]) -> tuple[float, float]:
    """Read all batches through a new cache object; return as `_sequential_seconds` does.

    Opening is not timed; making the buffers is, as each run makes them once.
    """
    paths = files_below(root / mode.directory)
    cache = FeatureCache.open(root / mode.directory, integrity=mode.integrity)
    drop(paths)
    kept = resident_share(paths)
    start = time.perf_counter()
    mode.consume(cache, batches)
    seconds = time.perf_counter() - start
    del cache
    gc.collect()  # its memory maps close with it; pages that are mapped cannot be dropped
    return seconds, kept


def _summary(name: str, description: str, features: Features, pairs: Sequence[_Pair]) -> Cold:
    """Sum up the timings of the sequential read and of the measured one, taken in pairs."""
    ratios = [sequential / own for (sequential, _), (own, _) in pairs]
    seconds = statistics.median(own for _, (own, _) in pairs)
    return Cold(
        name=name,
        description=description,
        ratio=statistics.median(ratios),
        worst=min(ratios),
        best=max(ratios),
        images_per_s=features.num_images / seconds,
        read_gb_per_s=features.num_bytes / seconds / 1e9,
        kept=max(kept for pair in pairs for _, kept in pair),
    )

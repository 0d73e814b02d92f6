"""Warm reading, each layout in turn with the ceiling.

Ratios are taken between neighbours in time: every batch is read through the ceiling and through the layout,
one right after the other and in alternating order, so a machine that slows down slows both. The page cache
holds the files of both when a round begins, and each reader has read every image before the first one.
"""

from __future__ import annotations

import gc
import importlib.util
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from layouts.contract import Array, Batch, Features, Layout, Read
from layouts.flat import FLAT
from layouts.page_cache import files_below, fill, resident_share, write_back
from ris_cache.errors import RisError
from ris_cache.vision_imports import ensure_torchvision


@dataclass(frozen=True, slots=True, kw_only=True)
class Written:
    """The files of one layout.

    Attributes:
        seconds: until the last byte was on the disk (fsync).
        num_bytes: of all files.
    """

    directory: Path
    seconds: float
    num_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Warm:
    """What was measured of one layout, or why nothing was.

    Attributes:
        missing: why the layout could not be measured; then everything else is 0.
        ratio: the ceiling's seconds over the layout's for the same images, median over the rounds.
        worst, best: of the rounds' ratios.
        images_per_s: median over the rounds.
        read_gb_per_s: the same in 1e9 bytes as stored.
        first_pass: images per second when a new reader reads all images once, opening it included.
        write_gb_per_s: bytes of the drawn features over the seconds until all files are on the disk.
        size: bytes of the files over those of the drawn features.
        resident: smallest share of the files, and of the ceiling's, that was still in the page cache after a
            round; below 1 that round was not warm.
    """

    name: str
    description: str
    missing: str | None = None
    ratio: float = 0.0
    worst: float = 0.0
    best: float = 0.0
    images_per_s: float = 0.0
    read_gb_per_s: float = 0.0
    first_pass: float = 0.0
    write_gb_per_s: float = 0.0
    size: float = 0.0
    resident: float = 0.0


class _Round(NamedTuple):
    """Seconds of the ceiling and of a layout, and the share of their files in the page cache afterwards."""

    ceiling: float
    own: float
    resident: float


def why_missing(layout: Layout) -> str | None:
    """Import what a layout needs; say why that fails, if it does."""
    for package in layout.packages:
        if importlib.util.find_spec(package) is None:
            return f"not installed: {package}"
        ensure_torchvision()  # the streaming datasets import it, and may find one built for another torch
        try:
            importlib.import_module(package)
        except ImportError as error:
            return f"cannot be imported: {error}"
    return None


def write(layout: Layout, features: Features, root: Path) -> Written:
    """Write a layout's files, and wait until they are on the disk."""
    directory = root / layout.directory
    directory.mkdir()
    start = time.perf_counter()
    layout.write(features, directory)
    paths = files_below(directory)
    write_back(paths)
    seconds = time.perf_counter() - start
    return Written(directory=directory, seconds=seconds, num_bytes=sum(path.stat().st_size for path in paths))


def draw_batches(num_images: int, batch_size: int, generator: np.random.Generator) -> list[list[int]]:
    """Return a random order of all images, cut into batches; the last may be smaller."""
    order: list[int] = generator.permutation(num_images).tolist()
    return [order[start : start + batch_size] for start in range(0, num_images, batch_size)]


def prove(layout: Layout, read: Read, features: Features, batches: Sequence[Sequence[int]]) -> float:
    """Read every image and compare it with what was drawn; return the seconds spent reading.

    Raises:
        RisError: a value that differs; the figures of such a reader would mean nothing.
    """
    seconds = 0.0
    for images in batches:
        start = time.perf_counter()
        found = read(images)
        seconds += time.perf_counter() - start
        expected = layout.expected(features.rows(images))
        for name, values in expected.items():
            if name not in found or not _same_bits(as_numpy(found, name), values):
                raise RisError(
                    f"{layout.name} returned other values of {name} than were written for images {images}.",
                    layout=layout.name,
                    name=name,
                    images=images,
                )
    return seconds


def as_numpy(batch: Batch, name: str) -> Array:
    """Return one feature of a batch in the computer's own memory."""
    values = batch[name]
    return values if isinstance(values, np.ndarray) else values.cpu().numpy()


def measure(
    layouts: Sequence[Layout], features: Features, root: Path, *, batch_size: int, rounds: int, seed: int
) -> list[Warm]:
    """Write, prove and time layouts, in that order.

    Raises:
        RisError: a layout that returns other values than were written.
    """
    generator = np.random.default_rng(seed)
    proof_batches = draw_batches(features.num_images, batch_size, generator)
    missing = {layout.name: why_missing(layout) for layout in layouts}
    present = [layout for layout in layouts if missing[layout.name] is None]
    written: dict[str, Written] = {}
    for layout in (FLAT, *present):
        if layout.directory not in written:
            written[layout.directory] = write(layout, features, root)
    readers: dict[str, Read] = {}
    first_pass: dict[str, float] = {}
    for layout in present:
        start = time.perf_counter()
        read = layout.open(written[layout.directory].directory, features, batch_size)
        opening = time.perf_counter() - start
        first_pass[layout.name] = opening + prove(layout, read, features, proof_batches)
        readers[layout.name] = read
    ceiling = FLAT.open(written[FLAT.directory].directory, features, batch_size)
    prove(FLAT, ceiling, features, proof_batches)
    ceiling_paths = files_below(written[FLAT.directory].directory)
    rounds_of: dict[str, list[_Round]] = {layout.name: [] for layout in present}
    for _ in range(rounds):
        batches = draw_batches(features.num_images, batch_size, generator)
        for layout in present:
            paths = files_below(written[layout.directory].directory)
            fill([*ceiling_paths, *paths])
            timed = _timed_round(ceiling, readers[layout.name], batches)
            rounds_of[layout.name].append(_Round(*timed, resident=resident_share([*ceiling_paths, *paths])))
    readers.clear()
    del ceiling, read
    gc.collect()  # memory maps close with their last view; none may be left when the cache is dropped
    return [
        _summary(layout, features, written[layout.directory], rounds_of[layout.name], first_pass[layout.name])
        if missing[layout.name] is None
        else Warm(name=layout.name, description=layout.description, missing=missing[layout.name])
        for layout in layouts
    ]


def _timed_round(ceiling: Read, read: Read, batches: Sequence[Sequence[int]]) -> tuple[float, float]:
    """Return the seconds of the ceiling and of a reader for the same batches."""
    readers = (ceiling, read)
    seconds = [0.0, 0.0]
    for number, images in enumerate(batches):
        for turn in (0, 1) if number % 2 == 0 else (1, 0):
            start = time.perf_counter()
            readers[turn](images)
            seconds[turn] += time.perf_counter() - start
    return seconds[0], seconds[1]


def _summary(
    layout: Layout,
    features: Features,
    written: Written,
    rounds: Sequence[_Round],
    first_pass: float,
) -> Warm:
    ratios = [one.ceiling / one.own for one in rounds]
    images_per_s = features.num_images / statistics.median(one.own for one in rounds)
    return Warm(
        name=layout.name,
        description=layout.description,
        ratio=statistics.median(ratios),
        worst=min(ratios),
        best=max(ratios),
        images_per_s=images_per_s,
        read_gb_per_s=images_per_s * written.num_bytes / features.num_images / 1e9,
        first_pass=features.num_images / first_pass,
        write_gb_per_s=features.num_bytes / written.seconds / 1e9,
        size=written.num_bytes / features.num_bytes,
        resident=min(one.resident for one in rounds),
    )


def _same_bits(found: Array, expected: Array) -> bool:
    return (
        found.shape == expected.shape
        and found.dtype == expected.dtype
        and np.array_equal(
            np.ascontiguousarray(found).view(np.uint8), np.ascontiguousarray(expected).view(np.uint8)
        )
    )

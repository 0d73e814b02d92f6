"""What the benchmark compares: ways to lay features out as files, and readers of them.

Axes: N images drawn, B images in one batch; what follows is the feature's own.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    import torch

Array = npt.NDArray[Any]

SHAPES: Mapping[str, Mapping[str, tuple[int, ...]]] = {
    "paper": {"sam": (256, 64, 64), "clip": (576, 1024), "clip_pooled": (768,)},
    "tiny": {"sam": (32, 8, 8), "clip": (16, 64), "clip_pooled": (48,)},
}
"""Features of one image, by preset."""

Batch = Mapping[str, "Array | torch.Tensor"]

Read = Callable[[Sequence[int]], Batch]
"""Reads the images of some numbers: [B, ...] by feature, valid until the next call."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Features:
    """The features drawn for the benchmark.

    Attributes:
        path: the flat file that holds them.
        arrays: float16[N, ...] by feature, views of one memory map of the file.
    """

    path: Path
    arrays: Mapping[str, Array]

    @property
    def num_images(self) -> int:
        """N."""
        return len(next(iter(self.arrays.values())))

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of one image, by feature."""
        return {name: array.shape[1:] for name, array in self.arrays.items()}

    @property
    def num_bytes(self) -> int:
        """Bytes of all features."""
        return sum(array.nbytes for array in self.arrays.values())

    def rows(self, images: int | Sequence[int] | slice) -> dict[str, Array]:
        """Return the features of one image or several; of a number or a slice, as views."""
        return {name: array[images] for name, array in self.arrays.items()}


def unchanged(rows: Mapping[str, Array]) -> Mapping[str, Array]:
    """Expect the features as they were drawn."""
    return rows


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """One row of the table: files, and a way to read them.

    Attributes:
        name: unique; `--only` takes it.
        description: what is measured, in a few words.
        directory: where the files lie below the benchmark's directory. Layouts with the same directory read
            the same files, and have the same `write`.
        write: makes the directory's files from the features.
        open: takes the directory, the features (for their shapes and number only) and the largest B.
        expected: turns drawn features into what `open`'s reader must return for them.
        size: bytes stored, of those drawn; an estimate, to see beforehand whether all will fit.
        packages: modules to import that `ris` does not depend on.
    """

    name: str
    description: str
    directory: str
    write: Callable[[Features, Path], None]
    open: Callable[[Path, Features, int], Read]
    expected: Callable[[Mapping[str, Array]], Mapping[str, Array]] = unchanged
    size: float = 1.0
    packages: tuple[str, ...] = ()


def map_features(
    path: Path, shapes: Mapping[str, tuple[int, ...]], num_images: int, mode: Literal["r", "w+"] = "r"
) -> Features:
    """Map a flat file that holds the float16 features array after array; `w+` makes it.

    Args:
        shapes: of one image, by feature.
    """
    sizes = {name: num_images * math.prod(shape) for name, shape in shapes.items()}
    # Not as np.memmap: that subclass makes taking a row several times slower.
    flat = np.asarray(np.memmap(path, np.float16, mode, shape=(sum(sizes.values()),)))
    arrays: dict[str, Array] = {}
    start = 0
    for name, shape in shapes.items():
        arrays[name] = flat[start : start + sizes[name]].reshape(num_images, *shape)
        start += sizes[name]
    return Features(path=path, arrays=arrays)


def draw_features(path: Path, shapes: Mapping[str, tuple[int, ...]], num_images: int, seed: int) -> Features:
    """Draw features from a normal distribution into one flat file.

    Args:
        shapes: of one image, by feature.
    """
    features = map_features(path, shapes, num_images, "w+")
    generator = np.random.default_rng(seed)
    for name, shape in shapes.items():
        for row in features.arrays[name]:
            row[...] = generator.standard_normal(shape, np.float32)
    return features


def allocate(features: Features, batch_size: int, dtype: str = "float16") -> dict[str, Array]:
    """Make the buffers of one reader, touched once so that no later read pays for fresh memory."""
    return {name: np.ones((batch_size, *shape), dtype) for name, shape in features.shapes.items()}


def row_by_row(buffers: Mapping[str, Array], read_row: Callable[[int], Mapping[str, Any]]) -> Read:
    """Return a reader that asks for one image after the other and copies each into the buffers."""

    def read(images: Sequence[int]) -> Batch:
        for position, image in enumerate(images):
            row = read_row(image)
            for name, buffer in buffers.items():
                buffer[position] = row[name]
        return {name: buffer[: len(images)] for name, buffer in buffers.items()}

    return read

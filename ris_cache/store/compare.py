"""How far two caches agree: image by image over those that both hold, feature by feature, in float32.

Used to see what a precision costs, or whether two machines extract the same. The first cache is the
reference. Memory: a batch of images of each cache, however many there are.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from ris_cache.errors import CacheMissError, ConfigError, ShapeError
from ris_cache.store.batch import FeatureBatch
from ris_cache.store.cache import FeatureCache
from ris_cache.store.fingerprint import FieldDifference, differences
from ris_cache.store.precision import FEATURES

_BATCH_SIZE = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class FeatureDifference:
    """How far one feature differs, over all images compared.

    Attributes:
        cosine_mean, cosine_min: of the angle between the two, each image's feature as one vector; 1 where
            both are zero, 0 where one is.
        worst_image_id: where the cosine is least.
        relative_error: Frobenius norm of the difference over that of the reference; infinite where only the
            reference is zero.
        max_difference: largest absolute difference of two elements.
    """

    cosine_mean: float
    cosine_min: float
    worst_image_id: int
    relative_error: float
    max_difference: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """What two caches have in common and what not.

    Attributes:
        fields: of the fingerprints that differ; expected is the first cache's.
        features: by name.
        num_compared: images, of those that both hold features of.
        num_common: images that both hold features of.
        other_files: image_ids among them that were extracted from different image files.
        only_first, only_second: image_ids with features in one of them only.
    """

    fields: tuple[FieldDifference, ...]
    features: dict[str, FeatureDifference]
    num_compared: int
    num_common: int
    other_files: tuple[int, ...]
    only_first: tuple[int, ...]
    only_second: tuple[int, ...]

    def as_dict(self) -> dict[str, Any]:
        """Return plain values for JSON."""
        return asdict(self)


def compare(
    first: FeatureCache,
    second: FeatureCache,
    *,
    num_images: int | None = None,
    on_images: Callable[[int, int], None] = lambda done, total: None,
) -> Comparison:
    """Compare the features of two caches.

    Args:
        first: the reference.
        num_images: compare so many images, spread evenly over the rows of the first; by default all.
        on_images: told after each batch how many images are done, and of how many.

    Raises:
        ConfigError: less than one image.
        CacheMissError: no image that both hold.
        ShapeError: a feature that has another shape in each of them.
        CorruptShardError: damage in one of them.
    """
    if num_images is not None and num_images < 1:
        raise ConfigError(f"At least one image must be compared; got {num_images}.", num_images=num_images)
    names = _require_same_shapes(first, second)
    common = [image_id for image_id in first.image_ids.tolist() if image_id in second]
    if not common:
        raise CacheMissError(
            f"{first.root} and {second.root} hold features of no image in common, so there is nothing to "
            "compare. Name two caches of the same dataset.",
            first=first.root,
            second=second.root,
        )
    chosen = _spread(common, num_images)
    sums = {name: _Sums() for name in names}
    for done, (one, other) in enumerate(_batches(first, second, chosen), 1):
        ours, theirs = one.decoded(), other.decoded()
        for name, total in sums.items():
            total.add(one.image_ids, ours[name], theirs[name])
        on_images(min(done * _BATCH_SIZE, len(chosen)), len(chosen))
    one_images, other_images = first.images, second.images
    return Comparison(
        fields=tuple(differences(first.fingerprint, second.fingerprint)),
        features={name: total.result() for name, total in sums.items()},
        num_compared=len(chosen),
        num_common=len(common),
        other_files=tuple(
            image_id for image_id in common if one_images[image_id].sha256 != other_images[image_id].sha256
        ),
        only_first=tuple(image_id for image_id in first.image_ids.tolist() if image_id not in second),
        only_second=tuple(image_id for image_id in second.image_ids.tolist() if image_id not in first),
    )


class _Sums:
    """What the differences of one feature add up to."""

    def __init__(self) -> None:
        self._cosines = 0.0
        self._num_images = 0
        self._least = (math.inf, -1)
        self._squared_error = self._squared_norm = self._max_difference = 0.0

    def add(
        self,
        image_ids: npt.NDArray[np.int64],
        ours: npt.NDArray[np.float32],
        theirs: npt.NDArray[np.float32],
    ) -> None:
        for image_id, one, other in zip(image_ids.tolist(), ours, theirs, strict=True):
            x, y = one.reshape(-1).astype(np.float64), other.reshape(-1).astype(np.float64)
            squared_x, squared_y = float(x @ x), float(y @ y)
            cosine = _cosine(float(x @ y), squared_x, squared_y)
            self._cosines += cosine
            self._num_images += 1
            self._least = min(self._least, (cosine, image_id))
            difference = x - y
            self._squared_error += float(difference @ difference)
            self._squared_norm += squared_x
            self._max_difference = max(self._max_difference, float(np.abs(difference).max()))

    def result(self) -> FeatureDifference:
        error, norm = math.sqrt(self._squared_error), math.sqrt(self._squared_norm)
        return FeatureDifference(
            cosine_mean=self._cosines / self._num_images,
            cosine_min=self._least[0],
            worst_image_id=self._least[1],
            relative_error=error / norm if norm else (math.inf if error else 0.0),
            max_difference=self._max_difference,
        )


def _cosine(product: float, squared_x: float, squared_y: float) -> float:
    if squared_x == 0 or squared_y == 0:
        return 1.0 if squared_x == squared_y else 0.0
    # Clipped: rounding may carry it past 1. Roots before the product, which could underflow.
    return min(1.0, max(-1.0, product / (math.sqrt(squared_x) * math.sqrt(squared_y))))


def _batches(
    first: FeatureCache, second: FeatureCache, image_ids: Sequence[int]
) -> Iterator[tuple[FeatureBatch, FeatureBatch]]:
    """Yield the same images from both caches; a batch is overwritten by the next one."""
    batches = [image_ids[start : start + _BATCH_SIZE] for start in range(0, len(image_ids), _BATCH_SIZE)]
    ours, theirs = (cache.allocate(len(batches[0])) for cache in (first, second))
    for batch, following in itertools.zip_longest(batches, batches[1:], fillvalue=()):
        first.advise(following)
        second.advise(following)
        yield first.read(batch, out=ours), second.read(batch, out=theirs)


def _spread(image_ids: list[int], num_images: int | None) -> list[int]:
    if num_images is None or num_images >= len(image_ids):
        return image_ids
    return [image_ids[position * len(image_ids) // num_images] for position in range(num_images)]


def _require_same_shapes(first: FeatureCache, second: FeatureCache) -> list[str]:
    """Return the names of the features that both hold."""
    ours, theirs = (
        {entry.name: entry.shape for entry in cache.manifest.arrays if entry.name in FEATURES}
        for cache in (first, second)
    )
    if ours != theirs:
        fields = differences(first.fingerprint, second.fingerprint)
        listed = "\n".join(f"  {field}" for field in fields)
        raise ShapeError(
            f"The features of {first.root} ({_listed(ours)}) and {second.root} ({_listed(theirs)}) have "
            f"other shapes and cannot be compared. Their fingerprints differ in:\n{listed}",
            expected=ours,
            found=theirs,
            differences=fields,
        )
    return list(ours)


def _listed(shapes: dict[str, tuple[int, ...]]) -> str:
    return ", ".join(f"{name} {list(shape)}" for name, shape in shapes.items())

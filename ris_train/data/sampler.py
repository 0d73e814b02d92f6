"""The order of training samples, as a pure function of seed, epoch, cache and selection.

Nothing else enters: not the number of processes, of threads or of accumulation steps. What a run has consumed
is therefore one number, the count of samples.
"""

from __future__ import annotations

import hashlib

import numpy as np
import numpy.typing as npt

Positions = npt.NDArray[np.int64]


def order(
    image_ids: npt.ArrayLike,
    *,
    seed: int,
    epoch: int,
    fingerprint: str,
    selection: str,
    expressions_per_image: int = 1,
) -> Positions:
    """Permute the samples of one epoch.

    Args:
        image_ids: int64[n], the image of each sample.
        seed: the run's.
        epoch: counted from 0.
        fingerprint: the cache's digest, so that another cache gives another order.
        selection: what is trained on, as `data.train` has it; another one gives another order.
        expressions_per_image: k. With k > 1 the samples of each image are cut at random into groups of k, one
            of them smaller where k does not divide, and the groups are permuted.

    Returns:
        int64[n], each position once; the samples of a group stand next to each other.
    """
    images = np.asarray(image_ids)
    digest = hashlib.sha256(f"{fingerprint}\n{selection}".encode()).hexdigest()
    generator = np.random.default_rng([seed, epoch, int(digest[:32], 16)])
    shuffled = generator.permutation(len(images)).astype(np.int64, copy=False)
    if expressions_per_image == 1 or not len(images):
        return shuffled
    by_image = shuffled[np.argsort(images[shuffled], kind="stable")]
    sorted_images = images[by_image]
    is_first = np.append(True, sorted_images[1:] != sorted_images[:-1])
    starts = np.flatnonzero(is_first)
    within_image = np.arange(len(images)) - starts[np.cumsum(is_first) - 1]
    group = np.cumsum(within_image % expressions_per_image == 0) - 1
    rank = generator.permutation(group[-1] + 1)
    return by_image[np.argsort(rank[group], kind="stable")]


class SampleOrder:
    """The endless sequence of samples: epoch after epoch, each in its `order`.

    Args:
        image_ids: int64[n], the image of each sample; n ≥ 1.
        seed: as for `order`.
        fingerprint: as for `order`.
        selection: as for `order`.
        expressions_per_image: as for `order`.
    """

    def __init__(
        self,
        image_ids: npt.ArrayLike,
        *,
        seed: int,
        fingerprint: str,
        selection: str,
        expressions_per_image: int = 1,
    ) -> None:
        self._image_ids = np.asarray(image_ids)
        self._seed = seed
        self._fingerprint = fingerprint
        self._selection = selection
        self._expressions_per_image = expressions_per_image
        self._latest: tuple[int, Positions] | None = None

    def take(self, consumed: int, count: int) -> Positions:
        """Return the samples that follow the first `consumed` ones; they may straddle epochs.

        Returns:
            int64[count], positions in `image_ids`.
        """
        num_samples = len(self._image_ids)
        parts = []
        while count > 0:
            epoch, start = divmod(consumed, num_samples)
            part = self._epoch(epoch)[start : start + count]
            parts.append(part)
            consumed += len(part)
            count -= len(part)
        return np.concatenate([np.empty(0, dtype=np.int64), *parts])

    def _epoch(self, epoch: int) -> Positions:
        if self._latest is None or self._latest[0] != epoch:
            found = order(
                self._image_ids,
                seed=self._seed,
                epoch=epoch,
                fingerprint=self._fingerprint,
                selection=self._selection,
                expressions_per_image=self._expressions_per_image,
            )
            self._latest = (epoch, found)
        return self._latest[1]

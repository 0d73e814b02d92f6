"""The order of training samples, as a pure function of seed, epoch and cache."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np


def epoch_order(num_samples: int, *, seed: int, epoch: int, fingerprint: str) -> np.ndarray:
    """Permute the samples of one epoch.

    Args:
        num_samples: size of the training selection.
        seed: the run's.
        epoch: counted from 0.
        fingerprint: the cache's hexadecimal digest, so that another cache gives another order.

    Returns:
        int64[num_samples], each index once.
    """
    generator = np.random.default_rng([seed, epoch, int(fingerprint[:16], 16)])
    return generator.permutation(num_samples)


def batches(num_samples: int, batch_size: int, *, seed: int, fingerprint: str) -> Iterator[np.ndarray]:
    """Cut the endless sequence of epochs into batches; a batch may straddle two epochs.

    Yields:
        int64[batch_size], forever.
    """
    pending = np.empty(0, dtype=np.int64)
    epoch = 0
    while True:
        while len(pending) < batch_size:
            order = epoch_order(num_samples, seed=seed, epoch=epoch, fingerprint=fingerprint)
            pending = np.concatenate([pending, order])
            epoch += 1
        yield pending[:batch_size]
        pending = pending[batch_size:]

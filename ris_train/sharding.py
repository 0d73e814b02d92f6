"""Which samples are evaluated together: batches of whole images, and shards of whole images for ranks.

Samples of one image stay together, since its features are read once for all of them. Nothing is padded, so no
sample is counted twice.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import numpy.typing as npt

from ris_train.scoring.counts import Counts, concatenate


def image_batches(image_ids: Sequence[int], batch_size: int) -> Iterator[list[int]]:
    """Yield positions of samples, at most `batch_size` at once: whole images in order of first appearance.

    An image with more samples than that is cut.

    Args:
        image_ids: of each sample.
        batch_size: at least 1.
    """
    batch: list[int] = []
    for positions in _by_image(image_ids).values():
        if batch and len(batch) + len(positions) > batch_size:
            yield batch
            batch = []
        batch = batch + positions
        while len(batch) > batch_size:
            yield batch[:batch_size]
            batch = batch[batch_size:]
    if batch:
        yield batch


def shard(image_ids: Sequence[int], rank: int, world: int) -> npt.NDArray[np.int64]:
    """Choose the samples that one of several processes evaluates.

    Each image goes whole to the process that has the fewest samples so far, so every process can work out the
    shards of all. A process may get none.

    Args:
        image_ids: of each sample.
        rank: of the process, from 0 to before `world`.
        world: number of processes.

    Returns:
        int64[samples of the shard], ascending positions.
    """
    if not 0 <= rank < world:
        raise ValueError(f"Rank {rank} is not one of {world} processes, which count from 0.")
    return _shards(image_ids, world)[rank]


def gather(image_ids: Sequence[int], parts: Sequence[Mapping[str, Counts]]) -> dict[str, Counts]:
    """Put the counts of all shards back into the order of the samples.

    Whole numbers travel, no means: scores of any number of processes are those of one, to the last digit.

    Args:
        image_ids: of each sample, as given to `shard`.
        parts: what `count_samples` returned for the shard of rank 0, 1, …, by name of the view.
    """
    order = np.concatenate(_shards(image_ids, len(parts)))
    back = np.empty(len(order), dtype=np.intp)
    back[order] = np.arange(len(order))
    return {name: concatenate([part[name] for part in parts]).select(back) for name in parts[0]}


def _shards(image_ids: Sequence[int], world: int) -> list[npt.NDArray[np.int64]]:
    shards: list[list[int]] = [[] for _ in range(world)]
    for positions in _by_image(image_ids).values():
        min(shards, key=len).extend(positions)
    return [np.array(sorted(chosen), dtype=np.int64) for chosen in shards]


def _by_image(image_ids: Sequence[int]) -> dict[int, list[int]]:
    positions: dict[int, list[int]] = {}
    for position, image_id in enumerate(image_ids):
        positions.setdefault(image_id, []).append(position)
    return positions

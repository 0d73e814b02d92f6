"""Load any dataset by its name."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ris_cache.datasets.custom import load_custom
from ris_cache.datasets.grefcoco import load_grefcoco
from ris_cache.datasets.records import ReferringDataset
from ris_cache.datasets.ref_zom import load_ref_zom
from ris_cache.datasets.refer import load_refer
from ris_cache.datasets.selection import CUSTOM, PUBLISHED_DATASETS, require_dataset
from ris_cache.errors import ConfigError


def load_dataset(
    data_root: Path, dataset: str, split_by: str, *, drop_degenerate: bool = False
) -> ReferringDataset:
    """Read and check one dataset of one split_by, all splits together.

    Garbage collection is paused meanwhile: it would look for cycles among millions of new objects, which
    takes a third of the time and finds none.

    Args:
        data_root: the folder that holds the dataset folders.
        dataset: one of `PUBLISHED_DATASETS`, or `custom`.
        split_by: one of the dataset's; for custom the name of the file.
        drop_degenerate: leave out the refs of which nothing can be drawn, as ReLA and DFAM do.
    Raises:
        ConfigError: an unknown dataset or split_by.
        DataError: a file is missing, damaged, malformed or contradicts itself.
        UnsafePickleError: a pickle asks for more than plain values.
    """
    require_dataset(dataset)
    with _without_garbage_collection():
        return _load(data_root, dataset, split_by, drop_degenerate)


def _load(data_root: Path, dataset: str, split_by: str, drop_degenerate: bool) -> ReferringDataset:
    if dataset == CUSTOM:
        return load_custom(data_root, split_by, drop_degenerate=drop_degenerate)
    known = PUBLISHED_DATASETS[dataset]
    if split_by not in known:
        raise ConfigError(
            f"{dataset} has no split_by {split_by!r}; known: {', '.join(known)}.",
            found=split_by,
            expected=known,
        )
    if dataset == "grefcoco":
        return load_grefcoco(data_root, drop_degenerate=drop_degenerate)
    if dataset == "ref-zom":
        return load_ref_zom(data_root, drop_degenerate=drop_degenerate)
    return load_refer(data_root, dataset, split_by, drop_degenerate=drop_degenerate)


@contextmanager
def _without_garbage_collection() -> Iterator[None]:
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()

"""The backends by name.

A backend's module is imported when one is made, so a Zarr cache never loads h5py.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Final

from ris_cache.errors import ConfigError
from ris_cache.store.layout import Backend, StoredArray


def _make_zarr(root: Path, arrays: tuple[StoredArray, ...], shard_rows: int) -> Backend:
    from ris_cache.store.zarr_backend import ZarrBackend

    return ZarrBackend(root, arrays, shard_rows)


def _make_hdf5(root: Path, arrays: tuple[StoredArray, ...], shard_rows: int) -> Backend:
    from ris_cache.store.hdf5_backend import Hdf5Backend

    return Hdf5Backend(root, arrays, shard_rows)


BACKENDS: Final[dict[str, Callable[[Path, tuple[StoredArray, ...], int], Backend]]] = {
    "zarr": _make_zarr,
    "hdf5": _make_hdf5,
}


def make_backend(name: str, root: Path, arrays: Iterable[StoredArray], shard_rows: int) -> Backend:
    """Make a backend; no file is touched.

    Args:
        root: the cache directory.
        shard_rows: S.

    Raises:
        ConfigError: an unknown backend, or arrays that no backend can hold.
    """
    make = BACKENDS.get(name)
    if make is None:
        raise ConfigError(f"There is no backend {name!r}; choose from {', '.join(BACKENDS)}.", name=name)
    return make(root, tuple(arrays), shard_rows)

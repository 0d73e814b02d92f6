"""The cache's own files through other readers: zarr-python, zarrs, tensorstore and h5py."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np

from layouts.contract import Array, Batch, Features, Layout, Read, allocate, row_by_row
from layouts.ours import HDF5, SHARD_ROWS, ZARR, hdf5_shard, zarr_group

_POOL_BYTES = 1 << 30


def _open_zarr_python(directory: Path, features: Features, batch_size: int) -> Read:
    import zarr

    group = zarr.open_group(zarr_group(directory), mode="r")
    arrays: dict[str, Any] = {name: group[name] for name in features.arrays}
    return row_by_row(
        allocate(features, batch_size),
        lambda image: {name: array[image] for name, array in arrays.items()},
    )


def _open_zarrs(directory: Path, features: Features, batch_size: int) -> Read:
    import zarr

    import_module("zarrs")  # registers the pipeline
    # An array keeps the pipeline that was configured when it was opened.
    with zarr.config.set({"codec_pipeline.path": "zarrs.ZarrsCodecPipeline"}):
        return _open_zarr_python(directory, features, batch_size)


def _open_tensorstore(
    context: Mapping[str, Any],
) -> Callable[[Path, Features, int], Read]:
    def open_with_context(directory: Path, features: Features, batch_size: int) -> Read:
        tensorstore = import_module("tensorstore")
        buffers = allocate(features, batch_size)
        shared = tensorstore.Context(dict(context))
        arrays = {}
        for name in buffers:
            store = {"driver": "file", "path": str(zarr_group(directory).resolve() / name)}
            spec = {"driver": "zarr3", "kvstore": store}
            arrays[name] = tensorstore.open(spec, context=shared, read=True, open=True).result()

        def read(images: Sequence[int]) -> Batch:
            # One call per feature for the whole batch, written by the library straight into the buffer.
            batch = {name: buffer[: len(images)] for name, buffer in buffers.items()}
            copies = [
                tensorstore.array(values).write(arrays[name][list(images)]) for name, values in batch.items()
            ]
            for copy in copies:
                copy.result()
            return batch

        return read

    return open_with_context


def _open_shards(directory: Path, features: Features) -> list[Mapping[str, Any]]:
    import h5py

    num_shards = -(-features.num_images // SHARD_ROWS)
    return [h5py.File(hdf5_shard(directory, shard), "r") for shard in range(num_shards)]


def _open_h5py_slices(directory: Path, features: Features, batch_size: int) -> Read:
    shards = [{name: file[name] for name in features.arrays} for file in _open_shards(directory, features)]

    def read_row(image: int) -> Mapping[str, Array]:
        shard, position = divmod(image, SHARD_ROWS)
        return {name: dataset[position] for name, dataset in shards[shard].items()}

    return row_by_row(allocate(features, batch_size), read_row)


def _open_h5py_direct(directory: Path, features: Features, batch_size: int) -> Read:
    buffers = allocate(features, batch_size)
    shards = [{name: file[name] for name in buffers} for file in _open_shards(directory, features)]

    def read(images: Sequence[int]) -> Batch:
        for position, image in enumerate(images):
            shard, row = divmod(image, SHARD_ROWS)
            for name, buffer in buffers.items():
                shards[shard][name].read_direct(buffer, np.s_[row], np.s_[position])
        return {name: buffer[: len(images)] for name, buffer in buffers.items()}

    return read


def _on_zarr(
    name: str, description: str, open_: Callable[[Path, Features, int], Read], *packages: str
) -> Layout:
    return Layout(
        name=name,
        description=description,
        directory=ZARR.directory,
        write=ZARR.write,
        open=open_,
        packages=packages,
    )


def _on_hdf5(name: str, description: str, open_: Callable[[Path, Features, int], Read]) -> Layout:
    return Layout(name=name, description=description, directory=HDF5.directory, write=HDF5.write, open=open_)


LIBRARIES = (
    _on_zarr("zarr-python", "the zarr cache by zarr-python, array[i]", _open_zarr_python),
    _on_zarr("zarrs", "the zarr cache by zarr-python with the zarrs codec pipeline", _open_zarrs, "zarrs"),
    _on_zarr(
        "tensorstore", "the zarr cache by tensorstore, whole batches", _open_tensorstore({}), "tensorstore"
    ),
    _on_zarr(
        "tensorstore-pool",
        "the zarr cache by tensorstore with a pool of 1 GiB of chunks",
        _open_tensorstore({"cache_pool": {"total_bytes_limit": _POOL_BYTES}}),
        "tensorstore",
    ),
    _on_zarr(
        "tensorstore-memmap",
        "the zarr cache by tensorstore through memory maps",
        _open_tensorstore({"file_io_mode": {"mode": "memmap"}}),
        "tensorstore",
    ),
    _on_hdf5("h5py", "the hdf5 cache by h5py, dataset[i]", _open_h5py_slices),
    _on_hdf5("h5py-direct", "the hdf5 cache by h5py, read_direct into the buffer", _open_h5py_direct),
)

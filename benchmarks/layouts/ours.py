"""The cache of `ris`, written by its writer and read through its public interface."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Final

import numpy as np
import torch

from layouts.contract import Array, Batch, Features, Layout, Read
from ris_cache import FeatureCache
from ris_cache.store.checking import Integrity
from ris_cache.store.draft import SHARD_ROWS, Recipe
from ris_cache.store.fingerprint import Fingerprint
from ris_cache.store.planning import NewImage
from ris_cache.store.precision import decode, encode
from ris_cache.store.writer import CacheWriter, Outcome

__all__ = ["HDF5", "SHARD_ROWS", "ZARR", "hdf5_shard", "image_ids", "our_layouts", "zarr_group"]

_FIRST_ID: Final = 1000
_NO_FILE: Final = "0" * 64
"""Stands for the digest of an image file; there are none here."""


def zarr_group(directory: Path) -> Path:
    """Return the Zarr group of a cache; image i lies at row i."""
    return directory / "features.zarr"


def hdf5_shard(directory: Path, shard: int) -> Path:
    """Return an HDF5 file of a cache; image i lies at row i % `SHARD_ROWS` of shard i // `SHARD_ROWS`."""
    return directory / "features" / f"{shard:05d}.h5"


def image_ids(images: Sequence[int]) -> list[int]:
    """Return the ids that a cache knows images by."""
    return [_FIRST_ID + image for image in images]


def _write(backend: str, dtype: str, features: Features, directory: Path) -> None:
    recipe = Recipe(
        fingerprint=Fingerprint.of({"made_by": "benchmarks/store.py", "dtype": dtype}),
        preset="random",
        weights={},
        shapes=features.shapes,
        dtype=dtype,
        backend=backend,
    )
    images = [
        NewImage(image_id=image_id, file_name=f"{image_id}.jpg", height=1, width=1)
        for image_id in image_ids(range(features.num_images))
    ]
    writer = CacheWriter.open(directory, recipe, purpose="benchmark", request={}, choose=lambda known: images)
    for claim in writer.free_claims():
        start = claim.shard * SHARD_ROWS
        rows = features.rows(slice(start, start + len(claim.images)))
        claim.commit(_stored(dtype, rows), [Outcome(sha256=_NO_FILE) for _ in claim.images])
    writer.finish(lambda draft: None)


def _stored(dtype: str, rows: Mapping[str, Array]) -> Mapping[str, Array]:
    """Return features as a cache of some precision stores them."""
    if dtype == "float16":
        return rows
    floats = {name: torch.from_numpy(values).float() for name, values in rows.items()}
    return {name: tensor.numpy() for name, tensor in encode(dtype, floats).arrays.items()}


def _decoded(dtype: str, rows: Mapping[str, Array]) -> Mapping[str, Array]:
    """Return what decoding features that a cache of some precision stores gives in float32."""
    return decode(dtype, _stored(dtype, rows))


def _decoded_half(dtype: str, rows: Mapping[str, Array]) -> Mapping[str, Array]:
    """Return the same rounded to float16."""
    return {name: values.astype(np.float16) for name, values in _decoded(dtype, rows).items()}


def _open(integrity: Integrity, directory: Path, _: Features, batch_size: int) -> Read:
    cache = FeatureCache.open(directory, integrity=integrity)
    buffers = cache.allocate(batch_size)
    return lambda images: cache.read(image_ids(images), out=buffers).stored


def _open_new_memory(directory: Path, _: Features, __: int) -> Read:
    cache = FeatureCache.open(directory)
    return lambda images: cache.read(image_ids(images)).stored


def _open_decoded(device: str, directory: Path, _: Features, batch_size: int) -> Read:
    """Read into pinned memory where a GPU decodes, and into ordinary memory for the CPU."""
    is_gpu = device != "cpu"
    cache = FeatureCache.open(directory)
    buffers = cache.allocate(batch_size, pinned=is_gpu)

    def read(images: Sequence[int]) -> Batch:
        features = cache.read(image_ids(images), out=buffers).to(
            device, torch.float16 if is_gpu else torch.float32
        )
        if is_gpu:
            torch.cuda.synchronize(device)
        return features

    return read


def _directory(backend: str, dtype: str) -> str:
    return f"ris-{backend}-{dtype}"


def _layout(
    name: str,
    description: str,
    open_: Callable[[Path, Features, int], Read],
    *,
    backend: str = "zarr",
    dtype: str = "float16",
    expected: Callable[[str, Mapping[str, Array]], Mapping[str, Array]] = _stored,
) -> Layout:
    return Layout(
        name=name,
        description=description,
        directory=_directory(backend, dtype),
        write=partial(_write, backend, dtype),
        open=open_,
        expected=partial(expected, dtype),
        size=0.51 if dtype == "int8" else 1.0,
    )


_CACHED = partial(_open, "first-open")

ZARR = _layout("ris-zarr", "ris cache, zarr backend, cache.read into buffers", _CACHED)
HDF5 = _layout("ris-hdf5", "ris cache, hdf5 backend, cache.read into buffers", _CACHED, backend="hdf5")


def our_layouts(device: str) -> tuple[Layout, ...]:
    """Return the rows of `ris`.

    Args:
        device: where the rows that decode do so.
    """
    place = "float32 on the CPU" if device == "cpu" else f"float16 on {device}"
    decoding = [
        _layout(
            f"ris-zarr-{dtype}-decoded",
            f"ris cache in {dtype}, decoded to {place}",
            partial(_open_decoded, device),
            dtype=dtype,
            expected=_decoded if device == "cpu" else _decoded_half,
        )
        for dtype in ("float16", "bfloat16", "int8")
    ]
    policies: tuple[Integrity, ...] = ("off", "every-read")
    integrity = [
        _layout(
            f"ris-{backend}-{policy}",
            f"ris cache, {backend} backend, integrity={policy}",
            partial(_open, policy),
            backend=backend,
        )
        for backend in ("zarr", "hdf5")
        for policy in policies
    ]
    return (
        ZARR,
        HDF5,
        *integrity,
        _layout("ris-zarr-new-memory", "ris cache, zarr backend, cache.read without out=", _open_new_memory),
        _layout("ris-zarr-bfloat16", "ris cache in bfloat16, as stored", _CACHED, dtype="bfloat16"),
        _layout("ris-zarr-int8", "ris cache in int8, as stored", _CACHED, dtype="int8"),
        *decoding,
    )

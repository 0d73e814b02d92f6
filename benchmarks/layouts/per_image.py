"""One file per image and its kin: what research code usually does."""

from __future__ import annotations

import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from layouts.contract import Array, Features, Layout, Read, allocate, row_by_row


def _write_pickles(features: Features, directory: Path) -> None:
    for image in range(features.num_images):
        row = {name: torch.from_numpy(array[image]).float() for name, array in features.arrays.items()}
        with (directory / f"{image}.pkl").open("wb") as file:
            pickle.dump(row, file, protocol=pickle.HIGHEST_PROTOCOL)


def _open_pickles(directory: Path, features: Features, batch_size: int) -> Read:
    def read_row(image: int) -> Mapping[str, Any]:
        with (directory / f"{image}.pkl").open("rb") as file:
            row: Mapping[str, Any] = pickle.load(file)
        return row

    return row_by_row(allocate(features, batch_size, "float32"), read_row)


def _as_float32(rows: Mapping[str, Array]) -> Mapping[str, Array]:
    return {name: array.astype(np.float32) for name, array in rows.items()}


def _write_torch(features: Features, directory: Path) -> None:
    for image in range(features.num_images):
        # A clone: torch.save writes the whole storage that a view belongs to.
        row = {name: torch.from_numpy(array[image]).clone() for name, array in features.arrays.items()}
        torch.save(row, directory / f"{image}.pt")


def _open_torch(directory: Path, features: Features, batch_size: int) -> Read:
    return row_by_row(
        allocate(features, batch_size),
        lambda image: torch.load(directory / f"{image}.pt", weights_only=True),
    )


def _open_torch_mmap(directory: Path, features: Features, batch_size: int) -> Read:
    return row_by_row(
        allocate(features, batch_size),
        lambda image: torch.load(directory / f"{image}.pt", weights_only=True, mmap=True),
    )


def _write_npy(features: Features, directory: Path) -> None:
    for image in range(features.num_images):
        for name, array in features.arrays.items():
            np.save(directory / f"{image}.{name}.npy", array[image])


def _open_npy(directory: Path, features: Features, batch_size: int) -> Read:
    def read_row(image: int) -> Mapping[str, Any]:
        return {name: np.load(directory / f"{image}.{name}.npy") for name in features.arrays}

    return row_by_row(allocate(features, batch_size), read_row)


PER_IMAGE = (
    Layout(
        name="pickle-float32",
        description="a pickle of float32 tensors per image, the usual practice",
        directory="pickle",
        write=_write_pickles,
        open=_open_pickles,
        expected=_as_float32,
        size=2.0,
    ),
    Layout(
        name="torch-save",
        description="torch.save of float16 per image",
        directory="torch",
        write=_write_torch,
        open=_open_torch,
    ),
    Layout(
        name="torch-save-mmap",
        description="torch.save of float16 per image, torch.load(mmap=True)",
        directory="torch",
        write=_write_torch,
        open=_open_torch_mmap,
    ),
    Layout(
        name="npy",
        description="an npy file per image and feature",
        directory="npy",
        write=_write_npy,
        open=_open_npy,
    ),
)

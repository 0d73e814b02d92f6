"""The ceiling: the same bytes copied out of one flat memory map."""

from __future__ import annotations

from pathlib import Path

from layouts.contract import Features, Layout, Read, allocate, map_features, row_by_row

FLAT_NAME = "features.bin"


def _write(features: Features, directory: Path) -> None:
    with (directory / FLAT_NAME).open("wb") as file:
        for array in features.arrays.values():
            file.write(array.data)


def _open(directory: Path, features: Features, batch_size: int) -> Read:
    stored = map_features(directory / FLAT_NAME, features.shapes, features.num_images)
    return row_by_row(allocate(features, batch_size), stored.rows)


FLAT = Layout(
    name="flat-memmap",
    description="one flat memory map: the ceiling, measured against itself",
    directory="flat",
    write=_write,
    open=_open,
)

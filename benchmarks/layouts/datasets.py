"""Streaming datasets: litdata and MosaicML's MDS, samples fetched by number in the reading process."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path

from layouts.contract import Features, Layout, Read, allocate, row_by_row

_IMAGES_PER_CHUNK = 64


def _write_litdata(features: Features, directory: Path) -> None:
    # The writer itself: `litdata.optimize` runs the same in worker processes and adds seconds of start.
    writer = import_module("litdata.streaming.writer").BinaryWriter(
        str(directory), chunk_size=_IMAGES_PER_CHUNK
    )
    for image in range(features.num_images):
        writer[image] = features.rows(image)
    writer.done()
    writer.merge()


def _open_litdata(directory: Path, features: Features, batch_size: int) -> Read:
    dataset = import_module("litdata").StreamingDataset(str(directory))
    return row_by_row(allocate(features, batch_size), dataset.__getitem__)


def _write_mds(features: Features, directory: Path) -> None:
    columns = {
        name: f"ndarray:float16:{','.join(map(str, shape))}" for name, shape in features.shapes.items()
    }
    chunk_bytes = _IMAGES_PER_CHUNK * features.num_bytes // features.num_images
    open_writer = import_module("streaming").MDSWriter
    with open_writer(out=str(directory), columns=columns, size_limit=chunk_bytes) as writer:
        for image in range(features.num_images):
            writer.write(features.rows(image))


def _open_mds(directory: Path, features: Features, batch_size: int) -> Read:
    dataset = import_module("streaming").StreamingDataset(local=str(directory), batch_size=batch_size)
    return row_by_row(allocate(features, batch_size), dataset.__getitem__)


DATASETS = (
    Layout(
        name="litdata",
        description="litdata, StreamingDataset[i]",
        directory="litdata",
        write=_write_litdata,
        open=_open_litdata,
        packages=("litdata",),
    ),
    Layout(
        name="mds",
        description="mosaicml-streaming MDS, StreamingDataset[i]",
        directory="mds",
        write=_write_mds,
        open=_open_mds,
        packages=("streaming",),
    ),
)

"""Checksums of single rows of features."""

from __future__ import annotations

from collections.abc import Sequence

import google_crc32c
import numpy as np
import numpy.typing as npt

from ris_cache.store.layout import Array


def row_checksum(row: npt.NDArray[np.uint8]) -> int:
    """Return the CRC-32C of a contiguous row of bytes."""
    view = row.view()
    view.flags.writeable = False  # the library takes nothing that could change under it
    return int(google_crc32c.value(view))


def row_checksums(arrays: Sequence[Array]) -> list[tuple[int, ...]]:
    """Return the CRC-32C of each row's bytes in every array.

    Args:
        arrays: C-contiguous [n, ...] each, as stored.

    Returns:
        For each of the n rows, one checksum per array.
    """
    columns = []
    for array in arrays:
        rows = array.reshape(len(array), -1).view(np.uint8) if len(array) else np.empty((0, 0), np.uint8)
        columns.append([row_checksum(row) for row in rows])
    return list(zip(*columns, strict=True))

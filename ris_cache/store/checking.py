"""When features are compared with their checksums, and the comparing.

A checksum costs about a third of the copy that it checks, so by default each image is checked the first time
that it is read from an opened shard. A shard that is opened anew may be another file, so its images are
checked anew: after others took its place among the open ones, after it was replaced, and in a forked child.
Hashing whole shards when they are opened would find the same damage, but would read 64 images for one
wherever reading is random.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal, get_args

import numpy as np
import numpy.typing as npt

from ris_cache.errors import ConfigError
from ris_cache.store.layout import Array
from ris_cache.store.rows import row_checksum

Integrity = Literal["off", "first-open", "every-read"]
INTEGRITY: tuple[str, ...] = get_args(Integrity)


def require_integrity(integrity: str) -> None:
    """Refuse an unknown policy.

    Raises:
        ConfigError: listing those there are.
    """
    if integrity not in INTEGRITY:
        raise ConfigError(
            f"Unknown integrity policy {integrity!r}; there are {', '.join(INTEGRITY)}.", integrity=integrity
        )


class RowChecker:
    """Compares rows with the checksums of the table of images; what it is due to check, its caller knows."""

    def __init__(self, table: Any, names: Sequence[str], integrity: Integrity) -> None:
        """Take the checksums from the table of images.

        Args:
            names: of the arrays, in the order of the checksums.
        """
        column = table.column("crc32c").combine_chunks()
        self._values: npt.NDArray[np.uint32] = column.values.to_numpy()
        self._starts: npt.NDArray[np.int32] = column.offsets.to_numpy()
        self._names = list(names)
        self._integrity = integrity

    def first_wrong(
        self, positions: Sequence[int], stored: Mapping[str, Array], is_known: npt.NDArray[np.bool_]
    ) -> tuple[int, str] | None:
        """Check rows that are due, and return the first that is wrong.

        Args:
            positions: of each image in the table.
            stored: C-contiguous [B, ...] of the arrays, row i of the image at positions[i].
            is_known: bool[B], whether the row was found right before, in the files that it was read from now.

        Returns:
            Index into `positions` and name of the array; None if all are right.
        """
        if self._integrity == "off":
            return None
        due = range(len(positions)) if self._integrity == "every-read" else np.flatnonzero(~is_known).tolist()
        if not due:
            return None
        rows = {name: array.reshape(len(array), -1).view(np.uint8) for name, array in stored.items()}
        for index in due:
            start = self._starts[positions[index]]
            for offset, name in enumerate(self._names):
                if name in rows and row_checksum(rows[name][index]) != self._values[start + offset]:
                    return index, name
        return None

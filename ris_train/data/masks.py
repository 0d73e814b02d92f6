"""Target masks for training: rasterised on the loss grid, kept packed.

S side of the loss grid, which covers the squashed input frame.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping

import numpy as np
import numpy.typing as npt

from ris_cache.datasets.records import InstanceRecord
from ris_cache.datasets.segmentation import rasterise

Mask = npt.NDArray[np.bool_]


class TargetMasks:
    """Rasterises instances on the loss grid and remembers the latest ones, one bit a cell.

    Args:
        instances: of each table, by ann_id.
        sizes: (H, W) of each image, by image_id: the frame that its polygons are given in.
        size: S.
        max_cached: instances remembered; at S = 1024 each takes 128 KiB.
    """

    def __init__(
        self,
        instances: Mapping[str, Mapping[int, InstanceRecord]],
        sizes: Mapping[int, tuple[int, int]],
        size: int,
        *,
        max_cached: int = 4096,
    ) -> None:
        self._instances = instances
        self._sizes = sizes
        self._size = size
        self._max_cached = max_cached
        self._packed: OrderedDict[tuple[str, int], npt.NDArray[np.uint8]] = OrderedDict()

    @property
    def size(self) -> int:
        """S."""
        return self._size

    def of(self, table_name: str, ann_id: int) -> Mask:
        """Mask of one instance of a table: bool[S, S]."""
        key = (table_name, ann_id)
        packed = self._packed.get(key)
        if packed is None:
            packed = np.packbits(self._rasterise(table_name, ann_id))
            self._packed[key] = packed
            if len(self._packed) > self._max_cached:
                self._packed.popitem(last=False)
        else:
            self._packed.move_to_end(key)
        cells = np.unpackbits(packed, count=self._size * self._size)
        return cells.reshape(self._size, self._size).astype(bool)

    def _rasterise(self, table_name: str, ann_id: int) -> Mask:
        instance = self._instances[table_name][ann_id]
        return rasterise(
            instance.segmentation,
            frame_size=self._sizes[instance.image_id],
            grid_size=(self._size, self._size),
        )

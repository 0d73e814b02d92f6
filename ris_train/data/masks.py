"""Target masks for training: rasterised on the loss grid once, kept as lengths of runs.

S side of the loss grid, which covers the squashed input frame. n masks.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from typing import Final

import numpy as np
import numpy.typing as npt

from ris_cache.datasets.records import InstanceRecord
from ris_cache.datasets.segmentation import rasterise

Mask = npt.NDArray[np.bool_]
Key = tuple[str, int]
"""Table and ann_id of an instance."""

MAX_BYTES: Final = 512 << 20
"""Memory for masks.

An outline of 30 points that fills 4 % of the frame takes 1.3 KB at S = 256 and 5.2 KB at S = 1024, where one
bit a cell would take 8 and 131. All 50,000 instances of RefCOCO are 60 to 260 MB, so each is drawn once in a
run. Drawing takes 0.4 ms at S = 256 and 3.9 ms at S = 1024; from runs a mask is back in 6 and 120 µs.
"""
_ENTRY_BYTES: Final = 300
"""What Python and numpy take for one entry, beside its runs."""


class TargetMasks:
    """Rasterises instances on the loss grid and remembers the latest ones. For one thread.

    A mask is remembered as int32 lengths of its runs, row by row: background and foreground in turn, from
    background on, always an even number. So the runs of many masks follow each other as those of one.

    Args:
        instances: of each table, by ann_id.
        sizes: (H, W) of each image, by image_id: the frame that its polygons are given in.
        size: S.
        max_bytes: memory for what is remembered; the masks used latest stay.
    """

    def __init__(
        self,
        instances: Mapping[str, Mapping[int, InstanceRecord]],
        sizes: Mapping[int, tuple[int, int]],
        size: int,
        *,
        max_bytes: int = MAX_BYTES,
    ) -> None:
        self._instances = instances
        self._sizes = sizes
        self._size = size
        self._max_bytes = max_bytes
        self._num_bytes = 0
        self._runs: OrderedDict[Key, npt.NDArray[np.int32]] = OrderedDict()

    @property
    def size(self) -> int:
        """S."""
        return self._size

    def many(self, keys: Sequence[Key]) -> Mask:
        """Masks of n instances, all unfolded at once: bool[n, S, S]."""
        # The empty array gives the result its dtype where there are no keys.
        lengths = np.concatenate([np.empty(0, np.int32), *(self._runs_of(key) for key in keys)])
        is_foreground = np.tile([False, True], len(lengths) // 2)
        return np.repeat(is_foreground, lengths).reshape(len(keys), self._size, self._size)

    def of(self, table_name: str, ann_id: int) -> Mask:
        """Mask of one instance of a table: bool[S, S]."""
        return self.many([(table_name, ann_id)]).reshape(self._size, self._size)

    def _runs_of(self, key: Key) -> npt.NDArray[np.int32]:
        runs = self._runs.get(key)
        if runs is not None:
            self._runs.move_to_end(key)
            return runs
        runs = self._runs[key] = _runs(self._rasterise(*key))
        self._num_bytes += runs.nbytes + _ENTRY_BYTES
        while self._num_bytes > self._max_bytes:
            _, oldest = self._runs.popitem(last=False)
            self._num_bytes -= oldest.nbytes + _ENTRY_BYTES
        return runs

    def _rasterise(self, table_name: str, ann_id: int) -> Mask:
        instance = self._instances[table_name][ann_id]
        return rasterise(
            instance.segmentation,
            frame_size=self._sizes[instance.image_id],
            grid_size=(self._size, self._size),
        )


def _runs(mask: Mask) -> npt.NDArray[np.int32]:
    """Lengths of the runs of a mask; the first or the last is 0 where there is no such run."""
    cells = mask.ravel()
    borders = np.flatnonzero(cells[1:] != cells[:-1]) + 1
    before = [0, 0] if cells[0] else [0]
    is_odd = (len(before) + len(borders)) % 2 == 1
    after = [cells.size] if not is_odd else [cells.size, cells.size]
    return np.diff(np.concatenate([before, borders, after])).astype(np.int32)

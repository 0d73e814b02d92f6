"""Ground truth: annotated masks on the grids that they are compared on, drawn once and kept packed.

h, w size of a grid.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Mapping
from threading import Lock
from typing import Final

import numpy as np
import numpy.typing as npt

from ris_cache.datasets.records import InstanceRecord
from ris_cache.store.cache import FeatureCache
from ris_train.data.samples import Sample
from ris_train.scoring.views import View, truth_mask

MAX_BYTES: Final = 256 << 20
"""Memory for masks: nearly 7,000 of 640 × 480 pixels, 2,000 of 1024 × 1024."""

_Key = tuple[str, int, tuple[int, ...], str, str, str]


class GroundTruth:
    """Masks of samples of one or several tables.

    Samples with the same image and targets share their masks, and so do views that differ in the threshold
    alone, which concerns the prediction. Safe to share between threads.

    Args:
        instances: by ann_id, of each table by its name.
        sizes: (H, W) of each image, by image_id.
        max_bytes: of masks kept, one bit a pixel; the latest stay.
    """

    def __init__(
        self,
        instances: Mapping[str, Mapping[int, InstanceRecord]],
        sizes: Mapping[int, tuple[int, int]],
        *,
        max_bytes: int = MAX_BYTES,
    ) -> None:
        self._instances = instances
        self._sizes = sizes
        self._max_bytes = max_bytes
        self._num_bytes = 0
        self._packed: OrderedDict[_Key, npt.NDArray[np.uint8]] = OrderedDict()
        self._lock = Lock()

    @classmethod
    def from_cache(cls, cache: FeatureCache, table_names: Iterable[str]) -> GroundTruth:
        """Take instances and sizes from a cache's tables."""
        return cls({name: cache.instances(name) for name in dict.fromkeys(table_names)}, cache.sizes)

    @property
    def instances(self) -> Mapping[str, Mapping[int, InstanceRecord]]:
        """By ann_id, of each table by its name."""
        return self._instances

    def frame_size(self, sample: Sample) -> tuple[int, int]:
        """(H, W) of the sample's image."""
        return self._sizes[sample.image_id]

    def grid_size(self, sample: Sample, view: View) -> tuple[int, int]:
        """(h, w) of the grid on which the view compares the sample."""
        return view.grid_size(self.frame_size(sample))

    def of(self, sample: Sample, view: View) -> npt.NDArray[np.bool_]:
        """Mask of the sample's targets as the view draws it: bool[h, w]."""
        height, width = self.grid_size(sample, view)
        pixels = np.unpackbits(self.packed(sample, view), count=height * width)
        return pixels.view(np.bool_).reshape(height, width)

    def packed(self, sample: Sample, view: View) -> npt.NDArray[np.uint8]:
        """The same mask row by row, eight pixels a byte, the first in the highest bit: uint8[⌈h·w / 8⌉]."""
        key = (sample.table_name, sample.image_id, sample.ann_ids, *truth_key(view))
        with self._lock:
            packed = self._packed.get(key)
            if packed is not None:
                self._packed.move_to_end(key)
                return packed
        packed = np.packbits(self._draw(sample, view))
        packed.flags.writeable = False
        self._keep(key, packed)
        return packed

    def _draw(self, sample: Sample, view: View) -> npt.NDArray[np.bool_]:
        instances = self._instances[sample.table_name]
        segmentations = [instances[ann_id].segmentation for ann_id in sample.ann_ids]
        return truth_mask(segmentations, view, frame_size=self.frame_size(sample))

    def _keep(self, key: _Key, packed: npt.NDArray[np.uint8]) -> None:
        with self._lock:
            if key not in self._packed:
                self._packed[key] = packed
                self._num_bytes += packed.nbytes
            while self._num_bytes > self._max_bytes:
                _, oldest = self._packed.popitem(last=False)
                self._num_bytes -= oldest.nbytes


def truth_key(view: View) -> tuple[str, str, str]:
    """What of a view decides the ground truth."""
    return view.grid, view.raster, view.overlap

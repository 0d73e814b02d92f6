"""Public dataset files turned into one typed form.

Re-exported here is what costs next to nothing to import. The loaders need numpy and pycocotools and are
imported from their modules, for example `ris_cache.datasets.load`.
"""

from __future__ import annotations

from ris_cache.datasets.image_roots import ImageRoots
from ris_cache.datasets.records import (
    Category,
    ExpressionRecord,
    ImageRecord,
    InstanceRecord,
    ReferringDataset,
    Rle,
    Segmentation,
)
from ris_cache.datasets.selection import PUBLISHED_DATASETS, Selection, parse_selections, select_split

__all__ = [
    "PUBLISHED_DATASETS",
    "Category",
    "ExpressionRecord",
    "ImageRecord",
    "ImageRoots",
    "InstanceRecord",
    "ReferringDataset",
    "Rle",
    "Segmentation",
    "Selection",
    "parse_selections",
    "select_split",
]

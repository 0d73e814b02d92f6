"""A drawn referring dataset: scenes of coloured shapes with expressions that need language to resolve.

It needs no download, is exact about its masks, and is written in the files of RefCOCO, RefCOCO+, RefCOCOg,
gRefCOCO, Ref-ZOM or a custom dataset.
"""

from ris_cache.datasets.shapes.compose import SPLITS, ComposedImage, compose_image
from ris_cache.datasets.shapes.language import KINDS, Constraints, Reading, Relation, matches, singles_out
from ris_cache.datasets.shapes.layouts import LAYOUT_NAMES, ShapesSummary
from ris_cache.datasets.shapes.mixture import Shares
from ris_cache.datasets.shapes.objects import CATEGORY_IDS, COLOURS, SHAPES
from ris_cache.datasets.shapes.phrasing import VOCABULARY, realise
from ris_cache.datasets.shapes.rows import SplitCounts
from ris_cache.datasets.shapes.scene import Drawing, Scene, SceneObject
from ris_cache.datasets.shapes.writer import num_pictures, write_layouts, write_shapes_dataset

__all__ = [
    "CATEGORY_IDS",
    "COLOURS",
    "KINDS",
    "LAYOUT_NAMES",
    "SHAPES",
    "SPLITS",
    "VOCABULARY",
    "ComposedImage",
    "Constraints",
    "Drawing",
    "Reading",
    "Relation",
    "Scene",
    "SceneObject",
    "ShapesSummary",
    "Shares",
    "SplitCounts",
    "compose_image",
    "matches",
    "num_pictures",
    "realise",
    "singles_out",
    "write_layouts",
    "write_shapes_dataset",
]

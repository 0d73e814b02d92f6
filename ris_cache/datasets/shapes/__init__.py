"""A drawn referring dataset: scenes of coloured shapes with expressions that need language to resolve.

It needs no download, is exact about its masks, and is written in RefCOCO's own file format.
"""

from ris_cache.datasets.shapes.compose import SPLITS, ComposedImage, compose_image
from ris_cache.datasets.shapes.language import KINDS, Constraints, Reading, Relation, matches, singles_out
from ris_cache.datasets.shapes.objects import CATEGORY_IDS, COLOURS, SHAPES
from ris_cache.datasets.shapes.phrasing import VOCABULARY, realise
from ris_cache.datasets.shapes.scene import Drawing, Scene, SceneObject
from ris_cache.datasets.shapes.writer import ShapesSummary, SplitCounts, write_shapes_dataset

__all__ = [
    "CATEGORY_IDS",
    "COLOURS",
    "KINDS",
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
    "SplitCounts",
    "compose_image",
    "matches",
    "realise",
    "singles_out",
    "write_shapes_dataset",
]

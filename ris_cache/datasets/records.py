"""The typed form that every dataset loader produces and everything downstream reads.

Vocabulary: a *ref* groups the expressions of one target set in one image; an *expression* is one sentence.
Coordinates are original-frame pixels; sizes are (height, width). `category_id` is the raw COCO id.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, slots=True, kw_only=True)
class Rle:
    """A run-length encoded mask in COCO's compressed form.

    Attributes:
        size: (height, width) of the mask.
        counts: COCO's compressed ASCII string.
    """

    size: tuple[int, int]
    counts: str


Polygons = tuple[tuple[float, ...], ...]
"""Polygon parts, each flat (x0, y0, x1, y1, …) in original-frame pixels."""

Segmentation = Polygons | Rle


@dataclass(frozen=True, slots=True, kw_only=True)
class ImageRecord:
    """One image as its annotation file describes it; `height` and `width` must equal the decoded file's.

    Attributes:
        file_name: as `ImageRoots.path_of` takes it: a plain name, or `custom/…` for a custom dataset's.
        namespace: whose ids `image_id` is one of: coco, or `custom/<name>`.
    """

    image_id: int
    file_name: str
    height: int
    width: int
    namespace: str = "coco"


@dataclass(frozen=True, slots=True, kw_only=True)
class InstanceRecord:
    """One annotated object; `category_id` is -1 for an object of a custom dataset that names none."""

    ann_id: int
    image_id: int
    category_id: int
    segmentation: Segmentation
    is_crowd: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpressionRecord:
    """One expression and what it refers to.

    Attributes:
        sent_index: position of the sentence within its ref.
        raw: the text as the annotator typed it.
        sent: the cleaned text.
        ann_ids: target instances; empty when the expression refers to nothing.
        category_ids: raw COCO category of each entry of `ann_ids`; empty if none is annotated.
        is_degenerate: targets exist but none of their polygons encloses anything; the mask is empty.
    """

    split: str
    ref_id: int
    sent_id: int
    sent_index: int
    image_id: int
    raw: str
    sent: str
    ann_ids: tuple[int, ...]
    category_ids: tuple[int, ...]
    is_degenerate: bool

    @property
    def is_no_target(self) -> bool:
        """Whether the expression is annotated as referring to nothing."""
        return not self.ann_ids

    @property
    def target_kind(self) -> Literal["none", "one", "many"]:
        """How many objects the expression refers to."""
        if not self.ann_ids:
            return "none"
        return "one" if len(self.ann_ids) == 1 else "many"


@dataclass(frozen=True, slots=True, kw_only=True)
class Category:
    """One object category."""

    category_id: int
    name: str


@dataclass(frozen=True, slots=True, kw_only=True)
class ReferringDataset:
    """A whole dataset of one `split_by`, all splits together, in the order of its file.

    Attributes:
        name: refcoco, refcoco+, refcocog, grefcoco, ref-zom or custom.
        split_by: who made the splits: unc, google, umd, final; for custom the name of its file.
        images: by image_id; every image that an expression refers to.
        instances: by ann_id; every instance of those images.
        expressions: file order of refs, then order of sentences within the ref.
        warnings: what was odd but survivable, one sentence each, with counts.
    """

    name: str
    split_by: str
    images: dict[int, ImageRecord]
    instances: dict[int, InstanceRecord]
    expressions: tuple[ExpressionRecord, ...]
    categories: tuple[Category, ...]
    warnings: tuple[str, ...]

    @property
    def splits(self) -> tuple[str, ...]:
        """Names of the splits present, in order of first appearance."""
        return tuple(dict.fromkeys(expression.split for expression in self.expressions))

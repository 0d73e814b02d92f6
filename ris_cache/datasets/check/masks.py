"""Draw every target and say which masks are odd.

H, W: rows and columns of the original frame. Nothing is decoded to pixels unless parts overlap: pycocotools
counts the pixels of run-length masks as they are, and parts overlap exactly if their pixels, added up, are
more than those of their union.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence, Set
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import numpy as np
from pycocotools import mask as coco_mask

from ris_cache.datasets.check.counts import by_splits
from ris_cache.datasets.check.report import DroppedParts, MaskFindings
from ris_cache.datasets.fields import read_json
from ris_cache.datasets.records import (
    ExpressionRecord,
    InstanceRecord,
    Polygons,
    ReferringDataset,
    Rle,
    Segmentation,
)
from ris_cache.datasets.segmentation import part_count, rasterise

_SQUARES: Final = (1024, 480)


@dataclass(frozen=True, slots=True, kw_only=True)
class TargetMask:
    """What a set of targets looks like.

    Attributes:
        lost: share of the union's pixels under several parts, in the original frame; 0 if none overlap.
        empty: sides of the squashed square grids on which no pixel is left.
    """

    lost: float
    empty: frozenset[int]


def judge_masks(
    dataset: ReferringDataset, expressions: Sequence[ExpressionRecord], advance: Callable[[int, int], None]
) -> dict[str, MaskFindings]:
    """Draw the targets of the expressions and judge them, split by split.

    Args:
        advance: called with the sets of targets drawn so far and how many there are.
    """
    drawer = _Drawer(dataset)
    wanted = list(dict.fromkeys(e.ann_ids for e in expressions if e.ann_ids and not e.is_degenerate))
    drawn: dict[tuple[int, ...], TargetMask] = {}
    for ann_ids in wanted:
        drawn[ann_ids] = drawer.judge(ann_ids)
        advance(len(drawn), len(wanted))
    findings = {}
    for split, chosen in by_splits(expressions).items():
        counts: Counter[str] = Counter()
        lost: list[float] = []
        for expression in chosen:
            counts["crowd"] += any(dataset.instances[ann_id].is_crowd for ann_id in expression.ann_ids)
            counts["degenerate"] += expression.is_degenerate
            if expression.ann_ids in drawn:
                mask = drawn[expression.ann_ids]
                counts.update(f"empty_{side}" for side in mask.empty)
                lost += [mask.lost] if mask.lost else []
        findings[split] = MaskFindings(
            degenerate=counts["degenerate"],
            crowd=counts["crowd"],
            overlapping=len(lost),
            lost=float(np.mean(lost)) if lost else 0.0,
            empty_1024=counts["empty_1024"],
            empty_480=counts["empty_480"],
        )
    return findings


def count_dropped(instances_path: Path, ann_ids: Set[int]) -> DroppedParts:
    """Count the polygons of the annotations that the loader dropped, since they enclose nothing.

    Args:
        instances_path: a file that has been loaded, so its form is known to be right.
    """
    dropped = []
    for annotation in read_json(instances_path)["annotations"]:
        segmentation = annotation.get("segmentation")
        if annotation["id"] in ann_ids and isinstance(segmentation, list):
            polygons = [part for part in segmentation if isinstance(part, list)]
            dropped.append(sum(len(part) < 6 or len(part) % 2 == 1 for part in polygons))
    return DroppedParts(annotations=len(ann_ids), affected=sum(map(bool, dropped)), parts=sum(dropped))


@dataclass(slots=True)
class _Drawer:
    """Draws each object once, however many expressions refer to it."""

    dataset: ReferringDataset
    parts: dict[int, list[Any]] = field(default_factory=dict)
    empty: dict[int, frozenset[int]] = field(default_factory=dict)

    def judge(self, ann_ids: Iterable[int]) -> TargetMask:
        targets = [self.dataset.instances[ann_id] for ann_id in ann_ids]
        parts = [part for target in targets for part in self._parts(target)]
        lost = 0.0
        if len(parts) > 1 and coco_mask.area(parts).sum() > coco_mask.area(coco_mask.merge(parts)):
            frame = self._frame(targets[0])
            counts = part_count((t.segmentation for t in targets), frame_size=frame, grid_size=frame)
            lost = float((counts > 1).sum() / (counts > 0).sum())
        return TargetMask(lost=lost, empty=frozenset.intersection(*map(self._empty, targets)))

    def _parts(self, target: InstanceRecord) -> list[Any]:
        if target.ann_id not in self.parts:
            frame = self._frame(target)
            self.parts[target.ann_id] = (
                [{"size": list(frame), "counts": target.segmentation.counts}]
                if isinstance(target.segmentation, Rle)
                else _draw(target.segmentation, frame, frame)
            )
        return self.parts[target.ann_id]

    def _empty(self, target: InstanceRecord) -> frozenset[int]:
        if target.ann_id not in self.empty:
            frame = self._frame(target)
            self.empty[target.ann_id] = frozenset(
                side for side in _SQUARES if _is_empty(target.segmentation, frame, side)
            )
        return self.empty[target.ann_id]

    def _frame(self, target: InstanceRecord) -> tuple[int, int]:
        image = self.dataset.images[target.image_id]
        return image.height, image.width


def _is_empty(segmentation: Segmentation, frame_size: tuple[int, int], side: int) -> bool:
    """Whether no pixel is left on a squashed square grid."""
    if isinstance(segmentation, Rle):
        # Enlarging takes every frame pixel at least once, and a loaded mask has some foreground.
        is_enlarged = side >= max(frame_size)
        return not (
            is_enlarged or rasterise(segmentation, frame_size=frame_size, grid_size=(side, side)).any()
        )
    return not sum(map(coco_mask.area, _draw(segmentation, frame_size, (side, side))))


def _draw(polygons: Polygons, frame_size: tuple[int, int], grid_size: tuple[int, int]) -> list[Any]:
    """Draw each polygon by itself: pycocotools' run-length masks of the grid."""
    if not polygons:
        return []
    scale = np.array([grid_size[1] / frame_size[1], grid_size[0] / frame_size[0]])
    scaled = [(np.asarray(part).reshape(-1, 2) * scale).ravel().tolist() for part in polygons]
    drawn: list[Any] = coco_mask.frPyObjects(scaled, *grid_size)
    return drawn

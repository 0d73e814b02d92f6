"""Evaluation: a mask for every expression, counted in the original frame, scored by a rule set."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import numpy.typing as npt
import torch
from tqdm import tqdm

from ris_cache.ahead import map_ahead
from ris_cache.datasets.records import InstanceRecord
from ris_cache.datasets.segmentation import union_mask
from ris_train.data.batch import BatchBuilder, CategorySource
from ris_train.data.samples import Sample
from ris_train.frames import to_original_frame
from ris_train.model.segmenter import RisModel
from ris_train.scoring import RULES, Counts, Scores, collect, count_pixels

GRID = "original"
BINARISATION = "logit > 0"


@dataclass(frozen=True, slots=True, kw_only=True)
class EvaluationResult:
    """Scores of one split, with what they mean.

    Attributes:
        split: `dataset.split_by:split`.
        rules: name of the rule set.
        category_source: which category the model was given.
        expressions: `own`, or `shuffled` among the samples of each image.
        quarantined: expressions that could not be scored, since their image was unreadable at extraction.
        degenerate: expressions whose annotation encloses nothing; they are scored, with an empty truth.
    """

    split: str
    scores: Scores
    rules: str
    category_source: CategorySource
    expressions: str
    quarantined: int
    degenerate: int

    def as_dict(self) -> dict[str, object]:
        """Plain values for JSON; scores are fractions."""
        return {
            "split": self.split,
            "grid": GRID,
            "binarisation": BINARISATION,
            "rules": self.rules,
            "category_source": self.category_source,
            "expressions": self.expressions,
            "num_samples": self.scores.num_samples,
            "quarantined": self.quarantined,
            "degenerate": self.degenerate,
            "oIoU": self.scores.overall_iou,
            "mIoU": self.scores.mean_iou,
            **{f"Pr@{threshold}": share for threshold, share in self.scores.precision.items()},
        }


class GroundTruth:
    """Masks in the original frame, from the cache's tables.

    Args:
        instances: by ann_id.
        sizes: (H, W) of each image, by image_id.
    """

    def __init__(self, instances: Mapping[int, InstanceRecord], sizes: Mapping[int, tuple[int, int]]) -> None:
        self._instances = instances
        self._sizes = sizes
        # The expressions of a ref follow one another, so a few masks remembered serve nearly all.
        self._mask = lru_cache(maxsize=64)(self._rasterise)

    def of(self, sample: Sample) -> npt.NDArray[np.bool_]:
        """Union of the sample's targets: bool[H, W]."""
        return self._mask(sample.image_id, sample.ann_ids)

    def size(self, sample: Sample) -> tuple[int, int]:
        """(H, W) of the sample's image."""
        return self._sizes[sample.image_id]

    def _rasterise(self, image_id: int, ann_ids: tuple[int, ...]) -> npt.NDArray[np.bool_]:
        size = self._sizes[image_id]
        segmentations = [self._instances[ann_id].segmentation for ann_id in ann_ids]
        return union_mask(segmentations, frame_size=size, grid_size=size)


@torch.no_grad()
def count_samples(
    model: RisModel,
    samples: Sequence[Sample],
    builder: BatchBuilder,
    truth: GroundTruth,
    *,
    batch_size: int,
    show_progress: bool = False,
) -> Counts:
    """Predict every sample and count its pixels in the original frame.

    Args:
        model: put into evaluation mode meanwhile, and back after.
        samples: any samples of one table.
        builder: makes their batches.
        truth: their annotated masks.
        batch_size: samples per forward pass; changes nothing but speed and memory.
        show_progress: whether to draw a bar on stderr.
    """
    was_training = model.training
    model.eval()
    rows = []
    try:
        chunks = _chunks(samples, batch_size)
        batches = map_ahead(builder.evaluation_batch, chunks, workers=1, depth=2)
        with tqdm(
            total=len(samples), unit="expr", desc="evaluate", leave=False, disable=not show_progress
        ) as bar:
            for batch in batches:
                mask_logits = model(batch.inputs, with_dfam=False).mask_logits
                for sample, logits in zip(batch.samples, mask_logits, strict=True):
                    prediction = to_original_frame(logits, truth.size(sample)).cpu().numpy()
                    rows.append(count_pixels(prediction, truth.of(sample), is_no_target=not sample.ann_ids))
                bar.update(len(batch.samples))
    finally:
        model.train(was_training)
    return collect(rows)


def score(counts: Counts, rules: str = "ris") -> Scores:
    """Apply a rule set by name."""
    return RULES[rules](counts)


def _chunks(samples: Sequence[Sample], size: int) -> Iterator[Sequence[Sample]]:
    for start in range(0, len(samples), size):
        yield samples[start : start + size]

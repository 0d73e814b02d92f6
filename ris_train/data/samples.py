"""Samples: one expression with its image and targets, selected from a cache's tables."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from ris_cache.datasets.selection import Selection, matching_splits
from ris_cache.errors import CacheMissError
from ris_cache.store.cache import FeatureCache


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """One expression, the unit of training and of evaluation.

    Attributes:
        table_name: `dataset.split_by`, whose instances `ann_ids` are.
        text: the expression as the model reads it.
        ann_ids: target instances; empty if the expression refers to nothing.
        category_id: annotated category of the first target, raw COCO id; −1 without one.
        clip_category_id: the category that CLIP-T finds nearest to the expression.
        is_degenerate: targets exist, but their polygons enclose nothing.
    """

    table_name: str
    split: str
    ref_id: int
    sent_id: int
    image_id: int
    text: str
    ann_ids: tuple[int, ...]
    category_id: int
    clip_category_id: int
    is_degenerate: bool

    @property
    def is_no_target(self) -> bool:
        """Whether the expression is annotated as referring to nothing."""
        return not self.ann_ids


_STORED_AS_IS = (
    "split",
    "ref_id",
    "sent_id",
    "image_id",
    "ann_ids",
    "category_id",
    "clip_category_id",
    "is_degenerate",
)
"""Columns that a sample takes over under their own names."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SampleSet:
    """The samples of one selection, in the order of the dataset's file.

    Attributes:
        table_name: `dataset.split_by`, that of every sample.
        quarantined: expressions left out because their image could not be read at extraction.
    """

    table_name: str
    samples: tuple[Sample, ...]
    quarantined: int


def load_samples(cache: FeatureCache, selection: Selection, *, text: str) -> SampleSet:
    """Select samples from the cache's tables.

    Args:
        cache: the cache.
        selection: one dataset and, if it names one, one split.
        text: `raw` or `sent`.

    Raises:
        CacheMissError: the dataset or split was not extracted into this cache.
    """
    entry = cache.manifest.datasets.get(selection.table_name)
    if entry is None:
        raise CacheMissError(
            f"{cache.root} holds no expressions of {selection.table_name}; it holds "
            f"{', '.join(cache.manifest.datasets) or 'none'}. Add them: `ris extract --split "
            f"{selection.dataset}/{selection.split_by} --cache {cache.root}`, or use "
            "what is there, in training by --set data.train=… --set data.val=….",
            table_name=selection.table_name,
        )
    splits = (
        tuple(entry.splits)
        if selection.split is None
        else matching_splits(selection.split, entry.splits, selection.dataset)
    )
    if not splits:
        raise CacheMissError(
            f"{cache.root} holds no split {selection.split!r} of {selection.table_name}; it holds "
            f"{', '.join(entry.splits)}. Add it: `ris extract --split "
            f"{selection.dataset}/{selection.split_by}:{selection.split} --cache {cache.root}`.",
            split=selection.split,
            known=tuple(entry.splits),
        )
    quarantined = cache.quarantined
    columns = cache.expression_columns(
        selection.table_name, ("raw" if text == "raw" else "sent", *_STORED_AS_IS), splits=splits
    )
    samples = tuple(
        Sample(
            table_name=selection.table_name, text=expression, **dict(zip(_STORED_AS_IS, values, strict=True))
        )
        for expression, *values in zip(*columns, strict=True)
        if values[_STORED_AS_IS.index("image_id")] not in quarantined
    )
    return SampleSet(
        table_name=selection.table_name, samples=samples, quarantined=len(columns[0]) - len(samples)
    )


def shuffle_expressions(samples: tuple[Sample, ...], *, seed: int) -> tuple[Sample, ...]:
    """Permute expressions among the samples of the same image; targets and annotated categories stay.

    What the text alone decides, this destroys: the fall of a score shows how much the model listens.

    Args:
        samples: any samples; the order is kept.
        seed: of the permutation.
    """
    generator = np.random.default_rng(seed)
    by_image: dict[int, list[int]] = {}
    for index, sample in enumerate(samples):
        by_image.setdefault(sample.image_id, []).append(index)
    shuffled = list(samples)
    for indices in by_image.values():
        for target, source in zip(indices, generator.permutation(indices), strict=True):
            shuffled[target] = replace(
                samples[target],
                text=samples[source].text,
                clip_category_id=samples[source].clip_category_id,
            )
    return tuple(shuffled)

"""What a check found, as plain values."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from ris_cache.datasets.leakage import Leak
from ris_cache.datasets.published import Difference, Figure, Quantity
from ris_cache.errors import DataError


@dataclass(frozen=True, slots=True, kw_only=True)
class ImageFindings:
    """The image files of one dataset, as their headers describe them; no pixel is decoded.

    Attributes:
        num_images: that were looked for.
        missing: how many of them no folder has.
        missing_examples: names of some.
        searched: folders where they should lie, with whether each exists; empty if none is missing.
        other_size: images of another height or width than annotated.
        other_size_examples: what is annotated and what was found, of some.
        unreadable: files that are no image by their header.
        unreadable_examples: the reason, of some.
    """

    num_images: int
    missing: int
    missing_examples: tuple[str, ...]
    searched: Mapping[str, bool]
    other_size: int
    other_size_examples: tuple[str, ...]
    unreadable: int
    unreadable_examples: tuple[str, ...]

    @property
    def num_unusable(self) -> int:
        """Images that an extraction could not take."""
        return self.missing + self.other_size + self.unreadable


@dataclass(frozen=True, slots=True, kw_only=True)
class WordFindings:
    """Sentences of one split that are odd as text.

    Attributes:
        blank: without a visible character, as typed or cleaned.
        repeated: whose image, words and targets an earlier one has.
        contradictory: whose image and words another one has, but with other targets.
    """

    blank: int
    repeated: int
    contradictory: int


@dataclass(frozen=True, slots=True, kw_only=True)
class MaskFindings:
    """Sentences of one split whose targets are odd as masks.

    Attributes:
        degenerate: none of the targets' polygons encloses anything.
        crowd: a target is a crowd.
        overlapping: parts of the targets overlap in the original frame, so that taking only pixels under
            exactly one part gives another mask than the union.
        lost: mean share of the union's pixels that lie under several parts, over the overlapping; 0 if none.
        empty_1024: targets, not degenerate, without a pixel once drawn on the squashed 1024 × 1024 grid.
        empty_480: the same at 480 × 480.
    """

    degenerate: int
    crowd: int
    overlapping: int
    lost: float
    empty_1024: int
    empty_480: int


@dataclass(frozen=True, slots=True, kw_only=True)
class DroppedParts:
    """Polygons of the annotations that are referred to, as `instances.json` has them.

    Attributes:
        annotations: that are referred to.
        affected: annotations of which a polygon was dropped.
        parts: polygons dropped, for an odd number of coordinates or fewer than three points.
    """

    annotations: int
    affected: int
    parts: int


@dataclass(frozen=True, slots=True, kw_only=True)
class DatasetReport:
    """What was found of one dataset.

    Attributes:
        table_name: `dataset.split_by`.
        splits: that were looked at.
        missing_splits: that the published dataset has and the file has not.
        counts: by split, and by the groups that published numbers exist for.
        differences: from the published numbers.
        masks: by split; empty if masks were not drawn.
        dropped: None if masks were not drawn, and for a custom dataset.
        seen: what the files turned out to hold where their documentation is unsure, by what it is.
        warnings: of the loader.
    """

    table_name: str
    splits: tuple[str, ...]
    missing_splits: tuple[str, ...]
    counts: Mapping[str, Mapping[Quantity, int]]
    differences: tuple[Difference, ...]
    images: ImageFindings
    words: Mapping[str, WordFindings]
    masks: Mapping[str, MaskFindings]
    dropped: DroppedParts | None
    seen: Mapping[str, Any]
    warnings: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Failure:
    """A dataset that could not be checked."""

    table_name: str
    error: str
    exit_code: int


@dataclass(frozen=True, slots=True, kw_only=True)
class MergeReport:
    """Several datasets merged.

    Attributes:
        figures: by name; images and sentences.
        published: what they are said to be, for the names known; empty for other merges.
    """

    tables: tuple[str, ...]
    figures: Mapping[str, int]
    published: Mapping[str, Figure]


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckReport:
    """What was found below one data root.

    Attributes:
        leaks: every pair of a training split and a split for validation or testing.
    """

    data_root: str
    datasets: tuple[DatasetReport, ...]
    failures: tuple[Failure, ...]
    leaks: tuple[Leak, ...]
    merges: tuple[MergeReport, ...]

    @property
    def exit_code(self) -> int:
        """0 if everything can be used; else that of the gravest failure."""
        unusable = any(dataset.images.num_unusable for dataset in self.datasets)
        codes = [failure.exit_code for failure in self.failures] + [DataError.exit_code] * unusable
        return max(codes, default=0)

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {**asdict(self), "exit_code": self.exit_code}

"""Images that one split trains on and another is evaluated on.

RefCOCO, RefCOCO+, RefCOCOg, gRefCOCO and Ref-ZOM draw on one pool of images, and each cuts it into splits of
its own. Images are compared by image_id. Nothing here reads a file.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final, Literal

from ris_cache.datasets.records import ExpressionRecord

Role = Literal["test", "val", "train"]
"""What a split is for."""

ROLES: Final[tuple[Role, ...]] = ("test", "val", "train")
"""An image of several splits belongs to the first of these that one of them is for."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SplitImages:
    """The images of one split.

    Attributes:
        sentences: how many expressions of the split each image has, by image_id; at least one.
    """

    table_name: str
    split: str
    sentences: Mapping[int, int]

    @property
    def name(self) -> str:
        """`dataset.split_by:split`."""
        return f"{self.table_name}:{self.split}"

    @property
    def role(self) -> Role:
        """What it is for: `train` and `val` are called so, every other split is for testing."""
        if self.split == "train":
            return "train"
        return "val" if self.split == "val" else "test"


@dataclass(frozen=True, slots=True, kw_only=True)
class Leak:
    """What a training split has in common with one split of somebody's evaluation.

    Attributes:
        images: that both hold.
        sentences: expressions of the training split on these images.
    """

    train: str
    evaluation: str
    images: int
    sentences: int


@dataclass(frozen=True, slots=True, kw_only=True)
class MergedSets:
    """What becomes of several datasets when their training splits are merged.

    Attributes:
        tables: the datasets, `dataset.split_by`.
        images: by role; each image once, by the priority of `ROLES`.
        sentences: of all splits together, by the role of their image.
        train_sentences: of the training splits one after another, as they are.
        leaking_sentences: those of them on an image of some val or test split.
    """

    tables: tuple[str, ...]
    images: Mapping[Role, int]
    sentences: Mapping[Role, int]
    train_sentences: int
    leaking_sentences: int

    @property
    def figures(self) -> dict[str, int]:
        """These numbers by the names that the published ones have (`published.MERGE`)."""
        return {
            "sentences": sum(self.sentences.values()),
            "images of a test split": self.images["test"],
            "sentences on them": self.sentences["test"],
            "images of a val split alone": self.images["val"],
            "sentences on these": self.sentences["val"],
            "images of train splits alone": self.images["train"],
            "train sentences": self.train_sentences,
            "train sentences that leak": self.leaking_sentences,
            "train sentences that are clean": self.train_sentences - self.leaking_sentences,
        }


def leaking_images(
    train: Mapping[str, Collection[int]], evaluation: Mapping[str, Collection[int]]
) -> dict[str, dict[str, frozenset[int]]]:
    """Find the images that are trained on and evaluated on.

    Args:
        train: image_ids by any name of what is trained on.
        evaluation: image_ids by any name of what is validated or tested on.
    Returns:
        The image_ids of both, by name of `train`, then of `evaluation`. The first has every name, the second
        only those that share an image with it; names keep their order.
    """
    evaluated = {name: frozenset(image_ids) for name, image_ids in evaluation.items()}
    return {
        name: {other: shared for other, held in evaluated.items() if (shared := held.intersection(image_ids))}
        for name, image_ids in train.items()
    }


def split_images(table_name: str, expressions: Iterable[ExpressionRecord]) -> tuple[SplitImages, ...]:
    """Count the expressions of every image, split by split, in the order of first appearance."""
    counts: dict[str, Counter[int]] = {}
    for expression in expressions:
        counts.setdefault(expression.split, Counter())[expression.image_id] += 1
    return tuple(
        SplitImages(table_name=table_name, split=split, sentences=sentences)
        for split, sentences in counts.items()
    )


def find_leaks(splits: Sequence[SplitImages]) -> tuple[Leak, ...]:
    """Compare every training split with every split of the others' and its own evaluation.

    Returns:
        One entry for each such pair, those that share nothing included.
    """
    train = [split for split in splits if split.role == "train"]
    evaluation = [split for split in splits if split.role != "train"]
    shared = leaking_images(
        {split.name: split.sentences.keys() for split in train},
        {split.name: split.sentences.keys() for split in evaluation},
    )
    nothing: frozenset[int] = frozenset()
    return tuple(
        Leak(
            train=one.name,
            evaluation=other.name,
            images=len(common := shared[one.name].get(other.name, nothing)),
            sentences=sum(one.sentences[image_id] for image_id in common),
        )
        for one in train
        for other in evaluation
    )


def merge(splits: Sequence[SplitImages]) -> MergedSets:
    """Merge datasets on paper: whose image is whose, and how many training sentences leak."""
    held = images_of(splits)
    role_of = {image_id: role for role in reversed(ROLES) for image_id in held[role]}
    sentences: Counter[Role] = Counter()
    leaking = train = 0
    for split in splits:
        for image_id, count in split.sentences.items():
            sentences[role_of[image_id]] += count
            if split.role == "train":
                train += count
                leaking += count * (role_of[image_id] != "train")
    return MergedSets(
        tables=tuple(dict.fromkeys(split.table_name for split in splits)),
        images={role: sum(one == role for one in role_of.values()) for role in ROLES},
        sentences={role: sentences[role] for role in ROLES},
        train_sentences=train,
        leaking_sentences=leaking,
    )


def evaluated_by_both(first: Sequence[SplitImages], second: Sequence[SplitImages]) -> dict[str, int]:
    """Count the images that both sides test on, and that both validate or test on; named as in `figures`."""
    one, other = images_of(first), images_of(second)
    evaluated = (one["val"] | one["test"]) & (other["val"] | other["test"])
    return {
        "images that both test on": len(one["test"] & other["test"]),
        "images that both validate or test on": len(evaluated),
    }


def images_of(splits: Iterable[SplitImages]) -> dict[Role, set[int]]:
    """Collect the image_ids of the splits by what these are for."""
    held: dict[Role, set[int]] = {role: set() for role in ROLES}
    for split in splits:
        held[split.role].update(split.sentences)
    return held

"""The layouts that a drawn dataset can be written in: which images, which files, which expressions.

RefCOCO, RefCOCO+ and gRefCOCO share their images and their partition, as the real ones do. RefCOCOg has the
same pool of images in another partition, so images leak: many of its val and test are in RefCOCO's train,
and the other way round. Its google file splits objects, not images, so there one image is in both splits.
Ref-ZOM and the custom dataset have images of their own.
"""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import numpy as np

from ris_cache.datasets.shapes.compose import KIND_WEIGHTS, POOLS, REFERABLE_SHAPES, ComposedImage, refer
from ris_cache.datasets.shapes.detailed import detailed_refs
from ris_cache.datasets.shapes.mixture import (
    GREFCOCO_SHARES,
    PLAIN_SHARES,
    Ref,
    Shares,
    mixed_refs,
    single_refs,
)
from ris_cache.datasets.shapes.rows import (
    Place,
    RefFacts,
    RefForm,
    Row,
    SplitCounts,
    annotation_rows,
    count_splits,
    grefcoco_row,
    image_row,
    instances_document,
    ref_zom_row,
    refer_row,
)
from ris_cache.errors import DataError

Speak = Callable[[np.random.Generator, ComposedImage, str], tuple[Ref, ...]]
"""(random stream, image, split) → what a layout says of the image; empty leaves the image out."""

SplitOf = Callable[[Place], str]
"""Place of an image in its pool → split of the layout."""

_PICKLE_PROTOCOL = 2
_GOOGLE_VAL = 0.1


@dataclass(frozen=True, slots=True, kw_only=True)
class ShapesSummary:
    """What was written of one refs file.

    Attributes:
        layout: name of the dataset.
        split_by: who is said to have made the splits; for the custom dataset, its name.
        instances_path: None for the custom dataset, which has no such file.
        images_dir: where the images lie, all or most of them.
        splits: counts by split, only splits with images.
    """

    layout: str
    split_by: str
    refs_path: Path
    instances_path: Path | None
    images_dir: Path
    splits: dict[str, SplitCounts]


class LayoutWriter(Protocol):
    """One layout that is being written. Annotation files come at the end, after every image."""

    @property
    def pool(self) -> str:
        """The pool whose images it takes."""
        ...

    @property
    def annotation_paths(self) -> tuple[Path, ...]:
        """The files whose presence means that the dataset is there."""
        ...

    def add(self, composed: ComposedImage, jpeg: bytes, place: Place) -> None:
        """Take the next image of the pool; may leave it out."""
        ...

    def finish(self) -> tuple[ShapesSummary, ...]:
        """Write the annotation files."""
        ...


def split_by_place(place: Place) -> str:
    """The pool's own split."""
    return place.split


def say_single(rng: np.random.Generator, composed: ComposedImage, split: str) -> tuple[Ref, ...]:
    """RefCOCO: what the image was drawn with."""
    return single_refs(composed)


def say_without_places(rng: np.random.Generator, composed: ComposedImage, split: str) -> tuple[Ref, ...]:
    """RefCOCO+: other sentences about the same scene, without words of location."""
    scene = composed.drawing.scene
    refs = refer(rng, scene, REFERABLE_SHAPES[split], KIND_WEIGHTS["refcoco+"])
    return single_refs(ComposedImage(drawing=composed.drawing, picture=composed.picture, refs=refs))


def say_at_length(rng: np.random.Generator, composed: ComposedImage, split: str) -> tuple[Ref, ...]:
    """RefCOCOg: long sentences about any object."""
    return detailed_refs(rng, composed.drawing.scene)


def mixing(shares: Mapping[str, Shares]) -> Speak:
    """Sentences of no, one and many targets, by the shares of each split."""

    def say(rng: np.random.Generator, composed: ComposedImage, split: str) -> tuple[Ref, ...]:
        return mixed_refs(rng, composed, shares.get(split, PLAIN_SHARES))

    return say


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """How one published dataset is written.

    Attributes:
        title: the dataset's name as its authors write it.
        pool: the pool whose images it takes.
        refs_name: name of the refs file; .json or .p.
        number: seeds the language; never 0, which is the pool's own.
        has_own_partition: the pool's images are dealt out anew, and a google file is written too.
    """

    title: str
    pool: str
    split_by: str
    refs_name: str
    number: int
    speak: Speak
    row: RefForm
    has_own_partition: bool = False


LAYOUTS: dict[str, Layout] = {
    "refcoco": Layout(
        title="RefCOCO",
        pool="refcoco",
        split_by="unc",
        refs_name="refs(unc).p",
        number=1,
        speak=say_single,
        row=refer_row,
    ),
    "refcoco+": Layout(
        title="RefCOCO+",
        pool="refcoco",
        split_by="unc",
        refs_name="refs(unc).p",
        number=2,
        speak=say_without_places,
        row=refer_row,
    ),
    "refcocog": Layout(
        title="RefCOCOg",
        pool="refcoco",
        split_by="umd",
        refs_name="refs(umd).p",
        number=3,
        speak=say_at_length,
        row=refer_row,
        has_own_partition=True,
    ),
    "grefcoco": Layout(
        title="gRefCOCO",
        pool="refcoco",
        split_by="unc",
        refs_name="grefs(unc).json",
        number=4,
        speak=mixing(GREFCOCO_SHARES),
        row=grefcoco_row,
    ),
    "ref-zom": Layout(
        title="Ref-ZOM",
        pool="ref-zom",
        split_by="final",
        refs_name="refs(final).p",
        number=5,
        speak=mixing({}),
        row=ref_zom_row,
    ),
}
"""Name → layout of a published dataset."""

CUSTOM = "custom"
LAYOUT_NAMES: tuple[str, ...] = (*LAYOUTS, CUSTOM)


@dataclass(slots=True, kw_only=True)
class CocoLayoutWriter:
    """Writes a dataset of refs over COCO's images: `<root>/<name>/` and `<root>/images/`.

    Attributes:
        split_of: which split an image of the pool belongs to.
    """

    root: Path
    name: str
    layout: Layout
    seed: int
    split_of: SplitOf = split_by_place
    _images: list[Row] = field(default_factory=list, init=False)
    _annotations: list[Row] = field(default_factory=list, init=False)
    _refs: list[Row] = field(default_factory=list, init=False)
    _num_sentences: int = field(default=0, init=False)

    @property
    def pool(self) -> str:
        """The pool whose images it takes."""
        return self.layout.pool

    @property
    def annotation_paths(self) -> tuple[Path, ...]:
        """The refs files and instances.json."""
        folder = self.root / self.name
        google = (folder / "refs(google).p",) if self.layout.has_own_partition else ()
        return (folder / self.layout.refs_name, *google, folder / "instances.json")

    def add(self, composed: ComposedImage, jpeg: bytes, place: Place) -> None:
        """Write the image and keep its rows; left out if nothing is said of it."""
        pool, split = tuple(POOLS).index(place.pool), POOLS[place.pool].index(place.split)
        rng = np.random.default_rng((self.seed, pool, split, place.index, self.layout.number))
        refs = self.layout.speak(rng, composed, place.split)
        if not refs:
            return
        put_image(self.root / "images" / place.folder / place.file_name, jpeg)
        self._images.append(image_row(composed, place))
        self._annotations.extend(annotation_rows(composed, place))
        for ref in refs:
            facts = RefFacts(
                ref=ref,
                composed=composed,
                place=place,
                split=self.split_of(place),
                ref_id=len(self._refs),
                first_sent_id=self._num_sentences,
            )
            self._refs.append(self.layout.row(facts))
            self._num_sentences += len(ref.sentences)

    def finish(self) -> tuple[ShapesSummary, ...]:
        """Write instances.json, then the refs."""
        instances = instances_document(self.layout.title, self._images, self._annotations, self.seed)
        *refs_paths, instances_path = self.annotation_paths
        write_whole(instances_path, json.dumps(instances).encode())
        written = [(self.layout.split_by, self._refs)]
        if self.layout.has_own_partition:
            written.append(("google", _split_by_object(self._refs, self.seed)))
        summaries = []
        for path, (split_by, rows) in zip(refs_paths, written, strict=True):
            is_json = path.suffix == ".json"
            content = json.dumps(rows).encode() if is_json else pickle.dumps(rows, protocol=_PICKLE_PROTOCOL)
            write_whole(path, content)
            summaries.append(
                ShapesSummary(
                    layout=self.name,
                    split_by=split_by,
                    refs_path=path,
                    instances_path=instances_path,
                    images_dir=self.root / "images" / "train2014",
                    splits=count_splits(rows, self._annotations),
                )
            )
        return tuple(summaries)


def deal_out(pool: str, num_images: Mapping[str, int], seed: int) -> SplitOf:
    """Deal a pool's images out into train, val and test by lot, as many of each as the pool's splits have."""
    places = [(split, index) for split in POOLS[pool] for index in range(num_images.get(split, 0))]
    num_val = num_images.get("val", 0)
    num_test = len(places) - num_images.get("train", 0) - num_val
    dealt = ["val"] * num_val + ["test"] * num_test + ["train"] * num_images.get("train", 0)
    order = np.random.default_rng((seed, tuple(POOLS).index(pool))).permutation(len(places))
    split_of = {places[place]: split for place, split in zip(order, dealt, strict=True)}
    return lambda place: split_of[place.split, place.index]


def write_whole(path: Path, content: bytes) -> None:
    """Write to a temporary name, then rename, so that the name never stands for half a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.partial")
    partial.write_bytes(content)
    partial.replace(path)


def put_image(path: Path, content: bytes) -> None:
    """Write an image, unless it is there already.

    Raises:
        DataError: another picture has that name; a dataset in this root would be left with wrong masks.
    """
    if not path.exists():
        write_whole(path, content)
    elif path.read_bytes() != content:
        raise DataError(
            f"{path} is another picture than the one to write: it was drawn with another seed, or by another "
            "version. Choose another directory, or remove that one's datasets.",
            path=path,
        )


def _split_by_object(refs: list[Row], seed: int) -> list[Row]:
    """RefCOCOg's google file: the same refs, a tenth of them drawn into val whatever image they are on."""
    num_val = max(1, round(_GOOGLE_VAL * len(refs)))
    held_out = set(np.random.default_rng((seed, len(refs))).permutation(len(refs))[:num_val].tolist())
    return [ref | {"split": "val" if position in held_out else "train"} for position, ref in enumerate(refs)]

"""Load a dataset of one's own, `<root>/custom/<name>.jsonl`: JSON Lines, one expression a line.

    {"image": "birds/1.jpg", "expression": "the red bird", "split": "train", "polygons": [[x0, y0, …], …]}

Pixels are given by one of `polygons` (parts of one object, in pixels of the image), `rle` (one object, COCO's
run-length form), `mask` (the path of an image file that is not zero on the object), or `targets`, a list of
objects with one of these each. With none of them, or an empty list, the expression refers to nothing.
Optional: `category` of the object, `ref_id`, `sent_id`, and `sent`, the cleaned text. Paths are relative to
`<root>/custom` and cannot leave it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from ris_cache.datasets.coco import COCO_CATEGORIES
from ris_cache.datasets.image_roots import ImageRoots
from ris_cache.datasets.json_lines import Line, StatedTarget, read_lines
from ris_cache.datasets.pictures import frame_size, read_mask
from ris_cache.datasets.records import (
    Category,
    ExpressionRecord,
    ImageRecord,
    InstanceRecord,
    ReferringDataset,
    Segmentation,
)
from ris_cache.datasets.refs import Tally, handle_degenerate
from ris_cache.datasets.segmentation import parse_segmentation, to_json
from ris_cache.datasets.selection import CUSTOM, require_free_name
from ris_cache.errors import DataError

NO_CATEGORY: Final = -1
"""The category_id of an object whose line names none."""


def load_custom(root: Path, name: str, *, drop_degenerate: bool = False) -> ReferringDataset:
    """Read and check one custom dataset.

    Ids of images and objects are digests of their names and outlines, beyond all of COCO's, and stay the
    same when lines are added. Lines with the same `ref_id` are one ref. Categories are the names used,
    sorted, with ids from 1; if no line names one, COCO's 80 are there to be predicted.

    Args:
        root: the data root, which holds the folder custom.
        name: of the file, without `.jsonl`.
        drop_degenerate: leave out the refs of which nothing can be drawn.
    Returns:
        All splits, in the order of refs' first lines.
    Raises:
        ConfigError: `name` is not made of letters, digits, `_` and `-`.
        DataError: the file, an image or a mask is missing, damaged or malformed, or lines contradict each
            other; the message names the line.
    """
    require_free_name("the name of a custom dataset", name)
    path = root / CUSTOM / f"{name}.jsonl"
    if not path.is_file():
        raise _missing(root, path)
    lines = list(read_lines(path))
    if not lines:
        raise DataError(f"{path} holds no expression. Write one JSON object a line.", path=path)
    namespace = f"{CUSTOM}/{name}"
    roots = ImageRoots(root)
    images = _images(lines, roots, namespace)
    objects = _Objects(roots=roots, namespace=namespace)
    targets = {line.number: objects.add(line, images[line.image]) for line in lines}
    instances = objects.instances()
    dataset = ReferringDataset(
        name=CUSTOM,
        split_by=name,
        images={image.image_id: image for image in images.values()},
        instances=instances,
        expressions=tuple(
            _expression(
                line, ref_id, position, images[line.image], [instances[i] for i in targets[line.number]]
            )
            for ref_id, of_ref in _in_refs(lines, targets).items()
            for position, line in enumerate(of_ref)
        ),
        categories=objects.categories(),
        warnings=_warnings(lines),
    )
    return handle_degenerate(dataset, drop=drop_degenerate)


def _missing(root: Path, path: Path) -> DataError:
    """Say that the file is missing, and recognise the usual accidents."""
    hints = []
    folder = path.parent
    for other in (root / path.name, folder / CUSTOM / path.name, folder / path.stem / path.name):
        if other.is_file():
            hints.append(f"It lies in {other.parent}; move it to {folder}.")
    if any((place / "__MACOSX").is_dir() for place in (root, folder)):
        hints.append("The folder __MACOSX holds only macOS's copies of file attributes; delete it.")
    present = tuple(sorted(other.stem for other in folder.glob("*.jsonl")))
    if present:
        hints.append(f"Present there: {', '.join(present)}.")
    if not hints:
        hints.append("Write one JSON object a line into it, or name another data root.")
    return DataError(f"{path} is missing. {' '.join(hints)}", path=path, present=present)


def _warnings(lines: Sequence[Line]) -> tuple[str, ...]:
    tally = Tally()
    for line in lines:
        if not line.raw.strip() or not line.sent.strip():
            tally.add("Blank sentences, kept", "line", line.number)
    return tally.warnings()


# Images.


def _images(lines: Sequence[Line], roots: ImageRoots, namespace: str) -> dict[str, ImageRecord]:
    """Return the images by their path as the lines give it."""
    first_lines: dict[str, Line] = {}
    for line in lines:
        first_lines.setdefault(line.image, line)
    for image, line in first_lines.items():
        _inside(roots, image, line, "image")
    paths = roots.find_all(f"{CUSTOM}/{image}" for image in first_lines)
    images: dict[str, ImageRecord] = {}
    known: dict[int, str] = {}
    for image, line in first_lines.items():
        image_id = _stable_id(f"{namespace}/{image}")
        if known.setdefault(image_id, image) != image:
            raise line.record.error(
                "image", f"gets the image_id {image_id} of {known[image_id]!r} too; rename one", found=image
            )
        try:
            height, width = frame_size(paths[f"{CUSTOM}/{image}"])
        except DataError as error:
            raise line.record.error("image", f"cannot be used: {error}", **error.facts) from error
        images[image] = ImageRecord(
            image_id=image_id,
            file_name=f"{CUSTOM}/{image}",
            height=height,
            width=width,
            namespace=namespace,
        )
    return images


def _inside(roots: ImageRoots, relative: str, line: Line, place: str) -> Path:
    try:
        return roots.custom_path(relative)
    except DataError as error:
        raise line.record.error(place, f"is no usable path: {error}", found=relative) from error


def _stable_id(name: str) -> int:
    """Return a positive int64 that depends on the name alone, with bit 62 set, so that it is no COCO id."""
    digest = int.from_bytes(hashlib.sha256(name.encode("utf-8")).digest()[:8], "big")
    return digest & (2**62 - 1) | 2**62


# Objects and categories.


@dataclass(slots=True)
class _Objects:
    """The objects of the lines, each once however many lines name it.

    Attributes:
        found: image and segmentation by ann_id.
        names: of their categories, with the line that said so.
        masks: that were read, by path and image.
    """

    roots: ImageRoots
    namespace: str
    found: dict[int, tuple[int, Segmentation]] = field(default_factory=dict)
    names: dict[int, tuple[str, int]] = field(default_factory=dict)
    masks: dict[tuple[str, int], Segmentation] = field(default_factory=dict)

    def add(self, line: Line, image: ImageRecord) -> tuple[int, ...]:
        """Return the ann_ids of a line's targets, each once."""
        try:
            return tuple(dict.fromkeys(self._add(line, target, image) for target in line.targets))
        except RecursionError as error:  # a value that parses, but is too deep to be shown or written
            raise line.record.error("targets", "nests too deeply") from error

    def _add(self, line: Line, target: StatedTarget, image: ImageRecord) -> int:
        try:
            segmentation = self._segmentation(line, target, image)
        except DataError as error:
            if "line" in error.facts:
                raise
            raise line.record.error(target.place, f"is malformed: {error}", **error.facts) from error
        # Objects of which nothing can be drawn differ by what the line says.
        content = to_json(segmentation) if segmentation else json.dumps(target.value, sort_keys=True)
        ann_id = _stable_id(f"{self.namespace}/{line.image}\n{content}")
        known = self.found.setdefault(ann_id, (image.image_id, segmentation))
        if known != (image.image_id, segmentation):
            raise line.record.error(target.place, f"gets the ann_id {ann_id} of another object")
        if target.category is not None:
            name, number = self.names.setdefault(ann_id, (target.category, line.number))
            if name != target.category:
                raise line.record.error(
                    "category",
                    f"is {target.category!r:.80}, but the same object is {name!r:.80} in line {number}",
                    expected=name,
                    found=target.category,
                )
        return ann_id

    def _segmentation(self, line: Line, target: StatedTarget, image: ImageRecord) -> Segmentation:
        size = (image.height, image.width)
        if target.shape != "mask":
            if target.shape == "polygons" and any(isinstance(part, dict) for part in target.value):
                raise line.record.error(target.place, "holds an object; give run-length masks as `rle`")
            return parse_segmentation(target.value, size)
        key = (target.value, image.image_id)
        if key not in self.masks:
            self.masks[key] = read_mask(_inside(self.roots, target.value, line, target.place), size)
        return self.masks[key]

    def categories(self) -> tuple[Category, ...]:
        """Return the names used, or COCO's if none is."""
        names = sorted({name for name, _ in self.names.values()})
        if not names:
            return COCO_CATEGORIES
        return tuple(
            Category(category_id=category_id, name=name) for category_id, name in enumerate(names, start=1)
        )

    def instances(self) -> dict[int, InstanceRecord]:
        """Return the objects by ann_id, in the order of the lines."""
        by_name = {category.name: category.category_id for category in self.categories()}
        return {
            ann_id: InstanceRecord(
                ann_id=ann_id,
                image_id=image_id,
                category_id=by_name[self.names[ann_id][0]] if ann_id in self.names else NO_CATEGORY,
                segmentation=segmentation,
                is_crowd=False,
            )
            for ann_id, (image_id, segmentation) in self.found.items()
        }


# Refs and expressions.


def _in_refs(lines: Sequence[Line], targets: Mapping[int, tuple[int, ...]]) -> dict[int, list[Line]]:
    """Return the lines of each ref, refs in the order of their first lines."""
    for name in ("ref_id", "sent_id"):
        have = [getattr(line, name) is not None for line in lines]
        if any(have) and not all(have):
            raise lines[have.index(False)].record.error(name, "is missing, but other lines have one; add it")
    sent_ids: dict[int, int] = {}
    refs: dict[int, list[Line]] = {}
    for line in lines:
        if line.sent_id is not None and sent_ids.setdefault(line.sent_id, line.number) != line.number:
            raise line.record.error(
                "sent_id", f"{line.sent_id} occurs in line {sent_ids[line.sent_id]} too", found=line.sent_id
            )
        ref = refs.setdefault(line.number if line.ref_id is None else line.ref_id, [])
        ref.append(line)
        first = ref[0]
        for what, one, other in (
            ("image", first.image, line.image),
            ("split", first.split, line.split),
            ("ref_id", targets[first.number], targets[line.number]),
        ):
            if one != other:
                problem = "has other targets than" if what == "ref_id" else "differs from that of"
                raise line.record.error(
                    what, f"{problem} line {first.number}, which has the same ref_id {line.ref_id}"
                )
    return refs


def _expression(
    line: Line, ref_id: int, position: int, image: ImageRecord, targets: Sequence[InstanceRecord]
) -> ExpressionRecord:
    category_ids = tuple(target.category_id for target in targets)
    return ExpressionRecord(
        split=line.split,
        ref_id=ref_id,
        sent_id=line.number if line.sent_id is None else line.sent_id,
        sent_index=position,
        image_id=image.image_id,
        raw=line.raw,
        sent=line.sent,
        ann_ids=tuple(target.ann_id for target in targets),
        category_ids=category_ids if set(category_ids) != {NO_CATEGORY} else (),
        is_degenerate=bool(targets) and not any(target.segmentation for target in targets),
    )

"""What the loaders of published datasets share: finding the files, and turning refs into expressions.

A published dataset is a file of refs beside `instances.json`. A ref is a dict with `ref_id`, `image_id`,
`split`, `sentences`, and its targets in a form of each dataset's own, which the caller reads. What
contradicts itself is an error; what is odd but clear becomes a warning with a count. A ref's own `file_name`
is never read: it carries an object suffix and names no image.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Final

from ris_cache.datasets import safe_pickle
from ris_cache.datasets.coco import CocoInstances, read_instances
from ris_cache.datasets.fields import Record, described, index_records, is_storable, read_json, shown
from ris_cache.datasets.records import ExpressionRecord, InstanceRecord, ReferringDataset
from ris_cache.datasets.selection import REFER_SPLITS, SPLIT_NAMES, matching_splits
from ris_cache.errors import DataError

_REFS_NAME: Final = re.compile(r"g?refs\((.*)\)\.(?:p|json)")


@dataclass(slots=True)
class Tally:
    """What was odd but usable: by what it is, the kind of id that it is counted by, and these ids."""

    odd: dict[tuple[str, str], list[int | str]] = field(default_factory=dict)

    def add(self, what: str, id_fact: str, identity: int | str) -> None:
        """Note one more case of something."""
        self.odd.setdefault((what, id_fact), []).append(identity)

    def warnings(self) -> tuple[str, ...]:
        """Return one sentence for each kind of thing noted, in the order of their first cases."""
        return tuple(
            f"{what}: {len(ids)} (first {id_fact}: {ids[0]})." for (what, id_fact), ids in self.odd.items()
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class StatedTargets:
    """What a ref says of its targets.

    Attributes:
        ann_ids: none for an expression that refers to nothing.
        category_ids: that the ref states beside; None if it states none.
    """

    ann_ids: tuple[int, ...]
    category_ids: frozenset[int] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """Where a dataset's files may lie; of several, the first that is there is read.

    Attributes:
        folders: below the data root.
        refs_names: of the file of refs, within a folder.
        remedy: what to do if nothing is there; `{folder}` stands for the first folder, `{root}` for the root.
    """

    folders: tuple[str, ...]
    refs_names: tuple[str, ...]
    remedy: str


def load_published(
    root: Path,
    layout: Layout,
    read_targets: Callable[[Record, Tally], StatedTargets],
    *,
    name: str,
    split_by: str,
    drop_degenerate: bool,
) -> ReferringDataset:
    """Read and check one dataset.

    Args:
        root: the folder that holds the dataset folders.
        read_targets: reads the targets of a ref; it may note what is odd.
        drop_degenerate: leave out the refs of which nothing can be drawn, as ReLA and DFAM do.
    Returns:
        All splits. Images are those that some expression refers to, with every instance on them. A ref whose
        targets' polygons enclose nothing stays, flagged `is_degenerate`, unless it is dropped.
    Raises:
        DataError: a file is missing, damaged, malformed or contradicts itself; the message names the ref,
            annotation or image, and the field.
        UnsafePickleError: a pickle asks for more than plain values.
    """
    refs_path, instances_path = _find_files(root, layout)
    tally = Tally()
    try:
        refs = _read_refs(refs_path)
        coco = read_instances(instances_path, {ref.get("image_id", int) for ref in refs.values()})
        expressions = tuple(_expressions(refs.values(), coco, read_targets, tally))
    except RecursionError as error:  # a value that parses, but is too deep to be shown or compared
        raise DataError(
            f"{refs_path} or {instances_path} nests values deeper than any such file does. Download them "
            "again from a source you trust.",
            path=refs_path,
        ) from error
    dataset = ReferringDataset(
        name=name,
        split_by=split_by,
        images=coco.images,
        instances=coco.instances,
        expressions=expressions,
        categories=coco.categories,
        warnings=(*tally.warnings(), *_unselectable_splits(name, expressions)),
    )
    return handle_degenerate(dataset, drop=drop_degenerate)


def handle_degenerate(dataset: ReferringDataset, *, drop: bool) -> ReferringDataset:
    """Count the refs of which nothing can be drawn in a warning, and drop them if asked to."""
    refs = tuple(dict.fromkeys(e.ref_id for e in dataset.expressions if e.is_degenerate))
    if not refs:
        return dataset
    fate = "left out" if drop else "kept as empty masks"
    warning = f"Refs without a polygon that encloses anything, {fate}: {len(refs)} (first ref_id: {refs[0]})."
    dataset = replace(dataset, warnings=(*dataset.warnings, warning))
    if not drop:
        return dataset
    kept = tuple(expression for expression in dataset.expressions if not expression.is_degenerate)
    image_ids = {expression.image_id for expression in kept}
    return replace(
        dataset,
        expressions=kept,
        images={image_id: image for image_id, image in dataset.images.items() if image_id in image_ids},
        instances={ann_id: i for ann_id, i in dataset.instances.items() if i.image_id in image_ids},
    )


# Files.


def _find_files(root: Path, layout: Layout) -> tuple[Path, Path]:
    """Return the paths of the refs and of the instances."""
    candidates = [root / folder / name for folder in layout.folders for name in layout.refs_names]
    refs_path = next((path for path in candidates if path.is_file()), None)
    if refs_path is None:
        present_folder = next((root / f for f in layout.folders if (root / f).is_dir()), candidates[0].parent)
        raise _missing(root, present_folder, layout, layout.refs_names)
    instances_path = refs_path.parent / "instances.json"
    if not instances_path.is_file():
        raise _missing(root, refs_path.parent, layout, ("instances.json",))
    return refs_path, instances_path


def _missing(root: Path, folder: Path, layout: Layout, names: tuple[str, ...]) -> DataError:
    """Say which file is missing, and recognise the usual accidents of unpacking."""
    hints = []
    for name in names:
        if (folder / folder.name / name).is_file():
            hints.append(
                f"It lies one folder too deep, in {folder / folder.name}; move that folder's files up."
            )
        if (root / name).is_file():
            hints.append(
                f"It lies in {root} itself; the data root must be the folder that holds {folder.name}/."
            )
    if any((place / "__MACOSX").is_dir() for place in (root, folder)):
        hints.append("The folder __MACOSX holds only macOS's copies of file attributes; delete it.")
    others = folder.iterdir() if folder.is_dir() else ()
    present = tuple(sorted({found[1] for other in others if (found := _REFS_NAME.fullmatch(other.name))}))
    if present and names is layout.refs_names:
        hints.append(f"The split_by present there: {', '.join(present)}.")
    if not hints:
        hints.append(layout.remedy.format(root=root, folder=root / layout.folders[0]))
    alternatives = f" (or {', '.join(names[1:])})" if len(names) > 1 else ""
    path = folder / names[0]
    return DataError(
        f"{path}{alternatives} is missing. {' '.join(hints)}", path=path, present=present, names=names
    )


def _read_refs(path: Path) -> dict[int, Record]:
    """Index the refs by ref_id, in file order."""
    content = read_json(path) if path.suffix == ".json" else safe_pickle.load(path)
    if not isinstance(content, list) or not content:
        raise DataError(
            f"{path} should hold a list of refs, not {described(content)}. Download it again.",
            path=path,
            found=type(content).__name__,
        )
    return index_records(content, path, "ref_id", "ref_id")


# Refs to expressions.


def _unselectable_splits(name: str, expressions: tuple[ExpressionRecord, ...]) -> Iterator[str]:
    """Warn of labels that no split name asks for, whose expressions only the whole dataset has."""
    known = SPLIT_NAMES.get(name, REFER_SPLITS)
    for label, number in Counter(expression.split for expression in expressions).items():
        if not any(matching_splits(split, (label,), name) for split in known):
            yield f"Expressions of split {shown(label)}, which none of {', '.join(known)} selects: {number}."


def _expressions(
    refs: Iterable[Record],
    coco: CocoInstances,
    read_targets: Callable[[Record, Tally], StatedTargets],
    tally: Tally,
) -> Iterator[ExpressionRecord]:
    ref_of_sentence: dict[int, int] = {}
    for ref in refs:
        ref_id, image_id, split = ref.get("ref_id", int), ref.get("image_id", int), ref.get("split", str)
        if image_id not in coco.images:
            raise ref.error("image_id", f"is {image_id}, which instances.json lacks", found=image_id)
        targets = _targets(ref, image_id, read_targets(ref, tally), coco.instances, tally)
        ann_ids = tuple(target.ann_id for target in targets)
        category_ids = tuple(target.category_id for target in targets)
        is_degenerate = bool(targets) and not any(target.segmentation for target in targets)
        sentences = _sentences(ref)
        if ref.fields.get("sent_ids") != [sent_id for sent_id, _, _ in sentences]:
            tally.add("Refs whose sent_ids are not their sentences', which are used", "ref_id", ref_id)
        for sent_index, (sent_id, raw, sent) in enumerate(sentences):
            other_ref = ref_of_sentence.setdefault(sent_id, ref_id)
            if other_ref != ref_id:
                raise ref.error("sent_id", f"{sent_id} occurs in ref_id {other_ref} too", sent_id=sent_id)
            if not raw.strip() or not sent.strip():
                tally.add("Blank sentences, kept", "sent_id", sent_id)
            yield ExpressionRecord(
                split=split,
                ref_id=ref_id,
                sent_id=sent_id,
                sent_index=sent_index,
                image_id=image_id,
                raw=raw,
                sent=sent,
                ann_ids=ann_ids,
                category_ids=category_ids,
                is_degenerate=is_degenerate,
            )


def _targets(
    ref: Record, image_id: int, stated: StatedTargets, instances: dict[int, InstanceRecord], tally: Tally
) -> list[InstanceRecord]:
    """Look up the ref's objects, each once, and leave crowds out where other objects remain."""
    targets = []
    for ann_id in dict.fromkeys(stated.ann_ids):
        target = instances.get(ann_id)
        if target is None:
            raise ref.error("ann_id", f"is {ann_id}, which no referred image has", ann_id=ann_id)
        if target.image_id != image_id:
            raise ref.error(
                "ann_id",
                f"is {ann_id}, which lies on image {target.image_id}, not on the ref's image {image_id}",
                ann_id=ann_id,
                expected=image_id,
                found=target.image_id,
            )
        targets.append(target)
    ref_id = ref.get("ref_id", int)
    if stated.category_ids is not None and stated.category_ids != {t.category_id for t in targets}:
        tally.add("Refs whose category_id is not their annotation's, which is used", "ref_id", ref_id)
    single = [target for target in targets if not target.is_crowd]
    if single and len(single) < len(targets):
        tally.add("Refs with crowds beside other targets, left out of the targets", "ref_id", ref_id)
        return single
    if targets and not single:
        tally.add("Refs whose only targets are crowds, kept", "ref_id", ref_id)
    return targets


def _sentences(ref: Record) -> list[tuple[int, str, str]]:
    """Read (sent_id, raw, sent) of each sentence; their ids are unique within the ref."""
    sentences = []
    for position, value in enumerate(ref.get("sentences", list)):
        if not isinstance(value, dict):
            raise ref.error(f"sentences[{position}]", f"should be a dict, not {shown(value)}", found=value)
        for name, kind in (("sent_id", int), ("raw", str), ("sent", str)):
            if type(value.get(name)) is not kind:
                raise ref.error(
                    f"sentences[{position}].{name}",
                    f"should be of type {kind.__name__}, not {shown(value.get(name))}",
                    found=value.get(name),
                )
            if not is_storable(value[name]):
                raise ref.error(
                    f"sentences[{position}].{name}",
                    f"is beyond 64 bits or no valid Unicode: {shown(value[name])}",
                    found=value[name],
                )
        sentences.append((value["sent_id"], value["raw"], value["sent"]))
    if not sentences:
        raise ref.error("sentences", "should hold at least one sentence, not none")
    if len({sent_id for sent_id, _, _ in sentences}) < len(sentences):
        raise ref.error("sentences", "should have sentences of different sent_id")
    return sentences

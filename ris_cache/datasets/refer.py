"""Load RefCOCO, RefCOCO+ and RefCOCOg as their authors published them.

`<root>/<name>/refs(<split_by>).p` holds the refs, `<root>/<name>/instances.json` the images and objects of
all splits together. What contradicts itself is an error; what is odd but clear becomes a warning with a
count. A ref's own `file_name` is never read: it carries an object suffix and names no image.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from ris_cache.datasets import safe_pickle
from ris_cache.datasets.records import (
    Category,
    ExpressionRecord,
    ImageRecord,
    InstanceRecord,
    ReferringDataset,
)
from ris_cache.datasets.segmentation import parse_segmentation
from ris_cache.errors import ConfigError, DataError

_T = TypeVar("_T")


def load_refer(root: Path, name: str, split_by: str) -> ReferringDataset:
    """Read and check one dataset of one split_by.

    Args:
        root: the folder that holds the dataset folders.
        name: refcoco, refcoco+ or refcocog; the name of the dataset folder.
        split_by: unc, google or umd; the part of the refs file's name in parentheses.
    Returns:
        All splits. Images are those that some expression refers to, with every instance on them. A ref whose
        targets' polygons enclose nothing stays, flagged `is_degenerate`.
    Raises:
        ConfigError: `name` or `split_by` is a path.
        DataError: a file is missing, damaged, malformed or contradicts itself; the message names the ref,
            annotation or image, and the field.
        UnsafePickleError: the refs file asks for more than plain values.
    """
    for argument in (name, split_by):
        if argument in ("", ".", "..") or "/" in argument or "\\" in argument:
            raise ConfigError(f"{argument!r} is not the name of a dataset or a split_by.", found=argument)
    refs_path, instances_path = (root / name / file for file in (f"refs({split_by}).p", "instances.json"))
    for path in (refs_path, instances_path):
        if not path.is_file():
            raise _file_missing(path, root, name)
    refs = _read_refs(refs_path)
    referred = {ref.get("image_id", int) for ref in refs.values()}
    images, instances, categories = _read_instances(instances_path, referred)
    tally = _Tally()
    expressions = tuple(_expressions(refs, images, instances, tally))
    return ReferringDataset(
        name=name,
        split_by=split_by,
        images=images,
        instances=instances,
        expressions=expressions,
        categories=categories,
        warnings=tally.warnings(),
    )


# Files.


def _file_missing(path: Path, root: Path, name: str) -> DataError:
    """Say which file is missing, and recognise the usual accidents of unpacking."""
    hints = []
    if (root / name / name / path.name).is_file():
        hints.append(f"It lies one folder too deep, in {root / name / name}; move that folder's files up.")
    if (root / path.name).is_file():
        hints.append(f"It lies in {root} itself; the data root must be the folder that holds {name}/.")
    if any((folder / "__MACOSX").is_dir() for folder in (root, root / name)):
        hints.append("The folder __MACOSX holds only macOS's copies of file attributes; delete it.")
    present = tuple(sorted(other.name[5:-3] for other in (root / name).glob("refs(*).p")))
    if present and path.name.startswith("refs("):
        hints.append(f"The split_by present there: {', '.join(present)}.")
    if not hints:
        hints.append(f"Unpack {name}.zip in {root}, so that {root / name} holds its files.")
    return DataError(f"{path} is missing. {' '.join(hints)}", path=path, present=present)


def _read_refs(path: Path) -> dict[int, _Record]:
    """Index the refs by ref_id, in file order."""
    content = safe_pickle.load(path)
    if not isinstance(content, list) or not content:
        raise DataError(
            f"{path} should hold a list of refs, not {_described(content)}. Download it again.",
            path=path,
            found=type(content).__name__,
        )
    return _indexed(content, path, "ref_id", "ref_id")


def _read_instances(
    path: Path, referred: set[int]
) -> tuple[dict[int, ImageRecord], dict[int, InstanceRecord], tuple[Category, ...]]:
    """Read what concerns the referred images; the rest is only checked for unique ids."""
    try:
        content = json.loads(path.read_bytes())
    except OSError as error:
        raise DataError(f"Cannot read {path}: {error.strerror or error}.", path=path) from error
    except (ValueError, RecursionError) as error:
        raise DataError(
            f"{path} is truncated or not JSON ({error}). Download it again.", path=path, reason=str(error)
        ) from error
    if not isinstance(content, dict):
        raise DataError(
            f"{path} should hold a JSON object, not {_described(content)}. Download it again.",
            path=path,
            found=type(content).__name__,
        )
    tables = {}
    for key, id_fact in (("images", "image_id"), ("annotations", "ann_id"), ("categories", "category_id")):
        if not isinstance(content.get(key), list):
            raise DataError(
                f"{path} lacks the list {key!r}. Download it again.",
                path=path,
                field=key,
                found=sorted(content),
            )
        tables[key] = _indexed(content[key], path, "id", id_fact)
    images = {
        image_id: _image(record) for image_id, record in tables["images"].items() if image_id in referred
    }
    categories = tuple(
        Category(category_id=category_id, name=record.get("name", str))
        for category_id, record in tables["categories"].items()
    )
    instances = {
        ann_id: _instance(record, images[image_id], tables["categories"])
        for ann_id, record in tables["annotations"].items()
        if (image_id := record.get("image_id", int)) in images
    }
    return images, instances, categories


def _described(value: object) -> str:
    return "an empty list" if value == [] else f"a value of type {type(value).__name__}"


# Records.


@dataclass(frozen=True, slots=True)
class _Record:
    """One dict of a file, read field by field with errors that say which dict and which field.

    Attributes:
        id_fact: what the project calls the record's id: ref_id, ann_id, image_id or category_id.
        identity: that id, or the record's position in the file while the id is not known.
    """

    fields: dict[str, Any]
    path: Path
    id_fact: str
    identity: int | str

    def get(self, name: str, kind: type[_T]) -> _T:
        value = self.fields.get(name)
        if type(value) is kind:  # not isinstance: True is no id
            return value
        raise self.error(name, f"should be of type {kind.__name__}, not {value!r:.80}", found=value)

    def error(self, name: str, problem: str, **facts: object) -> DataError:
        facts = {"path": self.path, self.id_fact: self.identity, "field": name} | facts
        return DataError(
            f"{self.path}, {self.id_fact} {self.identity}: `{name}` {problem}. "
            "Correct the record, or download the file again.",
            **facts,
        )


def _indexed(values: list[object], path: Path, id_field: str, id_fact: str) -> dict[int, _Record]:
    records: dict[int, _Record] = {}
    for position, value in enumerate(values):
        if not isinstance(value, dict):
            raise DataError(
                f"{path}: record {position} of those with {id_fact} should be a dict, not "
                f"{_described(value)}. Download the file again.",
                path=path,
                position=position,
            )
        identity = value.get(id_field)
        if type(identity) is not int:
            raise _Record(value, path, id_fact, f"of record {position}").error(
                id_field, f"should be of type int, not {identity!r:.80}", found=identity
            )
        record = _Record(value, path, id_fact, identity)
        if not _is_storable(identity):
            raise record.error(id_field, "is beyond 64 bits")
        if identity in records:
            raise record.error(id_field, "occurs twice in the file")
        records[identity] = record
    return records


def _image(record: _Record) -> ImageRecord:
    height, width = (record.get(name, int) for name in ("height", "width"))
    if height < 1 or width < 1:
        raise record.error("height", f"and `width` should be positive, not {height} and {width}")
    return ImageRecord(
        image_id=record.get("id", int),
        file_name=record.get("file_name", str),
        height=height,
        width=width,
    )


def _instance(record: _Record, image: ImageRecord, categories: dict[int, _Record]) -> InstanceRecord:
    category_id = record.get("category_id", int)
    if category_id not in categories:
        raise record.error("category_id", f"is {category_id}, which `categories` lacks", found=category_id)
    is_crowd = record.fields.get("iscrowd", 0)
    if is_crowd not in (0, 1):
        raise record.error("iscrowd", f"should be 0 or 1, not {is_crowd!r:.80}", found=is_crowd)
    try:
        segmentation = parse_segmentation(record.fields.get("segmentation"), (image.height, image.width))
    except DataError as error:
        raise record.error("segmentation", f"is malformed: {error}", **error.facts) from error
    return InstanceRecord(
        ann_id=record.get("id", int),
        image_id=image.image_id,
        category_id=category_id,
        segmentation=segmentation,
        is_crowd=bool(is_crowd),
    )


# Refs to expressions.


@dataclass(slots=True)
class _Tally:
    """Ids of the refs and sentences that are odd but usable."""

    other_category: list[int] = field(default_factory=list)
    other_sent_ids: list[int] = field(default_factory=list)
    degenerate: list[int] = field(default_factory=list)
    blank: list[int] = field(default_factory=list)

    def warnings(self) -> tuple[str, ...]:
        cases = (
            (
                self.other_category,
                "Refs whose category_id is not their annotation's, which is used",
                "ref_id",
            ),
            (self.other_sent_ids, "Refs whose sent_ids are not their sentences', which are used", "ref_id"),
            (self.degenerate, "Refs without a polygon that encloses anything, kept as empty masks", "ref_id"),
            (self.blank, "Blank sentences, kept", "sent_id"),
        )
        return tuple(
            f"{what}: {len(ids)} (first {id_fact}: {ids[0]})." for ids, what, id_fact in cases if ids
        )


def _expressions(
    refs: dict[int, _Record],
    images: dict[int, ImageRecord],
    instances: dict[int, InstanceRecord],
    tally: _Tally,
) -> Iterator[ExpressionRecord]:
    ref_of_sentence: dict[int, int] = {}
    for ref_id, ref in refs.items():
        image_id = ref.get("image_id", int)
        if image_id not in images:
            raise ref.error("image_id", f"is {image_id}, which instances.json lacks", found=image_id)
        targets = _targets(ref, image_id, instances)
        ann_ids = tuple(target.ann_id for target in targets)
        category_ids = tuple(target.category_id for target in targets)
        is_degenerate = not any(target.segmentation for target in targets)
        if is_degenerate:
            tally.degenerate.append(ref_id)
        if "category_id" in ref.fields and set(_ids(ref, "category_id")) != set(category_ids):
            tally.other_category.append(ref_id)
        sentences = _sentences(ref)
        if ref.fields.get("sent_ids") != [sent_id for sent_id, _, _ in sentences]:
            tally.other_sent_ids.append(ref_id)
        split = ref.get("split", str)
        for sent_index, (sent_id, raw, sent) in enumerate(sentences):
            other_ref = ref_of_sentence.setdefault(sent_id, ref_id)
            if other_ref != ref_id:
                raise ref.error("sent_id", f"{sent_id} occurs in ref_id {other_ref} too", sent_id=sent_id)
            if not raw.strip() or not sent.strip():
                tally.blank.append(sent_id)
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


def _ids(ref: _Record, name: str) -> list[int]:
    """Read a field that is one id or a list of ids."""
    value = ref.fields.get(name)
    ids: list[Any] = value if isinstance(value, list) else [value]
    if not ids or not all(type(item) is int for item in ids):
        raise ref.error(name, f"should be an id or a list of ids, not {value!r:.80}", found=value)
    return ids


def _targets(ref: _Record, image_id: int, instances: dict[int, InstanceRecord]) -> list[InstanceRecord]:
    """Look up the ref's objects, each once."""
    targets = []
    for ann_id in dict.fromkeys(_ids(ref, "ann_id")):
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
    return targets


def _sentences(ref: _Record) -> list[tuple[int, str, str]]:
    """Read (sent_id, raw, sent) of each sentence; their ids are unique within the ref."""
    sentences = []
    for position, value in enumerate(ref.get("sentences", list)):
        if not isinstance(value, dict):
            raise ref.error(f"sentences[{position}]", f"should be a dict, not {value!r:.80}", found=value)
        for name, kind in (("sent_id", int), ("raw", str), ("sent", str)):
            if type(value.get(name)) is not kind:
                raise ref.error(
                    f"sentences[{position}].{name}",
                    f"should be of type {kind.__name__}, not {value.get(name)!r:.80}",
                    found=value.get(name),
                )
            if not _is_storable(value[name]):
                raise ref.error(
                    f"sentences[{position}].{name}",
                    f"is beyond 64 bits or no valid Unicode: {value[name]!r:.80}",
                    found=value[name],
                )
        sentences.append((value["sent_id"], value["raw"], value["sent"]))
    if not sentences:
        raise ref.error("sentences", "should hold at least one sentence, not none")
    if len({sent_id for sent_id, _, _ in sentences}) < len(sentences):
        raise ref.error("sentences", "should have sentences of different sent_id")
    return sentences


def _is_storable(value: int | str) -> bool:
    """Whether the cache's tables can hold it: a 64-bit integer, or text without lone surrogates."""
    if isinstance(value, int):
        return -(2**63) <= value < 2**63
    return not any("\ud800" <= character <= "\udfff" for character in value)

"""A small dataset loads as documented, and everything that can be wrong with one is named."""

from __future__ import annotations

import copy
import json
import pickle
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from ris_cache.datasets.records import Category, ExpressionRecord, ImageRecord, Rle
from ris_cache.datasets.refer import load_refer
from ris_cache.errors import ConfigError, DataError, UnsafePickleError

SQUARE = [10.0, 10.0, 50.0, 10.0, 50.0, 50.0, 10.0, 50.0]


def sentence(sent_id: int, raw: str, sent: str | None = None) -> dict[str, Any]:
    sent = raw.lower() if sent is None else sent
    return {"sent_id": sent_id, "raw": raw, "sent": sent, "tokens": sent.split()}


@dataclass
class Files:
    """A dataset on disk of three images, five objects and three refs, open to changes before it is loaded."""

    root: Path
    name: str = "refcoco"
    split_by: str = "unc"
    protocol: int = 0
    refs: list[Any] = field(default_factory=list)
    instances: dict[str, Any] = field(default_factory=dict)

    @property
    def refs_path(self) -> Path:
        return self.root / self.name / f"refs({self.split_by}).p"

    @property
    def instances_path(self) -> Path:
        return self.root / self.name / "instances.json"

    def write(self) -> None:
        self.refs_path.parent.mkdir(parents=True, exist_ok=True)
        self.refs_path.write_bytes(pickle.dumps(self.refs, self.protocol))
        self.instances_path.write_text(json.dumps(self.instances), encoding="utf-8")

    def load(self) -> Any:
        self.write()
        return load_refer(self.root, self.name, self.split_by)


@pytest.fixture
def files(tmp_path: Path) -> Files:
    made = Files(root=tmp_path)
    made.refs = [
        {
            "ref_id": 0,
            "ann_id": 1719310,
            "image_id": 581857,
            "category_id": 1,
            "file_name": "COCO_train2014_000000581857_16.jpg",
            "split": "train",
            "sent_ids": [0, 1, 2],
            "sentences": [
                sentence(0, "THE LADY WITH THE BLUE SHIRT"),
                sentence(1, "lady w back to us", "lady with back to us"),
                sentence(2, "blue shirt"),
            ],
        },
        {
            "ref_id": 7,
            "ann_id": 22,
            "image_id": 2,
            "category_id": 90,
            "file_name": "nowhere.jpg",
            "split": "testA",
            "sent_ids": [9],
            "sentences": [sentence(9, "café on the left")],
        },
        {
            "ref_id": 3,
            "ann_id": 1719310,
            "image_id": 581857,
            "category_id": 1,
            "split": "train",
            "sent_ids": [4],
            "sentences": [sentence(4, "woman")],
        },
    ]
    made.instances = {
        "info": {},
        "licenses": [],
        "images": [
            {"id": 2, "file_name": "COCO_train2014_000000000002.jpg", "height": 100, "width": 200},
            {"id": 581857, "file_name": "COCO_train2014_000000581857.jpg", "height": 640, "width": 427},
            {"id": 3, "file_name": "COCO_train2014_000000000003.jpg", "height": 60, "width": 60},
        ],
        "annotations": [
            _annotation(1719310, 581857, 1),
            _annotation(22, 2, 90),
            _annotation(23, 2, 1, segmentation={"size": [100, 200], "counts": [0, 100, 19900]}, iscrowd=1),
            _annotation(31, 3, 1),
            _annotation(24, 2, 1, segmentation=[SQUARE, [1.0, 1.0, 2.0, 2.0]]),
        ],
        "categories": [
            {"id": 1, "name": "person", "supercategory": "person"},
            {"id": 90, "name": "toothbrush", "supercategory": "indoor"},
        ],
    }
    return made


def _annotation(ann_id: int, image_id: int, category_id: int, **changes: Any) -> dict[str, Any]:
    return {
        "id": ann_id,
        "image_id": image_id,
        "category_id": category_id,
        "segmentation": [SQUARE],
        "bbox": [10.0, 10.0, 40.0, 40.0],
        "area": 1600.0,
        "iscrowd": 0,
    } | changes


@pytest.mark.parametrize("protocol", [0, 2, 4])
def test_a_dataset_loads_in_file_order(files: Files, protocol: int) -> None:
    files.protocol = protocol
    dataset = files.load()
    assert (dataset.name, dataset.split_by, dataset.warnings) == ("refcoco", "unc", ())
    assert dataset.splits == ("train", "testA")
    assert [e.sent_id for e in dataset.expressions] == [0, 1, 2, 9, 4]
    assert [e.sent_index for e in dataset.expressions] == [0, 1, 2, 0, 0]
    assert dataset.expressions[1] == ExpressionRecord(
        split="train",
        ref_id=0,
        sent_id=1,
        sent_index=1,
        image_id=581857,
        raw="lady w back to us",
        sent="lady with back to us",
        ann_ids=(1719310,),
        category_ids=(1,),
        is_degenerate=False,
    )
    assert dataset.expressions[3].raw == "café on the left"
    assert dataset.categories == (
        Category(category_id=1, name="person"),
        Category(category_id=90, name="toothbrush"),
    )


def test_only_referred_images_stay_with_every_instance_on_them(files: Files) -> None:
    dataset = files.load()
    assert dataset.images == {
        2: ImageRecord(image_id=2, file_name="COCO_train2014_000000000002.jpg", height=100, width=200),
        581857: ImageRecord(
            image_id=581857, file_name="COCO_train2014_000000581857.jpg", height=640, width=427
        ),
    }
    assert list(dataset.instances) == [1719310, 22, 23, 24]
    crowd = dataset.instances[23]
    assert crowd.is_crowd
    assert isinstance(crowd.segmentation, Rle)
    assert crowd.segmentation.size == (100, 200)
    assert dataset.instances[24].segmentation == (tuple(SQUARE),)
    assert dataset.instances[22].category_id == 90


def test_an_unreferred_image_may_be_malformed(files: Files) -> None:
    files.instances["images"][2] |= {"height": None}
    files.instances["annotations"][3] |= {"segmentation": "none", "category_id": None}
    assert 3 not in files.load().images


@pytest.mark.parametrize("name", ["refcoco+", "refcocog"])
def test_the_folder_is_named_after_the_dataset(files: Files, name: str) -> None:
    files.name, files.split_by = name, "umd"
    dataset = files.load()
    assert (dataset.name, dataset.split_by) == (name, "umd")


def test_a_list_of_targets_is_kept_in_order_and_each_once(files: Files) -> None:
    files.refs[1] |= {"ann_id": [24, 22, 24], "category_id": [1, 90, 1]}
    expression = files.load().expressions[3]
    assert expression.ann_ids == (24, 22)
    assert expression.category_ids == (1, 90)


# Warnings.


def test_another_category_than_the_annotation_is_a_warning(files: Files) -> None:
    files.refs[1]["category_id"] = 1
    dataset = files.load()
    assert dataset.warnings == (
        "Refs whose category_id is not their annotation's, which is used: 1 (first ref_id: 7).",
    )
    assert dataset.expressions[3].category_ids == (90,)


@pytest.mark.parametrize("sent_ids", [None, [0, 1], [2, 1, 0], [], "absent"])
def test_sent_ids_that_differ_give_way_to_the_sentences(files: Files, sent_ids: Any) -> None:
    if sent_ids == "absent":
        del files.refs[0]["sent_ids"]
    else:
        files.refs[0]["sent_ids"] = sent_ids
    dataset = files.load()
    assert [e.sent_id for e in dataset.expressions[:3]] == [0, 1, 2]
    assert dataset.warnings == (
        "Refs whose sent_ids are not their sentences', which are used: 1 (first ref_id: 0).",
    )


def test_blank_sentences_stay_and_are_counted(files: Files) -> None:
    files.refs[0]["sentences"][1] = sentence(1, "  \t")
    files.refs[2]["sentences"][0] = sentence(4, "woman", "")
    dataset = files.load()
    assert len(dataset.expressions) == 5
    assert dataset.expressions[1].raw == "  \t"
    assert dataset.warnings == ("Blank sentences, kept: 2 (first sent_id: 1).",)


@pytest.mark.parametrize("segmentation", [[], [[1.0, 1.0, 5.0, 5.0]], [[1.0] * 7]])
def test_degenerate_targets_stay_and_are_flagged(files: Files, segmentation: Any) -> None:
    files.instances["annotations"][0]["segmentation"] = segmentation
    dataset = files.load()
    assert [e.is_degenerate for e in dataset.expressions] == [True, True, True, False, True]
    assert not any(e.is_no_target for e in dataset.expressions)
    assert dataset.warnings == (
        "Refs without a polygon that encloses anything, kept as empty masks: 2 (first ref_id: 0).",
    )


def test_one_whole_target_of_several_suffices(files: Files) -> None:
    files.instances["annotations"][1]["segmentation"] = []
    files.refs[1] |= {"ann_id": [22, 24], "category_id": [90, 1]}
    assert not files.load().expressions[3].is_degenerate


# Contradictions and malformed records.


def _changed(*path: Any, to: Any) -> Callable[[Files], None]:
    """Set `files.<path[0]>[path[1]]…` to a value; `to=KeyError` deletes it."""

    def change(files: Files) -> None:
        container = getattr(files, path[0])
        for key in path[1:-1]:
            container = container[key]
        if to is KeyError:
            del container[path[-1]]
        else:
            container[path[-1]] = to

    return change


REF = ("refs", 1)
SENTENCE = ("refs", 1, "sentences", 0)
ANNOTATION = ("instances", "annotations", 1)
IMAGE = ("instances", "images", 0)


@pytest.mark.parametrize(
    ("change", "facts", "text"),
    [
        (
            _changed(*REF, "ann_id", to=999),
            {"ref_id": 7, "field": "ann_id"},
            "999, which no referred image has",
        ),
        (_changed(*REF, "ann_id", to=-1), {"ref_id": 7, "field": "ann_id"}, "-1, which"),
        (_changed(*REF, "ann_id", to=1719310), {"ref_id": 7, "found": 581857}, "not on the ref's image 2"),
        (_changed(*REF, "ann_id", to=31), {"ref_id": 7, "field": "ann_id"}, "31, which no referred"),
        (_changed(*REF, "ann_id", to=[]), {"ref_id": 7, "field": "ann_id"}, "an id or a list of ids"),
        (_changed(*REF, "ann_id", to="22"), {"ref_id": 7, "field": "ann_id"}, "an id or a list of ids"),
        (_changed(*REF, "ann_id", to=[22, None]), {"ref_id": 7, "field": "ann_id"}, "an id or a list of ids"),
        (_changed(*REF, "ann_id", to=KeyError), {"ref_id": 7, "field": "ann_id"}, "not None"),
        (_changed(*REF, "category_id", to="x"), {"ref_id": 7, "field": "category_id"}, "an id or a list"),
        (_changed(*REF, "image_id", to=5), {"ref_id": 7, "field": "image_id"}, "instances.json lacks"),
        (_changed(*REF, "image_id", to="2"), {"ref_id": 7, "field": "image_id"}, "should be of type int"),
        (_changed(*REF, "image_id", to=True), {"ref_id": 7, "field": "image_id"}, "not True"),
        (_changed(*REF, "image_id", to=KeyError), {"ref_id": 7, "field": "image_id"}, "not None"),
        (_changed(*REF, "split", to=KeyError), {"ref_id": 7, "field": "split"}, "type str"),
        (_changed(*REF, "split", to=3), {"ref_id": 7, "field": "split"}, "type str"),
        (_changed(*REF, "ref_id", to=0), {"ref_id": 0, "field": "ref_id"}, "occurs twice"),
        (_changed(*REF, "ref_id", to=KeyError), {"ref_id": "of record 1"}, "type int"),
        (_changed(*REF, to=["x"]), {"position": 1}, "should be a dict"),
        (_changed(*REF, "sentences", to=KeyError), {"ref_id": 7, "field": "sentences"}, "type list"),
        (_changed(*REF, "sentences", to={}), {"ref_id": 7, "field": "sentences"}, "type list"),
        (_changed(*REF, "sentences", to=[]), {"ref_id": 7, "field": "sentences"}, "at least one"),
        (_changed(*SENTENCE, to="left"), {"ref_id": 7, "field": "sentences[0]"}, "should be a dict"),
        (_changed(*SENTENCE, "raw", to=KeyError), {"ref_id": 7, "field": "sentences[0].raw"}, "type str"),
        (_changed(*SENTENCE, "raw", to=b"left"), {"ref_id": 7, "field": "sentences[0].raw"}, "type str"),
        (_changed(*SENTENCE, "sent", to=None), {"ref_id": 7, "field": "sentences[0].sent"}, "type str"),
        (_changed(*SENTENCE, "sent_id", to="9"), {"ref_id": 7, "field": "sentences[0].sent_id"}, "type int"),
        (_changed(*SENTENCE, "sent_id", to=2), {"ref_id": 7, "sent_id": 2}, "2 occurs in ref_id 0 too"),
        (
            _changed("refs", 0, "sentences", 1, "sent_id", to=0),
            {"ref_id": 0, "field": "sentences"},
            "different sent_id",
        ),
        (_changed(*ANNOTATION, "id", to=23), {"ann_id": 23, "field": "id"}, "occurs twice"),
        (_changed(*ANNOTATION, "id", to=None), {"ann_id": "of record 1"}, "type int"),
        (_changed(*ANNOTATION, "image_id", to=None), {"ann_id": 22, "field": "image_id"}, "type int"),
        (_changed(*ANNOTATION, "category_id", to=12), {"ann_id": 22, "found": 12}, "`categories` lacks"),
        (_changed(*ANNOTATION, "category_id", to=1.0), {"ann_id": 22, "field": "category_id"}, "type int"),
        (_changed(*ANNOTATION, "iscrowd", to="no"), {"ann_id": 22, "field": "iscrowd"}, "0 or 1"),
        (_changed(*ANNOTATION, "segmentation", to=KeyError), {"ann_id": 22}, "neither a list of polygons"),
        (_changed(*ANNOTATION, "segmentation", to=[["1"] * 6]), {"ann_id": 22}, "not a number"),
        (_changed(*ANNOTATION, "segmentation", to=[[float("nan")] * 6]), {"ann_id": 22}, "not finite"),
        (
            _changed(*ANNOTATION, "segmentation", to={"size": [200, 100], "counts": [20000]}),
            {"ann_id": 22, "field": "segmentation", "found": (200, 100), "expected": (100, 200)},
            "another size",
        ),
        (_changed(*IMAGE, "id", to=581857), {"image_id": 581857}, "occurs twice"),
        (_changed(*IMAGE, "height", to=0), {"image_id": 2, "field": "height"}, "positive, not 0 and 200"),
        (_changed(*IMAGE, "width", to="200"), {"image_id": 2, "field": "width"}, "type int"),
        (_changed(*IMAGE, "file_name", to=KeyError), {"image_id": 2, "field": "file_name"}, "type str"),
        (
            _changed("instances", "categories", 0, "name", to=1),
            {"category_id": 1, "field": "name"},
            "type str",
        ),
        (_changed("instances", "categories", 0, "id", to=90), {"category_id": 90}, "occurs twice"),
        (_changed("instances", "annotations", to={}), {"field": "annotations"}, "lacks the list"),
        (_changed("instances", "images", to=KeyError), {"field": "images"}, "lacks the list 'images'"),
    ],
)
def test_what_contradicts_itself_is_named(
    files: Files, change: Callable[[Files], None], facts: dict[str, Any], text: str
) -> None:
    files.protocol = 4  # has an opcode for bytes
    change(files)
    with pytest.raises(DataError) as caught:
        files.load()
    assert facts.items() <= caught.value.facts.items()
    assert text in str(caught.value)
    assert str(files.root) in str(caught.value)


JUNK: tuple[Any, ...] = (None, True, -1, 1.5, "x", b"x", [], {}, [[]], [{}], {"a": 1}, (1, 2))


def test_junk_in_any_field_of_a_ref_is_a_data_error_or_survivable(files: Files) -> None:
    """No junk value in any place ever surfaces as a KeyError, TypeError or AttributeError."""
    clean_refs = copy.deepcopy(files.refs)
    files.write()
    for key in clean_refs[0]:
        for junk in JUNK:
            files.refs = copy.deepcopy(clean_refs)
            files.refs[0][key] = junk
            files.refs_path.write_bytes(pickle.dumps(files.refs, 4))
            try:
                dataset = load_refer(files.root, files.name, files.split_by)
            except DataError:
                continue
            assert len(dataset.expressions) == 5
            assert key in ("ref_id", "category_id", "file_name", "sent_ids", "split")


def test_junk_in_any_field_of_the_instances_is_a_data_error_or_survivable(files: Files) -> None:
    clean = copy.deepcopy(files.instances)
    files.write()
    ignored = {"info", "licenses", "bbox", "area", "supercategory"}
    for table in ("images", "annotations", "categories"):
        for key in clean[table][0]:
            for junk in JUNK:
                if isinstance(junk, bytes | tuple):
                    continue
                files.instances = copy.deepcopy(clean)
                files.instances[table][0][key] = junk
                files.instances_path.write_text(json.dumps(files.instances))
                try:
                    load_refer(files.root, files.name, files.split_by)
                except DataError:
                    continue
                valid = [("iscrowd", True), ("segmentation", []), ("segmentation", [[]]), ("file_name", "x")]
                assert key in ignored or (key, junk) in [*valid, ("name", "x")], (table, key, junk)


# Files.


@pytest.mark.parametrize("content", ["", "{", '{"images": [', "[1, 2]", "null", "\ufeff", "[" * 100_000])
def test_a_damaged_instances_file_is_a_data_error(files: Files, content: str) -> None:
    files.write()
    files.instances_path.write_text(content, encoding="utf-8")
    with pytest.raises(DataError, match=r"instances\.json .*Download it again"):
        load_refer(files.root, "refcoco", "unc")


def test_instances_that_are_not_utf8_are_a_data_error(files: Files) -> None:
    files.write()
    files.instances_path.write_bytes(b'{"images": "\xff\xfe"}')
    with pytest.raises(DataError, match="not JSON"):
        load_refer(files.root, "refcoco", "unc")


@pytest.mark.parametrize("refs", [{}, [], "refs", None])
def test_refs_that_are_no_list_are_a_data_error(files: Files, refs: Any) -> None:
    files.refs = refs
    with pytest.raises(DataError, match="should hold a list of refs"):
        files.load()


def test_a_refs_file_that_runs_code_is_refused(files: Files) -> None:
    files.write()
    files.refs_path.write_bytes(pickle.dumps([Path("x")]))
    with pytest.raises(UnsafePickleError, match=r"pathlib"):
        load_refer(files.root, "refcoco", "unc")


def test_a_missing_dataset_says_what_to_unpack_where(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"refs\(unc\)\.p is missing\. Unpack refcoco\+\.zip in"):
        load_refer(tmp_path, "refcoco+", "unc")


def test_another_split_by_on_disk_is_named(files: Files) -> None:
    files.write()
    with pytest.raises(DataError, match="split_by present there: unc") as caught:
        load_refer(files.root, "refcoco", "google")
    assert caught.value.facts["present"] == ("unc",)


def test_a_missing_instances_file_is_named(files: Files) -> None:
    files.write()
    files.instances_path.unlink()
    with pytest.raises(DataError, match=r"instances\.json is missing"):
        load_refer(files.root, "refcoco", "unc")


def test_a_nested_folder_is_recognised(files: Files) -> None:
    files.root = files.root / "refcoco"
    files.write()
    with pytest.raises(DataError, match=r"one folder too deep, in .*refcoco/refcoco; move"):
        load_refer(files.root.parent, "refcoco", "unc")


def test_a_root_that_is_the_dataset_folder_is_recognised(files: Files) -> None:
    files.write()
    with pytest.raises(DataError, match="must be the folder that holds refcoco/"):
        load_refer(files.root / "refcoco", "refcoco", "unc")


@pytest.mark.parametrize("place", [".", "refcoco"])
def test_the_leavings_of_a_macos_archive_are_recognised(tmp_path: Path, place: str) -> None:
    (tmp_path / place / "__MACOSX").mkdir(parents=True)
    with pytest.raises(DataError, match="__MACOSX holds only macOS's copies"):
        load_refer(tmp_path, "refcoco", "unc")


@pytest.mark.parametrize(
    ("name", "split_by"), [("../refcoco", "unc"), ("refcoco", "../unc"), ("", "unc"), ("..", "unc")]
)
def test_names_that_are_paths_are_refused(tmp_path: Path, name: str, split_by: str) -> None:
    with pytest.raises(ConfigError, match="not the name of a dataset"):
        load_refer(tmp_path, name, split_by)


def test_what_the_caches_tables_cannot_hold_is_refused(files: Files) -> None:
    files.protocol = 2
    files.refs[0]["sentences"][0]["raw"] = "red \ud800 circle"
    with pytest.raises(DataError, match="no valid Unicode"):
        files.load()
    files.refs[0]["sentences"][0].update(raw="red circle", sent_id=2**63)
    with pytest.raises(DataError, match="beyond 64 bits"):
        files.load()
    files.refs[0]["sentences"][0]["sent_id"] = 0
    files.refs[0]["ref_id"] = 2**70
    with pytest.raises(DataError, match="beyond 64 bits"):
        files.load()

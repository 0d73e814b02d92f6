"""Ref-ZOM's own forms: three sources, several names, and fields that may be absent."""

from __future__ import annotations

from typing import Any

import pytest

from ris_cache.datasets.image_roots import ImageRoots
from ris_cache.datasets.selection import select_split
from ris_cache.errors import ConfigError, DataError


@pytest.fixture
def files(published):
    return published("ref-zom")


def test_each_source_loads(files):
    dataset = files.load()
    assert (dataset.name, dataset.split_by, dataset.warnings) == ("ref-zom", "final", ())
    assert [(e.sent_id, e.target_kind, e.ann_ids, e.category_ids) for e in dataset.expressions] == [
        (10, "one", (1,), (1,)),
        (11, "one", (1,), (1,)),
        (20, "one", (2,), (18,)),
        (30, "one", (5,), (18,)),
        (40, "none", (), ()),
        (50, "many", (2, 1), (18, 1)),
        (51, "many", (2, 1), (18, 1)),
    ]
    assert dataset.splits == ("train", "test")
    assert [e.sent_id for e in select_split(dataset, "test")] == [30]


@pytest.mark.parametrize("folder", ["ref-zom", "refzom"])
@pytest.mark.parametrize("refs_name", ["refs(final).p", "Ref-ZOM(final).p", "Ref_ZOM.p"])
def test_it_is_found_under_each_of_its_names(files, folder: str, refs_name: str):
    files.folder, files.refs_name = folder, refs_name
    assert len(files.load().expressions) == 7


def test_a_folder_that_holds_the_refs_goes_before_an_empty_one(files):
    (files.root / "ref-zom").mkdir()
    files.folder = "refzom"
    assert len(files.load().expressions) == 7


def test_images_lie_in_train2014_and_val2014(files):
    for place, name in (
        ("train2014", "COCO_train2014_000000000010"),
        ("val2014", "COCO_val2014_000000000011"),
    ):
        path = files.root / "images" / place / f"{name}.jpg"
        path.parent.mkdir(parents=True)
        path.write_bytes(b"")
    paths = ImageRoots(files.root).resolve(files.load().images.values())
    assert [paths[10].parent.name, paths[11].parent.name] == ["train2014", "val2014"]


@pytest.mark.parametrize("ann_id", [[1], 999, [], None, "absent"])
def test_a_source_of_zero_decides_whatever_ann_id_says(files, ann_id: Any):
    files.refs[3]["ann_id"] = ann_id
    if ann_id == "absent":
        del files.refs[3]["ann_id"]
    dataset = files.load()
    assert dataset.expressions[4].is_no_target
    expected = ("Refs of source zero that have an ann_id, taken as no target: 1 (first ref_id: 4).",)
    assert dataset.warnings == (expected if ann_id in ([1], 999) else ())


def test_an_empty_ann_id_of_another_source_is_no_target_and_counted(files):
    files.refs[4]["ann_id"] = []
    dataset = files.load()
    assert dataset.expressions[5].is_no_target
    assert dataset.warnings == (
        "Refs of source 'many' without ann_id, taken as no target: 1 (first ref_id: 5).",
    )


@pytest.mark.parametrize(
    ("index", "source", "warning"),
    [
        (0, "many", "Refs of source 'many' with one target: 1 (first ref_id: 1)."),
        (4, "one", "Refs of source 'one' with several targets: 1 (first ref_id: 5)."),
        (0, "two", "Refs of source 'two' with one target: 1 (first ref_id: 1)."),
        (4, "two", "Refs of source 'two' with several targets: 1 (first ref_id: 5)."),
    ],
)
def test_a_source_that_does_not_fit_its_targets_is_counted_and_the_targets_are_used(
    files, index: int, source: str, warning: str
):
    files.refs[index]["source"] = source
    dataset = files.load()
    assert dataset.warnings == (warning,)
    assert {e.ann_ids for e in dataset.expressions if e.ref_id == index + 1} == {[(1,), (2, 1)][index == 4]}


@pytest.mark.parametrize("source", [None, 0, ["zero"], "absent"])
def test_a_ref_without_a_source_is_an_error(files, source: Any):
    files.refs[0]["source"] = source
    if source == "absent":
        del files.refs[0]["source"]
    with pytest.raises(DataError, match=r"ref_id 1: `source` should be of type str"):
        files.load()


def test_minus_one_means_nothing_here(files):
    files.refs[0]["ann_id"] = -1
    with pytest.raises(DataError, match="-1, which no referred image has"):
        files.load()


def test_a_missing_or_odd_category_id_never_stops_loading(files):
    del files.refs[0]["category_id"]
    files.refs[1]["category_id"] = {"a": 1}
    files.refs[2]["category_id"] = None
    files.refs[3]["category_id"] = "none"
    files.refs[4]["category_id"] = 18
    assert files.load().warnings == (
        "Refs without category_id: 2 (first ref_id: 1).",
        "Refs whose category_id is not understood: 1 (first ref_id: 2).",
        "Refs whose category_id is not their annotation's, which is used: 1 (first ref_id: 5).",
    )


def test_sent_ids_may_be_absent(files):
    for ref in files.refs:
        del ref["sent_ids"]
    dataset = files.load()
    assert [e.sent_id for e in dataset.expressions] == [10, 11, 20, 30, 40, 50, 51]
    assert dataset.warnings == (
        "Refs whose sent_ids are not their sentences', which are used: 5 (first ref_id: 1).",
    )


def test_there_is_no_val(files):
    with pytest.raises(ConfigError, match="no split 'val'; it has train, test"):
        select_split(files.load(), "val")

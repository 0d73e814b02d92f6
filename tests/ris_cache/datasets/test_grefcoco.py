"""gRefCOCO's own forms: lists of targets, -1 for none, and files of several ages."""

from __future__ import annotations

import pickle
from typing import Any

import pytest

from ris_cache.datasets.selection import select_split
from ris_cache.errors import ConfigError, DataError


@pytest.fixture
def files(published):
    return published("grefcoco")


def test_each_kind_of_target_loads(files):
    dataset = files.load()
    assert (dataset.name, dataset.split_by, dataset.warnings) == ("grefcoco", "unc", ())
    assert [(e.sent_id, e.target_kind, e.ann_ids, e.category_ids) for e in dataset.expressions] == [
        (10, "one", (1,), (1,)),
        (11, "one", (1,), (1,)),
        (20, "one", (2,), (18,)),
        (30, "one", (5,), (18,)),
        (40, "none", (), ()),
        (50, "many", (2, 1), (18, 1)),
        (51, "many", (2, 1), (18, 1)),
    ]
    assert [e.is_no_target for e in dataset.expressions] == [False] * 4 + [True] + [False] * 2
    assert not any(e.is_degenerate for e in dataset.expressions)


def test_a_bare_id_is_a_list_of_one(files):
    files.refs[0] |= {"ann_id": 1, "category_id": 1}
    files.refs[3] |= {"ann_id": -1, "category_id": -1}
    dataset = files.load()
    assert dataset.warnings == ()
    assert dataset.expressions[0].ann_ids == (1,)
    assert dataset.expressions[4].ann_ids == ()


def test_older_copies_are_pickles_and_the_json_file_goes_first(files):
    files.write()
    files.refs_path.with_suffix(".p").write_bytes(pickle.dumps(files.refs[:1], 2))
    assert len(files.load_as_is().expressions) == 7
    files.refs_path.unlink()
    assert len(files.load_as_is().expressions) == 2


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"ann_id": [1, -1]}, r"`ann_id` mixes -1, no target, with ids: \(1, -1\)"),
        ({"ann_id": [-1], "category_id": [-1]}, r"`no_target` is False, which contradicts ann_id \[-1\]"),
        ({"no_target": True}, r"`no_target` is True, which contradicts ann_id \[1\]"),
        ({"no_target": 0}, r"`no_target` should be of type bool, not 0"),
        ({"ann_id": []}, r"`ann_id` should be \[-1\] for no target"),
        ({"ann_id": None}, r"`ann_id` should be an id or a list of ids"),
        ({"ann_id": [-2]}, r"-2, which no referred image has"),
        ({"category_id": "dog"}, r"`category_id` should be an id or a list of ids"),
    ],
)
def test_what_contradicts_itself_is_named(files, changes: dict[str, Any], text: str):
    files.refs[0] |= changes
    with pytest.raises(DataError, match=text) as caught:
        files.load()
    assert caught.value.facts["ref_id"] == 1


def test_files_without_no_target_are_judged_by_ann_id_and_counted(files):
    for ref in files.refs:
        del ref["no_target"]
    dataset = files.load()
    assert [e.is_no_target for e in dataset.expressions] == [False] * 4 + [True] + [False] * 2
    assert dataset.warnings == ("Refs without the field no_target, judged by ann_id: 5 (first ref_id: 1).",)


def test_refs_may_lack_category_id_or_state_another(files):
    del files.refs[0]["category_id"]
    files.refs[3]["category_id"] = [7]
    files.refs[4]["category_id"] = [1, 1]
    assert files.load().warnings == (
        "Refs whose category_id is not their annotation's, which is used: 2 (first ref_id: 4).",
    )


def test_single_targets_in_val_are_reported_since_the_published_file_has_none(files):
    files.refs[1]["split"] = files.refs[3]["split"] = files.refs[4]["split"] = "val"
    assert files.load().warnings == (
        "Expressions of val with one target, which the published file is said to lack: 1 (first sent_id: 20).",
    )


def test_an_old_file_loads_and_says_so_where_its_test_splits_are_asked_for(files):
    files.refs[2]["split"] = "val"
    files.refs.append(files.ref(6, [2, 1], "two", split="val"))
    dataset = files.load()
    assert dataset.splits == ("train", "val")
    for split in ("testA", "testB"):
        with pytest.raises(
            ConfigError, match="old file from before 2023-08-29, without test splits"
        ) as caught:
            select_split(dataset, split)
        assert caught.value.facts["expected"] == ("train", "val")


def test_splits_are_taken_by_equality(files):
    files.refs[0]["split"] = "testAB"
    assert [e.sent_id for e in select_split(files.load(), "testA")] == [30]
    with pytest.raises(ConfigError, match="no split 'test'; it has testAB, train, testA"):
        select_split(files.load(), "test")

"""`ris data check`, as a user sees it."""

from __future__ import annotations

import json
import os
import pickle
import shutil
from pathlib import Path
from typing import Any

import pytest


@pytest.fixture(scope="module")
def drawn_all(tmp_path_factory, ris) -> Path:
    """Every layout in one data root, of a few images."""
    root = tmp_path_factory.mktemp("all") / "data"
    result = ris(
        "data", "synth", "--out", root, "--layout", "all", "--train", 6, "--val", 3, "--test", 2, "--seed", 5
    )
    assert result.exit_code == 0, result.output
    return root


@pytest.fixture
def data(drawn_data, tmp_path) -> Path:
    """A drawn refcoco that a test may damage."""
    return Path(shutil.copytree(drawn_data, tmp_path / "data"))


def test_every_layout_is_checked_and_usable(ris, drawn_all):
    result = ris("data", "check", "--data", drawn_all)
    assert result.exit_code == 0, result.output
    for part in (
        "refcoco.unc",
        "≠ 120,624 S",
        "differs from the published dataset\n",
        "differs from the published dataset where its numbers are unsure",
        "refs by no_target: ",
        "refs by source: ",
        "images by folder: train2014",
        "custom.drawn",
        "Image leakage",
        "≠ 33,723 D",
        "Published numbers are S stated by a source, D derived",
    ):
        assert part in result.stdout, part
    assert result.stderr == ""
    tables = [
        line.strip()
        for line in result.stdout.splitlines()
        if line.strip().count(".") == 1 and " " not in line.strip()
    ]
    assert tables == [
        "refcoco.unc", "refcoco+.unc", "refcocog.umd", "refcocog.google", "grefcoco.unc", "ref-zom.final",
        "custom.drawn",
    ]  # fmt: skip


def test_no_table_is_wider_than_the_page(ris, drawn_all):
    lines = ris("data", "check", "--data", drawn_all).stdout.splitlines()
    borders = [line for line in lines if line.startswith("┏")]
    assert borders
    assert max(map(len, borders)) <= 110
    assert not any("…" in line for line in lines)


def test_json_holds_everything_and_nothing_else_is_on_stdout(ris, drawn_all):
    document = json.loads(ris("data", "check", "--data", drawn_all, "--json").stdout)
    assert document["exit_code"] == 0
    by_name = {dataset["table_name"]: dataset for dataset in document["datasets"]}
    assert by_name["grefcoco.unc"]["counts"]["val"]["one"] == 0
    assert by_name["ref-zom.final"]["seen"]["images by folder"].keys() == {"train2014", "val2014"}
    assert by_name["refcoco.unc"]["images"]["missing"] == 0
    assert by_name["refcoco.unc"]["masks"]["train"]["overlapping"] == 0
    # One pair for each training split and each split for evaluation.
    splits = [f"{name}:{split}" for name, dataset in by_name.items() for split in dataset["splits"]]
    train = [name for name in splits if name.endswith(":train")]
    assert len(document["leaks"]) == len(train) * (len(splits) - len(train))
    assert document["merges"][0]["published"]["train sentences that leak"]["value"] == 33_723


def test_a_selection_is_all_that_is_looked_at(ris, drawn_all):
    result = ris(
        "data", "check", "--data", drawn_all, "--split", "refcoco:val,custom/drawn", "--no-masks", "--json"
    )
    document = json.loads(result.stdout)
    assert [(one["table_name"], one["splits"]) for one in document["datasets"]] == [
        ("refcoco.unc", ["val"]),
        ("custom.drawn", ["train", "val", "test"]),
    ]
    assert document["datasets"][0]["masks"] == {}
    assert (
        "pixels"
        not in ris("data", "check", "--data", drawn_all, "--split", "refcoco:val", "--no-masks").stdout
    )


def test_what_is_not_usable_is_named_with_the_code_of_bad_data(ris, data):
    images = sorted((data / "images" / "train2014").iterdir())
    images[0].unlink()
    images[1].write_bytes(b"no image")
    result = ris("data", "check", "--data", data)
    assert result.exit_code == 3
    assert f"missing images, 1:\n  for example {images[0].name}\n  searched: " in result.stdout
    assert "images/mscoco/images/train2014 (no such folder)" in result.stdout
    assert f"unreadable images, 1, for example:\n  {images[1]} cannot be read" in result.stdout
    assert "34 of 36 can be used" in result.stdout


def test_a_hostile_pickle_is_refused_and_the_rest_checked(ris, data):
    class Hostile:
        def __reduce__(self) -> Any:
            return os.mkdir, (str(data / "owned"),)

    shutil.copytree(data / "refcoco", data / "refcoco+")
    (data / "refcoco" / "refs(unc).p").write_bytes(pickle.dumps([Hostile()]))
    result = ris("data", "check", "--data", data)
    assert result.exit_code == 4
    assert "error: refcoco.unc: " in result.stderr
    assert "posix.mkdir" in result.stderr
    assert "refcoco+.unc" in result.stdout
    assert not (data / "owned").exists()


def test_odd_masks_and_sentences_get_a_table(ris, data):
    path = data / "refcoco" / "refs(unc).p"
    refs = pickle.loads(path.read_bytes())
    refs[0]["sentences"][0]["sent"] = " "
    path.write_bytes(pickle.dumps(refs, 2))
    instances_path = data / "refcoco" / "instances.json"
    instances = json.loads(instances_path.read_text())
    annotation = next(one for one in instances["annotations"] if one["id"] == refs[0]["ann_id"])
    annotation["segmentation"] = [annotation["segmentation"][0]] * 2 + [[1.0, 2.0]]
    instances_path.write_text(json.dumps(instances))
    result = ris("data", "check", "--data", data)
    assert result.exit_code == 0, "odd, but usable"
    assert "Odd sentences" in result.stdout
    for part in ("blank", "overlapping", "100.00", "degenerate polygons, dropped: 1, of 1 of the"):
        assert part in result.stdout, part
    assert "warnings of the loader:\n  Blank sentences, kept: 1" in result.stdout


def test_text_of_a_file_cannot_steer_the_terminal(ris, data):
    instances_path = data / "refcoco" / "instances.json"
    instances = json.loads(instances_path.read_text())
    for image in instances["images"]:
        image["file_name"] = "\x1b]0;owned\x07" + image["file_name"]
    instances_path.write_text(json.dumps(instances))
    result = ris("data", "check", "--data", data)
    assert result.exit_code == 3
    assert "\\x1b]0;owned\\x07" in result.stdout
    assert "\x1b" not in result.stdout + result.stderr


def test_an_empty_root_and_an_unknown_name_end_with_their_codes(ris, tmp_path):
    result = ris("data", "check", "--data", tmp_path)
    assert result.exit_code == 3
    assert "No dataset lies below" in result.stderr
    result = ris("data", "check", "--data", tmp_path, "--split", "refcooc")
    assert result.exit_code == 2
    assert "Did you mean 'refcoco'" in result.stderr
    result = ris("data", "check", "--data", tmp_path, "--split", "all")
    assert result.exit_code == 3
    assert result.stderr.count("error: ") == 5

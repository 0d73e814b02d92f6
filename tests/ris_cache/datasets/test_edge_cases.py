"""Every accident that a dataset's files are known for, built on disk, and what becomes of it."""

from __future__ import annotations

import gc
import io
import json
import os
import pickle
import pickletools
from typing import Any

import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as coco_mask

from ris_cache.datasets.image_roots import ImageRoots
from ris_cache.datasets.load import load_dataset
from ris_cache.datasets.records import Rle
from ris_cache.datasets.segmentation import rasterise
from ris_cache.datasets.selection import PUBLISHED_DATASETS, parse_selections, select_split
from ris_cache.encoders.images import decode_image
from ris_cache.errors import ConfigError, DataError, UnsafePickleError

ALL = ["refcoco", "refcoco+", "refcocog", "grefcoco", "ref-zom"]
SEVERAL = ["grefcoco", "ref-zom"]
PICKLED = ["refcoco", "refcoco/google", "refcoco+", "refcocog", "refcocog/google", "ref-zom"]
every_dataset = pytest.mark.parametrize("name", ALL)


def annotation(files, ann_id: int) -> dict[str, Any]:
    return next(found for found in files.instances["annotations"] if found["id"] == ann_id)


def mask_of(dataset, ann_id: int) -> np.ndarray:
    instance = dataset.instances[ann_id]
    image = dataset.images[instance.image_id]
    size = (image.height, image.width)
    return rasterise(instance.segmentation, frame_size=size, grid_size=size)


# Images.


@every_dataset
def test_the_file_name_of_a_ref_is_ignored(name, published):
    files = published(name)
    files.refs[0]["file_name"] = "../../etc/passwd"
    dataset = files.load()
    assert dataset.images[10].file_name == "COCO_train2014_000000000010.jpg"
    assert dataset.warnings == ()


@every_dataset
def test_images_missing_on_disk_are_one_error_with_count_and_examples(name, published):
    images = published(name).load().images
    with pytest.raises(DataError, match=r"2 of 2 images are missing, for example COCO_") as caught:
        ImageRoots(published(name).root).resolve(images.values())
    assert caught.value.facts["examples"] == tuple(image.file_name for image in images.values())


@every_dataset
@pytest.mark.parametrize(
    "file_name", ["../secret.jpg", "/etc/passwd", "a/../../b.jpg", "custom/../../b.jpg", "a\\b.jpg", ".."]
)
def test_an_image_path_out_of_the_root_is_refused(name, file_name, published):
    files = published(name)
    files.instances["images"][0]["file_name"] = file_name
    images = files.load().images
    with pytest.raises(DataError, match=r"not a plain name|not one below"):
        ImageRoots(files.root).resolve(images.values())


def test_an_image_of_another_size_than_its_json_names_the_file_and_both_sizes(published, tmp_path):
    record = published("refcoco").load().images[10]
    path = tmp_path / record.file_name
    Image.new("RGB", (record.height, record.width)).save(path)
    with pytest.raises(DataError, match=r"000000000010.jpg is 60x40 .* annotation says 40x60"):
        decode_image(path, expected_size=(record.height, record.width))


@pytest.mark.parametrize("mode", ["L", "CMYK", "P"])
def test_greyscale_cmyk_and_palette_images_become_rgb(mode, tmp_path):
    path = tmp_path / ("a.png" if mode == "P" else "a.jpg")
    Image.new("RGB", (60, 40), (204, 204, 204)).convert(mode).save(path)
    pixels = decode_image(path, expected_size=(40, 60))
    assert pixels.shape == (40, 60, 3)
    assert np.abs(pixels.astype(int) - 204).max() <= 3


# Targets.


@every_dataset
def test_an_ann_id_that_instances_json_lacks_is_an_error_with_the_ref_id(name, published):
    files = published(name)
    files.refs[1]["ann_id"] = [999] if name in SEVERAL else 999
    with pytest.raises(DataError, match="ref_id 2: `ann_id` is 999, which no referred image has") as caught:
        files.load()
    assert (caught.value.facts["ref_id"], caught.value.facts["ann_id"]) == (2, 999)


@every_dataset
def test_an_annotation_on_another_image_is_an_error(name, published):
    files = published(name)
    files.refs[1]["image_id"] = 11
    with pytest.raises(DataError, match="lies on image 10, not on the ref's image 11") as caught:
        files.load()
    assert (caught.value.facts["expected"], caught.value.facts["found"]) == (11, 10)


@every_dataset
def test_an_annotation_of_another_category_is_a_warning(name, published):
    files = published(name)
    files.refs[1]["category_id"] = 1
    dataset = files.load()
    assert dataset.expressions[2].category_ids == (18,)
    assert dataset.warnings == (
        "Refs whose category_id is not their annotation's, which is used: 1 (first ref_id: 2).",
    )


@every_dataset
def test_one_id_and_a_list_of_one_are_the_same(name, published):
    one, several = published(name), published(name)
    one.refs[0] |= {"ann_id": 1, "category_id": 1}
    several.refs[0] |= {"ann_id": [1], "category_id": [1]}
    assert one.load() == several.load()


def test_minus_one_in_grefcoco_and_source_zero_in_ref_zom_are_no_target(published):
    for name in SEVERAL:
        files = published(name)
        dataset = files.load()
        (expression,) = (e for e in dataset.expressions if e.ref_id == 4)
        assert (expression.is_no_target, expression.target_kind, expression.is_degenerate) == (
            *(True, "none"),
            False,
        )
        assert (expression.ann_ids, expression.category_ids) == ((), ())


def test_an_empty_list_in_ref_zom_is_no_target(published):
    files = published("ref-zom")
    files.refs[0]["ann_id"] = []
    assert files.load().expressions[0].is_no_target


def test_minus_one_beside_real_ids_is_an_error(published):
    for name in SEVERAL:
        files = published(name)
        files.refs[4]["ann_id"] = [1, -1]
        with pytest.raises(DataError, match=r"ref_id 5: `ann_id`.*-1"):
            files.load()


@pytest.mark.parametrize("index", [0, 3])
def test_no_target_that_contradicts_ann_id_is_an_error(index, published):
    files = published("grefcoco")
    files.refs[index]["no_target"] = not files.refs[index]["no_target"]
    with pytest.raises(DataError, match=r"`no_target` is (True|False), which contradicts ann_id"):
        files.load()


def test_source_zero_wins_over_an_ann_id_with_a_warning(published):
    files = published("ref-zom")
    files.refs[3]["ann_id"] = [1, 2]
    dataset = files.load()
    assert dataset.expressions[4].is_no_target
    assert dataset.warnings == (
        "Refs of source zero that have an ann_id, taken as no target: 1 (first ref_id: 4).",
    )


@pytest.mark.parametrize("name", SEVERAL)
def test_an_ann_id_given_twice_counts_once(name, published):
    files = published(name)
    files.refs[4] |= {"ann_id": [2, 1, 2], "category_id": [18, 1, 18]}
    dataset = files.load()
    assert dataset.expressions[5].ann_ids == (2, 1)
    assert dataset.warnings == ()


@every_dataset
def test_several_refs_on_one_annotation_are_kept_apart(name, published):
    files = published(name)
    files.refs.append(files.ref(6, [1], "the same man", split="train"))
    expressions = files.load().expressions
    assert [e.ref_id for e in expressions if e.ann_ids == (1,)] == [1, 1, 6]


# Ids and sentences.


@every_dataset
def test_a_ref_id_given_twice_is_an_error(name, published):
    files = published(name)
    files.refs[1]["ref_id"] = 1
    with pytest.raises(DataError, match="ref_id 1: `ref_id` occurs twice in the file"):
        files.load()


@every_dataset
def test_a_sent_id_given_twice_is_an_error(name, published):
    files = published(name)
    files.refs[1]["sentences"][0]["sent_id"] = 11
    with pytest.raises(DataError, match="ref_id 2: `sent_id` 11 occurs in ref_id 1 too"):
        files.load()
    files.refs[0]["sentences"][0]["sent_id"] = 11
    with pytest.raises(DataError, match="ref_id 1: `sentences` should have sentences of different sent_id"):
        files.load()


@every_dataset
@pytest.mark.parametrize("sent_ids", ["absent", [10], [10, 11, 12]])
def test_sent_ids_that_are_absent_or_too_many_come_from_the_sentences(name, sent_ids, published):
    files = published(name)
    files.refs[0]["sent_ids"] = sent_ids
    if sent_ids == "absent":
        del files.refs[0]["sent_ids"]
    dataset = files.load()
    assert [e.sent_id for e in dataset.expressions[:2]] == [10, 11]
    assert dataset.warnings == (
        "Refs whose sent_ids are not their sentences', which are used: 1 (first ref_id: 1).",
    )


@every_dataset
def test_blank_sentences_are_kept_and_counted(name, published):
    files = published(name)
    files.refs[0]["sentences"][0] |= {"raw": " \t", "sent": ""}
    dataset = files.load()
    assert (dataset.expressions[0].raw, dataset.expressions[0].sent) == (" \t", "")
    assert dataset.warnings == ("Blank sentences, kept: 1 (first sent_id: 10).",)


ODD_TEXT = "café\u00a0\u200b 左 \x1b[31m\x07\r\n\x00 🐕\u202e end"


@every_dataset
def test_odd_characters_in_a_text_are_kept(name, published):
    files = published(name)
    files.refs[0]["sentences"][0] |= {"raw": ODD_TEXT, "sent": ODD_TEXT}
    expression = files.load().expressions[0]
    assert (expression.raw, expression.sent) == (ODD_TEXT, ODD_TEXT)


# Outlines.


@every_dataset
@pytest.mark.parametrize(
    "segmentation", [[], [[]], [[1.0, 1.0, 5.0, 5.0]], [[1.0] * 7], [[1, 1, 5, 1], [2, 2, 9, 2, 9, 9, 9]]]
)
def test_an_outline_of_which_nothing_can_be_drawn_is_flagged_or_dropped(name, segmentation, published):
    files = published(name)
    annotation(files, 1)["segmentation"] = segmentation
    dataset = files.load()
    assert [e.is_degenerate for e in dataset.expressions if e.ref_id in (1, 2)] == [True, True, False]
    assert dataset.expressions[0].target_kind == "one"
    assert not mask_of(dataset, 1).any()
    assert dataset.warnings == (
        "Refs without a polygon that encloses anything, kept as empty masks: 1 (first ref_id: 1).",
    )
    dropped = files.load(drop_degenerate=True)
    assert dropped.expressions == dataset.expressions[2:]
    assert dropped.warnings == (
        "Refs without a polygon that encloses anything, left out: 1 (first ref_id: 1).",
    )


@every_dataset
def test_an_image_whose_refs_are_all_dropped_goes_with_its_objects(name, published):
    files = published(name)
    annotation(files, 5)["segmentation"] = []
    dropped = files.load(drop_degenerate=True)
    assert list(dropped.images) == [10]
    assert list(dropped.instances) == [1, 2, 3, 4]


@every_dataset
def test_only_the_sound_polygons_of_an_outline_are_drawn(name, published):
    files = published(name)
    whole = mask_of(files.load(), 1)
    annotation(files, 1)["segmentation"] += [[1.0, 1.0], [3.0] * 7, []]
    dataset = files.load()
    assert np.array_equal(mask_of(dataset, 1), whole)
    assert dataset.warnings == ()


@every_dataset
def test_a_target_that_covers_no_pixel_is_kept_and_not_degenerate(name, published):
    files = published(name)
    annotation(files, 1)["segmentation"] = [[5.0, 5.0, 6.0, 6.0, 7.0, 7.0]]
    dataset = files.load()
    assert not mask_of(dataset, 1).any()
    assert (dataset.expressions[0].target_kind, dataset.expressions[0].is_degenerate) == ("one", False)


@every_dataset
@pytest.mark.parametrize("form", ["runs", "text", "list"])
def test_run_lengths_are_decoded_in_each_form(name, form, published):
    files = published(name)
    runs = {"size": [40, 60], "counts": [0, 100, 2300]}
    compressed = coco_mask.frPyObjects(runs, 40, 60)["counts"].decode()
    annotation(files, 1)["segmentation"] = {
        "runs": runs,
        "text": {"size": [40, 60], "counts": compressed},
        "list": [runs, {"size": [40, 60], "counts": [40, 10, 2350]}],
    }[form]
    dataset = files.load()
    expected = np.zeros(2400, bool)
    expected[:100] = True
    assert np.array_equal(mask_of(dataset, 1), expected.reshape(60, 40).T)
    assert isinstance(dataset.instances[1].segmentation, Rle)


@pytest.mark.parametrize("name", SEVERAL)
def test_a_crowd_beside_other_targets_is_left_out_of_them(name, published):
    files = published(name)
    files.refs[4] |= {"ann_id": [3, 2, 1], "category_id": [1, 18, 1]}
    dataset = files.load()
    assert dataset.expressions[5].ann_ids == (2, 1)
    assert dataset.expressions[5].category_ids == (18, 1)
    assert dataset.warnings == (
        "Refs with crowds beside other targets, left out of the targets: 1 (first ref_id: 5).",
    )


@every_dataset
def test_a_crowd_alone_is_a_target(name, published):
    files = published(name)
    files.refs[0] |= {"ann_id": [3], "category_id": [1]}
    dataset = files.load()
    assert dataset.expressions[0].ann_ids == (3,)
    assert mask_of(dataset, 3).sum() == 100
    assert dataset.warnings == ("Refs whose only targets are crowds, kept: 1 (first ref_id: 1).",)


# Splits.


@every_dataset
def test_an_unknown_split_names_those_that_are_there(name, published):
    dataset = published(name).load()
    with pytest.raises(ConfigError, match=f"has no split 'vall'; it has {', '.join(dataset.splits)}"):
        select_split(dataset, "vall")
    with pytest.raises(ConfigError, match=r"Unknown split of .* 'vall'.*known: train"):
        parse_selections(f"{name}:vall")


def test_an_old_grefcoco_says_that_it_lacks_the_test_splits(published):
    files = published("grefcoco")
    del files.refs[2]
    with pytest.raises(ConfigError, match="old file from before 2023-08-29, without test splits"):
        select_split(files.load(), "testB")


def test_the_google_split_of_refcocog_has_no_test(published):
    files = published("refcocog/google")
    files.refs[2]["split"] = "val"
    (selection,) = parse_selections("refcocog/google:test")
    with pytest.raises(ConfigError, match=r"refcocog \(google\) has no split 'test'; it has train, val\."):
        select_split(files.load(), selection.split)


def test_names_that_begin_with_test_follow_the_refer_api(published):
    files = published("refcoco")
    for ref, split in zip(files.refs, ("testA", "testAB", "testB"), strict=True):
        ref["split"] = split
    dataset = files.load()
    assert {name: [e.ref_id for e in select_split(dataset, name)] for name in ("test", "testA", "testB")} == {
        "test": [1, 1, 2, 3],
        "testA": [1, 1, 2],
        "testB": [2, 3],
    }


# Files.


@every_dataset
def test_a_folder_one_too_deep_is_recognised(name, published):
    files = published(name)
    files.folder = f"{name}/{name}"
    with pytest.raises(DataError, match=r"is missing.* It lies one folder too deep, in .*; move"):
        files.load()


@every_dataset
def test_a_data_root_that_is_the_folder_itself_is_recognised(name, published):
    files = published(name)
    files.folder = "."
    with pytest.raises(DataError, match="the data root must be the folder that holds"):
        files.load()


@pytest.mark.parametrize("name", [*ALL, "custom"])
@pytest.mark.parametrize("place", ["", "folder"])
def test_the_leavings_of_a_macos_archive_are_recognised(name, place, tmp_path):
    (tmp_path / (name if place else "") / "__MACOSX").mkdir(parents=True)
    split_by = PUBLISHED_DATASETS.get(name, ("birds",))[0]
    with pytest.raises(DataError, match=r"is missing.* __MACOSX holds only macOS's copies"):
        load_dataset(tmp_path, name, split_by)


@pytest.mark.parametrize("place", ["birds.jsonl", "custom/custom/birds.jsonl", "custom/birds/birds.jsonl"])
def test_a_custom_file_in_the_wrong_folder_is_recognised(place, tmp_path):
    (tmp_path / place).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / place).write_text("{}")
    with pytest.raises(DataError, match=f"It lies in {(tmp_path / place).parent}; move it to"):
        load_dataset(tmp_path, "custom", "birds")


@every_dataset
def test_a_dataset_that_is_not_there_says_what_to_do(name, tmp_path):
    with pytest.raises(DataError, match=r"is missing\. (Unpack|Download) .*" + str(tmp_path)):
        load_dataset(tmp_path, name, PUBLISHED_DATASETS[name][0])


@every_dataset
def test_instances_that_are_missing_are_named(name, published):
    files = published(name)
    files.write()
    (files.directory / "instances.json").unlink()
    with pytest.raises(DataError, match=r"instances\.json is missing"):
        files.load_as_is()


class Hostile:
    """Runs a command wherever it is unpickled by `pickle`."""

    def __init__(self, command: str) -> None:
        self.command = command

    def __reduce__(self) -> Any:
        return os.system, (self.command,)


@pytest.mark.parametrize("name", [*PICKLED, "grefcoco"])
@pytest.mark.parametrize("protocol", range(6))
def test_a_pickle_that_runs_code_is_refused_and_nothing_is_run(name, protocol, published, tmp_path):
    files = published(name)
    files.refs_name = files.refs_name.replace(".json", ".p")
    files.write()
    trap = tmp_path / "sprung"
    files.refs_path.write_bytes(pickle.dumps([Hostile(f"touch '{trap}'")], protocol))
    with pytest.raises(UnsafePickleError, match=r"asks for the global .*system.* nothing in it was run"):
        files.load_as_is()
    assert not trap.exists()
    pickle.loads(files.refs_path.read_bytes())
    assert trap.exists()  # the trap works


@pytest.mark.parametrize("name", [*PICKLED, "grefcoco"])
def test_numpy_scalars_in_a_pickle_are_named_with_their_place(name, published):
    files = published(name)
    files.refs_name = files.refs_name.replace(".json", ".p")
    files.refs[0]["ref_id"] = np.int64(1)
    files.write = lambda: None  # type: ignore[method-assign]
    files.directory.mkdir()
    (files.directory / "instances.json").write_text(json.dumps(files.instances))
    files.refs_path.write_bytes(pickle.dumps(files.refs, 2))
    with pytest.raises(UnsafePickleError, match="numpy") as caught:
        files.load_as_is()
    offset = caught.value.facts["offset"]
    at = {p: op.name for op, _, p in pickletools.genops(io.BytesIO(files.refs_path.read_bytes()))}
    assert at[offset] == "GLOBAL"


BOMBS = {
    "deep lists": b"[" * 100_000,
    "deep objects": b'{"a":' * 100_000,
    "a long number": b"[" + b"9" * 100_000 + b"]",
    "not closed": b'[{"ref_id": 1',
    "not text": b"[\xff\xfe]",
}


@pytest.mark.parametrize("bomb", BOMBS)
@every_dataset
def test_a_json_bomb_is_refused(name, bomb, published):
    files = published(name)
    files.write()
    path = files.refs_path if name == "grefcoco" else files.directory / "instances.json"
    path.write_bytes(BOMBS[bomb])
    with pytest.raises(DataError, match="is truncated or not JSON") as caught:
        files.load_as_is()
    assert caught.value.facts["path"] == path


@every_dataset
@pytest.mark.parametrize("depth", range(800, 1000, 20))
def test_json_that_just_parses_but_is_too_deep_to_be_shown_is_refused(name, depth, published):
    files = published(name)
    files.instances["annotations"][0]["segmentation"] = "@"
    files.write()
    path = files.directory / "instances.json"
    path.write_text(path.read_text().replace('"@"', "[" * depth + "]" * depth))
    with pytest.raises(DataError):
        files.load_as_is()


@every_dataset
def test_an_annotation_file_of_enormous_size_is_refused_unread(name, published):
    files = published(name)
    files.write()
    path = files.directory / "instances.json"
    with path.open("ab") as file:
        file.truncate((1 << 30) + 1)  # a hole: takes no space
    with pytest.raises(DataError, match="bytes, more than the 1073741824 accepted") as caught:
        files.load_as_is()
    assert caught.value.facts["path"] == path


# Names.


def test_load_dataset_knows_every_name(published):
    for name, split_bys in PUBLISHED_DATASETS.items():
        for split_by in split_bys:
            dataset = published(f"{name}/{split_by}").load()
            assert (dataset.name, dataset.split_by) == (name, split_by)


@pytest.mark.parametrize(
    ("dataset", "split_by", "text"),
    [
        ("refcocoo", "unc", "Unknown dataset 'refcocoo'; known: refcoco, .*custom.*Did you mean 'refcoco'"),
        ("../refcoco", "unc", "Unknown dataset"),
        ("refcoco", "umd", "refcoco has no split_by 'umd'; known: unc, google"),
        ("grefcoco", "../x", "grefcoco has no split_by"),
        ("custom", "../x", "cannot be the name of a custom dataset"),
    ],
)
def test_unknown_names_are_refused(dataset, split_by, text, tmp_path):
    with pytest.raises(ConfigError, match=text):
        load_dataset(tmp_path, dataset, split_by)


def shared_list(depth: int) -> list[Any]:
    """Two items that are one list, of two items that are one list, …: small in a file, 2**depth to show."""
    value: list[Any] = [1, 1]
    for _ in range(depth):
        value = [value, value]
    return value


@pytest.mark.parametrize("value", [10**5000, shared_list(50)], ids=["huge number", "shared lists"])
@pytest.mark.parametrize("field", ["ref_id", "image_id", "split", "sentences", "ann_id", "sent_id"])
@pytest.mark.parametrize("name", ["refcoco", "ref-zom"])
def test_a_value_too_large_to_be_shown_is_refused_at_once(published, name, field, value):
    files = published(name)
    (files.refs[0]["sentences"][0] if field == "sent_id" else files.refs[0])[field] = value
    with pytest.raises(DataError, match=field) as caught:
        files.load()
    assert len(str(caught.value)) < 600


@every_dataset
def test_a_split_that_no_name_selects_is_reported(published, name):
    files = published(name)
    assert not any("selects" in warning for warning in files.load().warnings)
    files.refs[0]["split"] = "Train"
    (warning,) = (warning for warning in files.load().warnings if "selects" in warning)
    assert warning.startswith("Expressions of split 'Train', which none of train, ")
    assert warning.endswith(" selects: 2.")


@every_dataset
@pytest.mark.parametrize("was_enabled", [True, False])
def test_loading_leaves_garbage_collection_as_it_was(published, name, was_enabled):
    files = published(name)
    try:
        (gc.enable if was_enabled else gc.disable)()
        files.load()
        assert gc.isenabled() is was_enabled
        files.instances = {}
        with pytest.raises(DataError):
            files.load()
        assert gc.isenabled() is was_enabled
    finally:
        gc.enable()


@every_dataset
@pytest.mark.parametrize("category_id", [-1, 2**31])
def test_a_category_id_that_the_cache_cannot_hold_is_refused(published, name, category_id):
    files = published(name)
    files.instances["categories"].append({"id": category_id, "name": "cat"})
    with pytest.raises(DataError, match=f"category_id {category_id}: `id` should be from 0 to 2147483647"):
        files.load()


@every_dataset
def test_an_image_that_claims_a_giant_size_is_refused(published, name):
    files = published(name)
    files.instances["images"][0] |= {"height": 10_001, "width": 10_000}
    with pytest.raises(DataError, match="image_id 10: `height` times `width` is more than 100000000"):
        files.load()

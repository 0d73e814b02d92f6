"""`check_datasets` finds what is wrong with a dataset, and nothing that is not."""

from __future__ import annotations

import itertools
import json
import os
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from ris_cache.datasets import Selection
from ris_cache.datasets.check import CheckReport, check_datasets, find_datasets
from ris_cache.datasets.check.found import refs_paths
from ris_cache.datasets.check.masks import judge_masks
from ris_cache.datasets.load import load_dataset
from ris_cache.datasets.records import ExpressionRecord, ImageRecord, InstanceRecord, ReferringDataset, Rle
from ris_cache.datasets.segmentation import parse_segmentation, part_count, union_mask
from ris_cache.errors import DataError

ALL = ("refcoco", "refcoco/google", "refcoco+", "refcocog", "refcocog/google", "grefcoco", "ref-zom")


def put_images(root: Path, *names: str, size: tuple[int, int] = (60, 40)) -> None:
    for name in names or ("COCO_train2014_000000000010.jpg",):
        folder = root / "images" / name.split("_")[1]
        folder.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", size).save(folder / name)


@pytest.fixture
def with_images(published, tmp_path) -> Any:
    """Make the files of a dataset, written, with its images."""

    def make(text: str) -> Any:
        files = published(text)
        files.write()
        put_images(tmp_path)
        put_images(tmp_path, files.instances["images"][1]["file_name"], size=(30, 30))
        return files

    return make


def check(root: Path, *names: Selection, **options: Any) -> CheckReport:
    return check_datasets(root, names or None, **options)


# Which datasets are there.


@pytest.mark.parametrize("text", ALL)
def test_every_published_dataset_is_found_counted_and_usable(with_images, tmp_path, text):
    with_images(text)
    report = check(tmp_path)
    assert report.failures == ()
    assert report.exit_code == 0
    (dataset,) = report.datasets
    assert dataset.table_name.split(".")[0] == text.split("/")[0]
    train = dataset.counts["train"]
    mixed = dataset.table_name in ("grefcoco.unc", "ref-zom.final")
    assert train == {
        "refs": 4 if mixed else 2,
        "images": 1,
        "sentences": 6 if mixed else 3,
        "objects": 2,
        "none": 1 if mixed else 0,
        "one": 3,
        "many": 2 if mixed else 0,
    }
    assert dataset.counts["total"]["sentences"] == train["sentences"] + 1
    assert dataset.differences, "two images are not the published dataset"
    assert dataset.images.num_images == 2


@pytest.mark.parametrize("text", ALL)
def test_every_place_that_is_searched_is_one_that_the_loader_reads(published, tmp_path, text):
    files = published(text)
    files.write()
    (first,) = find_datasets(tmp_path)
    for path in refs_paths(tmp_path, first):
        files.directory.rename(tmp_path / "aside")
        (tmp_path / "aside").rename(path.parent)
        files.folder = path.parent.name
        files.refs_path.unlink()
        files.refs_name = path.name
        files.write()
        assert find_datasets(tmp_path) == (first,)
        assert load_dataset(tmp_path, first.dataset, first.split_by).expressions


def test_a_folder_without_its_files_is_loaded_to_say_what_is_wrong(tmp_path):
    (tmp_path / "refcoco" / "refcoco").mkdir(parents=True)
    (tmp_path / "refcoco" / "refcoco" / "refs(unc).p").touch()
    report = check(tmp_path)
    (failure,) = report.failures
    assert failure.table_name == "refcoco.unc"
    assert "one folder too deep" in failure.error
    assert report.exit_code == 3


@pytest.mark.parametrize(
    ("make", "hint"),
    [
        (lambda root: None, "ris data synth"),
        (lambda root: root.rmdir(), "no such folder"),
        (lambda root: (root / "refs(unc).p").touch(), r"refs\(unc\).p lies in .* itself"),
    ],
)
def test_nothing_at_all_is_an_error_that_says_what_to_do(tmp_path, make, hint):
    root = tmp_path / "data"
    root.mkdir()
    make(root)
    with pytest.raises(DataError, match=hint):
        find_datasets(root)


def test_one_bad_dataset_does_not_keep_the_others_from_being_checked(with_images, tmp_path):
    class Hostile:
        def __reduce__(self) -> Any:
            return os.system, ("true",)

    files = with_images("refcoco")
    hostile = tmp_path / "refcocog" / "refs(umd).p"
    hostile.parent.mkdir()
    (hostile.parent / "instances.json").write_text(json.dumps(files.instances))
    hostile.write_bytes(pickle.dumps([Hostile()]))
    damaged = tmp_path / "grefcoco" / "grefs(unc).json"
    damaged.parent.mkdir()
    damaged.write_text("[{")
    report = check(tmp_path)
    assert [dataset.table_name for dataset in report.datasets] == ["refcoco.unc"]
    assert [(failure.table_name, failure.exit_code) for failure in report.failures] == [
        ("refcocog.umd", 4),
        ("grefcoco.unc", 3),
    ]
    assert "posix.system" in report.failures[0].error
    assert report.exit_code == 4


# Counts of a part.


def test_a_split_is_checked_alone_and_leakage_still_knows_all(with_images, tmp_path):
    files = with_images("refcoco")
    files.refs[1]["split"] = "val"
    files.write()
    report = check(tmp_path, Selection(dataset="refcoco", split_by="unc", split="val"))
    (dataset,) = report.datasets
    assert dataset.splits == ("val",)
    assert set(dataset.counts) == {"val"}
    assert dataset.images.num_images == 1
    assert [(leak.train, leak.evaluation, leak.images, leak.sentences) for leak in report.leaks] == [
        ("refcoco.unc:train", "refcoco.unc:val", 1, 2),
        ("refcoco.unc:train", "refcoco.unc:testA", 0, 0),
    ]
    whole = check(tmp_path, *(Selection(dataset="refcoco", split_by="unc", split=s) for s in ("val", None)))
    assert whole.datasets[0].splits == ("train", "val", "testA")
    assert whole.datasets[0].missing_splits == ("testB",)


def test_a_split_that_is_not_there_is_a_failure(with_images, tmp_path):
    with_images("grefcoco")
    report = check(tmp_path, Selection(dataset="grefcoco", split_by="unc", split="testB"))
    assert "before 2023-08-29" in report.failures[0].error
    assert report.exit_code == 2


def test_groups_of_splits_are_counted_where_numbers_are_published(with_images, tmp_path):
    files = with_images("grefcoco")
    files.refs.append(files.ref(6, [], "a bird", split="testB"))
    files.write()
    (dataset,) = check(tmp_path).datasets
    assert dataset.counts["testA+testB"]["none"] == dataset.counts["testA+testB"]["one"] == 1


# Images.


def test_missing_images_are_counted_with_examples_and_places(published, tmp_path):
    published("ref-zom").write()
    put_images(tmp_path)
    report = check(tmp_path)
    images = report.datasets[0].images
    assert (images.missing, images.missing_examples) == (1, ("COCO_val2014_000000000011.jpg",))
    assert images.searched[str(tmp_path / "images" / "val2014")] is False
    assert all("train2014" not in folder for folder in images.searched)
    assert report.exit_code == 3


def test_sizes_and_unreadable_files_are_found_by_the_header(with_images, tmp_path):
    files = with_images("refcoco")
    folder = tmp_path / "images" / "train2014"
    Image.new("RGB", (40, 60)).save(folder / "COCO_train2014_000000000010.jpg")
    (folder / "COCO_train2014_000000000011.jpg").write_bytes(b"no image")
    report = check(tmp_path)
    images = report.datasets[0].images
    assert (images.missing, images.other_size, images.unreadable) == (0, 1, 1)
    assert "is 60x40 (height x width), annotated as 40x60" in images.other_size_examples[0]
    assert "000000000011.jpg cannot be read" in images.unreadable_examples[0]
    assert report.exit_code == 3
    files.instances["images"][0] |= {"height": 60, "width": 40}
    del files.instances["annotations"][2]  # a run-length mask of the former size
    files.write()
    assert check(tmp_path).datasets[0].images.other_size == 0


def test_an_image_turned_by_its_exif_has_the_size_it_is_shown_in(with_images, tmp_path):
    with_images("refcoco")
    exif = Image.Exif()
    exif[0x0112] = 6
    path = tmp_path / "images" / "train2014" / "COCO_train2014_000000000010.jpg"
    Image.new("RGB", (40, 60)).save(path, exif=exif)
    assert check(tmp_path).exit_code == 0


def test_an_image_name_that_leads_out_of_its_folder_is_refused(with_images, tmp_path):
    files = with_images("refcoco")
    files.instances["images"][0]["file_name"] = "../../secret.jpg"
    files.write()
    (failure,) = check(tmp_path).failures
    assert "not a plain name" in failure.error


def test_shared_images_are_read_once(with_images, tmp_path, monkeypatch):
    for name in ("refcoco", "refcoco+"):
        with_images(name)
    opened = []
    size_of = check_datasets.__globals__["check_images"].__globals__["frame_size"]
    monkeypatch.setattr(
        "ris_cache.datasets.check.images.frame_size", lambda path: opened.append(path) or size_of(path)
    )
    assert check(tmp_path).exit_code == 0
    assert len(opened) == 2


# Sentences and masks.


def test_odd_sentences_are_counted_by_kind(with_images, tmp_path):
    files = with_images("refcoco")
    files.refs += [files.ref(6, [1], " ", "the man"), files.ref(7, [2], "man w dog")]
    files.write()
    (dataset,) = check(tmp_path).datasets
    words = dataset.words["train"]
    assert (words.blank, words.repeated, words.contradictory) == (1, 1, 2)
    assert dataset.words["testA"].blank == 0
    assert any("Blank sentences" in warning for warning in dataset.warnings)


def test_odd_masks_are_counted_by_kind(with_images, tmp_path):
    files = with_images("refcoco")
    square, tiny = [10.0, 10.0, 20.0, 10.0, 20.0, 20.0, 10.0, 20.0], [5.0, 5.0, 5.01, 5.0, 5.0, 5.01]
    shifted = [x + 5 if place % 2 == 0 else x for place, x in enumerate(square)]
    for ann_id, segmentation in ((6, [square, shifted]), (7, [tiny]), (8, [square, [1.0, 2.0, 3.0, 4.0]])):
        files.instances["annotations"].append(
            {"id": ann_id, "image_id": 10, "category_id": 1, "segmentation": segmentation, "iscrowd": 0}
        )
    files.refs += [files.ref(10 + ann_id, [ann_id], f"object {ann_id}") for ann_id in (3, 4, 6, 7, 8)]
    files.write()
    (dataset,) = check(tmp_path).datasets
    masks = dataset.masks["train"]
    assert (masks.crowd, masks.degenerate, masks.overlapping) == (1, 1, 1)
    assert masks.lost == pytest.approx(5 / 15)
    assert (masks.empty_1024, masks.empty_480) == (1, 1)
    assert dataset.dropped is not None
    assert (dataset.dropped.annotations, dataset.dropped.affected, dataset.dropped.parts) == (8, 2, 2)
    without = check(tmp_path, with_masks=False).datasets[0]
    assert without.masks == {}
    assert without.dropped is None
    assert without.words == dataset.words


@st.composite
def targets(draw: st.DrawFn) -> tuple[tuple[int, int], list[Any]]:
    """An image of a few pixels and up to three objects on it: polygons of up to three parts, or masks."""
    size = draw(st.tuples(st.integers(2, 12), st.integers(2, 12)))
    objects: list[Any] = []
    for _ in range(draw(st.integers(1, 3))):
        if draw(st.booleans()):
            point = st.floats(0, 12, width=16)
            parts = st.lists(st.lists(point, min_size=6, max_size=10), min_size=1, max_size=3)
            objects.append(parse_segmentation(draw(parts), size))
        else:
            pixels = draw(st.lists(st.booleans(), min_size=size[0] * size[1], max_size=size[0] * size[1]))
            runs = [0] if pixels[0] else []
            runs += [len(list(group)) for _, group in itertools.groupby(pixels)]
            objects.append(parse_segmentation({"size": list(size), "counts": runs}, size))
    return size, objects


@given(targets())
@settings(max_examples=60, deadline=None)
def test_masks_are_judged_as_drawing_all_their_pixels_would(drawn: tuple[tuple[int, int], list[Any]]) -> None:
    size, objects = drawn
    dataset, expression = dataset_of(size, objects)
    found = judge_masks(dataset, [expression], lambda done, total: None)["train"]
    counts = part_count(objects, frame_size=size, grid_size=size)
    several = (counts > 1).sum()
    assert found.overlapping == int(several > 0)
    assert found.lost == pytest.approx(several / (counts > 0).sum() if several else 0)
    for side, empty in ((1024, found.empty_1024), (480, found.empty_480)):
        mask = union_mask(objects, frame_size=size, grid_size=(side, side))
        assert empty == int(not mask.any() and any(objects))


def dataset_of(size: tuple[int, int], objects: list[Any]) -> tuple[ReferringDataset, ExpressionRecord]:
    expression = ExpressionRecord(
        split="train", ref_id=0, sent_id=0, sent_index=0, image_id=1, raw="a", sent="a",
        ann_ids=tuple(range(len(objects))), category_ids=(1,) * len(objects), is_degenerate=not any(objects),
    )  # fmt: skip
    instances = {
        ann_id: InstanceRecord(ann_id=ann_id, image_id=1, category_id=1, segmentation=s, is_crowd=False)
        for ann_id, s in enumerate(objects)
    }
    image = ImageRecord(image_id=1, file_name="a.jpg", height=size[0], width=size[1])
    dataset = ReferringDataset(
        name="refcoco", split_by="unc", images={1: image}, instances=instances, expressions=(expression,),
        categories=(), warnings=(),
    )  # fmt: skip
    return dataset, expression


def test_a_mask_that_vanishes_on_the_smaller_grid_only_is_told_apart() -> None:
    size = (1024, 1024)
    # One pixel of 1024 has no centre of a 480 grid in it.
    pixels = np.zeros(size, dtype=bool)
    pixels[0, 0] = True
    segmentation = parse_segmentation({"size": list(size), "counts": [0, 1, 1024 * 1024 - 1]}, size)
    assert isinstance(segmentation, Rle)
    dataset, expression = dataset_of(size, [segmentation])
    found = judge_masks(dataset, [expression], lambda done, total: None)["train"]
    assert (found.empty_1024, found.empty_480) == (0, 1)


# What the files hold.


def test_what_is_unsure_of_grefcoco_is_told(with_images, tmp_path):
    with_images("refcoco")
    files = with_images("grefcoco")
    del files.refs[0]["no_target"]
    files.refs.append(files.ref(6, [], "a bird", split="val"))
    files.write()
    seen = check(tmp_path).datasets[1].seen
    assert seen["refs by no_target"] == {"'absent'": 1, "False": 3, "True": 2}
    assert seen["sentences of val by targets"] == {"none": 1}
    assert (seen["sentences with a target"], seen["sentences without target"]) == (6, 2)
    assert seen["different single-target expressions (image, words) of train"] == 3
    assert seen["of them in RefCOCO's train (unc)"] == 3
    assert seen["of RefCOCO's train (unc) that are not among them"] == 0
    assert "pickle protocol" not in seen
    assert len(seen["SHA-256"]) == 64


def test_what_is_unsure_of_ref_zom_is_told(with_images, tmp_path):
    files = with_images("ref-zom")
    files.refs[0]["source"] = "\x1b[31m" + "x" * 100
    del files.refs[1]["category_id"], files.refs[1]["sent_ids"]
    files.write()
    seen = check(tmp_path).datasets[0].seen
    assert seen["pickle protocol"] == 2
    assert seen["refs by source"] == {
        repr("\x1b[31m" + "x" * 100)[:40]: 1,
        "'one'": 2,
        "'zero'": 1,
        "'many'": 1,
    }
    assert seen["refs by form of ann_id"] == {"int": 3, "empty list": 1, "list of several": 1}
    assert seen["refs by form of category_id"]["absent"] == 1
    assert seen["refs with each field"]["sent_ids"] == 4
    assert seen["images by folder"] == {"train2014": 1, "val2014": 1}


@pytest.mark.parametrize(("protocol", "expected"), [(0, "0 or 1"), (1, "0 or 1"), (2, 2), (4, 4)])
def test_the_pickle_protocol_is_told(with_images, tmp_path, protocol, expected):
    files = with_images("refcoco")
    files.refs_path.write_bytes(pickle.dumps(files.refs, protocol))
    assert check(tmp_path).datasets[0].seen["pickle protocol"] == expected


def test_the_first_ref_of_refcoco_is_recognised(with_images, tmp_path):
    name = "first ref is the one that its authors' documentation shows"
    files = with_images("refcoco")
    assert check(tmp_path).datasets[0].seen[name] is False
    files.instances["images"][0]["id"] = 581857
    files.instances["annotations"][0] |= {"id": 1719310, "image_id": 581857}
    files.instances["annotations"] = files.instances["annotations"][:1]
    files.refs = [files.ref(0, [1719310], "THE LADY WITH THE BLUE SHIRT", image_id=581857)]
    files.write()
    assert check(tmp_path).datasets[0].seen[name] is True


# Several datasets.


def test_the_merge_that_numbers_are_published_of_stands_beside_them(with_images, tmp_path):
    for name in ("refcoco", "refcoco+", "refcocog", "refcocog/google"):
        with_images(name)
    umd = tmp_path / "refcocog" / "refs(umd).p"
    refs = pickle.loads(umd.read_bytes())
    refs[1]["split"] = "val"  # on image 10, which the others train on
    umd.write_bytes(pickle.dumps(refs, 2))
    report = check(tmp_path)
    (merged,) = report.merges
    assert merged.tables == ("refcoco.unc", "refcoco+.unc", "refcocog.umd")
    assert merged.figures.keys() == merged.published.keys()
    assert merged.figures["train sentences"] == 3 + 3 + 2
    assert merged.figures["train sentences that leak"] == 3 + 3 + 2
    assert merged.figures["images of a val split alone"] == 1
    assert merged.figures["images that both test on"] == 1
    leaks = {(leak.train, leak.evaluation): leak.sentences for leak in report.leaks}
    assert leaks["refcoco.unc:train", "refcocog.umd:val"] == 3
    assert leaks["refcocog.umd:train", "refcocog.umd:val"] == 2


def test_a_merge_of_others_has_no_published_numbers_and_no_google(with_images, tmp_path):
    for name in ("refcoco", "refcoco/google", "grefcoco"):
        with_images(name)
    (merged,) = check(tmp_path).merges
    assert merged.tables == ("refcoco.unc", "grefcoco.unc")
    assert merged.published == {}
    assert merged.figures["train sentences that leak"] == 0


def test_the_report_is_plain_values(with_images, tmp_path):
    with_images("refcoco")
    report = check(tmp_path)
    document = json.loads(json.dumps(report.as_dict()))
    assert document["exit_code"] == 0
    assert document["datasets"][0]["counts"]["train"]["sentences"] == 3
    assert {one["published"]["evidence"] for one in document["datasets"][0]["differences"]} == {"S", "D"}


def test_progress_is_told_for_images_and_targets(with_images, tmp_path):
    with_images("refcoco")
    told: list[tuple[str, int, int]] = []
    check(tmp_path, progress=lambda *step: told.append(step))
    assert told == [
        ("load refcoco.unc", 0, 1),
        ("images of refcoco.unc", 1, 2),
        ("images of refcoco.unc", 2, 2),
        ("targets of refcoco.unc", 1, 3),
        ("targets of refcoco.unc", 2, 3),
        ("targets of refcoco.unc", 3, 3),
    ]

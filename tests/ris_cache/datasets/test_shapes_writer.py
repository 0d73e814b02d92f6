"""The files of the drawn dataset: RefCOCO's layout, same bytes again, refusals."""

from __future__ import annotations

import hashlib
import json
import pickle
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from ris_cache.datasets.shapes import CATEGORY_IDS, ShapesSummary, write_shapes_dataset
from ris_cache.errors import ConfigError, DataError

NUM_IMAGES = {"train": 16, "val": 6, "testA": 6, "testB": 6}


class PlainUnpickler(pickle.Unpickler):
    """Loads lists, dicts, text and numbers; refuses everything that has to be imported."""

    def find_class(self, module_name: str, global_name: str) -> Any:
        raise AssertionError(f"the pickle imports {module_name}.{global_name}")


def load_refs(root: Path, name: str = "refcoco") -> list[dict[str, Any]]:
    with (root / name / "refs(unc).p").open("rb") as file:
        refs: list[dict[str, Any]] = PlainUnpickler(file).load()
    return refs


def load_instances(root: Path, name: str = "refcoco") -> dict[str, Any]:
    document: dict[str, Any] = json.loads((root / name / "instances.json").read_text(encoding="utf-8"))
    return document


def file_bytes(root: Path) -> dict[str, bytes]:
    return {
        path.relative_to(root).as_posix(): path.read_bytes() for path in root.rglob("*") if path.is_file()
    }


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, ShapesSummary]:
    root = tmp_path_factory.mktemp("drawn")
    return root, write_shapes_dataset(root, num_images=NUM_IMAGES, seed=7)


def test_the_root_holds_the_two_annotation_files_and_the_images_and_nothing_else(
    written: tuple[Path, ShapesSummary],
) -> None:
    root, _ = written
    images = {f"images/train2014/{image['file_name']}" for image in load_instances(root)["images"]}
    assert len(images) == sum(NUM_IMAGES.values())
    assert set(file_bytes(root)) == images | {"refcoco/refs(unc).p", "refcoco/instances.json"}


def test_refs_are_a_protocol_2_pickle_with_the_fields_of_the_real_file(
    written: tuple[Path, ShapesSummary],
) -> None:
    root, _ = written
    assert (root / "refcoco" / "refs(unc).p").read_bytes().startswith(b"\x80\x02")
    refs = load_refs(root)
    for ref in refs:
        assert {key: type(value) for key, value in ref.items()} == {
            "ref_id": int,
            "ann_id": int,
            "image_id": int,
            "category_id": int,
            "file_name": str,
            "split": str,
            "sent_ids": list,
            "sentences": list,
        }
        assert ref["sent_ids"] == [sentence["sent_id"] for sentence in ref["sentences"]]
        for sentence in ref["sentences"]:
            assert {key: type(value) for key, value in sentence.items()} == {
                "tokens": list,
                "raw": str,
                "sent_id": int,
                "sent": str,
            }
            assert " ".join(sentence["tokens"]) == sentence["sent"]
            assert sentence["raw"].lower().strip(" .") == sentence["sent"]
    sent_ids = [sent_id for ref in refs for sent_id in ref["sent_ids"]]
    assert sent_ids == list(range(len(sent_ids)))
    assert [ref["ref_id"] for ref in refs] == list(range(len(refs)))


def test_some_raw_texts_differ_from_their_cleaned_form(written: tuple[Path, ShapesSummary]) -> None:
    sentences = [sentence for ref in load_refs(written[0]) for sentence in ref["sentences"]]
    share = sum(sentence["raw"] != sentence["sent"] for sentence in sentences) / len(sentences)
    assert 0.1 < share < 0.4


def test_refs_point_at_annotations_and_images_that_exist(written: tuple[Path, ShapesSummary]) -> None:
    root, _ = written
    document = load_instances(root)
    images = {image["id"]: image for image in document["images"]}
    annotations = {annotation["id"]: annotation for annotation in document["annotations"]}
    assert len(images) == len(document["images"])
    assert len(annotations) == len(document["annotations"])
    for ref in load_refs(root):
        annotation = annotations[ref["ann_id"]]
        assert annotation["image_id"] == ref["image_id"]
        assert annotation["category_id"] == ref["category_id"]
        stem = images[ref["image_id"]]["file_name"].removesuffix(".jpg")
        assert ref["file_name"].startswith(f"{stem}_")
        assert ref["file_name"].endswith(".jpg")
        assert not (root / "images" / "train2014" / ref["file_name"]).exists()


def test_instances_hold_coco_fields_and_unreferred_objects(written: tuple[Path, ShapesSummary]) -> None:
    root, _ = written
    document = load_instances(root)
    assert set(document) == {"info", "images", "licenses", "annotations", "categories"}
    categories = {category["id"]: category["name"] for category in document["categories"]}
    assert {name: category_id for category_id, name in categories.items()} == CATEGORY_IDS
    assert sorted(categories) != list(range(1, len(categories) + 1))
    for annotation in document["annotations"]:
        assert annotation["category_id"] in categories
        assert annotation["iscrowd"] == 0
        assert annotation["segmentation"]
        for polygon in annotation["segmentation"]:
            assert len(polygon) >= 8
            assert len(polygon) % 2 == 0
    referred = {ref["ann_id"] for ref in load_refs(root)}
    assert referred < {annotation["id"] for annotation in document["annotations"]}


def test_images_decode_to_the_annotated_size_and_are_mostly_not_square(
    written: tuple[Path, ShapesSummary],
) -> None:
    root, _ = written
    images = load_instances(root)["images"]
    for image in images:
        assert image["file_name"] == f"COCO_train2014_{image['id']:012d}.jpg"
        with Image.open(root / "images" / "train2014" / image["file_name"]) as picture:
            picture.load()
            assert (picture.format, picture.mode) == ("JPEG", "RGB")
            assert picture.size == (image["width"], image["height"])
    assert sum(image["width"] != image["height"] for image in images) > 0.8 * len(images)
    assert len({(image["width"], image["height"]) for image in images}) > 0.8 * len(images)


def test_splits_share_no_image_and_the_tests_differ_by_kind_of_referent(
    written: tuple[Path, ShapesSummary],
) -> None:
    refs = load_refs(written[0])
    images = {split: {ref["image_id"] for ref in refs if ref["split"] == split} for split in NUM_IMAGES}
    assert {split: len(found) for split, found in images.items()} == NUM_IMAGES
    assert len(set().union(*images.values())) == sum(NUM_IMAGES.values())
    names = {category_id: name for name, category_id in CATEGORY_IDS.items()}
    kinds = {
        split: {names[ref["category_id"]] for ref in refs if ref["split"] == split}
        for split in ("testA", "testB")
    }
    assert kinds["testA"] <= {"circle", "heart"}
    assert kinds["testB"] <= {"square", "triangle", "star", "cross"}


def test_each_image_has_two_to_four_refs_with_two_or_three_different_sentences(
    written: tuple[Path, ShapesSummary],
) -> None:
    refs = load_refs(written[0])
    by_image: dict[int, list[int]] = {}
    for ref in refs:
        by_image.setdefault(ref["image_id"], []).append(ref["ann_id"])
        sentences = [sentence["sent"] for sentence in ref["sentences"]]
        assert len(set(sentences)) == len(sentences)
        assert len(sentences) in (2, 3)
    for ann_ids in by_image.values():
        assert len(set(ann_ids)) == len(ann_ids)
        assert len(ann_ids) in (2, 3, 4)


def test_the_summary_counts_what_the_files_hold(written: tuple[Path, ShapesSummary]) -> None:
    root, summary = written
    refs, document = load_refs(root), load_instances(root)
    split_of = {ref["image_id"]: ref["split"] for ref in refs}
    assert list(summary.splits) == list(NUM_IMAGES)
    for split, counts in summary.splits.items():
        mine = [ref for ref in refs if ref["split"] == split]
        assert counts.images == NUM_IMAGES[split]
        assert counts.refs == len(mine)
        assert counts.expressions == sum(len(ref["sentences"]) for ref in mine)
        assert counts.instances == sum(
            split_of[annotation["image_id"]] == split for annotation in document["annotations"]
        )
        assert (counts.none, counts.one, counts.many) == (0, counts.expressions, 0)
    assert (summary.layout, summary.split_by) == ("refcoco", "unc")
    assert summary.refs_path == root / "refcoco" / "refs(unc).p"
    assert summary.instances_path == root / "refcoco" / "instances.json"


def test_the_same_seed_writes_the_same_bytes_whatever_the_order_of_splits(
    written: tuple[Path, ShapesSummary], tmp_path: Path
) -> None:
    write_shapes_dataset(tmp_path, num_images=dict(reversed(NUM_IMAGES.items())), seed=7)
    assert file_bytes(tmp_path) == file_bytes(written[0])


def test_the_annotations_of_a_seed_are_pinned(written: tuple[Path, ShapesSummary]) -> None:
    """Figures that are published rest on them. JPEG bytes may differ between versions of Pillow; text may not."""
    digests = {
        name: hashlib.sha256((written[0] / "refcoco" / name).read_bytes()).hexdigest()[:16]
        for name in ("refs(unc).p", "instances.json")
    }
    assert digests == {"refs(unc).p": "472b05c36a9fd983", "instances.json": "71b8c4f840a98490"}


def test_another_seed_draws_other_images(tmp_path: Path) -> None:
    for seed in (1, 2):
        write_shapes_dataset(tmp_path / str(seed), num_images={"val": 1}, seed=seed)
    first, second = (file_bytes(tmp_path / str(seed)) for seed in (1, 2))
    assert first.keys() == second.keys()
    assert all(first[name] != second[name] for name in first)


def test_an_image_does_not_change_when_splits_grow(
    written: tuple[Path, ShapesSummary], tmp_path: Path
) -> None:
    write_shapes_dataset(tmp_path, num_images={"train": 2, "testB": 1}, seed=7)
    small, large = file_bytes(tmp_path / "images"), file_bytes(written[0] / "images")
    assert len(small) == 3
    assert small.items() <= large.items()


def test_an_existing_dataset_is_never_overwritten(tmp_path: Path) -> None:
    write_shapes_dataset(tmp_path, num_images={"train": 2}, seed=1)
    before = file_bytes(tmp_path)
    with pytest.raises(DataError, match=r"exists already.*another directory") as caught:
        write_shapes_dataset(tmp_path, num_images={"train": 2}, seed=2)
    assert caught.value.facts["path"] == tmp_path / "refcoco" / "refs(unc).p"
    assert file_bytes(tmp_path) == before


@pytest.mark.parametrize("left_over", ["refs(unc).p", "instances.json"])
def test_either_annotation_file_alone_is_enough_to_refuse(tmp_path: Path, left_over: str) -> None:
    path = tmp_path / "refcoco" / left_over
    path.parent.mkdir()
    path.write_text("mine")
    with pytest.raises(DataError):
        write_shapes_dataset(tmp_path, num_images={"train": 1}, seed=0)
    assert file_bytes(tmp_path) == {f"refcoco/{left_over}": b"mine"}


def test_a_root_that_is_a_file_is_refused(tmp_path: Path) -> None:
    root = tmp_path / "notes.txt"
    root.write_text("mine")
    with pytest.raises(DataError, match=r"is a file.*Name a directory"):
        write_shapes_dataset(root, num_images={"train": 1}, seed=0)
    assert root.read_text() == "mine"


def test_an_interrupted_run_leaves_no_annotation_file(tmp_path: Path) -> None:
    def interrupt(done: int) -> None:
        if done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_shapes_dataset(tmp_path, num_images={"train": 3}, seed=2, progress=interrupt)
    assert list((tmp_path / "refcoco").iterdir()) == []
    write_shapes_dataset(tmp_path, num_images={"train": 3}, seed=2)
    assert len(load_instances(tmp_path)["images"]) == 3


def test_progress_counts_the_images_written(tmp_path: Path) -> None:
    seen: list[int] = []
    write_shapes_dataset(tmp_path, num_images={"val": 2, "testA": 1}, seed=0, progress=seen.append)
    assert seen == [1, 2, 3]


def test_refcoco_plus_says_nothing_of_location_and_shares_a_root_with_refcoco(tmp_path: Path) -> None:
    write_shapes_dataset(tmp_path, num_images={"train": 2}, seed=3)
    before = file_bytes(tmp_path)
    write_shapes_dataset(tmp_path, name="refcoco+", num_images={"train": 12}, seed=3)
    assert before.items() <= file_bytes(tmp_path).items()
    location = {
        "left",
        "right",
        "top",
        "bottom",
        "above",
        "below",
        "on",
        "at",
        "of",
    }
    words = {
        word
        for ref in load_refs(tmp_path, "refcoco+")
        for sentence in ref["sentences"]
        for word in sentence["tokens"]
    }
    assert words.isdisjoint(location)


def test_image_ids_lie_beyond_those_of_coco(written: tuple[Path, ShapesSummary]) -> None:
    largest_in_coco_2014 = 581_929
    assert all(image["id"] > largest_in_coco_2014 for image in load_instances(written[0])["images"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"name": "refcocog"}, "No drawn dataset is called 'refcocog'.*refcoco, refcoco\\+\\."),
        ({"num_images": {"test": 3}}, "Unknown split 'test'.*train, val, testA, testB"),
        ({"num_images": {"train": -1}}, "-1 images of split 'train'"),
        ({"num_images": {"train": 1_000_000}}, "1000000 images of split 'train'.*0 to 999999"),
        ({"num_images": {"train": 0}}, "no image"),
        ({"num_images": {}}, "no image"),
        ({"seed": -1}, "seed is -1"),
    ],
)
def test_wrong_arguments_are_named_and_write_nothing(
    tmp_path: Path, arguments: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        write_shapes_dataset(tmp_path, **{"num_images": {"train": 1}, "seed": 0, **arguments})
    assert list(tmp_path.iterdir()) == []

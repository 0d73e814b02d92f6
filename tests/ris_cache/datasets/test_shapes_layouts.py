"""The drawn dataset in every layout: files and fields as published, images where they belong, the same bytes again."""

from __future__ import annotations

import json
import pickle
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as coco_mask

from ris_cache.datasets.load import load_dataset
from ris_cache.datasets.records import ReferringDataset, Rle
from ris_cache.datasets.shapes import (
    CATEGORY_IDS,
    LAYOUT_NAMES,
    SPLITS,
    ShapesSummary,
    Shares,
    compose_image,
    custom,
    num_pictures,
    write_layouts,
    write_shapes_dataset,
)
from ris_cache.datasets.shapes.mixture import mixed_refs
from ris_cache.errors import ConfigError, DataError
from ris_train.config import load_config
from ris_train.data.text import Tokenizer

NUM_IMAGES = {"train": 14, "val": 5, "testA": 4, "testB": 3, "test": 5}
POOL_SIZE = 14 + 5 + 4 + 3
SEED = 13
FILES = {
    ("refcoco", "unc"): "refcoco/refs(unc).p",
    ("refcoco+", "unc"): "refcoco+/refs(unc).p",
    ("refcocog", "umd"): "refcocog/refs(umd).p",
    ("refcocog", "google"): "refcocog/refs(google).p",
    ("grefcoco", "unc"): "grefcoco/grefs(unc).json",
    ("ref-zom", "final"): "ref-zom/refs(final).p",
    ("custom", "drawn"): "custom/drawn.jsonl",
}
SINGLE_TARGET = ("refcoco", "refcoco+", "refcocog")

Row = dict[str, Any]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("drawn")


@pytest.fixture(scope="module")
def summaries(root: Path) -> tuple[ShapesSummary, ...]:
    return write_layouts(root, LAYOUT_NAMES, num_images=NUM_IMAGES, seed=SEED)


@pytest.fixture(scope="module")
def rows(root: Path, summaries: tuple[ShapesSummary, ...]) -> dict[tuple[str, str], list[Row]]:
    """What each refs file holds, read without the project's loaders."""
    found: dict[tuple[str, str], list[Row]] = {}
    for key, relative in FILES.items():
        content = (root / relative).read_bytes()
        if relative.endswith(".p"):
            found[key] = pickle.loads(content)
        elif relative.endswith(".json"):
            found[key] = json.loads(content)
        else:
            found[key] = [json.loads(line) for line in content.splitlines()]
    return found


@pytest.fixture(scope="module")
def loaded(root: Path, summaries: tuple[ShapesSummary, ...]) -> dict[tuple[str, str], ReferringDataset]:
    return {key: load_dataset(root, *key) for key in FILES}


def file_bytes(root: Path) -> dict[str, bytes]:
    return {
        path.relative_to(root).as_posix(): path.read_bytes() for path in root.rglob("*") if path.is_file()
    }


def images_by_split(rows: list[Row]) -> dict[str, set[int]]:
    found: dict[str, set[int]] = {}
    for row in rows:
        found.setdefault(row["split"], set()).add(row["image_id"])
    return found


def annotations_of(root: Path, dataset: str) -> dict[int, Row]:
    document = json.loads((root / dataset / "instances.json").read_text())
    return {annotation["id"]: annotation for annotation in document["annotations"]}


# What there is.


def test_every_layout_has_its_files_and_there_are_no_others(
    root: Path, summaries: tuple[ShapesSummary, ...]
) -> None:
    assert [(each.layout, each.split_by) for each in summaries] == list(FILES)
    assert [each.refs_path for each in summaries] == [root / relative for relative in FILES.values()]
    outside_images = {name for name in file_bytes(root) if not name.startswith(("images/", "custom/drawn/"))}
    folders = ("refcoco", "refcoco+", "refcocog", "grefcoco", "ref-zom")
    assert outside_images == {*FILES.values(), *(f"{name}/instances.json" for name in folders)}


@pytest.mark.parametrize("key", FILES, ids="/".join)
def test_the_loader_reads_it_without_a_warning_and_counts_as_the_summary(
    key: tuple[str, str],
    loaded: dict[tuple[str, str], ReferringDataset],
    summaries: tuple[ShapesSummary, ...],
) -> None:
    dataset = loaded[key]
    (summary,) = (each for each in summaries if (each.layout, each.split_by) == key)
    assert dataset.warnings == ()
    assert set(dataset.splits) == set(summary.splits)
    for split, counts in summary.splits.items():
        expressions = [each for each in dataset.expressions if each.split == split]
        kinds = Counter(min(len(each.ann_ids), 2) for each in expressions)
        assert (counts.none, counts.one, counts.many) == (kinds[0], kinds[1], kinds[2])
        assert counts.expressions == len(expressions)
        assert counts.refs == len({each.ref_id for each in expressions})
        image_ids = {each.image_id for each in expressions}
        assert counts.images == len(image_ids)
        if key[0] != "custom":  # whose objects are known only where a line gives them
            assert counts.instances == sum(
                instance.image_id in image_ids for instance in dataset.instances.values()
            )


@pytest.mark.parametrize(
    ("key", "splits"),
    [
        (("refcoco", "unc"), ("train", "val", "testA", "testB")),
        (("refcoco+", "unc"), ("train", "val", "testA", "testB")),
        (("refcocog", "umd"), ("train", "val", "test")),
        (("refcocog", "google"), ("train", "val")),
        (("grefcoco", "unc"), ("train", "val", "testA", "testB")),
        (("ref-zom", "final"), ("train", "test")),
        (("custom", "drawn"), ("train", "val", "test")),
    ],
)
def test_splits_are_those_of_the_real_file(
    key: tuple[str, str], splits: tuple[str, ...], summaries: tuple[ShapesSummary, ...]
) -> None:
    (summary,) = (each for each in summaries if (each.layout, each.split_by) == key)
    assert tuple(summary.splits) == splits


# Fields.


def test_refs_have_the_types_of_the_real_files(rows: dict[tuple[str, str], list[Row]]) -> None:
    common = {
        "ref_id": int,
        "image_id": int,
        "file_name": str,
        "split": str,
        "sent_ids": list,
        "sentences": list,
    }
    for (dataset, _), refs in rows.items():
        if dataset == "custom":
            continue
        for ref in refs:
            types = {name: type(value) for name, value in ref.items()}
            ids = {name: types.pop(name) for name in ("ann_id", "category_id")}
            extra = {"grefcoco": {"no_target": bool}, "ref-zom": {"source": str}}.get(dataset, {})
            assert types == common | extra
            if dataset == "grefcoco":
                assert set(ids.values()) == {list}
            elif dataset in SINGLE_TARGET:
                assert set(ids.values()) == {int}
            assert ref["sent_ids"] == [sentence["sent_id"] for sentence in ref["sentences"]]
        sent_ids = [sent_id for ref in refs for sent_id in ref["sent_ids"]]
        assert sent_ids == list(range(len(sent_ids)))
        assert [ref["ref_id"] for ref in refs] == list(range(len(refs)))


def test_grefcoco_writes_minus_one_and_no_target_together(rows: dict[tuple[str, str], list[Row]]) -> None:
    refs = rows["grefcoco", "unc"]
    for ref in refs:
        assert len(ref["ann_id"]) == len(ref["category_id"]) == len(set(ref["ann_id"]) | {-2}) - 1 or ref[
            "ann_id"
        ] == ref["category_id"] == [-1]
        assert ref["no_target"] == (ref["ann_id"] == [-1])
        assert ref["no_target"] or -1 not in ref["ann_id"]
    assert {True, False} == {ref["no_target"] for ref in refs}


def test_ref_zom_says_its_source_and_writes_an_id_a_list_or_an_empty_list(
    rows: dict[tuple[str, str], list[Row]],
) -> None:
    shapes = {"one": int, "many": list, "zero": list}
    refs = rows["ref-zom", "final"]
    assert {ref["source"] for ref in refs} == set(shapes)
    for ref in refs:
        assert type(ref["ann_id"]) is type(ref["category_id"]) is shapes[ref["source"]]
        if ref["source"] != "one":
            assert len(ref["ann_id"]) == len(ref["category_id"])
            assert (len(ref["ann_id"]) >= 2) == (ref["source"] == "many")


def test_targets_are_annotations_of_the_image_and_categories_are_theirs(
    root: Path, loaded: dict[tuple[str, str], ReferringDataset]
) -> None:
    for (name, _), dataset in loaded.items():
        if name == "custom":
            continue
        annotations = annotations_of(root, name)
        for expression in dataset.expressions:
            targets = [annotations[ann_id] for ann_id in expression.ann_ids]
            assert all(target["image_id"] == expression.image_id for target in targets)
            assert [target["category_id"] for target in targets] == list(expression.category_ids)


# Images.


def test_refcoco_plus_and_grefcoco_have_refcocos_images_in_the_same_splits(
    rows: dict[tuple[str, str], list[Row]],
) -> None:
    of_refcoco = images_by_split(rows["refcoco", "unc"])
    assert {split: len(found) for split, found in of_refcoco.items()} == {
        split: NUM_IMAGES[split] for split in SPLITS
    }
    assert images_by_split(rows["grefcoco", "unc"]) == of_refcoco
    for split, found in images_by_split(rows["refcoco+", "unc"]).items():
        assert found <= of_refcoco[split]


def test_refcocog_deals_the_same_images_out_anew_so_that_images_leak(
    rows: dict[tuple[str, str], list[Row]],
) -> None:
    of_refcoco, umd = images_by_split(rows["refcoco", "unc"]), images_by_split(rows["refcocog", "umd"])
    assert set().union(*umd.values()) <= set().union(*of_refcoco.values())
    assert sum(len(found) for found in umd.values()) == len(set().union(*umd.values()))
    assert len(umd["val"]) <= NUM_IMAGES["val"]
    assert len(umd["test"]) <= NUM_IMAGES["testA"] + NUM_IMAGES["testB"]
    assert of_refcoco["train"] & (umd["val"] | umd["test"])
    assert umd["train"] & (of_refcoco["val"] | of_refcoco["testA"] | of_refcoco["testB"])


def test_the_google_file_has_the_same_refs_and_splits_objects_not_images(
    rows: dict[tuple[str, str], list[Row]],
) -> None:
    google, umd = rows["refcocog", "google"], rows["refcocog", "umd"]
    assert [ref | {"split": ""} for ref in google] == [ref | {"split": ""} for ref in umd]
    images = images_by_split(google)
    assert images["train"] & images["val"]


def test_ref_zom_has_its_own_images_in_both_folders_in_both_splits(
    root: Path, rows: dict[tuple[str, str], list[Row]]
) -> None:
    document = json.loads((root / "ref-zom" / "instances.json").read_text())
    names = {image["id"]: image["file_name"] for image in document["images"]}
    splits = images_by_split(rows["ref-zom", "final"])
    for found in splits.values():
        assert {names[image_id].split("_")[1] for image_id in found} == {"train2014", "val2014"}
    for name in names.values():
        assert (root / "images" / name.split("_")[1] / name).is_file()
    shared = set().union(*images_by_split(rows["refcoco", "unc"]).values())
    assert shared.isdisjoint(names)


def test_every_image_is_on_disk_in_the_size_that_is_written(
    root: Path, summaries: tuple[ShapesSummary, ...]
) -> None:
    for path in root.glob("*/instances.json"):
        for image in json.loads(path.read_text())["images"]:
            with Image.open(root / "images" / image["file_name"].split("_")[1] / image["file_name"]) as file:
                assert file.size == (image["width"], image["height"])


# The custom dataset.


def test_custom_lines_use_every_form_of_a_mask_and_both_forms_of_no_target(
    rows: dict[tuple[str, str], list[Row]],
) -> None:
    lines = rows["custom", "drawn"]
    forms = Counter(
        form
        for line in lines
        for target in (line, *line.get("targets", ()))
        for form in ("polygons", "rle", "mask")
        if form in target
    )
    assert min(forms[form] for form in ("polygons", "rle", "mask")) > 10
    assert any(len(line.get("targets", ())) > 1 for line in lines)
    bare = [line for line in lines if not {"polygons", "rle", "mask", "targets"} & set(line)]
    assert bare
    assert any(line.get("targets") == [] for line in lines)
    assert all(line["image"].startswith("drawn/") for line in lines)
    named = {target.get("category") for line in lines for target in (line, *line.get("targets", ()))}
    assert named - {None} == set(CATEGORY_IDS)


def test_custom_masks_are_the_drawn_objects_whatever_their_form(root: Path, loaded: Any) -> None:
    dataset = loaded["custom", "drawn"]
    names = {category.category_id: category.name for category in dataset.categories}
    composed = {}
    seen: Counter[str] = Counter()
    for expression in dataset.expressions:
        image = dataset.images[expression.image_id]
        if image.image_id not in composed:
            split, index = Path(image.file_name).stem.split("_")
            composed[image.image_id] = compose_image(seed=SEED, name="custom", split=split, index=int(index))
        drawing = composed[image.image_id].drawing
        for ann_id, category_id in zip(expression.ann_ids, expression.category_ids, strict=True):
            segmentation = dataset.instances[ann_id].segmentation
            if isinstance(segmentation, Rle):
                encoded = {"size": list(segmentation.size), "counts": segmentation.counts.encode()}
            else:
                parts = [list(part) for part in segmentation]
                encoded = coco_mask.merge(coco_mask.frPyObjects(parts, image.height, image.width))
            found = np.asarray(coco_mask.decode(encoded)).astype(bool)
            (index_there,) = set(drawing.labels[found].tolist())
            np.testing.assert_array_equal(found, drawing.labels == index_there)
            assert drawing.scene.objects[index_there].shape == names[category_id]
            seen[type(segmentation).__name__] += 1
    assert len(seen) == 2


# The words.


def test_every_sentence_fits_the_tiny_models_words_and_length(
    loaded: dict[tuple[str, str], ReferringDataset],
) -> None:
    config = load_config(recipe="tiny").model
    tokenizer = Tokenizer.load(config.bert, 64)
    for dataset in loaded.values():
        token_ids, text_mask = tokenizer.encode([each.sent for each in dataset.expressions])
        assert not (token_ids == 1).any()  # [UNK]
        assert text_mask.sum(dim=1).max() <= config.max_tokens


def test_refcoco_plus_has_no_word_of_location(rows: dict[tuple[str, str], list[Row]]) -> None:
    words = {word for ref in rows["refcoco+", "unc"] for s in ref["sentences"] for word in s["tokens"]}
    assert words.isdisjoint({"left", "right", "top", "bottom", "above", "below", "on", "at", "of"})


def test_grefcocos_single_targets_are_refcocos_expressions_and_val_has_none(
    rows: dict[tuple[str, str], list[Row]],
) -> None:
    def said(refs: list[Row], *, splits: tuple[str, ...]) -> list[tuple[int, list[int], list[str]]]:
        return [
            (ref["image_id"], np.atleast_1d(ref["ann_id"]).tolist(), [s["raw"] for s in ref["sentences"]])
            for ref in refs
            if ref["split"] in splits
        ]

    singles = [ref for ref in rows["grefcoco", "unc"] if len(ref["ann_id"]) == 1 and not ref["no_target"]]
    tested = ("train", "testA", "testB")
    assert said(singles, splits=tested) == said(rows["refcoco", "unc"], splits=tested)
    assert said(singles, splits=("val",)) == []


def test_shares_follow_the_real_training_split(summaries: tuple[ShapesSummary, ...]) -> None:
    for layout in ("grefcoco", "ref-zom", "custom"):
        (summary,) = (each for each in summaries if each.layout == layout)
        train = summary.splits["train"]
        assert train.none / train.expressions == pytest.approx(0.09, abs=0.04)
        assert train.many / train.expressions == pytest.approx(0.33, abs=0.04)


@pytest.mark.parametrize("layout", ["grefcoco", "ref-zom", "custom"])
def test_shares_of_a_split_can_be_chosen_and_the_others_keep_theirs(layout: str, tmp_path: Path) -> None:
    shares = {layout: {"train": Shares(none=1.0, one=1.0, many=0.0)}}
    numbers = {"train": 6, "val": 6, "test": 6}
    (summary,) = write_layouts(tmp_path / "a", [layout], num_images=numbers, seed=0, shares=shares)
    (usual,) = write_layouts(tmp_path / "b", [layout], num_images=numbers, seed=0)
    chosen = summary.splits.pop("train")
    assert chosen.many == 0
    assert chosen.none == chosen.one > 0
    assert usual.splits.pop("train") != chosen
    assert summary.splits == usual.splits


# Bytes.


def test_the_same_arguments_write_the_same_bytes_in_any_order(
    root: Path, summaries: tuple[ShapesSummary, ...], tmp_path: Path
) -> None:
    numbers = dict(reversed(NUM_IMAGES.items()))
    for layout in reversed(LAYOUT_NAMES):
        write_layouts(tmp_path, [layout], num_images=numbers, seed=SEED)
    assert file_bytes(tmp_path) == file_bytes(root)


def test_refcoco_has_the_bytes_that_it_has_alone(
    root: Path, summaries: tuple[ShapesSummary, ...], tmp_path: Path
) -> None:
    write_shapes_dataset(tmp_path, num_images={split: NUM_IMAGES[split] for split in SPLITS}, seed=SEED)
    alone = file_bytes(tmp_path)
    assert len(alone) == POOL_SIZE + 2
    assert alone.items() <= file_bytes(root).items()


def test_progress_counts_shared_images_once(tmp_path: Path) -> None:
    seen: list[int] = []
    layouts, numbers = ("refcoco", "grefcoco", "custom"), {"train": 2, "testB": 1, "test": 1}
    write_layouts(tmp_path, layouts, num_images=numbers, seed=0, progress=seen.append)
    assert seen == [1, 2, 3, 4, 5, 6]
    assert num_pictures(layouts, numbers) == 6


def test_another_seeds_images_are_not_overwritten(tmp_path: Path) -> None:
    write_layouts(tmp_path, ["refcoco"], num_images={"train": 2}, seed=1)
    before = file_bytes(tmp_path)
    with pytest.raises(DataError, match=r"another seed.*Choose another directory"):
        write_layouts(tmp_path, ["grefcoco"], num_images={"train": 2}, seed=2)
    assert file_bytes(tmp_path) == before


@pytest.mark.parametrize("layout", LAYOUT_NAMES)
def test_a_layout_that_is_there_is_refused_before_anything_is_drawn(layout: str, tmp_path: Path) -> None:
    write_layouts(tmp_path, [layout], num_images={"train": 1}, seed=1)
    before = file_bytes(tmp_path)
    with pytest.raises(DataError, match="exists already"):
        write_layouts(tmp_path, LAYOUT_NAMES, num_images={"train": 1}, seed=1)
    assert file_bytes(tmp_path) == before


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"layouts": ["grefcocoa"]}, "No layout is called 'grefcocoa'.*ref-zom, custom"),
        ({"layouts": ["ref-zom"], "num_images": {"val": 3}}, "ref-zom.*train, test"),
        ({"layouts": []}, "no layout"),
        ({"num_images": {"dev": 3}}, "Unknown split 'dev'.*testB, test"),
        ({"num_images": {}}, "no image"),
        ({"seed": -1}, "seed is -1"),
        ({"shares": {"refcoco": {}}}, "No layout with shares is called 'refcoco'.*grefcoco, ref-zom, custom"),
    ],
)
def test_wrong_arguments_are_named_and_write_nothing(
    tmp_path: Path, arguments: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        write_layouts(
            tmp_path, **{"layouts": ["grefcoco"], "num_images": {"train": 1}, "seed": 0, **arguments}
        )
    assert list(tmp_path.iterdir()) == []


def test_a_custom_image_of_which_nothing_is_said_is_neither_written_nor_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    turns = iter([True, False, True])

    def say(*arguments: Any) -> Any:
        return mixed_refs(*arguments) if next(turns) else ()

    monkeypatch.setattr(custom, "mixed_refs", say)
    (summary,) = write_layouts(tmp_path, ["custom"], num_images={"train": 3}, seed=1)
    assert summary.splits["train"].images == len(load_dataset(tmp_path, "custom", "drawn").images) == 2
    assert len(list((tmp_path / "custom/drawn").glob("*.jpg"))) == 2

"""A dataset of one's own loads as documented, and everything that can be wrong with a line is named."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from ris_cache.datasets import custom, json_lines
from ris_cache.datasets.custom import load_custom
from ris_cache.datasets.records import Category, ReferringDataset, Rle
from ris_cache.datasets.segmentation import rasterise
from ris_cache.errors import ConfigError, DataError

HEIGHT, WIDTH = 6, 8
SQUARE = [1.0, 1.0, 4.0, 1.0, 4.0, 4.0, 1.0, 4.0]
TRIANGLE = [5, 0, 8, 0, 8, 5]
RLE = {"size": [HEIGHT, WIDTH], "counts": [6, 3, 39]}


@dataclass
class Files:
    """`custom/birds.jsonl` with two images, open to changes before it is loaded."""

    root: Path
    lines: list[Any] = field(default_factory=list)

    @property
    def folder(self) -> Path:
        return self.root / "custom"

    @property
    def path(self) -> Path:
        return self.folder / "birds.jsonl"

    def add(self, **changes: Any) -> None:
        line = {"image": "pictures/1.png", "expression": "A  Red\tBird", "split": "train"} | changes
        self.lines.append({key: value for key, value in line.items() if value != "absent"})

    def mask(self, relative: str, pixels: Any, mode: str | None = None, **options: Any) -> str:
        path = self.folder / relative
        path.parent.mkdir(parents=True, exist_ok=True)
        image = Image.fromarray(np.asarray(pixels, np.uint8))
        (image if mode is None else image.convert(mode)).save(path, **options)
        return relative

    def load(self, **options: Any) -> ReferringDataset:
        self.path.write_text("\n".join(json.dumps(line) for line in self.lines), encoding="utf-8")
        return load_custom(self.root, "birds", **options)


@pytest.fixture
def files(tmp_path: Path) -> Files:
    made = Files(root=tmp_path)
    for name in ("1.png", "2.png"):
        made.mask(f"pictures/{name}", np.zeros((HEIGHT, WIDTH, 3)))
    return made


def raising(kind: type[Exception]) -> Callable[..., Any]:
    def fail(*arguments: Any, **options: Any) -> Any:
        raise kind("damaged")

    return fail


def spot() -> np.ndarray:
    pixels = np.zeros((HEIGHT, WIDTH), np.uint8)
    pixels[2:4, 5:7] = 1
    return pixels


def test_a_line_becomes_an_expression_with_an_image_and_an_object(files: Files) -> None:
    files.add(polygons=[SQUARE], category="bird")
    dataset = files.load()
    assert (dataset.name, dataset.split_by, dataset.splits, dataset.warnings) == (
        *("custom", "birds", ("train",)),
        (),
    )
    (image,), (instance,), (expression,) = (
        dataset.images.values(),
        dataset.instances.values(),
        dataset.expressions,
    )
    assert (image.file_name, image.height, image.width) == ("custom/pictures/1.png", HEIGHT, WIDTH)
    assert image.namespace == "custom/birds"
    assert (expression.raw, expression.sent) == ("A  Red\tBird", "a red bird")
    assert (expression.ref_id, expression.sent_id, expression.sent_index) == (1, 1, 0)
    assert (expression.image_id, expression.target_kind) == (image.image_id, "one")
    assert (expression.ann_ids, expression.category_ids) == ((instance.ann_id,), (1,))
    assert (instance.image_id, instance.category_id, instance.is_crowd) == (image.image_id, 1, False)
    assert instance.segmentation == (tuple(SQUARE),)
    assert dataset.categories == (Category(category_id=1, name="bird"),)


def test_ids_are_digests_beyond_those_of_coco_and_do_not_depend_on_other_lines(files: Files) -> None:
    files.add(polygons=[SQUARE])
    alone = files.load()
    files.lines.insert(0, {"image": "pictures/2.png", "expression": "x", "split": "val", "rle": RLE})
    both = files.load()
    digest = hashlib.sha256(b"custom/birds/pictures/1.png").digest()
    bits = "01" + "".join(f"{byte:08b}" for byte in digest[:8])[2:]
    assert list(alone.images) == [int(bits, 2)]
    assert alone.images.items() <= both.images.items()
    assert alone.instances.items() <= both.instances.items()
    assert all(2**62 <= identity < 2**63 for identity in (*both.images, *both.instances))


def test_the_same_object_in_several_lines_is_one_and_on_another_image_another(files: Files) -> None:
    files.add(polygons=[SQUARE])
    files.add(targets=[{"polygons": [TRIANGLE]}, {"polygons": [[int(x) for x in SQUARE]]}])
    files.add(polygons=[SQUARE], image="pictures/2.png")
    dataset = files.load()
    first, second, third = dataset.expressions
    assert len(dataset.instances) == 3
    assert second.ann_ids[1:] == first.ann_ids
    assert third.ann_ids != first.ann_ids
    assert [e.ref_id for e in dataset.expressions] == [1, 2, 3]


def test_polygons_run_lengths_masks_and_nothing_draw_what_they_say(files: Files) -> None:
    files.add(polygons=[SQUARE, TRIANGLE])
    files.add(rle=RLE)
    files.add(mask=files.mask("masks/1.png", spot()))
    files.add(targets=[{"mask": "masks/1.png"}, {"rle": RLE}])
    files.add(targets=[])
    files.add()
    dataset = files.load()
    assert [e.target_kind for e in dataset.expressions] == ["one", "one", "one", "many", "none", "none"]
    size = (HEIGHT, WIDTH)
    drawn = [
        [
            rasterise(dataset.instances[a].segmentation, frame_size=size, grid_size=size).tolist()
            for a in e.ann_ids
        ]
        for e in dataset.expressions
    ]
    by_hand = np.zeros(size, bool)
    by_hand[0:3, 1] = True  # column-major: six pixels of column 0, then three of column 1
    assert drawn[1] == [by_hand.tolist()]
    assert drawn[2] == [spot().astype(bool).tolist()]
    assert drawn[3] == [*drawn[2], *drawn[1]]
    assert np.asarray(drawn[0][0]).sum() > 9


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGB", "RGBA", "LA", "I;16"])
def test_a_mask_may_be_of_any_mode_and_alpha_means_nothing(files: Files, mode: str) -> None:
    pixels = spot() * 255
    if mode == "I;16":
        path = files.folder / "mask.png"
        Image.fromarray(spot().astype(np.uint16) * 256).save(path)
    else:
        files.mask("mask.png", pixels, None if mode == "L" else mode)
    files.add(mask="mask.png")
    (instance,) = files.load().instances.values()
    assert isinstance(instance.segmentation, Rle)
    size = (HEIGHT, WIDTH)
    drawn = rasterise(instance.segmentation, frame_size=size, grid_size=size)
    assert np.array_equal(drawn, spot().astype(bool))


@given(pixels=st.lists(st.booleans(), min_size=HEIGHT * WIDTH, max_size=HEIGHT * WIDTH))
def test_every_mask_comes_back_as_it_was(
    pixels: list[bool], tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.mktemp("masks") / "m.png"
    mask = np.array(pixels).reshape(HEIGHT, WIDTH)
    Image.fromarray(mask.astype(np.uint8)).save(path)
    segmentation = custom.read_mask(path, (HEIGHT, WIDTH))
    drawn = rasterise(segmentation, frame_size=(HEIGHT, WIDTH), grid_size=(HEIGHT, WIDTH))
    assert np.array_equal(drawn, mask)
    assert (segmentation == ()) == (not mask.any())


def test_a_mask_file_is_decoded_once(files: Files, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[Path] = []
    original = custom.read_mask
    monkeypatch.setattr(custom, "read_mask", lambda path, size: (read.append(path), original(path, size))[1])
    files.mask("m.png", spot())
    for _ in range(3):
        files.add(mask="m.png")
    assert len(files.load().instances) == 1
    assert read == [files.folder / "m.png"]


@pytest.mark.parametrize("image_format", ["jpg", "png"])
def test_the_size_is_the_one_after_exif_orientation(files: Files, image_format: str) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    files.mask(f"turned.{image_format}", np.zeros((HEIGHT, WIDTH, 3)), exif=exif)
    files.add(image=f"turned.{image_format}")
    (image,) = files.load().images.values()
    assert (image.height, image.width) == (WIDTH, HEIGHT)


# Categories.


def test_categories_are_the_names_used_in_order(files: Files) -> None:
    files.add(polygons=[SQUARE], category="zebra")
    files.add(targets=[{"polygons": [TRIANGLE], "category": "ant"}, {"rle": RLE}])
    files.add()
    dataset = files.load()
    assert dataset.categories == (Category(category_id=1, name="ant"), Category(category_id=2, name="zebra"))
    assert [e.category_ids for e in dataset.expressions] == [(2,), (1, -1), ()]


def test_without_any_name_the_categories_are_cocos_and_no_expression_has_one(files: Files) -> None:
    files.add(polygons=[SQUARE])
    dataset = files.load()
    ids = [category.category_id for category in dataset.categories]
    assert len(ids) == 80
    assert set(range(1, 91)) - set(ids) == {12, 26, 29, 30, 45, 66, 68, 69, 71, 83}
    named = {category.category_id: category.name for category in dataset.categories}
    assert {i: named[i] for i in (1, 11, 13, 25, 27, 44, 46, 65, 67, 70, 72, 82, 84, 90)} == {
        **{1: "person", 11: "fire hydrant", 13: "stop sign", 25: "giraffe", 27: "backpack", 44: "bottle"},
        **{46: "wine glass", 65: "bed", 67: "dining table", 70: "toilet", 72: "tv", 82: "refrigerator"},
        **{84: "book", 90: "toothbrush"},
    }
    assert dataset.expressions[0].category_ids == ()
    assert next(iter(dataset.instances.values())).category_id == -1


def test_an_object_named_in_one_line_has_that_category_in_all(files: Files) -> None:
    files.add(polygons=[SQUARE])
    files.add(polygons=[SQUARE], category="bird")
    assert [e.category_ids for e in files.load().expressions] == [(1,), (1,)]


# Refs.


def test_lines_of_one_ref_come_together_in_their_order(files: Files) -> None:
    for ref_id, sent_id in ((7, 30), (5, 31), (7, 12)):
        files.add(ref_id=ref_id, sent_id=sent_id, polygons=[SQUARE], sent=f"cleaned {sent_id}")
    dataset = files.load()
    assert [(e.ref_id, e.sent_id, e.sent_index, e.sent) for e in dataset.expressions] == [
        (7, 30, 0, "cleaned 30"),
        (7, 12, 1, "cleaned 12"),
        (5, 31, 0, "cleaned 31"),
    ]


def test_blank_lines_are_skipped_but_counted_in_the_numbers(files: Files) -> None:
    files.path.write_bytes(
        b'\xef\xbb\xbf{"image": "pictures/1.png", "expression": "a", "split": "x"}\r\n'
        b'  \n\n{"image": "pictures/1.png", "expression": " ", "split": "x"}'
    )
    dataset = load_custom(files.root, "birds")
    assert [e.sent_id for e in dataset.expressions] == [1, 4]
    assert dataset.warnings == ("Blank sentences, kept: 1 (first line: 4).",)


@pytest.mark.parametrize(
    ("first", "second", "text"),
    [
        ({"ref_id": 1}, {}, "line 2: `ref_id` is missing, but other lines have one"),
        ({}, {"sent_id": 1}, "line 1: `sent_id` is missing, but other lines have one"),
        ({"sent_id": 3}, {"sent_id": 3}, "line 2: `sent_id` 3 occurs in line 1 too"),
        (
            {"ref_id": 1},
            {"ref_id": 1, "image": "pictures/2.png"},
            "line 2: `image` differs from that of line 1, which",
        ),
        ({"ref_id": 1}, {"ref_id": 1, "split": "val"}, "line 2: `split` differs from that of line 1, which"),
        ({"ref_id": 1}, {"ref_id": 1, "rle": RLE}, "line 2: `ref_id` has other targets than line 1, which"),
        (
            {"rle": RLE, "category": "cat"},
            {"rle": RLE, "category": "dog"},
            "line 2: `category` is 'dog', but the same object is 'cat' in line 1",
        ),
    ],
)
def test_lines_that_contradict_each_other_are_named(
    files: Files, first: dict[str, Any], second: dict[str, Any], text: str
) -> None:
    files.add(**first)
    files.add(**second)
    with pytest.raises(DataError) as caught:
        files.load()
    assert text in str(caught.value)


def test_two_names_with_one_digest_are_an_error(files: Files, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(custom, "_stable_id", lambda name: 2**62)
    files.add()
    files.add(image="pictures/2.png")
    with pytest.raises(DataError, match=r"line 2: `image` gets the image_id \d+ of 'pictures/1.png' too"):
        files.load()
    files.lines.pop()
    files.lines[0]["targets"] = [{"polygons": [SQUARE]}, {"polygons": [TRIANGLE]}]
    with pytest.raises(DataError, match=r"`targets\[1\].polygons` gets the ann_id"):
        files.load()


# Malformed lines.


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"image": "absent"}, "`image` should be of type str, not None"),
        ({"image": 1}, "`image` should be of type str"),
        ({"expression": "absent"}, "`expression` should be of type str"),
        ({"expression": ["a"]}, "`expression` should be of type str"),
        ({"expression": "\ud800"}, "`expression` is beyond 64 bits or no valid Unicode"),
        ({"split": "absent"}, "`split` should be of type str"),
        ({"split": "a b"}, "`split` is malformed: 'a b' cannot be the name of a split"),
        ({"split": ""}, "`split` is malformed"),
        ({"sent": 1}, "`sent` should be of type str"),
        ({"ref_id": "1"}, "`ref_id` should be of type int"),
        ({"ref_id": True}, "`ref_id` should be of type int, not True"),
        ({"sent_id": 2**63}, "`sent_id` is beyond 64 bits"),
        ({"polygon": [SQUARE]}, "`polygon` is no key of this format; did you mean `polygons`?"),
        ({"bbox": [1, 2, 3, 4]}, "`bbox` is no key of this format; known: image, expression"),
        ({"polygons": [SQUARE], "rle": RLE}, "`rle` stands beside `polygons`"),
        ({"mask": "m.png", "targets": []}, "`targets` stands beside `mask`"),
        ({"category": "bird"}, "`category` belongs beside one of polygons, rle, mask"),
        ({"category": "bird", "targets": []}, "`category` belongs inside each of `targets`"),
        ({"polygons": [SQUARE], "category": 1}, "`category` should be of type str"),
        ({"polygons": [SQUARE], "category": " "}, "`category` is blank or padded"),
        ({"polygons": None}, "`polygons` should be of type list, not None"),
        ({"polygons": [RLE]}, "`polygons` holds an object; give run-length masks as `rle`"),
        ({"polygons": SQUARE}, "`polygons` is malformed: A segmentation has a part that is not a list"),
        ({"polygons": [["1"] * 6]}, "`polygons` is malformed: A segmentation has a coordinate that is not"),
        ({"polygons": [[float("nan")] * 6]}, "not finite"),
        ({"polygons": [[10**400] * 6]}, "not finite"),
        ({"polygons": [[1e6] * 6]}, "more than 10 image sizes away"),
        ({"rle": [RLE]}, "`rle` should be of type dict"),
        ({"rle": {"size": [8, 6], "counts": [48]}}, "`rle` is malformed: A segmentation has an RLE of another size"),
        ({"rle": {"size": [6, 8], "counts": [47]}}, "do not add up to the 48 pixels"),
        ({"rle": {"size": [6, 8], "counts": [2**80]}}, "do not add up"),
        ({"mask": 1}, "`mask` should be of type str"),
        ({"mask": "gone.png"}, "`mask` is malformed: "),
        ({"mask": "birds.jsonl"}, "cannot be read as an image"),
        ({"targets": {}}, "`targets` should be of type list"),
        ({"targets": [1]}, "`targets[0]` should be an object, not 1"),
        ({"targets": [{}]}, "`targets[0]` should have one of polygons, rle, mask"),
        ({"targets": [{"rle": RLE, "mask": "m"}]}, "`targets[0]` should have one of polygons, rle, mask"),
        ({"targets": [{"rle": RLE}, {"masks": "m"}]}, "`targets[1].masks` is no key of this format; did you mean `mask`"),
        ({"targets": [{"rle": RLE, "category": ""}]}, "`targets[0].category` is blank"),
        ({"targets": [{"polygons": [[None] * 6]}]}, "`targets[0].polygons` is malformed"),
    ],
)  # fmt: skip
def test_what_is_wrong_with_a_line_is_named(files: Files, changes: dict[str, Any], text: str) -> None:
    files.add()
    files.add(**changes)
    with pytest.raises(DataError) as caught:
        files.load()
    assert text in str(caught.value)
    assert f"{files.path}, line 2: " in str(caught.value)
    assert caught.value.facts["line"] == 2


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        (b"{", "is not JSON"),
        (b"[]", "should be a JSON object, not an empty list"),
        (b"1", "should be a JSON object"),
        (b'{"image": "\xff"}', "is not UTF-8 (invalid start byte at byte 11)"),
        (b"[" * 100_000, "is not JSON (it nests too deeply)"),
        (b'{"a":' * 100_000, "is not JSON (it nests too deeply)"),
        (b'{"ref_id": ' + b"9" * 5000 + b"}", "is not JSON (it holds a number of thousands of digits)"),
        (b"{} {}", "is not JSON (Extra data"),
        (b'{"mask": "a", "mask": "b"}', "is not JSON (the key 'mask' stands twice in one object)"),
        (b'{"targets": [{"rle": 1, "rle": 2}]}', "is not JSON (the key 'rle' stands twice in one object)"),
    ],
)
def test_a_line_that_is_no_json_object_is_named(files: Files, line: bytes, problem: str) -> None:
    files.path.write_bytes(b"\n" + line)
    with pytest.raises(DataError) as caught:
        load_custom(files.root, "birds")
    assert f"{files.path}, line 2 {problem}" in str(caught.value)
    assert caught.value.facts["line"] == 2


@pytest.mark.parametrize("depth", range(800, 1000, 20))
@pytest.mark.parametrize("key", ["polygons", "targets", "image"])
def test_a_line_that_just_parses_but_is_too_deep_to_be_shown_is_named(
    files: Files, depth: int, key: str
) -> None:
    files.path.write_bytes(
        b'{"image": "pictures/1.png", "expression": "a", "split": "x", "%b": %b1%b}'
        % (key.encode(), b"[" * depth, b"]" * depth)
    )
    with pytest.raises(DataError) as caught:
        load_custom(files.root, "birds")
    assert caught.value.facts["line"] == 1


def test_a_line_of_enormous_length_is_refused_without_reading_it_whole(
    files: Files, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(json_lines, "MAX_LINE_BYTES", 100)
    files.add(expression="x" * 200)
    with pytest.raises(DataError, match="line 1 is longer than 100 bytes"):
        files.load()
    files.lines = []
    files.add(expression="x" * 30)
    assert len(files.load().expressions) == 1


# Files.


def test_the_folder_may_not_be_left_and_links_out_of_it_are_not_followed(files: Files) -> None:
    secret = files.root / "secret.png"
    Image.new("L", (WIDTH, HEIGHT), 1).save(secret)
    (files.folder / "link.png").symlink_to(secret)
    (files.folder / "out").symlink_to(files.root)
    (files.folder / "loop.png").symlink_to(files.folder / "loop.png")
    names = ["../secret.png", str(secret), "pictures/../../secret.png", "link.png", "out/secret.png", ""]
    names += [".", "./pictures/1.png", "pictures//1.png", "pictures\\1.png", "loop.png", "a\0b", "x" * 5000]
    for name in names:
        for key in ("image", "mask"):
            files.lines = []
            files.add(**{key: name})
            with pytest.raises(DataError, match=f"line 1: `{key}` is no usable path") as caught:
                files.load()
            assert caught.value.facts["found"] == name


def test_the_custom_folder_itself_and_files_within_may_be_links(files: Files, tmp_path: Path) -> None:
    files.add()
    (files.folder / "alias.png").symlink_to("pictures/1.png")
    files.add(image="alias.png")
    files.folder.rename(tmp_path / "elsewhere")
    files.folder.symlink_to(tmp_path / "elsewhere")
    assert len(files.load().images) == 2


def test_missing_images_are_one_error_with_count_and_examples(files: Files) -> None:
    files.add()
    for number in range(7):
        files.add(image=f"pictures/gone{number}.png")
    with pytest.raises(
        DataError, match=r"7 of 8 images are missing, for example custom/pictures/gone0"
    ) as caught:
        files.load()
    assert caught.value.facts["num_missing"] == 7
    assert str(files.folder) in str(caught.value)
    assert "COCO" not in str(caught.value)


def test_an_image_that_is_none_is_named_with_its_line(files: Files) -> None:
    (files.folder / "bad.png").write_bytes(b"no image")
    files.add(image="bad.png")
    with pytest.raises(DataError, match=r"line 1: `image` cannot be used: .*cannot be read as an image"):
        files.load()


def test_a_decompression_bomb_is_refused(files: Files, monkeypatch: pytest.MonkeyPatch) -> None:
    files.add()
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 30)
    monkeypatch.setattr(Image, "_decompression_bomb_check", lambda size: None)
    with pytest.raises(DataError, match="claims 6x8 pixels, more than the 30"):
        files.load()
    monkeypatch.undo()
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10)
    with pytest.raises(DataError, match="DecompressionBombError"):
        files.load()


@pytest.mark.parametrize("key", ["image", "mask"])
def test_a_file_that_pillow_would_give_to_another_program_is_refused(files: Files, key: str) -> None:
    Image.new("L", (WIDTH, HEIGHT)).save(files.folder / "m.png", "EPS")
    files.add(**{key: "m.png"})
    with pytest.raises(DataError, match="is in the format EPS"):
        files.load()


def test_a_named_pipe_is_not_waited_for(files: Files) -> None:
    os.mkfifo(files.folder / "m.png")
    files.add(mask="m.png")
    with pytest.raises(DataError, match="is no file"):
        files.load()


def test_whatever_pillow_raises_on_damaged_bytes_names_the_line(
    files: Files, monkeypatch: pytest.MonkeyPatch
) -> None:
    files.add(mask=files.mask("m.png", spot()))
    for kind in (NotImplementedError, AttributeError, ZeroDivisionError, MemoryError):
        monkeypatch.setattr(Image, "open", raising(kind))
        with pytest.raises(DataError, match=f"line 1: `image` cannot be used: .*{kind.__name__}"):
            files.load()


def test_a_mask_that_is_shown_turned_is_refused(files: Files) -> None:
    exif = Image.Exif()
    exif[0x0112] = 3
    files.add(mask=files.mask("m.png", spot(), exif=exif))
    with pytest.raises(DataError, match="has an EXIF orientation"):
        files.load()
    exif[0x0112] = 1
    files.lines[0]["mask"] = files.mask("m.png", spot(), exif=exif)
    assert len(files.load().instances) == 1


def test_a_mask_of_another_size_or_in_lossy_form_is_refused(files: Files) -> None:
    files.add(mask=files.mask("m.png", spot().T))
    with pytest.raises(
        DataError, match=r"line 1: `mask` is malformed: .* is 8x6 .* but its image is 6x8"
    ) as caught:
        files.load()
    assert (caught.value.facts["found"], caught.value.facts["expected"]) == ((8, 6), (6, 8))
    files.lines[0]["mask"] = files.mask("m.jpg", spot())
    with pytest.raises(DataError, match="is a JPEG"):
        files.load()


def test_a_missing_file_says_where_it_should_be_and_what_is_there(files: Files) -> None:
    with pytest.raises(DataError, match=r"custom/birds.jsonl is missing. Write one JSON object a line"):
        load_custom(files.root, "birds")
    (files.folder / "bees.jsonl").write_text("")
    with pytest.raises(DataError, match="Present there: bees") as caught:
        load_custom(files.root, "birds")
    assert caught.value.facts["present"] == ("bees",)
    with pytest.raises(DataError, match=r"bees.jsonl holds no expression"):
        load_custom(files.root, "bees")


@pytest.mark.parametrize("name", ["", "..", "a/b", "a.b", "a b", "ä"])
def test_a_name_that_could_be_a_path_is_refused(files: Files, name: str) -> None:
    with pytest.raises(ConfigError, match="cannot be the name of a custom dataset"):
        load_custom(files.root, name)

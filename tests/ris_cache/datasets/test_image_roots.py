"""Images are found in every usual folder layout, and the missing ones are reported together."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from ris_cache.datasets.image_roots import ImageRoots
from ris_cache.datasets.records import ImageRecord
from ris_cache.errors import DataError

TRAIN = "COCO_train2014_000000000001.jpg"
VAL = "COCO_val2014_000000000001.jpg"

TRAIN_ORDER = (
    "images/train2014",
    "images/mscoco/images/train2014",
    "images/trainval2014",
    "train2014",
    "trainval2014",
)
VAL_ORDER = (
    "images/val2014",
    "images/mscoco/images/val2014",
    "images/trainval2014",
    "val2014",
    "trainval2014",
)


def put(root: Path, directory: str, file_name: str) -> Path:
    path = root / directory / file_name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"")
    return path


def record(image_id: int, file_name: str) -> ImageRecord:
    return ImageRecord(image_id=image_id, file_name=file_name, height=1, width=1)


@pytest.mark.parametrize(
    ("file_name", "order"), [(TRAIN, TRAIN_ORDER), (VAL, VAL_ORDER), ("drawn.png", TRAIN_ORDER)]
)
def test_folders_are_searched_in_the_documented_order(
    tmp_path: Path, file_name: str, order: tuple[str, ...]
) -> None:
    assert ImageRoots(tmp_path).path_of(file_name) is None
    for directory in reversed(order):
        path = put(tmp_path, directory, file_name)
        assert ImageRoots(tmp_path).path_of(file_name) == path


def test_val_images_are_not_looked_for_among_train_images(tmp_path: Path) -> None:
    put(tmp_path, "images/train2014", VAL)
    put(tmp_path, "images/val2014", TRAIN)
    roots = ImageRoots(tmp_path)
    assert roots.path_of(VAL) is None
    assert roots.path_of(TRAIN) is None


def test_images_resolve_by_id_across_folders(tmp_path: Path) -> None:
    first = put(tmp_path, "train2014", TRAIN)
    second = put(tmp_path, "images/val2014", VAL)
    assert ImageRoots(tmp_path).resolve([record(7, VAL), record(3, TRAIN)]) == {7: second, 3: first}
    assert ImageRoots(tmp_path).resolve([]) == {}


def test_missing_images_are_one_error_with_count_examples_and_folders(tmp_path: Path) -> None:
    put(tmp_path, "train2014", TRAIN)
    missing = [record(i, f"COCO_train2014_{i:012d}.jpg") for i in range(2, 30)]
    with pytest.raises(DataError) as caught:
        ImageRoots(tmp_path).resolve([record(1, TRAIN), *missing])
    message, facts = str(caught.value), caught.value.facts
    assert "28 of 29 images are missing" in message
    assert facts["num_missing"] == 28
    assert facts["examples"] == tuple(image.file_name for image in missing[:5])
    assert message.count("COCO_train2014_0") == 5
    assert facts["directories"] == tuple(tmp_path / directory for directory in TRAIN_ORDER)
    assert f"{tmp_path / 'train2014'} (no match)" in message
    assert f"{tmp_path / 'images/train2014'} (no such folder)" in message
    assert "Unpack COCO's train2014.zip" in message
    assert caught.value.exit_code == 3


def test_the_folders_of_val_images_are_listed_when_val_images_are_missing(tmp_path: Path) -> None:
    with pytest.raises(DataError) as caught:
        ImageRoots(tmp_path).resolve([record(1, TRAIN), record(2, VAL)])
    directories = caught.value.facts["directories"]
    assert directories == tuple(tmp_path / d for d in dict.fromkeys((*TRAIN_ORDER, *VAL_ORDER)))


@pytest.mark.parametrize(
    "file_name",
    ["", ".", "..", "../secret.jpg", "/etc/passwd", "train2014/a.jpg", "a\\b.jpg", "..\\a.jpg", "a.jpg\0"],
)
def test_a_file_name_that_is_a_path_is_refused(tmp_path: Path, file_name: str) -> None:
    put(tmp_path, "images", "secret.jpg")
    (tmp_path / "images/train2014").mkdir()
    with pytest.raises(DataError, match="not a plain name") as caught:
        ImageRoots(tmp_path).resolve([record(1, file_name)])
    assert caught.value.facts["file_name"] == file_name


def test_folders_and_dangling_links_are_no_images_but_links_to_files_are(tmp_path: Path) -> None:
    directory = tmp_path / "train2014"
    (directory / "folder.jpg").mkdir(parents=True)
    (directory / "dangling.jpg").symlink_to(tmp_path / "gone.jpg")
    (directory / "linked.jpg").symlink_to(put(tmp_path, "elsewhere", "a.jpg"))
    roots = ImageRoots(tmp_path)
    assert roots.path_of("folder.jpg") is None
    assert roots.path_of("dangling.jpg") is None
    assert roots.path_of("linked.jpg") == directory / "linked.jpg"


def test_custom_images_lie_below_the_custom_folder_under_their_path(tmp_path: Path) -> None:
    roots = ImageRoots(tmp_path)
    path = put(tmp_path, "custom/birds", "1.jpg")
    put(tmp_path, "train2014", "2.jpg")
    assert roots.path_of("custom/birds/1.jpg") == path
    assert roots.path_of("custom/birds/2.jpg") is None
    assert roots.path_of("custom/birds") is None
    assert roots.path_of("1.jpg") is None
    assert roots.resolve([record(5, "custom/birds/1.jpg"), record(6, "2.jpg")])[5] == path


@pytest.mark.parametrize(
    "file_name",
    [
        "custom/",
        "custom/../secret.jpg",
        "custom/birds/../../secret.jpg",
        "custom//etc/passwd",
        "custom/./a.jpg",
        "custom/a\\b.jpg",
        "custom/out/secret.jpg",
        "custom/linked.jpg",
        "custom/dangling.jpg",
    ],
)
def test_a_custom_path_out_of_its_folder_is_refused(tmp_path: Path, file_name: str) -> None:
    secret = put(tmp_path, ".", "secret.jpg")
    (tmp_path / "custom").mkdir()
    (tmp_path / "custom/out").symlink_to(tmp_path)
    (tmp_path / "custom/linked.jpg").symlink_to(secret)
    (tmp_path / "custom/dangling.jpg").symlink_to(tmp_path / "gone.jpg")
    with pytest.raises(DataError, match="is not one below") as caught:
        ImageRoots(tmp_path).path_of(file_name)
    assert f"custom/{caught.value.facts['path']}" == file_name


def test_a_custom_path_that_cannot_be_followed_is_a_data_error(tmp_path: Path) -> None:
    (tmp_path / "custom").mkdir()
    (tmp_path / "custom/loop").symlink_to(tmp_path / "custom/loop")
    for name in ("custom/loop", f"custom/{'x' * 5000}", "custom/a\0b"):
        with pytest.raises(DataError, match="cannot be followed"):
            ImageRoots(tmp_path).path_of(name)


def test_missing_custom_images_are_told_apart_from_cocos(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="Put them where the dataset's file says") as caught:
        ImageRoots(tmp_path).resolve([record(1, "custom/a.jpg")])
    assert caught.value.facts["directories"] == (tmp_path / "custom",)
    with pytest.raises(DataError, match=r"Unpack COCO's train2014\.zip"):
        ImageRoots(tmp_path).resolve([record(1, "custom/a.jpg"), record(2, TRAIN)])


def test_each_folder_is_listed_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    images = [record(i, f"{i}.jpg") for i in range(50)]
    for image in images:
        put(tmp_path, "trainval2014", image.file_name)
    listed: list[Path] = []
    scandir = os.scandir

    def counting(path: Path) -> object:
        listed.append(path)
        return scandir(path)

    monkeypatch.setattr(os, "scandir", counting)
    roots = ImageRoots(tmp_path)
    assert len(roots.resolve(images)) == 50
    roots.resolve(images)
    assert sorted(listed) == sorted(tmp_path / directory for directory in TRAIN_ORDER)


def test_a_file_in_the_place_of_a_folder_holds_no_images(tmp_path: Path) -> None:
    (tmp_path / "train2014").write_bytes(b"")
    assert ImageRoots(tmp_path).path_of(TRAIN) is None


def test_a_folder_that_cannot_be_listed_is_a_data_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(path: Path) -> object:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(DataError, match=r"Cannot list the image folder .*train2014: Permission denied"):
        ImageRoots(tmp_path).path_of(TRAIN)


def test_a_custom_folder_is_followed_once_however_many_images_it_holds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = [f"custom/{folder}/{i}.jpg" for folder in "ab" for i in range(20)]
    for name in names:
        put(tmp_path, str(Path(name).parent), Path(name).name)
    followed: list[Path] = []
    resolve = Path.resolve

    def counting(path: Path, strict: bool = False) -> Path:
        followed.append(path)
        return resolve(path, strict)

    monkeypatch.setattr(Path, "resolve", counting)
    assert len(ImageRoots(tmp_path).find_all(names)) == 40
    assert set(followed) == {tmp_path / "custom", tmp_path / "custom/a", tmp_path / "custom/b"}
    assert len(followed) == 4

"""Prediction: masks as files to look at, the same by the library and by the command."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from ris_cache.errors import ConfigError, DataError
from ris_train.live import Segmenter
from ris_train.predict import OVERLAY_COLOUR, Prediction, predict, save_prediction
from ris_train.pretrained import RISModel
from ris_train.run import RunDirectory


@pytest.fixture(scope="module")
def segmenter(tiny_runs: Path) -> Segmenter:
    """The trained run, whose model reads the sentence alone."""
    return Segmenter.load(RISModel.from_run(RunDirectory(tiny_runs / "first")))


@pytest.fixture(scope="module")
def image_path(drawn_data: Path) -> Path:
    """One drawn image."""
    return sorted((drawn_data / "images" / "train2014").iterdir())[0]


def test_a_prediction_is_what_the_segmenter_finds_beside_the_image(
    segmenter: Segmenter, image_path: Path
) -> None:
    texts = ["the red circle", "big blue square at the left"]
    predictions = predict(image_path, texts, segmenter)
    for prediction, found in zip(predictions, segmenter(image_path, texts), strict=True):
        assert np.array_equal(prediction.mask, found.mask)
        assert (prediction.category, prediction.category_source) == (None, "none")
        assert prediction.says_no_target is None
        assert np.array_equal(prediction.image, np.asarray(Image.open(image_path).convert("RGB")))


@pytest.mark.parametrize("text", ["", "  ", "\n"])
def test_a_blank_expression_is_refused(segmenter: Segmenter, image_path: Path, text: str) -> None:
    with pytest.raises(ConfigError, match="The expression is empty"):
        predict(image_path, ["the circle", text], segmenter)


def test_an_image_that_is_none_is_refused(segmenter: Segmenter, tmp_path: Path) -> None:
    path = tmp_path / "words.jpg"
    path.write_text("not an image")
    with pytest.raises(DataError, match=r"words\.jpg"):
        predict(path, ["the circle"], segmenter)


def test_the_overlay_tints_the_mask_halfway_and_nothing_else() -> None:
    image = np.zeros((2, 3, 3), dtype=np.uint8)
    image[0, 1] = (200, 100, 0)
    image[1, 2] = (10, 20, 30)
    mask = np.zeros((2, 3), dtype=bool)
    mask[0, 1] = mask[1, 0] = True
    overlay = Prediction(image=image, mask=mask, category=None, category_source="none").overlay()
    assert OVERLAY_COLOUR == (255, 64, 64)
    # Half of (200, 100, 0) and half of (255, 64, 64); 227.5 and 127.5 round to the even number.
    expected = image.copy()
    expected[0, 1] = (228, 82, 32)
    expected[1, 0] = (128, 32, 32)
    assert overlay.dtype == np.uint8
    assert np.array_equal(overlay, expected)


@given(st.integers(0, 2**32), st.floats(0, 1))
def test_outside_the_mask_the_overlay_is_the_image(seed: int, share: float) -> None:
    generator = np.random.default_rng(seed)
    image = generator.integers(0, 256, (7, 5, 3), dtype=np.uint8)
    mask = generator.random((7, 5)) < share
    before = image.copy()
    overlay = Prediction(image=image, mask=mask, category=None, category_source="none").overlay()
    assert np.array_equal(overlay[~mask], image[~mask])
    assert np.array_equal(image, before)
    tint = np.array(OVERLAY_COLOUR)
    distance = np.abs(overlay[mask].astype(int) - tint) * 2 - np.abs(image[mask].astype(int) - tint)
    assert np.abs(distance).max(initial=0) <= 1


def test_what_is_saved_is_the_mask_as_0_and_255_and_the_overlay(tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    prediction = Prediction(
        image=generator.integers(0, 256, (6, 4, 3), dtype=np.uint8),
        mask=generator.random((6, 4)) < 0.5,
        category=None,
        category_source="none",
    )
    mask_path, overlay_path = save_prediction(prediction, tmp_path / "new" / "folder", "street")
    assert mask_path == tmp_path / "new" / "folder" / "street.mask.png"
    assert overlay_path.name == "street.overlay.png"
    assert np.array_equal(np.asarray(Image.open(mask_path)), np.where(prediction.mask, 255, 0))
    assert np.array_equal(np.asarray(Image.open(overlay_path)), prediction.overlay())


def test_a_full_disk_leaves_the_earlier_file_and_names_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    image = np.zeros((2, 3, 3), dtype=np.uint8)
    mask = np.ones((2, 3), dtype=bool)
    earlier = Prediction(image=image, mask=mask, category=None, category_source="none")
    mask_path, overlay_path = save_prediction(earlier, tmp_path, "street")
    before = mask_path.read_bytes(), overlay_path.read_bytes()

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    later = Prediction(image=image, mask=~mask, category=None, category_source="none")
    with pytest.raises(OSError, match="No space left on device") as caught:
        save_prediction(later, tmp_path, "street")
    assert (caught.value.errno, caught.value.filename) == (errno.ENOSPC, str(mask_path))
    assert (mask_path.read_bytes(), overlay_path.read_bytes()) == before
    assert sorted(tmp_path.iterdir()) == [mask_path, overlay_path]


def test_a_file_in_place_of_the_directory_is_named(tmp_path: Path) -> None:
    (tmp_path / "out").write_text("mine")
    prediction = Prediction(
        image=np.zeros((1, 1, 3), dtype=np.uint8),
        mask=np.ones((1, 1), dtype=bool),
        category=None,
        category_source="none",
    )
    with pytest.raises(OSError, match="out") as caught:
        save_prediction(prediction, tmp_path / "out", "street")
    assert caught.value.filename is not None
    assert (tmp_path / "out").read_text() == "mine"


def test_the_command_writes_one_pair_of_files_for_one_expression(
    ris: Callable[..., Any], tiny_runs: Path, image_path: Path, tmp_path: Path, segmenter: Segmenter
) -> None:
    common = ("--image", image_path, "--runs", tiny_runs, "--run", "first", "--device", "cpu", "--json")
    result = ris("predict", *common, "--text", "the red circle", "--out", tmp_path)
    assert result.exit_code == 0, result.output
    document = json.loads(result.stdout)
    assert {path.name for path in tmp_path.iterdir()} == {
        f"{image_path.stem}.mask.png",
        f"{image_path.stem}.overlay.png",
    }
    (found,) = segmenter(image_path, "the red circle")
    assert np.array_equal(np.asarray(Image.open(document["mask"])) == 255, found.mask)
    assert document["share"] == pytest.approx(found.mask.mean())
    assert document["weights"]["sam"] == "random(seed=0)"
    assert document["run"] == str(tiny_runs / "first")
    assert (document["checkpoint"], document["step"]) == ("best", segmenter.model.metadata.step)


def test_the_command_numbers_the_files_of_several_expressions(
    ris: Callable[..., Any], tiny_runs: Path, image_path: Path, tmp_path: Path, segmenter: Segmenter
) -> None:
    texts = ["the red circle", "big blue square at the left"]
    options = ("--image", image_path, "--text", texts[0], "--text", texts[1], "--out", tmp_path)
    result = ris("predict", *options, "--runs", tiny_runs, "--run", "first", "--device", "cpu", "--json")
    assert result.exit_code == 0, result.output
    document = json.loads(result.stdout)
    assert [one["text"] for one in document["predictions"]] == texts
    assert len(list(tmp_path.iterdir())) == 4
    for number, (one, found) in enumerate(
        zip(document["predictions"], segmenter(image_path, texts), strict=True), start=1
    ):
        assert one["mask"] == str(tmp_path / f"{image_path.stem}.{number}.mask.png")
        assert np.array_equal(np.asarray(Image.open(one["mask"])) == 255, found.mask)
    table = ris("predict", *options, "--runs", tiny_runs, "--run", "first", "--device", "cpu")
    assert table.exit_code == 0, table.output
    assert all(text in table.stdout for text in texts)
    rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in table.stdout.splitlines()]
    assert [row for row in rows if row[:1] in (["checkpoint"], ["step"])] == [
        ["checkpoint", "best"],
        ["step", str(segmenter.model.metadata.step)],
    ]


def test_the_command_refuses_a_blank_expression_among_others(ris: Callable[..., Any]) -> None:
    result = ris("predict", "--image", "x.jpg", "--text", "a dog", "--text", " ")
    assert result.exit_code == 2
    assert "The expression is empty" in result.stderr

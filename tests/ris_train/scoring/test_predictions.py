"""Files of predictions: what we write is what is read back, and what is wrong in others' files is named."""

from __future__ import annotations

import json
import os
import tracemalloc
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from PIL import Image
from pycocotools import mask as coco_mask

from ris_cache.errors import ConfigError, DataError
from ris_train.data.samples import Sample
from ris_train.scoring import VIEWS
from ris_train.scoring.prediction_files import open_predictions
from ris_train.scoring.predictions import (
    MASK_NAMES,
    PredictionWriter,
    WrongSizeError,
    decode,
    encode,
    mask_name,
)

SIZE = (4, 6)
GRIDS = {"original": SIZE, "480": (480, 480)}


def sample(ref_id: int, sent_id: int, table_name: str = "refcoco.unc") -> Sample:
    return Sample(
        table_name=table_name, split="val", ref_id=ref_id, sent_id=sent_id, image_id=9, text="", ann_ids=(1,),
        category_id=1, clip_category_id=1, is_degenerate=False,
    )  # fmt: skip


def mask(seed: int, size: tuple[int, int] = SIZE) -> np.ndarray:
    return np.random.default_rng(seed).random(size) > 0.5


def rle(array: np.ndarray) -> dict[str, Any]:
    """As pycocotools' users write it."""
    encoded = coco_mask.encode(np.asfortranarray(array.astype(np.uint8)))
    return {"size": list(encoded["size"]), "counts": encoded["counts"].decode()}


@given(hnp.arrays(np.bool_, st.tuples(st.integers(1, 20), st.integers(1, 20))))
def test_a_mask_survives_its_encoding_and_is_coded_as_pycocotools_does(array: np.ndarray) -> None:
    assert np.array_equal(decode(encode(array)), array)
    assert encode(array).counts == rle(array)["counts"]


def test_views_that_compare_the_same_mask_share_its_name() -> None:
    names = {view.name: mask_name(view) for view in VIEWS.values()}
    assert names == {
        "original": "original", "original-one": "original", "original-p35": "original-p35", "1024": "1024",
        "480": "480", "480-nearest": "480", "480-nearest-one": "480",
    }  # fmt: skip
    assert set(MASK_NAMES) == set(names.values())


def write(target: str, *, has_head: bool) -> PredictionWriter:
    writer = PredictionWriter(target)
    samples = [sample(1, 10), sample(1, 11), sample(2, 20)]
    for one in samples:
        writer.keep_mask(one, "original", mask(one.sent_id))
        writer.keep_mask(one, "480", mask(one.sent_id + 100, (480, 480)))
        writer.keep_mask(one, "original", ~mask(one.sent_id))  # of a second selection: the first is kept
    says = np.array([False, has_head, False])
    writer.write([*samples, samples[0]], np.array([*says, True]), has_head=has_head, info={"method": "ours"})
    return writer


@pytest.mark.parametrize("has_head", [True, False])
@pytest.mark.parametrize("target", ["p.json", "p.npz", "folder", "dotted.folder/"])
def test_what_is_written_is_read_back(tmp_path: Path, target: str, has_head: bool) -> None:
    path = write(f"{tmp_path}/{target}", has_head=has_head).path
    file = open_predictions(path)
    assert file.sample_ids == {(1, 10), (1, 11), (2, 20)}
    assert (file.duplicates, tuple(file.strays)) == ((), ())
    for sample_id in file.sample_ids:
        found = file.read(sample_id, GRIDS)
        assert np.array_equal(found.masks["original"], mask(sample_id[1]))
        assert found.masks["original"].dtype == np.bool_
        expected = None if not has_head or path.is_dir() else sample_id == (1, 11)
        assert found.no_target is expected
    assert ("480" in found.masks) is (target == "p.json")


def test_json_keeps_every_grid_and_says_what_made_it(tmp_path: Path) -> None:
    file = open_predictions(write(f"{tmp_path}/p.json", has_head=False).path)
    assert file.info == {"method": "ours", "thresholds": {"original": 0.5, "480": 0.5}}
    found = file.read((2, 20), GRIDS)
    assert np.array_equal(found.masks["480"], mask(120, (480, 480)))
    assert found.image_id == 9


@pytest.mark.parametrize("target", ["p.json", "p.npz"])
def test_the_same_predictions_give_the_same_bytes(tmp_path: Path, target: str) -> None:
    one, other = (write(f"{tmp_path}/{name}{target}", has_head=True).path for name in "ab")
    assert one.read_bytes() == other.read_bytes()


def test_places_that_cannot_be_written_are_refused_before_anything_runs(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"as \.json, \.npz or a folder of PNGs, not 'p\.txt'"):
        PredictionWriter(f"{tmp_path}/p.txt")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "1_1.png").touch()
    with pytest.raises(ConfigError, match="is no empty folder"):
        PredictionWriter(f"{tmp_path}/full")
    (tmp_path / "folder.json").mkdir()
    with pytest.raises(ConfigError, match="is a folder"):
        PredictionWriter(f"{tmp_path}/folder.json")
    writer = PredictionWriter(f"{tmp_path}/p.json")
    with pytest.raises(ConfigError, match=r"belongs to one dataset, not to refcoco\.unc, refcocog\.umd"):
        writer.require_one_table(["refcoco.unc", "refcocog.umd"])


def json_file(tmp_path: Path, document: object) -> Path:
    path = tmp_path / "p.json"
    path.write_text(document if isinstance(document, str) else json.dumps(document))
    return path


def entry(**changes: Any) -> dict[str, Any]:
    return {"ref_id": 1, "sent_id": 2, "segmentation": rle(mask(0))} | changes


def test_a_bare_list_and_uncompressed_runs_are_read_too(tmp_path: Path) -> None:
    """24 pixels down the columns: 5 background, 3 foreground, the rest background."""
    counts = {"size": list(SIZE), "counts": [5, 3, 16]}
    found = open_predictions(json_file(tmp_path, [entry(segmentation=counts, score=0.9)])).read((1, 2), GRIDS)
    expected = np.zeros(24, dtype=bool)
    expected[5:8] = True
    assert np.array_equal(found.masks["original"], expected.reshape(6, 4).T)
    assert (found.no_target, found.image_id) == (None, None)


@pytest.mark.parametrize(
    ("document", "message"),
    [
        ("{", "is not JSON"),
        ("[" * 100_000, "is not JSON"),
        ("[" + "9" * 10_000 + "]", "is not JSON"),
        ({"results": []}, "neither a list of predictions nor an object with one"),
        ({"predictions": [], "info": 3}, "neither a list of predictions"),
        ([3], "entry 0 is no object"),
        ([{"ref_id": 1}], "entry 0 lacks ref_id or sent_id"),
        ([{"ref_id": True, "sent_id": "2"}], "entry 0 lacks ref_id or sent_id"),
        ([{"ref_id": 1, "sent_id": 1 << 63}], "entry 0 lacks ref_id or sent_id, whole numbers of 64 bits"),
    ],
)
def test_json_that_is_no_list_of_predictions_is_refused(
    tmp_path: Path, document: object, message: str
) -> None:
    with pytest.raises(DataError, match=message):
        open_predictions(json_file(tmp_path, document))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"segmentation": [[0, 0, 1, 0, 1, 1]]}, "mask original that is no RLE object"),
        ({"segmentation": {"size": list(SIZE), "counts": "!!"}}, "mask original: .*COCO's code lacks"),
        ({"segmentation": {"size": list(SIZE), "counts": [5, 3]}}, "do not add up to the 24 pixels"),
        ({"masks": {"512": {}}}, "has other masks than original-p35, 1024, 480"),
        ({"masks": 3}, "has other masks than"),
        ({"masks": {"original": {}}}, "has other masks than"),
        ({"no_target": 1}, "neither true nor false"),
        ({"image_id": "9"}, "image_id that is no whole number"),
    ],
)
def test_an_entry_that_is_malformed_is_named(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    file = open_predictions(json_file(tmp_path, [entry(**changes)]))
    with pytest.raises(DataError, match=f"ref_id 1, sent_id 2.*{message}"):
        file.read((1, 2), GRIDS)


def test_an_entry_without_a_mask_is_named(tmp_path: Path) -> None:
    file = open_predictions(json_file(tmp_path, [{"ref_id": 1, "sent_id": 2}]))
    with pytest.raises(DataError, match="has no segmentation"):
        file.read((1, 2), GRIDS)


def test_a_huge_file_is_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ris_train.scoring.prediction_files.MAX_JSON_BYTES", 10)
    with pytest.raises(DataError, match="JSON is read up to 10"):
        open_predictions(json_file(tmp_path, [entry()]))


def test_two_predictions_of_one_sample_are_noticed_in_every_form(tmp_path: Path) -> None:
    assert open_predictions(json_file(tmp_path, [entry(), entry(), entry(sent_id=3)])).duplicates == ((1, 2),)
    folder = tmp_path / "pngs"
    folder.mkdir()
    for name in ("1_2.png", "01_2.png", "1_3.PNG", "notes.txt", "1-2.png"):
        (folder / name).touch()
    assert open_predictions(folder).duplicates == ((1, 2),)
    assert open_predictions(folder).sample_ids == {(1, 2), (1, 3)}
    assert set(open_predictions(folder).strays) == {"notes.txt", "1-2.png"}
    with zipfile.ZipFile(tmp_path / "p.npz", "w") as archive:
        for name in ("1_2.npy", "1_3.npy", "mean.npy", "7_7_no_target.npy"):
            archive.writestr(name, b"")
        with pytest.warns(UserWarning, match="Duplicate"):
            archive.writestr("1_2.npy", b"")
    assert open_predictions(tmp_path / "p.npz").duplicates == ((1, 2),)
    assert set(open_predictions(tmp_path / "p.npz").strays) == {"mean.npy", "7_7_no_target.npy"}


def png(folder: Path, image: Image.Image) -> Path:
    folder.mkdir(exist_ok=True)
    image.save(folder / "1_2.png")
    return folder


@pytest.mark.parametrize("mode", ["L", "1", "P", "RGB", "I;16"])
def test_what_is_not_zero_in_a_png_is_foreground(tmp_path: Path, mode: str) -> None:
    array = mask(1)
    image = {
        "L": lambda: Image.fromarray(array.astype(np.uint8)),
        "1": lambda: Image.fromarray(array),
        "P": lambda: _with_palette(array),
        "RGB": lambda: Image.fromarray(np.stack([0 * array, array, 0 * array], axis=2).astype(np.uint8) * 7),
        "I;16": lambda: Image.fromarray(array.astype(np.uint16) * 256),
    }[mode]()
    found = open_predictions(png(tmp_path / "pngs", image)).read((1, 2), {"original": SIZE})
    assert np.array_equal(found.masks["original"], array)


def _with_palette(array: np.ndarray) -> Image.Image:
    """Index 0 is shown white, index 1 black: the indices count, not the colours."""
    image = Image.new("P", array.shape[::-1])
    image.putdata(array.astype(int).ravel().tolist())
    image.putpalette([255, 255, 255, 0, 0, 0])
    return image


def test_a_png_with_transparency_is_not_guessed_at(tmp_path: Path) -> None:
    folder = png(tmp_path / "pngs", Image.new("RGBA", (6, 4)))
    with pytest.raises(DataError, match=r"transparent layer \(mode RGBA\)"):
        open_predictions(folder).read((1, 2), {"original": SIZE})


def test_a_file_that_is_no_png_is_named(tmp_path: Path) -> None:
    folder = tmp_path / "pngs"
    folder.mkdir()
    Image.new("L", (6, 4)).save(folder / "1_2.png", format="JPEG")
    with pytest.raises(DataError, match=r"1_2\.png cannot be read as PNG"):
        open_predictions(folder).read((1, 2), {"original": SIZE})
    png(folder, Image.fromarray(mask(1, (400, 600))))
    (folder / "1_2.png").write_bytes((folder / "1_2.png").read_bytes()[:500])
    with pytest.raises(DataError, match=r"1_2\.png cannot be read as PNG"):
        open_predictions(folder).read((1, 2), {"original": (400, 600)})


def npz(tmp_path: Path, **arrays: Any) -> Path:
    np.savez(tmp_path / "p.npz", **arrays)
    return tmp_path / "p.npz"


@pytest.mark.parametrize("dtype", [np.bool_, np.uint8, np.int64, np.float32])
def test_zeros_and_ones_of_any_type_are_a_mask(tmp_path: Path, dtype: Any) -> None:
    path = npz(tmp_path, **{"1_2": mask(3).astype(dtype), "1_2_no_target": np.array([1])})
    found = open_predictions(path).read((1, 2), {"original": SIZE})
    assert np.array_equal(found.masks["original"], mask(3))
    assert found.no_target is True


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.full(SIZE, 255, dtype=np.uint8), "other values than 0 and 1"),
        (np.full(SIZE, 0.5), "other values than 0 and 1"),
        (np.full(SIZE, "a"), "other values than 0 and 1"),
        (np.full(SIZE, None), r"other values than 0 and 1 \(type O\)"),
    ],
)
def test_arrays_that_are_no_mask_are_refused_and_pickles_never_loaded(
    tmp_path: Path, array: np.ndarray, message: str
) -> None:
    file = open_predictions(npz(tmp_path, **{"1_2": array}))
    with pytest.raises(DataError, match=message):
        file.read((1, 2), {"original": SIZE})


def test_a_damaged_archive_is_refused(tmp_path: Path) -> None:
    path = npz(tmp_path, **{"1_2": mask(0, (50, 50))})
    content = bytearray(path.read_bytes())
    content[150] ^= 255
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"1_2\.npy cannot be read"):
        open_predictions(path).read((1, 2), {"original": (50, 50)})
    path.write_bytes(content[:100])
    with pytest.raises(DataError, match="cannot be read as NPZ"):
        open_predictions(path)


@pytest.mark.parametrize("size", [(6, 4), (4, 7), (8, 12)])
def test_a_mask_of_another_size_is_neither_resized_nor_decoded(tmp_path: Path, size: tuple[int, int]) -> None:
    files = [
        json_file(tmp_path, [entry(segmentation=rle(mask(0, size)))]),
        png(tmp_path / "pngs", Image.fromarray(mask(0, size))),
        npz(tmp_path, **{"1_2": mask(0, size)}),
    ]
    for path in files:
        with pytest.raises(WrongSizeError) as caught:
            open_predictions(path).read((1, 2), {"original": SIZE})
        assert caught.value.facts["expected"] == SIZE
        assert tuple(caught.value.facts["found"]) == size


def test_an_array_that_claims_a_giant_shape_takes_no_memory(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "p.npz", "w") as archive, archive.open("1_2.npy", "w") as member:
        header = {"descr": "|b1", "fortran_order": False, "shape": (1 << 30, 1 << 20)}
        np.lib.format.write_array_header_1_0(member, header)
    with pytest.raises(WrongSizeError):
        open_predictions(tmp_path / "p.npz").read((1, 2), {"original": SIZE})


def npy(descr: object, shape: object, *, header: bytes | None = None, version: int = 1) -> bytes:
    """A header without data, true or not."""
    if header is None:
        header = f"{{'descr': {descr!r}, 'fortran_order': False, 'shape': {shape!r}, }}".encode()
    length = len(header).to_bytes(2 if version == 1 else 4, "little")
    return b"\x93NUMPY" + bytes([version, 0]) + length + header


@pytest.mark.parametrize(
    "content",
    [
        npy("|V1073741824", SIZE),
        npy((), SIZE),
        npy("|b1", (-4, -6)),
        npy("", SIZE, header=b"((("),
        npy("", SIZE, header=b"{[]: 1}"),
        npy("", SIZE, header=b"-" * 9000 + b"1"),
        npy("|b1", SIZE, version=9),
        b"",
    ],
)
@pytest.mark.parametrize("name", ["1_2.npy", "1_2_no_target.npy"])
def test_a_header_that_numpy_would_not_write_is_never_evaluated(
    tmp_path: Path, content: bytes, name: str
) -> None:
    with zipfile.ZipFile(npz(tmp_path, **{"1_3": mask(0)}), "a") as archive:
        if name != "1_2.npy":
            archive.writestr("1_2.npy", npy("|b1", SIZE) + bytes(24))
        archive.writestr(name, content)
    with pytest.raises(DataError, match=name):
        open_predictions(tmp_path / "p.npz").read((1, 2), {"original": SIZE})


def test_a_header_that_claims_to_be_giant_is_not_read(tmp_path: Path) -> None:
    """64 MiB of zeros take 64 KiB in the archive."""
    with zipfile.ZipFile(tmp_path / "p.npz", "w", zipfile.ZIP_DEFLATED) as archive:
        length = (1 << 26).to_bytes(4, "little")
        archive.writestr("1_2.npy", b"\x93NUMPY\x02\x00" + length + bytes(1 << 26))
    file = open_predictions(tmp_path / "p.npz")
    tracemalloc.start()
    try:
        with pytest.raises(DataError, match="another header than numpy"):
            file.read((1, 2), {"original": SIZE})
        assert tracemalloc.get_traced_memory()[1] < 1 << 22
    finally:
        tracemalloc.stop()


def test_an_archive_compressed_as_numpy_never_does_is_refused(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "p.npz", "w", zipfile.ZIP_LZMA) as archive:
        archive.writestr("1_2.npy", npy("|b1", SIZE) + bytes(24))
    with pytest.raises(DataError, match="compressed by method 14"):
        open_predictions(tmp_path / "p.npz").read((1, 2), {"original": SIZE})
    content = bytearray((tmp_path / "p.npz").read_bytes())
    entry = content.index(b"PK\x01\x02")
    content[entry + 6] = 255  # the version of the format that is needed
    (tmp_path / "p.npz").write_bytes(content)
    with pytest.raises(DataError, match="cannot be read as NPZ"):
        open_predictions(tmp_path / "p.npz")


def test_a_name_that_states_no_id_of_64_bits_in_plain_digits_is_a_stray(tmp_path: Path) -> None:
    names = ["9" * 5000 + "_2.npy", "\u0661_\u0662.npy", "../1_2.npy"]
    with zipfile.ZipFile(tmp_path / "p.npz", "w") as archive:
        for name in names:
            archive.writestr(name, b"")
    file = open_predictions(tmp_path / "p.npz")
    assert (file.sample_ids, file.strays) == (frozenset(), tuple(names))


def test_a_png_chunk_that_claims_gigabytes_is_refused(tmp_path: Path, monkeypatch: Any) -> None:
    folder = png(tmp_path / "pngs", Image.fromarray(mask(1)))

    def load(image: Image.Image) -> None:
        raise MemoryError

    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", load)
    with pytest.raises(DataError, match="a chunk claims gigabytes"):
        open_predictions(folder).read((1, 2), {"original": SIZE})


def test_what_a_file_says_of_itself_is_written_though_utf_8_cannot_hold_it(tmp_path: Path) -> None:
    """A run's folder may have such a name."""
    writer = PredictionWriter(f"{tmp_path}/p.json")
    writer.keep_mask(sample(1, 2), "original", mask(0))
    writer.write([sample(1, 2)], np.array([False]), has_head=False, info={"method": "run\udcff"})
    assert open_predictions(tmp_path / "p.json").info["method"] == "run\udcff"


def test_only_regular_files_of_a_folder_are_opened(tmp_path: Path) -> None:
    """A pipe would be waited for without end."""
    os.mkfifo(tmp_path / "1_2.png")
    (tmp_path / "3_4.png").mkdir()
    (tmp_path / "5_6.png").symlink_to("/dev/zero")
    file = open_predictions(tmp_path)
    assert (file.sample_ids, file.strays) == (frozenset(), ("1_2.png", "3_4.png", "5_6.png"))


def test_a_path_that_the_system_refuses_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="cannot be read: File name too long"):
        open_predictions(tmp_path / ("x" * 300 + ".json"))


def test_what_is_not_there_or_of_no_known_form_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="There are no predictions at"):
        open_predictions(tmp_path / "none.json")
    (tmp_path / "p.pkl").touch()
    with pytest.raises(ConfigError, match=r"neither \.json nor \.npz nor a folder"):
        open_predictions(tmp_path / "p.pkl")

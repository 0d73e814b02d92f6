"""Decoding, squashing and normalising images."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from ris_cache.encoders.images import decode_image, normalise, squash
from ris_cache.encoders.spec import PAPER, Normalisation
from ris_cache.errors import ConfigError, DataError, ShapeError

ORIENTATION_TAG = 0x0112


def scene(height: int, width: int) -> np.ndarray:
    """A smooth picture in which every corner differs."""
    rows, cols = np.mgrid[0:height, 0:width]
    return np.stack([rows * 255 // height, cols * 255 // width, (rows + cols) % 256], axis=-1).astype(
        np.uint8
    )


@pytest.fixture
def jpeg(tmp_path: Path) -> Path:
    path = tmp_path / "scene.jpg"
    Image.fromarray(scene(40, 60)).save(path, quality=95)
    return path


def test_a_png_decodes_to_its_pixels(tmp_path: Path) -> None:
    path = tmp_path / "scene.png"
    Image.fromarray(scene(5, 7)).save(path)
    pixels = decode_image(path, expected_size=(5, 7))
    assert pixels.dtype == np.uint8
    np.testing.assert_array_equal(pixels, scene(5, 7))


@pytest.mark.parametrize(
    ("orientation", "upright"),
    [
        (1, lambda a: a),
        (2, lambda a: a[:, ::-1]),
        (3, lambda a: a[::-1, ::-1]),
        (4, lambda a: a[::-1]),
        (5, lambda a: a.transpose(1, 0, 2)),
        (6, lambda a: np.rot90(a, -1)),
        (7, lambda a: np.rot90(a.transpose(1, 0, 2), 2)),
        (8, lambda a: np.rot90(a)),
    ],
)
def test_exif_orientation_is_applied_before_the_size_is_compared(
    tmp_path: Path, orientation: int, upright
) -> None:
    path = tmp_path / "scene.png"
    exif = Image.Exif()
    exif[ORIENTATION_TAG] = orientation
    Image.fromarray(scene(4, 6)).save(path, exif=exif)
    expected = upright(scene(4, 6))
    np.testing.assert_array_equal(decode_image(path, expected_size=expected.shape[:2]), expected)


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGBA", "CMYK", "YCbCr", "I;16"])
def test_every_mode_becomes_rgb(tmp_path: Path, mode: str) -> None:
    if mode == "I;16":
        image = Image.fromarray(np.full((4, 6), 200 << 8, dtype=np.uint16))
    else:
        image = Image.new("RGB", (6, 4), (200, 200, 200)).convert(mode)
    path = tmp_path / ("scene.jpg" if mode in ("CMYK", "YCbCr") else "scene.png")
    image.save(path)
    pixels = decode_image(path, expected_size=(4, 6))
    assert pixels.shape == (4, 6, 3)
    if mode != "1":
        assert np.abs(pixels.astype(int) - 200).max() <= 6


@pytest.mark.filterwarnings("error")
def test_a_palette_with_transparency_decodes_without_a_warning(tmp_path: Path) -> None:
    path = tmp_path / "scene.png"
    image = Image.fromarray(scene(4, 6)).convert("P")
    image.save(path, transparency=bytes(range(256)))
    assert decode_image(path, expected_size=(4, 6)).shape == (4, 6, 3)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"No image file at .*absent\.jpg") as caught:
        decode_image(tmp_path / "absent.jpg", expected_size=None)
    assert caught.value.facts["path"] == tmp_path / "absent.jpg"


def test_a_truncated_file_is_refused(jpeg: Path) -> None:
    jpeg.write_bytes(jpeg.read_bytes()[:-200])
    with pytest.raises(DataError, match=r"scene\.jpg cannot be decoded"):
        decode_image(jpeg, expected_size=None)


def test_a_file_that_is_no_image_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "page.jpg"
    path.write_text("<html>404</html>")
    with pytest.raises(DataError, match="not an image"):
        decode_image(path, expected_size=None)


def test_another_size_than_annotated_names_both(jpeg: Path) -> None:
    with pytest.raises(DataError, match=r"scene\.jpg is 40x60 .* says 60x40") as caught:
        decode_image(jpeg, expected_size=(60, 40))
    assert caught.value.facts["expected"] == (60, 40)
    assert caught.value.facts["found"] == (40, 60)


@pytest.mark.parametrize(
    "limit", [1000, 2000]
)  # 2400 pixels: Pillow raises above twice the limit, else warns
@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_a_decompression_bomb_is_refused(jpeg: Path, monkeypatch: pytest.MonkeyPatch, limit: int) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
    with pytest.raises(DataError, match=r"too large to decode|decompression bomb"):
        decode_image(jpeg, expected_size=None)


@pytest.mark.parametrize("suffix", ["jpg", "png"])
@pytest.mark.filterwarnings("ignore::UserWarning")  # Pillow's, about damaged EXIF
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(position=st.floats(0, 1, exclude_max=True), garbage=st.binary(min_size=1, max_size=40))
def test_damaged_bytes_either_decode_or_raise_a_data_error(
    tmp_path: Path, suffix: str, position: float, garbage: bytes
) -> None:
    stream = io.BytesIO()
    exif = Image.Exif()
    exif[ORIENTATION_TAG] = 6
    Image.fromarray(scene(20, 30)).save(stream, format={"jpg": "JPEG", "png": "PNG"}[suffix], exif=exif)
    content = bytearray(stream.getvalue())
    start = int(position * len(content))
    content[start : start + len(garbage)] = garbage
    path = tmp_path / f"damaged.{suffix}"
    path.write_bytes(content)
    try:
        pixels = decode_image(path, expected_size=None)
    except DataError:
        return
    assert pixels.ndim == 3
    assert pixels.dtype == np.uint8


@pytest.mark.parametrize("kernel", ["pil-bilinear", "pil-bicubic"])
def test_squashing_keeps_relative_positions(kernel: str) -> None:
    image = np.zeros((40, 80, 3), np.uint8)
    image[:20, 40:] = 255  # the upper right quarter
    squashed = squash(image, 16, kernel)
    assert squashed.shape == (16, 16, 3)
    np.testing.assert_array_equal(squashed[:6, 10:], 255)
    np.testing.assert_array_equal(squashed[10:], 0)
    np.testing.assert_array_equal(squashed[:, :6], 0)


def test_bilinear_enlargement_agrees_with_torch_to_one_level() -> None:
    image = scene(30, 50)
    planes = torch.from_numpy(image).permute(2, 0, 1)[None].float()
    oracle = torch.nn.functional.interpolate(planes, size=(64, 64), mode="bilinear", align_corners=False)
    difference = oracle[0].permute(1, 2, 0).numpy() - squash(image, 64, "pil-bilinear")
    assert np.abs(difference).max() <= 1.0


def test_the_two_kernels_differ() -> None:
    assert not np.array_equal(
        squash(scene(30, 50), 64, "pil-bilinear"), squash(scene(30, 50), 64, "pil-bicubic")
    )


def test_an_unknown_kernel_lists_the_known_ones() -> None:
    with pytest.raises(ConfigError, match="'nearest'; known: pil-bilinear, pil-bicubic"):
        squash(scene(4, 4), 8, "nearest")


@pytest.mark.parametrize(
    "image",
    [
        np.zeros((4, 4), np.uint8),
        np.zeros((4, 4, 4), np.uint8),
        np.zeros((4, 4, 3)),
        np.zeros((0, 4, 3), np.uint8),
    ],
)
def test_squash_refuses_anything_but_rgb_bytes(image: np.ndarray) -> None:
    with pytest.raises(ShapeError, match="uint8"):
        squash(image, 8, "pil-bilinear")


def test_normalising_gives_values_worked_out_by_hand() -> None:
    pixels = torch.tensor([[[[255, 0, 51]]]], dtype=torch.uint8)
    result = normalise(pixels, Normalisation(mean=(0.5, 0.5, 0.1), std=(0.5, 0.25, 0.1), scale=255.0))
    torch.testing.assert_close(result, torch.tensor([[[[1.0]], [[-2.0]], [[1.0]]]]))


def test_each_preset_normalises_as_its_library_does() -> None:
    from ris_cache.encoders import clip  # noqa: F401  makes the library's preprocessing importable

    pixels = torch.randint(
        0, 256, (2, 8, 8, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)
    )
    planes = pixels.permute(0, 3, 1, 2)
    from segment_anything.modeling import Sam
    from torchvision.transforms import Normalize

    sam = Sam.__new__(Sam)
    torch.nn.Module.__init__(sam)
    sam.image_encoder = torch.nn.Identity()
    sam.image_encoder.img_size = 8
    sam.pixel_mean = torch.tensor([123.675, 116.28, 103.53]).view(-1, 1, 1)
    sam.pixel_std = torch.tensor([58.395, 57.12, 57.375]).view(-1, 1, 1)
    torch.testing.assert_close(normalise(pixels, PAPER.sam.normalisation), sam.preprocess(planes))
    import open_clip

    clip_normalise = Normalize(open_clip.OPENAI_DATASET_MEAN, open_clip.OPENAI_DATASET_STD)
    torch.testing.assert_close(normalise(pixels, PAPER.clip.normalisation), clip_normalise(planes / 255))


def test_normalised_planes_are_contiguous_float32() -> None:
    result = normalise(torch.zeros(2, 4, 4, 3, dtype=torch.uint8), PAPER.sam.normalisation)
    assert result.shape == (2, 3, 4, 4)
    assert result.dtype == torch.float32
    assert result.is_contiguous()


@pytest.mark.parametrize(
    "pixels",
    [torch.zeros(1, 4, 4, 3), torch.zeros(1, 3, 4, 4, dtype=torch.uint8), torch.zeros(4, 4, 3).byte()],
)
def test_normalise_refuses_other_axes_and_dtypes(pixels: torch.Tensor) -> None:
    with pytest.raises(ShapeError, match=r"uint8\[B, S, S, 3\]"):
        normalise(pixels, PAPER.sam.normalisation)


def test_a_format_that_needs_another_program_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "drawn.jpg"
    Image.new("RGB", (8, 6)).save(path, format="EPS")
    with pytest.raises(DataError, match=r"drawn\.jpg is in the format EPS\. Save it as"):
        decode_image(path, expected_size=None)

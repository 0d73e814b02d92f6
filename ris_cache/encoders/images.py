"""From an image file to the pixels that the encoders see.

Axes: B images, H W rows and columns, S side of a square input frame. Sizes are (height, width).
Each input frame is resampled once, straight from the original frame, and nothing is padded or cropped:
image and mask share the squash, so its inverse is a plain resize.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

from ris_cache.encoders.spec import Normalisation
from ris_cache.errors import ConfigError, DataError, ShapeError
from ris_cache.pillow_limits import DECODING_ERRORS, RUNS_A_PROGRAM

if TYPE_CHECKING:
    import torch

KERNELS: dict[str, Image.Resampling] = {
    "pil-bilinear": Image.Resampling.BILINEAR,
    "pil-bicubic": Image.Resampling.BICUBIC,
}
"""Resampling kernels by the name that specs and fingerprints use."""


def decode_image(path: Path, *, expected_size: tuple[int, int] | None) -> NDArray[np.uint8]:
    """Decode an image file to RGB, the way up that its EXIF orientation says.

    Greyscale, palette and CMYK are converted; an alpha channel is dropped; 16-bit greyscale keeps its upper
    8 bits.

    Args:
        expected_size: (height, width) in pixels that the annotations state, after orientation; None skips
            the comparison.

    Returns:
        uint8[H, W, 3], the original frame.

    Raises:
        DataError: the file is missing, cut short, no image, of a format that needs another program, larger
            than Pillow's limit against decompression bombs, or of another size than expected.
    """
    try:
        with Image.open(path) as image:
            _refuse_bomb(path, image.size)
            if image.format in RUNS_A_PROGRAM:
                raise DataError(f"{path} is in the format {image.format}. Save it as JPEG or PNG.", path=path)
            image.load()
            pixels = np.asarray(_to_rgb(ImageOps.exif_transpose(image)))
    except FileNotFoundError as error:
        raise DataError(
            f"No image file at {path}. Check the image folder and the file name.", path=path
        ) from error
    except Image.DecompressionBombError as error:
        raise DataError(f"Image {path} is too large to decode: {error}", path=path) from error
    except DataError:
        raise
    except DECODING_ERRORS as error:
        raise DataError(
            f"Image {path} cannot be decoded ({type(error).__name__}: {error}). "
            "The file is damaged or is not an image; fetch it again.",
            path=path,
        ) from error
    found_size = (pixels.shape[0], pixels.shape[1])
    if expected_size is not None and found_size != tuple(expected_size):
        raise DataError(
            f"Image {path} is {found_size[0]}x{found_size[1]} (height x width) once decoded, but its "
            f"annotation says {expected_size[0]}x{expected_size[1]}. "
            "Check that images and annotations belong together.",
            path=path,
            expected=tuple(expected_size),
            found=found_size,
        )
    return pixels


def squash(image: NDArray[np.uint8], side: int, kernel: str) -> NDArray[np.uint8]:
    """Resize to a square, letting the aspect ratio change.

    Args:
        image: uint8[H, W, 3], original frame.
        side: S in pixels.
        kernel: one of `KERNELS`; Pillow's, which average over the source pixels when they shrink.

    Returns:
        uint8[S, S, 3], input frame.

    Raises:
        ShapeError: not an RGB image of bytes.
        ConfigError: unknown kernel.
    """
    if image.ndim != 3 or image.shape[2] != 3 or image.dtype != np.uint8 or image.size == 0:
        raise ShapeError(
            f"squash takes uint8[H, W, 3] with at least one pixel, got {image.dtype}{list(image.shape)}.",
            found=image.shape,
        )
    if kernel not in KERNELS:
        raise ConfigError(
            f"Unknown resampling kernel {kernel!r}; known: {', '.join(KERNELS)}.",
            kernel=kernel,
            known=tuple(KERNELS),
        )
    return np.array(Image.fromarray(image).resize((side, side), resample=KERNELS[kernel]))


def normalise(pixels: torch.Tensor, normalisation: Normalisation) -> torch.Tensor:
    """Turn bytes into what an encoder's first layer takes, on the device where they lie.

    Args:
        pixels: uint8[B, S, S, 3], RGB input frames.

    Returns:
        float32[B, 3, S, S], contiguous: (pixels / scale - mean) / std per channel.

    Raises:
        ShapeError: other dtype or axes.
    """
    import torch  # here, so that decoding images for a data check does not pay for it

    if pixels.dtype != torch.uint8 or pixels.ndim != 4 or pixels.shape[3] != 3:
        raise ShapeError(
            f"normalise takes uint8[B, S, S, 3], got {pixels.dtype}{list(pixels.shape)}.",
            found=tuple(pixels.shape),
        )
    planes = pixels.permute(0, 3, 1, 2).to(torch.float32, memory_format=torch.contiguous_format)
    # Filled on the device: copying three numbers to a GPU would wait for all that is queued there.
    mean, std = (
        torch.stack([planes.new_full((1, 1), value) for value in values])
        for values in (normalisation.mean, normalisation.std)
    )
    return (planes / normalisation.scale - mean) / std


def _refuse_bomb(path: Path, size: tuple[int, int]) -> None:
    """Stop where Pillow only warns; a warning filter is process-wide and decoding runs in threads."""
    limit = Image.MAX_IMAGE_PIXELS
    width, height = size
    if limit is not None and width * height > limit:
        raise DataError(
            f"Image {path} claims {height}x{width} pixels, more than the {limit} that are decoded "
            "(a decompression bomb?). Shrink it, or raise PIL.Image.MAX_IMAGE_PIXELS if it is genuine.",
            path=path,
            size=(height, width),
            limit=limit,
        )


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I;16"):
        # Pillow clips 16-bit values at 255 on conversion, which turns almost any such picture white.
        return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8)).convert("RGB")
    if image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")  # Pillow warns when a palette's alpha is lost in one step
    return image.convert("RGB")

"""What the loader of custom datasets reads of image files: the size of a picture, and a mask.

H, W: rows and columns of the original frame, the way up that the EXIF orientation says.
"""

from __future__ import annotations

from pathlib import Path
from typing import Final

import numpy as np
from PIL import ExifTags, Image
from pycocotools import mask as coco_mask

from ris_cache.datasets.records import Rle, Segmentation
from ris_cache.errors import DataError
from ris_cache.pillow_limits import DECODING_ERRORS, RUNS_A_PROGRAM

_DECODING_ERRORS: Final = (*DECODING_ERRORS, MemoryError, Image.DecompressionBombError)

_ORIENTED: Final = frozenset({"exif", "Raw profile type exif", "xmp", "XML:com.adobe.xmp"})
_UPRIGHT: Final = frozenset({None, 0, 1})
_TURNED: Final = frozenset({5, 6, 7, 8})
_LOSSY: Final = frozenset({"JPEG", "MPO"})
_WITH_ALPHA: Final = frozenset({"LA", "PA", "La", "RGBA", "RGBa"})


def frame_size(path: Path) -> tuple[int, int]:
    """Read (H, W) of an image from its header; the pixels are not decoded.

    Raises:
        DataError: the file is missing, no image, of a format that needs another program, or larger than
            Pillow's limit against decompression bombs.
    """
    _require_file(path)
    try:
        with Image.open(path) as image:
            _require_usable(path, image)
            width, height = image.size
            orientation = _orientation(image)
    except DataError:
        raise
    except _DECODING_ERRORS as error:
        raise _unreadable(path, error) from error
    return (width, height) if orientation in _TURNED else (height, width)


def read_mask(path: Path, size: tuple[int, int]) -> Segmentation:
    """Read a mask file: a pixel is foreground if any of its channels but alpha is not zero.

    Args:
        size: (H, W) that it must have.
    Returns:
        `()` if nothing is foreground.
    Raises:
        DataError: the file is missing, damaged, no image, of another size, to be turned by its EXIF
            orientation, or a JPEG, whose zeros are not exact.
    """
    _require_file(path)
    try:
        with Image.open(path) as image:
            _require_usable(path, image)
            found = (image.size[1], image.size[0])
            if found != size:
                raise DataError(
                    f"The mask {path} is {found[0]}x{found[1]} (height x width), but its image is "
                    f"{size[0]}x{size[1]}. Draw it on the image's own pixels.",
                    path=path,
                    expected=size,
                    found=found,
                )
            if image.format in _LOSSY:
                raise DataError(
                    f"The mask {path} is a JPEG, which blurs what is zero and what is not. Save it as PNG.",
                    path=path,
                )
            if _orientation(image) not in _UPRIGHT:
                raise DataError(
                    f"The mask {path} has an EXIF orientation, so its pixels are not in the order shown. "
                    "Save it without.",
                    path=path,
                )
            has_alpha = image.mode in _WITH_ALPHA
            pixels = np.asarray(image)
    except DataError:
        raise
    except _DECODING_ERRORS as error:
        raise _unreadable(path, error) from error
    if has_alpha:
        pixels = pixels[..., :-1]
    mask = (pixels != 0).any(axis=2) if pixels.ndim == 3 else pixels != 0
    if not mask.any():
        return ()
    encoded = coco_mask.encode(np.asfortranarray(mask.astype(np.uint8)))
    return Rle(size=size, counts=encoded["counts"].decode("ascii"))


def _require_file(path: Path) -> None:
    """Reading a named pipe or a device might never end."""
    if path.exists() and not path.is_file():
        raise DataError(f"{path} is no file. Put an image there.", path=path)


def _require_usable(path: Path, image: Image.Image) -> None:
    """Refuse what would hurt to decode; of bombs Pillow only warns."""
    width, height = image.size
    limit = Image.MAX_IMAGE_PIXELS
    if limit is not None and width * height > limit:
        raise DataError(
            f"Image {path} claims {height}x{width} pixels, more than the {limit} that are decoded (a "
            "decompression bomb?). Shrink it, or raise PIL.Image.MAX_IMAGE_PIXELS if it is genuine.",
            path=path,
            limit=limit,
        )
    if image.format in RUNS_A_PROGRAM:
        raise DataError(f"{path} is in the format {image.format}. Save it as PNG.", path=path)


def _orientation(image: Image.Image) -> int | None:
    # Without metadata in the header, getexif would decode a whole PNG to look for some at its end.
    has_orientation = not _ORIENTED.isdisjoint(image.info)
    orientation: int | None = image.getexif().get(ExifTags.Base.Orientation) if has_orientation else None
    return orientation


def _unreadable(path: Path, error: Exception) -> DataError:
    what = "is missing" if isinstance(error, FileNotFoundError) else "cannot be read as an image"
    return DataError(f"{path} {what} ({type(error).__name__}: {error}). Put a sound file there.", path=path)

"""Prediction on a new image: what a segmenter finds, as files to look at."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image

from ris_cache.encoders.images import decode_image
from ris_cache.store.files import is_temporary, write_atomically
from ris_train.live import Segmenter

OVERLAY_COLOUR = (255, 64, 64)
OVERLAY_OPACITY = 0.5


@dataclass(frozen=True, slots=True, kw_only=True)
class Prediction:
    """A mask for one image and expression.

    Attributes:
        image: uint8[H, W, 3], the original frame.
        mask: bool[H, W].
        category: name of the category that the model was given; None if it reads none.
        category_source: `named` by the user, `predicted` by CLIP, or `none`.
        says_no_target: whether the model finds that the expression refers to nothing, so that the mask is
            empty; None if it has no head to say so.
    """

    image: npt.NDArray[np.uint8]
    mask: npt.NDArray[np.bool_]
    category: str | None
    category_source: str
    says_no_target: bool | None = None

    def overlay(self) -> npt.NDArray[np.uint8]:
        """The image with the mask tinted: uint8[H, W, 3]."""
        tint = np.array(OVERLAY_COLOUR, dtype=np.float32)
        blended = self.image.astype(np.float32)
        blended[self.mask] = (1 - OVERLAY_OPACITY) * blended[self.mask] + OVERLAY_OPACITY * tint
        return blended.round().astype(np.uint8)


def predict(
    image_path: Path, texts: Sequence[str], segmenter: Segmenter, *, category: str | None = None
) -> list[Prediction]:
    """Segment what each expression refers to.

    Args:
        image_path: any image that Pillow reads.
        texts: the expressions.
        segmenter: model and encoders.
        category: name of the targets' category, for models that read one; CLIP predicts it if not named.

    Returns:
        One per expression, in their order.

    Raises:
        ConfigError: an expression that is blank or no valid text, or a category that the model does not know
            or does not read.
        DataError: the image cannot be read.
    """
    image = decode_image(image_path, expected_size=None)
    return [
        Prediction(
            image=image,
            mask=found.mask,
            category=found.category,
            category_source=found.category_source,
            says_no_target=found.says_no_target,
        )
        for found in segmenter(image, texts, category=category)
    ]


def save_prediction(prediction: Prediction, out_dir: Path, stem: str) -> tuple[Path, Path]:
    """Write the mask (PNG, 0 and 255) and the overlay, each whole or not at all; returns both paths.

    Raises:
        OSError: a file, which it names, cannot be written, or the disk is full.
    """
    mask_path, overlay_path = out_dir / f"{stem}.mask.png", out_dir / f"{stem}.overlay.png"
    _write_png(mask_path, prediction.mask.astype(np.uint8) * 255)
    _write_png(overlay_path, prediction.overlay())
    return mask_path, overlay_path


def _write_png(path: Path, pixels: npt.NDArray[np.uint8]) -> None:
    content = BytesIO()
    Image.fromarray(pixels).save(content, format="PNG")
    try:
        write_atomically(path, content.getvalue())
    except OSError as error:
        if error.filename is not None and not is_temporary(str(error.filename)):
            raise
        raise OSError(error.errno, error.strerror, str(path)) from error  # a full disk names no file

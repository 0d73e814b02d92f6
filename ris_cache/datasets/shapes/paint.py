"""Colour a laid-out scene: textured background, objects with a rim, light falling from above.

H, W: rows and columns of the image; pixels are RGB.
"""

from __future__ import annotations

import colorsys
import math

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from ris_cache.datasets.shapes.objects import COLOURS
from ris_cache.datasets.shapes.scene import Drawing, Stamp, rasterise

_RIM = 0.9
_RIM_DARKENING = 0.6
_RIM_LIGHTENING = 64
_DARK = 60
_COLOUR_JITTER = 9
_GRAIN = 6


def paint(drawing: Drawing, rng: np.random.Generator) -> Image.Image:
    """Paint a drawing; the generator decides the background, the grain and the jitter of the colours.

    Returns:
        An RGB image of the scene's size.
    """
    height, width = drawing.labels.shape
    canvas = _background(rng, height, width)
    for placement in drawing.placements:
        jitter = rng.integers(-_COLOUR_JITTER, _COLOUR_JITTER + 1, size=3)
        colour = np.clip(np.array(COLOURS[placement.colour]) + jitter, 0, 255).astype(np.float32)
        # A darker rim would not show on black.
        rim = colour * _RIM_DARKENING if colour.max() > _DARK else colour + _RIM_LIGHTENING
        _lay_on(canvas, rasterise(placement.outline()), rim, shaded=False)
        _lay_on(canvas, rasterise(placement.outline(shrink=_RIM)), colour, shaded=True)
    canvas += rng.integers(-_GRAIN, _GRAIN + 1, size=(height, width, 1), dtype=np.int8)
    return Image.fromarray(np.clip(canvas, 0, 255).astype(np.uint8))


def _lay_on(canvas: NDArray[np.float32], stamp: Stamp, colour: NDArray[np.float32], *, shaded: bool) -> None:
    """Blend one colour into float32[H, W, 3] in place."""
    alpha = stamp.coverage[..., None].astype(np.float32) / 255.0
    light = np.linspace(1.04, 0.9, len(alpha), dtype=np.float32)[:, None, None] if shaded else np.float32(1.0)
    patch = canvas[stamp.region]
    patch += alpha * (colour * light - patch)


def _background(rng: np.random.Generator, height: int, width: int) -> NDArray[np.float32]:
    """Mix two muted tones by a random pattern: float32[H, W, 3] in 0…255."""
    pattern = (_gradient, _stripes, _checker, _blobs)[int(rng.integers(4))]
    first, second = _muted_tone(rng), _muted_tone(rng)
    mix = pattern(rng, height, width)[..., None]
    return first + mix * (second - first)


def _muted_tone(rng: np.random.Generator) -> NDArray[np.float32]:
    # Low saturation keeps tones away from the coloured objects, middle value away from black and white.
    tone = colorsys.hsv_to_rgb(rng.random(), rng.uniform(0.05, 0.22), rng.uniform(0.42, 0.68))
    return np.array(tone, dtype=np.float32) * 255.0


def _ramp(rng: np.random.Generator, height: int, width: int) -> NDArray[np.float32]:
    """Distance along a random direction, in pixels, from the centre: float32[H, W]."""
    angle = rng.uniform(0.0, 2.0 * math.pi)
    x = np.linspace(-width / 2, width / 2, width, dtype=np.float32)
    y = np.linspace(-height / 2, height / 2, height, dtype=np.float32)[:, None]
    ramp: NDArray[np.float32] = x * math.cos(angle) + y * math.sin(angle)
    return ramp


def _gradient(rng: np.random.Generator, height: int, width: int) -> NDArray[np.float32]:
    ramp = _ramp(rng, height, width)
    gradient: NDArray[np.float32] = (ramp - ramp.min()) / (ramp.max() - ramp.min())
    return gradient


def _stripes(rng: np.random.Generator, height: int, width: int) -> NDArray[np.float32]:
    period = rng.uniform(14.0, 48.0)
    stripes: NDArray[np.float32] = 0.5 + 0.5 * np.sin(
        _ramp(rng, height, width) * (2.0 * math.pi / float(period))
    )
    return stripes


def _checker(rng: np.random.Generator, height: int, width: int) -> NDArray[np.float32]:
    side = int(rng.integers(10, 36))
    rows, columns = np.arange(height) // side, np.arange(width) // side
    return ((rows[:, None] + columns[None, :]) % 2).astype(np.float32)


def _blobs(rng: np.random.Generator, height: int, width: int) -> NDArray[np.float32]:
    coarse = rng.integers(0, 256, size=(int(rng.integers(4, 10)), int(rng.integers(4, 10))), dtype=np.uint8)
    smooth = Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)
    return np.asarray(smooth, dtype=np.float32) / 255.0

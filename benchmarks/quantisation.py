"""What int8 costs in accuracy, by which values share a scale: the evidence for the choice in `precision.py`.

    python benchmarks/quantisation.py --preset paper

Three groupings are compared for `sam` and `clip` of one image: per channel (one scale per channel, over all
positions), per token (one scale per position, over all channels) and per tensor. They run on

* features of a drawn image from encoders with random weights: real architectures, no trained structure, so
  they say little about outliers;
* Gaussian features with the outliers known from trained vision transformers: channels that are large in every
  token, tokens that are large in every channel, both, and massive activations (those channels in those tokens
  alone).

Errors: `relative` is |x - y| / |x| in the Frobenius norm, `largest` the largest absolute one, `cosine` the
mean over tokens. Outliers dominate these three, so the last two columns give the relative error of the median
channel and of the median token.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F

from ris_cache.datasets.shapes import compose_image
from ris_cache.encoders.frozen import FrozenEncoders
from ris_cache.encoders.spec import PRESETS, EncoderSpec
from ris_cache.encoders.weights import RandomWeights
from ris_cache.store.precision import int8_scale, largest_magnitude, quantise

GROUPINGS = {"channel": (0,), "token": (1,), "tensor": (0, 1)}
"""Axes of [tokens, channels] that share a scale."""

NUM_OUTLIER_CHANNELS = 3
NUM_OUTLIER_TOKENS = 4


@dataclass(frozen=True, slots=True)
class Errors:
    """Errors of a stored tensor, as the table prints them."""

    relative: float
    largest: float
    cosine: float
    median_channel: float
    median_token: float


def measure(values: torch.Tensor, stored: torch.Tensor) -> Errors:
    """Compare float32[tokens, channels] with what was stored of it."""
    values, stored = values.double(), stored.double()
    error = stored - values

    def median_relative(axis: int) -> float:
        return float((error.norm(dim=axis) / values.norm(dim=axis)).median())

    return Errors(
        relative=float(error.norm() / values.norm()),
        largest=float(error.abs().max()),
        cosine=float(F.cosine_similarity(values, stored, dim=1).mean()),
        median_channel=median_relative(0),
        median_token=median_relative(1),
    )


def encoder_features(spec: EncoderSpec, seed: int) -> dict[str, torch.Tensor]:
    """Encode one drawn image with random weights: float32[tokens, channels] by feature."""
    source = RandomWeights(seed=seed)
    encoders = FrozenEncoders.load(spec, sam_source=source, clip_source=source, device="cpu")
    picture = compose_image(seed=seed, name="refcoco", split="val", index=0).picture
    sam_pixels, clip_pixels = encoders.prepare(np.asarray(picture))
    features = encoders.encode(torch.from_numpy(sam_pixels)[None], torch.from_numpy(clip_pixels)[None])
    return {"sam": features["sam"][0].flatten(1).T.contiguous(), "clip": features["clip"][0]}


def drawn_features(
    shape: tuple[int, int], seed: int, channel_factor: float, token_factor: float
) -> dict[str, torch.Tensor]:
    """Draw float32[tokens, channels] without outliers and with each kind, from the same Gaussian."""
    generator = torch.Generator().manual_seed(seed)
    plain = torch.randn(shape, generator=generator)
    factors = {name: torch.ones(shape) for name in ("channels", "tokens", "massive")}
    channels = torch.randperm(shape[1], generator=generator)[:NUM_OUTLIER_CHANNELS]
    tokens = torch.randperm(shape[0], generator=generator)[:NUM_OUTLIER_TOKENS]
    factors["channels"][:, channels] = channel_factor
    factors["tokens"][tokens] = token_factor
    factors["massive"][tokens[:, None], channels] = channel_factor * token_factor
    return {
        "Gaussian": plain,
        f"channels x{channel_factor:g}": plain * factors["channels"],
        f"tokens x{token_factor:g}": plain * factors["tokens"],
        f"channels x{channel_factor:g}, tokens x{token_factor:g}": plain
        * factors["channels"]
        * factors["tokens"],
        f"massive x{channel_factor * token_factor:g}": plain * factors["massive"],
    }


def print_errors(title: str, values: torch.Tensor) -> None:
    """Print one line for float16 and one per grouping."""
    stored = {"float16": values.half().float()}
    for grouping, axes in GROUPINGS.items():
        scale = int8_scale(largest_magnitude(values, axes))
        stored[f"int8 per {grouping}"] = quantise(values, scale) * scale
    for precision, kept in stored.items():
        errors = measure(values, kept)
        print(
            f"{title:34} {precision:17}{errors.relative:12.3g}{errors.largest:12.3g}"
            f"{errors.cosine:12.7f}{errors.median_channel:12.3g}{errors.median_token:12.3g}"
        )


def main() -> None:
    """Parse the arguments and print the table."""
    parser = argparse.ArgumentParser(description="Error of int8 features by grouping of the scales.")
    parser.add_argument("--preset", choices=(*PRESETS, "none"), default="tiny", help="encoders to run (tiny)")
    parser.add_argument("--seed", type=int, default=0, help="of weights, image and drawn features (0)")
    parser.add_argument("--channel-factor", type=float, default=50.0, help="of outlier channels (50)")
    parser.add_argument("--token-factor", type=float, default=30.0, help="of outlier tokens (30)")
    arguments = parser.parse_args()

    print("No trained weights are used: encoders are random, outliers are drawn.\n")
    columns = "".join(f"{name:>12}" for name in ("relative", "largest", "cosine", "med. chan.", "med. token"))
    print(f"{'features':34} {'stored as':17}{columns}")
    if arguments.preset != "none":
        for name, values in encoder_features(PRESETS[arguments.preset], arguments.seed).items():
            print_errors(f"{name}, {arguments.preset} encoder, random", values)
    for name, shape in {"sam": (4096, 256), "clip": (576, 1024)}.items():
        drawn = drawn_features(shape, arguments.seed, arguments.channel_factor, arguments.token_factor)
        for title, values in drawn.items():
            print_errors(f"{name}, {title}", values)


if __name__ == "__main__":
    main()

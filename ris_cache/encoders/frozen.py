"""The two frozen encoders and their preprocessing as one object: what stage 1 runs.

Axes: B images, H W rows and columns, S and s sides of SAM's and CLIP's input frames.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import ParamSpec, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray

from ris_cache.encoders.clip import category_embeddings, encode_clip_images, encode_texts, load_clip
from ris_cache.encoders.images import normalise, squash
from ris_cache.encoders.sam import SamParts, encode_sam, load_sam
from ris_cache.encoders.spec import EncoderSpec
from ris_cache.encoders.weights import WeightsRecord, WeightsSource
from ris_cache.errors import ConfigError, ShapeError
from ris_cache.vision_imports import ensure_torchvision

ensure_torchvision()  # open_clip imports torchvision, so its import has to come after this line

from open_clip.model import CLIP  # noqa: E402

P = ParamSpec("P")
R = TypeVar("R")

_AUTOCAST_DTYPES: dict[str, torch.dtype | None] = {
    "float32": None,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
}
ARITHMETICS = ("auto", *_AUTOCAST_DTYPES)
"""What the image encoders may compute in; `auto` is float16 on CUDA and float32 elsewhere."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FrozenEncoders:
    """SAM and CLIP, in eval mode, none of their parameters trainable.

    Attributes:
        device: where the image encoder and CLIP lie; SAM's heads stay on the CPU, only to be saved.
        arithmetic: dtype of the image encoders' matrix products, one of `ARITHMETICS` but never `auto`. It
            changes the features, which are returned in float32 all the same.
        compiled: the image encoders run through `torch.compile`.
        weights: where the weights came from, under `sam` and `clip`.
    """

    spec: EncoderSpec
    device: torch.device
    arithmetic: str
    compiled: bool
    sam: SamParts
    clip: CLIP
    weights: dict[str, WeightsRecord]

    @classmethod
    def load(
        cls,
        spec: EncoderSpec,
        *,
        sam_source: WeightsSource,
        clip_source: WeightsSource,
        device: torch.device | str = "cpu",
        arithmetic: str = "auto",
        compile: bool = False,
    ) -> FrozenEncoders:
        """Build both encoders with their weights and move them to a device.

        `auto` chooses float16 rather than bfloat16 on CUDA: features are stored as float16 by default, CLIP's
        published weights are float16, and CLIP's residual stream follows the autocast dtype, where bfloat16
        would round away three more bits at each of its blocks. bfloat16 is there for weights that overflow.

        Args:
            arithmetic: one of `ARITHMETICS`.
            compile: run the image encoders through `torch.compile`. The first batch of each size then waits
                for the compiler, for minutes at full size.

        Raises:
            WeightsError: weights are missing or do not fit.
            ConfigError: unknown arithmetic, a CUDA device that is not there, or no working compiler.
        """
        device = torch.device(device)
        if device.type == "cuda" and not torch.cuda.is_available():
            raise ConfigError(
                f"Device {device} was asked for, but torch sees no CUDA device. Use cpu, or install "
                "a CUDA build of torch and check the driver.",
                device=str(device),
            )
        if arithmetic not in ARITHMETICS:
            raise ConfigError(
                f"Unknown arithmetic {arithmetic!r}; known: {', '.join(ARITHMETICS)}.",
                arithmetic=arithmetic,
                known=ARITHMETICS,
            )
        if arithmetic == "auto":
            arithmetic = "float16" if device.type == "cuda" else "float32"
        if compile:
            _require_compiler(device)
        sam, sam_record = load_sam(spec.sam, sam_source)
        clip, clip_record = load_clip(spec.clip, clip_source)
        for network in (sam.as_module(), clip):
            network.eval().requires_grad_(False)
        sam.image_encoder.to(device)
        clip.to(device)
        return cls(
            spec=spec,
            device=device,
            arithmetic=arithmetic,
            compiled=compile,
            sam=sam,
            clip=clip,
            weights={"sam": sam_record, "clip": clip_record},
        )

    def prepare(self, image: NDArray[np.uint8]) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
        """Squash one image to both input frames, each straight from the original; safe in threads.

        Args:
            image: uint8[H, W, 3], RGB original frame.

        Returns:
            uint8[S, S, 3] for SAM and uint8[s, s, 3] for CLIP.

        Raises:
            ShapeError: not an RGB image of bytes.
        """
        sam, clip = self.spec.sam, self.spec.clip
        return squash(image, sam.image_size, sam.resize), squash(image, clip.image_size, clip.resize)

    def encode(self, sam_pixels: torch.Tensor, clip_pixels: torch.Tensor) -> dict[str, torch.Tensor]:
        """Compute the cached features of a batch.

        On CUDA the work is only queued, on the current stream: reading a result waits for it. Pixels in
        pinned memory are copied while the device computes; leave them unchanged until the results are there.

        Args:
            sam_pixels: uint8[B, S, S, 3] from `prepare`, any device.
            clip_pixels: uint8[B, s, s, 3] from `prepare`, row i the same image as sam_pixels[i].

        Returns:
            float32 on `device`, shapes as `EncoderSpec.feature_shapes` behind B: `sam` image_embeddings,
            `clip` clip_features, `clip_pooled` image embedding (not normalised).

        Raises:
            ShapeError: other axes, frames of another size, or batches that differ.
        """
        if sam_pixels.shape[0] != clip_pixels.shape[0]:
            raise ShapeError(
                f"{sam_pixels.shape[0]} images for SAM but {clip_pixels.shape[0]} for CLIP; row i of both "
                "must be the same image.",
                sam=sam_pixels.shape[0],
                clip=clip_pixels.shape[0],
            )
        sam_input = normalise(sam_pixels.to(self.device, non_blocking=True), self.spec.sam.normalisation)
        clip_input = normalise(clip_pixels.to(self.device, non_blocking=True), self.spec.clip.normalisation)
        run_sam, run_clip = (
            (_compiled(encode_sam), _compiled(encode_clip_images))
            if self.compiled
            else (encode_sam, encode_clip_images)
        )
        autocast_dtype = _AUTOCAST_DTYPES[self.arithmetic]
        # no_grad, not inference_mode: prediction feeds these features to modules that may record gradients.
        with (
            torch.no_grad(),
            torch.autocast(self.device.type, dtype=autocast_dtype, enabled=autocast_dtype is not None),
        ):
            image_embeddings = run_sam(self.sam.image_encoder, sam_input)
            clip_features, clip_pooled = run_clip(self.clip, clip_input)
        return {
            "sam": image_embeddings.float(),
            "clip": clip_features.float(),
            "clip_pooled": clip_pooled.float(),
        }

    def encode_texts(self, texts: Sequence[str]) -> torch.Tensor:
        """Embed texts in float32, whatever the images' arithmetic: float32[E, embed_dim], L2-normalised."""
        return encode_texts(self.clip, texts)

    def category_embeddings(self, names: Sequence[str]) -> torch.Tensor:
        """Embed category names in the spec's prompt: float32[K, embed_dim], L2-normalised."""
        return category_embeddings(self.clip, names, self.spec.clip.prompt_template)

    def sam_heads(self) -> dict[str, torch.Tensor]:
        """Copy the tensors of `mask_decoder.*` and `prompt_encoder.*`, named as in the public checkpoint."""
        return {
            name: tensor.detach().clone().contiguous()
            for name, tensor in self.sam.as_module().state_dict().items()
            if not name.startswith("image_encoder.")
        }


@cache
def _compiled(forward: Callable[P, R]) -> Callable[P, R]:
    return torch.compile(forward)


def _require_compiler(device: torch.device) -> None:
    """Compile one addition, so that a missing compiler shows before any weights are read.

    Raises:
        ConfigError: torch cannot compile for this device.
    """

    def add_one(x: torch.Tensor) -> torch.Tensor:
        return x + 1

    # Uncached: what an earlier process compiled needs no compiler, but the encoders will.
    compiled = torch.compile(add_one, options={"fx_graph_cache": False})
    try:
        compiled(torch.zeros(1, device=device))
    except RuntimeError as error:  # the root of all that dynamo and inductor raise
        raise ConfigError(
            f"torch.compile does not work here for {device} ({type(error).__name__}: "
            f"{str(error).strip().splitlines()[0]}). It needs a working C++ compiler: install g++, or name "
            "one in $CXX; or leave compilation off.",
            device=str(device),
            compiler=os.environ.get("CXX", "g++"),
        ) from error

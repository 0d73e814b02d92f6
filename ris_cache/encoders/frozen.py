"""The two frozen encoders and their preprocessing as one object: what stage 1 runs.

Axes: B images, H W rows and columns, S and s sides of SAM's and CLIP's input frames.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

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

_AUTOCAST_DTYPES: dict[str, torch.dtype | None] = {
    "float32": None,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
}
PRECISIONS = ("auto", *_AUTOCAST_DTYPES)
"""Arithmetic of the image encoders; `auto` is float16 on CUDA and float32 elsewhere."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FrozenEncoders:
    """SAM and CLIP, in eval mode, none of their parameters trainable.

    Attributes:
        device: where the image encoder and CLIP lie; SAM's heads stay on the CPU, only to be saved.
        autocast_dtype: of the image encoders' matrix products; None runs them in float32.
        weights: where the weights came from, under `sam` and `clip`.
    """

    spec: EncoderSpec
    device: torch.device
    autocast_dtype: torch.dtype | None
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
        precision: str = "auto",
    ) -> FrozenEncoders:
        """Build both encoders with their weights and move them to a device.

        `auto` chooses float16 rather than bfloat16 on CUDA: features are stored as float16 by default, CLIP's
        published weights are float16, and CLIP's residual stream follows the autocast dtype, where bfloat16
        would round away three more bits at each of its blocks. bfloat16 is there for weights that overflow.

        Raises:
            WeightsError: weights are missing or do not fit.
            ConfigError: unknown precision, or a CUDA device that is not there.
        """
        device = torch.device(device)
        if device.type == "cuda" and not torch.cuda.is_available():
            raise ConfigError(
                f"Device {device} was asked for, but torch sees no CUDA device. Use cpu, or install "
                "a CUDA build of torch and check the driver.",
                device=str(device),
            )
        if precision not in PRECISIONS:
            raise ConfigError(
                f"Unknown precision {precision!r}; known: {', '.join(PRECISIONS)}.",
                precision=precision,
                known=PRECISIONS,
            )
        if precision == "auto":
            precision = "float16" if device.type == "cuda" else "float32"
        sam, sam_record = load_sam(spec.sam, sam_source)
        clip, clip_record = load_clip(spec.clip, clip_source)
        for network in (sam.as_module(), clip):
            network.eval().requires_grad_(False)
        sam.image_encoder.to(device)
        clip.to(device)
        return cls(
            spec=spec,
            device=device,
            autocast_dtype=_AUTOCAST_DTYPES[precision],
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
        # no_grad, not inference_mode: prediction feeds these features to modules that may record gradients.
        with (
            torch.no_grad(),
            torch.autocast(
                self.device.type, dtype=self.autocast_dtype, enabled=self.autocast_dtype is not None
            ),
        ):
            image_embeddings = encode_sam(self.sam.image_encoder, sam_input)
            clip_features, clip_pooled = encode_clip_images(self.clip, clip_input)
        return {
            "sam": image_embeddings.float(),
            "clip": clip_features.float(),
            "clip_pooled": clip_pooled.float(),
        }

    def encode_texts(self, texts: Sequence[str]) -> torch.Tensor:
        """Embed texts in float32, whatever the images' precision: float32[E, embed_dim], L2-normalised."""
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

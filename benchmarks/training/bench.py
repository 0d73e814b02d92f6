"""What a training step needs: drawn images, their features, and the ways to train that are compared."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

from ris_cache.datasets import Selection
from ris_cache.datasets.shapes import write_shapes_dataset
from ris_cache.encoders.frozen import FrozenEncoders
from ris_cache.encoders.spec import PRESETS
from ris_cache.encoders.weights import resolve_clip_weights, resolve_sam_weights
from ris_cache.extraction.run import extract
from ris_cache.memory import return_freed_memory
from ris_train.config import RunConfig, load_config
from ris_train.data.batch import Batch
from ris_train.data.text import TINY_VOCABULARY
from ris_train.training.step import StepBatch
from training.steps import OVERFLOWS

SELECTION = Selection(dataset="refcoco", split_by="unc", split="train")


@dataclass(frozen=True, slots=True, kw_only=True)
class Way:
    """One way to train, on drawn images.

    Attributes:
        name: for the tables.
        kind: `cache` is what `ris train` does; `looped` decodes masks sample by sample; `live` runs the
            frozen encoders in every step.
        cache: directory of the features.
        preset: of the encoders, and so of the model.
        device: where it trains.
        precision: as `train.precision`.
        batch: expressions of a step.
        expressions_per_image: as `train.expressions_per_image`.
        steps: that count.
        warm_up: steps before those.
        is_counted: whether the work of a step is counted too, and the device's ceilings are measured.
    """

    name: str
    kind: Literal["cache", "looped", "live"] = "cache"
    cache: str
    preset: str
    device: str
    precision: str
    batch: int
    expressions_per_image: int = 1
    steps: int
    warm_up: int
    is_counted: bool = False

    def as_json(self) -> str:
        """Return the way as an argument of a command."""
        return json.dumps(asdict(self))

    def config(self) -> RunConfig:
        """Return what `ris train` would be given; random weights need no vocabulary of their own."""
        return load_config(
            recipe="tiny" if self.preset == "tiny" else "paper-refcoco",
            overrides=[
                "data.val=refcoco:train",  # alone is drawn
                f"model.bert.vocabulary={TINY_VOCABULARY}",
                f"train.batch_size={self.batch}",
                f"train.expressions_per_image={self.expressions_per_image}",
                f"train.precision={self.precision}",
                f"train.steps={self.warm_up + self.steps + OVERFLOWS}",
            ],
        )


class LoopedMaskDecoder(nn.Module):
    """The same mask decoder, sample after sample.

    Args:
        decoder: takes a batch.
    """

    def __init__(self, decoder: nn.Module) -> None:
        super().__init__()
        self.decoder = decoder

    def forward(self, image_embeddings: Tensor, sparse_prompt: Tensor, dense_prompt: Tensor) -> Tensor:
        """Decode as the decoder itself does."""
        masks = [
            self.decoder(*one)
            for one in zip(
                image_embeddings.split(1), sparse_prompt.split(1), dense_prompt.split(1), strict=True
            )
        ]
        return torch.cat(masks)


def load_encoders(preset: str, device: torch.device) -> FrozenEncoders:
    """Load encoders with random weights."""
    spec = PRESETS[preset]
    return FrozenEncoders.load(
        spec,
        sam_source=resolve_sam_weights(None, spec.sam, random_seed=0),
        clip_source=resolve_clip_weights(None, spec.clip, random_seed=0),
        device=device,
    )


def draw_cache(preset: str, device: torch.device, root: Path, num_images: int) -> Path:
    """Draw training images below a directory and extract their features with random encoders.

    Returns:
        The directory of the cache, absolute.
    """
    encoders = load_encoders(preset, device)
    write_shapes_dataset(root / "data", num_images={"train": num_images}, seed=0)
    extract([SELECTION], data_root=root / "data", cache_root=root / "feats", encoders=encoders)
    del encoders
    return_freed_memory()  # to the processes that measure
    if device.type == "cuda":
        torch.cuda.empty_cache()
    return (root / "feats").resolve()


def live_features(preset: str, device: torch.device) -> Callable[[StepBatch], StepBatch]:
    """Make what replaces the cached features of a batch by those that the encoders compute now.

    Each sample has an image of its own, decoded and resized already.
    """
    encoders = load_encoders(preset, device)
    return_freed_memory()
    sides = encoders.spec.sam.image_size, encoders.spec.clip.image_size

    def encode(part: Batch) -> Batch:
        sam, clip = (torch.zeros((len(part.samples), side, side, 3), dtype=torch.uint8) for side in sides)
        encoded = encoders.encode(sam, clip)
        inputs = replace(
            part.inputs, image_embeddings=encoded["sam"], clip_features=encoded["clip"], image_index=None
        )
        return replace(part, inputs=inputs)

    return lambda batch: replace(batch, parts=tuple(encode(part) for part in batch.parts))

"""Segment any image: the frozen encoders run live, once per image, then the trained model.

E expressions about one image, S side of the logits' grid, H and W the image's own size.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Final

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ris_cache.datasets.fields import is_storable, shown
from ris_cache.encoders.frozen import FrozenEncoders
from ris_cache.encoders.images import decode_image
from ris_cache.encoders.weights import WeightsRecord, resolve_clip_weights, resolve_sam_weights
from ris_cache.errors import ConfigError, FingerprintMismatchError
from ris_train.arithmetic import feature_arithmetic
from ris_train.checkpoint import CheckpointMetadata
from ris_train.frames import to_original_frame
from ris_train.model.segmenter import ModelInputs
from ris_train.pretrained import RISModel

DEFAULT_BATCH_SIZE: Final = 32

Pixels = npt.NDArray[np.uint8]


@dataclass(frozen=True, slots=True, kw_only=True)
class Segmentation:
    """What a model says of one expression about an image.

    Attributes:
        mask: bool[H, W], original frame; empty where `says_no_target`.
        logits: float32[S, S] over the squashed input frame, as the model gives them.
        says_no_target: whether the model finds that the expression refers to nothing; None if it has no head
            to say so.
        category: name of the category that the model was given; None if it reads none.
        category_source: `named` by the caller, `predicted` by CLIP, or `none`.
    """

    mask: npt.NDArray[np.bool_]
    logits: npt.NDArray[np.float32]
    says_no_target: bool | None
    category: str | None
    category_source: str


class Segmenter:
    """A trained model with the frozen encoders whose features it reads.

    Args:
        model: the model.
        encoders: with the weights that made its training features; on any device.

    Raises:
        FingerprintMismatchError: they have other weights.
    """

    def __init__(self, model: RISModel, encoders: FrozenEncoders) -> None:
        require_same_weights(model.metadata, encoders.weights)
        self.model = model
        self.encoders = encoders

    @classmethod
    def load(
        cls,
        model: RISModel,
        *,
        sam_weights: str | None = None,
        clip_weights: str | None = None,
        arithmetic: str | None = None,
    ) -> Segmenter:
        """Load the encoders that a model needs, to the device where it is.

        Args:
            model: the model.
            sam_weights: as in extraction. A model that was trained on random encoders names their seed, so
                none can be given for it.
            clip_weights: likewise.
            arithmetic: of the image encoders; by default as `live_arithmetic` says.

        Raises:
            WeightsError: weights are missing.
            ConfigError: weights are given for a model on random encoders.
            FingerprintMismatchError: they are not those that the model was trained with.
        """
        metadata = model.metadata
        spec = metadata.encoder_spec
        encoders = FrozenEncoders.load(
            spec,
            sam_source=resolve_sam_weights(
                sam_weights, spec.sam, random_seed=metadata.weights["sam"]["seed"]
            ),
            clip_source=resolve_clip_weights(
                clip_weights, spec.clip, random_seed=metadata.weights["clip"]["seed"]
            ),
            device=_device_of(model),
            arithmetic=arithmetic or live_arithmetic(metadata, _device_of(model)),
        )
        return cls(model, encoders)

    def __call__(
        self,
        image: Path | str | Pixels,
        text: str | Sequence[str],
        *,
        category: str | None = None,
        batch_size: int = DEFAULT_BATCH_SIZE,
    ) -> list[Segmentation]:
        """Segment what each expression refers to; the image is encoded once for all of them.

        Args:
            image: a file, or uint8[H, W, 3] RGB.
            text: one expression or several.
            category: name of the targets' category, for models that read one; CLIP predicts it for each
                expression if it is not named.
            batch_size: expressions per forward pass.

        Returns:
            One per expression, in their order.

        Raises:
            ConfigError: an expression that is blank or no valid text, or a category that the model does not
                know or does not read.
            DataError: the image cannot be read.
            ShapeError: an array of another kind.
        """
        texts = [text] if isinstance(text, str) else list(text)
        if batch_size < 1:
            raise ConfigError(f"batch_size is {batch_size}; it must be at least 1.", batch_size=batch_size)
        for one in texts:
            if not one.strip():
                raise ConfigError("The expression is empty; say what to look for.")
            if not is_storable(one):
                raise ConfigError(f"The expression is no valid text: {shown(one)}.", text=one)
        if not texts:
            return []
        pixels = image if isinstance(image, np.ndarray) else decode_image(Path(image), expected_size=None)
        categories = self._categories(texts, category)
        features = self._encode(pixels)
        size = (pixels.shape[0], pixels.shape[1])
        found = []
        for start in range(0, len(texts), batch_size):
            rows = slice(start, start + batch_size)
            found += self._segment(features, texts[rows], categories[rows], size)
        return found

    def _encode(self, pixels: Pixels) -> dict[str, Tensor]:
        """Features of one image, on the device of the model."""
        sam_pixels, clip_pixels = self.encoders.prepare(pixels)
        features = self.encoders.encode(
            torch.from_numpy(sam_pixels)[None], torch.from_numpy(clip_pixels)[None]
        )
        device = _device_of(self.model)
        return {name: tensor.to(device) for name, tensor in features.items()}

    @torch.no_grad()
    def _segment(
        self,
        features: Mapping[str, Tensor],
        texts: Sequence[str],
        categories: Sequence[_Category],
        size: tuple[int, int],
    ) -> list[Segmentation]:
        """One forward pass: features of one image, all expressions of the batch."""
        network = self.model.network
        device = _device_of(self.model)
        token_ids, text_mask = (tensor.to(device) for tensor in self.model.tokenizer.encode(texts))
        embeddings = [one.embedding for one in categories if one.embedding is not None]
        outputs = network(
            ModelInputs(
                image_embeddings=features["sam"],
                clip_features=features["clip"],
                token_ids=token_ids,
                text_mask=text_mask,
                category_embeddings=torch.stack(embeddings).to(device) if embeddings else None,
                image_index=torch.zeros(len(texts), dtype=torch.int64, device=device),
            ),
            with_dfam=network.has_no_target_head,
        )
        flags = outputs.says_no_target
        says_no_target = [None] * len(texts) if flags is None else flags.tolist()
        found = []
        for logits, says_nothing, category in zip(
            outputs.mask_logits, says_no_target, categories, strict=True
        ):
            mask = to_original_frame(logits, size).cpu().numpy()
            found.append(
                Segmentation(
                    mask=np.zeros_like(mask) if says_nothing else mask,
                    logits=logits.float().cpu().numpy(),
                    says_no_target=says_nothing,
                    category=category.name,
                    category_source=category.source,
                )
            )
        return found

    def _categories(self, texts: Sequence[str], named: str | None) -> list[_Category]:
        """Which category the model is given with each expression."""
        names = self.model.metadata.categories.names
        if self.model.metadata.config.model.sparse_prompt != "category":
            if named is not None:
                raise ConfigError(
                    f"This model reads no category (sparse_prompt is cls); leave category {named!r} out.",
                    category=named,
                )
            return [_Category(name=None, source="none", embedding=None)] * len(texts)
        if named is None:
            nearest = (self.encoders.encode_texts(texts) @ self._category_embeddings.T).argmax(dim=1).tolist()
            return [_Category(names[row], "predicted", self._category_embeddings[row]) for row in nearest]
        if named not in names:
            raise ConfigError(
                f"The model knows no category {named!r}; it knows {', '.join(names)}.", category=named
            )
        embedding = self._category_embeddings[names.index(named)]
        return [_Category(named, "named", embedding)] * len(texts)

    @cached_property
    def _category_embeddings(self) -> Tensor:
        """float32[K, D_joint], embedded once for all images."""
        return self.encoders.category_embeddings(self.model.metadata.categories.names)


def require_same_weights(metadata: CheckpointMetadata, weights: Mapping[str, WeightsRecord]) -> None:
    """Refuse encoders whose features the model has never seen.

    Raises:
        FingerprintMismatchError: SAM's or CLIP's weights differ from those of the training cache.
    """
    for role, record in weights.items():
        if metadata.weights[role] != record.as_dict():
            raise FingerprintMismatchError(
                f"The model was trained on features of {role.upper()} {metadata.weight_labels[role]}, but "
                f"these weights are {record.label}. Name the same file ({role}_weights, --{role}-weights).",
                role=role,
                expected=metadata.weight_labels[role],
                found=record.label,
            )


def live_arithmetic(metadata: CheckpointMetadata, device: torch.device) -> str:
    """Choose what the image encoders compute in: what the training features were computed in.

    Where that is not known, what suits the device. On a CPU, float32 stands in for float16, which torch
    multiplies there some ninety times slower; the features then differ by float16's rounding.
    """
    recorded = feature_arithmetic(metadata)
    if recorded == "float16" and device.type == "cpu":
        return "float32"
    return recorded or "auto"


@dataclass(frozen=True, slots=True)
class _Category:
    """The category given with one expression; its embedding is float[D_joint]."""

    name: str | None
    source: str
    embedding: Tensor | None


def _device_of(model: RISModel) -> torch.device:
    return next(model.network.parameters()).device

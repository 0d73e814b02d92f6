"""Prediction on a new image: the frozen encoders run live, then the trained model."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image

from ris_cache.encoders.frozen import FrozenEncoders
from ris_cache.encoders.images import decode_image
from ris_cache.encoders.weights import WeightsRecord, resolve_clip_weights, resolve_sam_weights
from ris_cache.errors import ConfigError, FingerprintMismatchError
from ris_train.checkpoint import CheckpointMetadata, load_checkpoint
from ris_train.data.text import Tokenizer
from ris_train.frames import to_original_frame
from ris_train.model.segmenter import ModelInputs, RisModel
from ris_train.run import RunDirectory

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
    """

    image: npt.NDArray[np.uint8]
    mask: npt.NDArray[np.bool_]
    category: str | None
    category_source: str

    def overlay(self) -> npt.NDArray[np.uint8]:
        """The image with the mask tinted: uint8[H, W, 3]."""
        tint = np.array(OVERLAY_COLOUR, dtype=np.float32)
        blended = self.image.astype(np.float32)
        blended[self.mask] = (1 - OVERLAY_OPACITY) * blended[self.mask] + OVERLAY_OPACITY * tint
        return blended.round().astype(np.uint8)


@dataclass(frozen=True, slots=True, kw_only=True)
class Predictor:
    """A trained model with the encoders whose features it was trained on, on one device.

    Attributes:
        metadata: of the model's checkpoint.
        tokenizer: the run's.
    """

    model: RisModel
    metadata: CheckpointMetadata
    tokenizer: Tokenizer
    encoders: FrozenEncoders

    @classmethod
    def load(
        cls,
        run: RunDirectory,
        *,
        sam_weights: str | None,
        clip_weights: str | None,
        device: torch.device,
    ) -> Predictor:
        """Load the best checkpoint of a run and the encoders it needs.

        Args:
            run: the run.
            sam_weights: as in extraction. A run that was trained on random encoders names their seed in its
                checkpoint, so none can be given for it.
            clip_weights: likewise.
            device: where everything runs.

        Raises:
            CheckpointError: the run has no usable checkpoint.
            WeightsError: weights are missing.
            ConfigError: weights are given for a run on random encoders.
            FingerprintMismatchError: they are not those that the model was trained with.
        """
        model, metadata = load_checkpoint(run.checkpoint_path("best"), device=device)
        spec = metadata.encoder_spec
        encoders = FrozenEncoders.load(
            spec,
            sam_source=resolve_sam_weights(
                sam_weights, spec.sam, random_seed=metadata.weights["sam"]["seed"]
            ),
            clip_source=resolve_clip_weights(
                clip_weights, spec.clip, random_seed=metadata.weights["clip"]["seed"]
            ),
            device=device,
        )
        require_same_weights(metadata, encoders.weights)
        tokenizer = Tokenizer.from_folder(run.tokenizer_dir, metadata.config.model.max_tokens)
        return cls(model=model, metadata=metadata, tokenizer=tokenizer, encoders=encoders)


def predict(image_path: Path, text: str, predictor: Predictor, *, category: str | None = None) -> Prediction:
    """Segment what the expression refers to.

    Args:
        image_path: any image that Pillow reads.
        text: the expression.
        predictor: model and encoders.
        category: name of the target's category, for models that read one; CLIP predicts it if not named.

    Raises:
        ConfigError: a blank expression, or a category that the model does not know or does not read.
        DataError: the image cannot be read.
    """
    if not text.strip():
        raise ConfigError("The expression is empty; say what to look for with --text.")
    encoders = predictor.encoders
    image = decode_image(image_path, expected_size=None)
    sam_pixels, clip_pixels = encoders.prepare(image)
    features = encoders.encode(
        torch.from_numpy(sam_pixels).unsqueeze(0), torch.from_numpy(clip_pixels).unsqueeze(0)
    )
    token_ids, text_mask = predictor.tokenizer.encode([text])
    name, source, embedding = _category(text, category, predictor.metadata, encoders)
    inputs = ModelInputs(
        image_embeddings=features["sam"],
        clip_features=features["clip"],
        token_ids=token_ids.to(encoders.device),
        text_mask=text_mask.to(encoders.device),
        category_embeddings=embedding,
    )
    with torch.no_grad():
        mask_logits = predictor.model(inputs, with_dfam=False).mask_logits[0]
    return Prediction(
        image=image,
        mask=to_original_frame(mask_logits, image.shape[:2]).cpu().numpy(),
        category=name,
        category_source=source,
    )


def require_same_weights(metadata: CheckpointMetadata, weights: dict[str, WeightsRecord]) -> None:
    """Refuse encoders whose features the model has never seen.

    Raises:
        FingerprintMismatchError: SAM's or CLIP's weights differ from those of the training cache.
    """
    for role, record in weights.items():
        if metadata.weights[role] != record.as_dict():
            raise FingerprintMismatchError(
                f"The model was trained on features of {role.upper()} {metadata.weight_labels[role]}, but "
                f"these weights are {record.label}. Name the same file: --{role}-weights.",
                role=role,
                expected=metadata.weight_labels[role],
                found=record.label,
            )


def save_prediction(prediction: Prediction, out_dir: Path, stem: str) -> tuple[Path, Path]:
    """Write the mask (PNG, 0 and 255) and the overlay; returns both paths."""
    out_dir.mkdir(parents=True, exist_ok=True)
    mask_path, overlay_path = out_dir / f"{stem}.mask.png", out_dir / f"{stem}.overlay.png"
    Image.fromarray(prediction.mask.astype(np.uint8) * 255).save(mask_path)
    Image.fromarray(prediction.overlay()).save(overlay_path)
    return mask_path, overlay_path


def _category(
    text: str, named: str | None, metadata: CheckpointMetadata, encoders: FrozenEncoders
) -> tuple[str | None, str, torch.Tensor | None]:
    """Which category the model is given: its name, where that came from, and float[1, D_joint]."""
    names = metadata.categories.names
    if metadata.config.model.sparse_prompt != "category":
        if named is not None:
            raise ConfigError("This model reads no category (sparse_prompt is cls); leave --category out.")
        return None, "none", None
    embeddings = encoders.category_embeddings(names)
    if named is None:
        index = int((encoders.encode_texts([text]) @ embeddings.T).argmax())
        return names[index], "predicted", embeddings[index : index + 1]
    if named not in names:
        raise ConfigError(
            f"The model knows no category {named!r}; it knows {', '.join(names)}.", category=named
        )
    index = names.index(named)
    return named, "named", embeddings[index : index + 1]

"""Checkpoints: one safetensors file that holds the whole trainable model and says what it is.

The file's metadata carries the configuration, the encoders and what made the cache, so that evaluation and
prediction need nothing else and can refuse features of another kind.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, ValidationError, field_validator
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save

from ris_cache.encoders.spec import EncoderSpec, spec_from_dict
from ris_cache.errors import CheckpointError, FingerprintMismatchError
from ris_cache.store.files import write_atomically
from ris_train.config import RunConfig
from ris_train.model.bert import bert_from_dict
from ris_train.model.segmenter import RisModel

METADATA_KEY = "ris"


class CategoryNames(BaseModel):
    """The categories that a model may be asked about."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    ids: tuple[int, ...]
    names: tuple[str, ...]
    prompt_template: str


class CheckpointMetadata(BaseModel):
    """What a checkpoint says of itself.

    Attributes:
        config: the run's configuration.
        encoders: `EncoderSpec.as_dict()` of the cache it was trained from.
        fingerprint: the cache's digest.
        weights: what identifies each set of pretrained weights (sam, clip, bert), as the fingerprint has it.
        weight_labels: the same in words.
        bert: BERT's configuration in transformers' words.
        step: optimiser steps taken.
        val: scores at that step, fractions; empty if none were taken.
    """

    # A score over nothing is NaN, for which JSON has no number.
    model_config = ConfigDict(extra="forbid", frozen=True, ser_json_inf_nan="strings")

    format: Literal["ris-checkpoint"] = "ris-checkpoint"
    format_version: Literal[1] = 1
    config: RunConfig
    encoders: dict[str, Any]
    fingerprint: str
    weights: dict[str, dict[str, Any]]
    weight_labels: dict[str, str]
    categories: CategoryNames
    bert: dict[str, Any]
    step: int
    val: dict[str, float]

    @field_validator("encoders")
    @classmethod
    def _encoders_can_be_built(cls, value: dict[str, Any]) -> dict[str, Any]:
        try:
            spec_from_dict(value)
        except (KeyError, TypeError) as error:
            raise ValueError(f"they cannot be built here ({error})") from error
        return value

    @property
    def encoder_spec(self) -> EncoderSpec:
        """The encoders whose features the model reads."""
        return spec_from_dict(self.encoders)


def save_checkpoint(path: Path, model: RisModel, metadata: CheckpointMetadata) -> None:
    """Write atomically; an interrupted write leaves the file that was there."""
    write_atomically(path, checkpoint_bytes(model, metadata))


def checkpoint_bytes(model: RisModel, metadata: CheckpointMetadata) -> bytes:
    """Content of a checkpoint's file."""
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}
    return save(tensors, metadata={METADATA_KEY: metadata.model_dump_json()})


def read_metadata(path: Path) -> CheckpointMetadata:
    """Read what a checkpoint says of itself, without its weights.

    Raises:
        CheckpointError: no such file, not safetensors, or not written by ris.
    """
    if not path.is_file():
        raise CheckpointError(
            f"There is no checkpoint at {path}. `ris train` writes them to runs/<name>/checkpoints/.",
            path=path,
        )
    try:
        with safe_open(path, framework="pt") as file:
            text = (file.metadata() or {}).get(METADATA_KEY)
    except (SafetensorError, OSError) as error:
        raise CheckpointError(
            f"Checkpoint {path} is damaged ({error}). Use another one of the same run.", path=path
        ) from error
    if text is None:
        raise CheckpointError(f"{path} is a safetensors file, but not a checkpoint of ris.", path=path)
    try:
        return CheckpointMetadata.model_validate_json(text)
    except ValidationError as error:
        problem = error.errors()[0]
        where = ".".join(str(part) for part in problem["loc"])
        raise CheckpointError(
            f"Checkpoint {path} was written by another version of ris: {where}: {problem['msg']}.", path=path
        ) from error


def load_checkpoint(path: Path, *, device: torch.device) -> tuple[RisModel, CheckpointMetadata]:
    """Rebuild the model of a checkpoint.

    Raises:
        CheckpointError: as `read_metadata`, or the weights are not those of the model it describes.
    """
    metadata = read_metadata(path)
    model = build_from_metadata(metadata)
    load_weights(model, path)
    return model.to(device).eval(), metadata


def build_from_metadata(metadata: CheckpointMetadata) -> RisModel:
    """Build the model that a checkpoint describes; its weights are still to come."""
    bert = bert_from_dict(metadata.bert)
    return RisModel(metadata.config.model, metadata.encoder_spec, bert)


def load_weights(model: RisModel, path: Path) -> None:
    """Load a checkpoint's weights into a model of the same architecture.

    Raises:
        CheckpointError: names or shapes differ; the first few are named.
    """
    found = load_file(path)
    expected = model.state_dict()
    problems = [f"{name} is missing" for name in expected if name not in found]
    problems += [f"{name} is unknown" for name in found if name not in expected]
    problems += [
        f"{name} is {tuple(found[name].shape)}, expected {tuple(tensor.shape)}"
        for name, tensor in expected.items()
        if name in found and found[name].shape != tensor.shape
    ]
    if problems:
        raise CheckpointError(
            f"Checkpoint {path} is of another model: {'; '.join(problems[:3])}"
            + (f" and {len(problems) - 3} more." if len(problems) > 3 else "."),
            path=path,
            problems=problems,
        )
    model.load_state_dict(found)


def require_same_cache(metadata: CheckpointMetadata, fingerprint: str, *, path: Path, cache: Path) -> None:
    """Refuse features that the model was not trained on.

    Raises:
        FingerprintMismatchError: the cache was made by other encoders, weights or preprocessing.
    """
    if metadata.fingerprint != fingerprint:
        raise FingerprintMismatchError(
            f"Checkpoint {path} was trained on features of fingerprint {metadata.fingerprint[:12]}; the "
            f"cache {cache} has {fingerprint[:12]}. Name the one it was trained from: --cache.",
            expected=metadata.fingerprint,
            found=fingerprint,
        )

"""Checkpoints: one safetensors file that holds the whole trainable model and says what it is.

The file's metadata carries the configuration, the encoders and what made the cache, so that evaluation and
prediction need nothing else and can refuse features of another kind; and a digest of the tensors, by which
damage is found that leaves the file readable.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
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
from ris_train.json_reading import parse_object
from ris_train.model.bert import bert_from_dict
from ris_train.model.segmenter import RisModel

METADATA_KEY = "ris"
DIGEST_FIELD = "tensors_sha256"
"""Of the tensors, among what the file says under METADATA_KEY. A second key beside that would do, but for
safetensors, which writes several in any order: the same checkpoint is to be the same file."""


class OtherVersionError(CheckpointError):
    """A checkpoint or state that another version of ris wrote; it is whole, but not for this one."""


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
        except (KeyError, TypeError, ValueError, AttributeError) as error:
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
    described = {**json.loads(metadata.model_dump_json()), DIGEST_FIELD: tensors_digest(tensors)}
    return save(tensors, metadata={METADATA_KEY: json.dumps(described)})


def tensors_digest(tensors: Mapping[str, torch.Tensor]) -> str:
    """SHA-256 (lower-case hex) over name, dtype, shape and bytes of each tensor, by name.

    Args:
        tensors: contiguous, on the CPU.
    """
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def read_metadata(path: Path) -> CheckpointMetadata:
    """Read what a checkpoint says of itself, without its weights.

    Raises:
        CheckpointError: no such file, not safetensors, or not written by ris.
        OtherVersionError: written by another version of ris.
    """
    if not path.is_file():
        raise CheckpointError(
            f"There is no checkpoint at {path}. `ris train` writes them to runs/<name>/checkpoints/.",
            path=path,
        )
    try:
        text = _header(path).get(METADATA_KEY)
    except (SafetensorError, OSError) as error:
        raise CheckpointError(
            f"Checkpoint {path} is damaged ({error}). Use another one of the same run.", path=path
        ) from error
    if text is None:
        raise CheckpointError(f"{path} is a safetensors file, but not a checkpoint of ris.", path=path)
    try:
        return CheckpointMetadata.model_validate_json(_without_digest(text))
    except ValidationError as error:
        problem = error.errors()[0]
        where = ".".join(str(part) for part in problem["loc"])
        raise OtherVersionError(
            f"Checkpoint {path} was written by another version of ris: {where}: {problem['msg']}. Use that "
            "version, which env.json names in the run, or train anew.",
            path=path,
        ) from error


def _without_digest(text: str) -> str:
    """What a checkpoint says of itself, but for the digest of its tensors, as JSON."""
    described = _parsed(text)
    described.pop(DIGEST_FIELD, None)
    return json.dumps(described) if described else text


def _parsed(text: str) -> dict[str, Any]:
    """A JSON object; empty if the text is none, which is for the reader of its fields to refuse."""
    try:
        return parse_object(text)
    except ValueError:
        return {}


def _header(path: Path) -> dict[str, str]:
    """What a safetensors file says beside its tensors."""
    with safe_open(path, framework="pt") as file:
        return dict(file.metadata() or {})


def load_checkpoint(path: Path, *, device: torch.device) -> tuple[RisModel, CheckpointMetadata]:
    """Rebuild the model of a checkpoint.

    Raises:
        CheckpointError: as `read_metadata`, or the weights are not those of the model it describes, or not
            those that were written.
    """
    metadata = read_metadata(path)
    model = build_fitting(metadata, path)
    load_weights(model, path)
    return model.to(device).eval(), metadata


def build_from_metadata(metadata: CheckpointMetadata) -> RisModel:
    """Build the model that a checkpoint describes; its weights are still to come."""
    bert = bert_from_dict(metadata.bert)
    return RisModel(metadata.config.model, metadata.encoder_spec, bert)


def build_fitting(metadata: CheckpointMetadata, path: Path) -> RisModel:
    """Build the model that a file of weights is said to be of, if the tensors in the file bear that out.

    Sizes that a damaged or hostile file claims are refused before anything is allocated for them.

    Args:
        metadata: what is said; from the file or from beside it.
        path: the weights, which are still to come.

    Raises:
        CheckpointError: no such model can be built, or the tensors are of another one.
        SafetensorError: the file is no safetensors file.
    """
    found = _shapes(path)
    layers = (metadata.config.model.pixel_decoder_layers, metadata.bert.get("num_hidden_layers"))
    try:
        if any(isinstance(number, int) and number > len(found) for number in layers):
            raise ValueError(f"it has more layers than the {len(found)} tensors of the file")
        with torch.device("meta"):
            model = build_from_metadata(metadata)
        positions = model.language.bert.config.max_position_embeddings
        if model.max_tokens > positions:
            raise ValueError(f"max_tokens is {model.max_tokens}, but BERT has {positions} positions")
        expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    except CheckpointError:
        raise
    except Exception as error:  # whatever the first wrong value leads torch and transformers to
        raise CheckpointError(
            f"The model of {path} cannot be built as it is described: {error}. The description is damaged, "
            "or was not written by ris.",
            path=path,
        ) from error
    _require_same_shapes(found, expected, path)
    return build_from_metadata(metadata)


def _shapes(path: Path) -> dict[str, tuple[int, ...]]:
    """Shape of each tensor of a safetensors file, by name; no tensor is read."""
    with safe_open(path, framework="pt") as file:
        return {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118


def load_weights(model: RisModel, path: Path) -> None:
    """Load a checkpoint's weights into a model of the same architecture.

    A file without a digest, of an earlier ris or of an exported model, is taken as it is.

    Raises:
        CheckpointError: the weights are not those that were written; or names or shapes differ, of which the
            first few are named.
    """
    found = load_file(path)
    expected_digest = _parsed(_header(path).get(METADATA_KEY, "")).get(DIGEST_FIELD)
    if expected_digest is not None and (digest := tensors_digest(found)) != expected_digest:
        raise CheckpointError(
            f"Checkpoint {path} is damaged: its weights are not those that were written (sha256 "
            f"{digest[:12]}, expected {str(expected_digest)[:12]}). Use another one of the same run.",
            path=path,
            expected=expected_digest,
            found=digest,
        )
    _require_same_shapes(
        {name: tuple(tensor.shape) for name, tensor in found.items()},
        {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()},
        path,
    )
    model.load_state_dict(found)


def _require_same_shapes(
    found: Mapping[str, tuple[int, ...]], expected: Mapping[str, tuple[int, ...]], path: Path
) -> None:
    problems = [f"{name} is missing" for name in expected if name not in found]
    problems += [f"{name} is unknown" for name in found if name not in expected]
    problems += [
        f"{name} is {found[name]}, expected {shape}"
        for name, shape in expected.items()
        if name in found and found[name] != shape
    ]
    if problems:
        raise CheckpointError(
            f"Checkpoint {path} is of another model: {'; '.join(problems[:3])}"
            + (f" and {len(problems) - 3} more." if len(problems) > 3 else "."),
            path=path,
            problems=problems,
        )


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

"""CLIP: building it, loading it, image features and text embeddings.

Axes: B images, N patch tokens (row by row, class token dropped), E texts, K categories.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from ris_cache.encoders.positions import random_position_embedding
from ris_cache.encoders.spec import ClipSpec
from ris_cache.encoders.weights import (
    FileWeights,
    RandomWeights,
    WeightsRecord,
    WeightsSource,
    describe_weights,
    load_strictly,
    read_state_dict,
)
from ris_cache.errors import ConfigError, ShapeError
from ris_cache.vision_imports import ensure_torchvision

ensure_torchvision()  # open_clip imports torchvision, so its import has to come after this line

import open_clip  # noqa: E402
from open_clip.model import CLIP  # noqa: E402

# SHA-256 of the TorchScript archives that OpenAI published; open_clip's download checks the same digests.
# Opening an archive may run code that it brings along, so no other one is opened.
_PUBLISHED_ARCHIVES = {
    "3035c92b350959924f9f00213499208652fc7ea050643e8b385c2dac08641f02": "ViT-L-14-336px.pt",
}
# What a traced CLIP may keep beside its parameters; the spec decides all of it here.
_ARCHIVE_CONSTANTS = ("input_resolution", "context_length", "vocab_size", "attn_mask")
_TEXTS_PER_FORWARD = 256


def clip_config(spec: ClipSpec) -> dict[str, Any]:
    """The spec in the words of an open_clip model configuration."""
    return {
        "embed_dim": spec.embed_dim,
        "quick_gelu": spec.quick_gelu,
        "vision_cfg": {
            "image_size": spec.image_size,
            "layers": spec.layers,
            "width": spec.width,
            "head_width": spec.width // spec.num_heads,
            "patch_size": spec.patch_size,
        },
        "text_cfg": {
            "context_length": spec.context_length,
            "vocab_size": spec.vocab_size,
            "width": spec.text_width,
            "heads": spec.text_heads,
            "layers": spec.text_layers,
        },
    }


def build_clip(spec: ClipSpec) -> CLIP:
    """Build both towers as open_clip initialises them, float32 on torch's current default device."""
    return CLIP(**clip_config(spec))


def load_clip(spec: ClipSpec, source: WeightsSource) -> tuple[CLIP, WeightsRecord]:
    """Build CLIP with weights, float32 on the CPU.

    Accepts .safetensors, torch files of plain tensors, and OpenAI's own archive. Random weights leave torch's
    global generator as it was.

    Raises:
        WeightsError: the file is missing, unreadable, refused or of another architecture.
    """
    record = describe_weights(source)
    if isinstance(source, RandomWeights):
        # Seeding the CPU generator alone: torch.manual_seed would reseed every CUDA device as well.
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(source.seed)
            model = build_clip(spec)
            with torch.no_grad():
                patches = model.visual.positional_embedding[1:]
                patches.copy_(random_position_embedding(spec.grid, spec.width))
        return model, record
    state = _read_clip_file(source, record)
    model = build_clip(spec)
    if "logit_scale" in state:
        state["logit_scale"] = state["logit_scale"].reshape(())  # saved as [1] by some trainers
    load_strictly(model, state, path=source.path)
    return model, record


def encode_clip_images(model: CLIP, pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute patch tokens and image embedding in one forward.

    Args:
        pixels: float[B, 3, S, S], normalised, S the model's own image size.

    Returns:
        clip_features float[B, N, width]: raw output of the last residual block, before `ln_post`.
        clip_pooled float[B, embed_dim]: the image embedding, not L2-normalised.

    Raises:
        ShapeError: other axes or another image size.
    """
    expected = (3, *model.visual.image_size)
    if pixels.ndim != 4 or tuple(pixels.shape[1:]) != expected:
        raise ShapeError(
            f"This CLIP encoder takes [B, {', '.join(map(str, expected))}], got {list(pixels.shape)}.",
            expected=(None, *expected),
            found=tuple(pixels.shape),
        )
    output = model.visual.forward_intermediates(pixels, indices=1, output_fmt="NLC")
    (tokens,) = output["image_intermediates"]
    return tokens, output["image_features"]


def encode_texts(model: CLIP, texts: Sequence[str]) -> torch.Tensor:
    """Embed texts with CLIP-T, on the device where the model lies.

    A text that is too long loses its end, but keeps the end-of-text token that the embedding is read from.

    Returns:
        float[E, embed_dim], L2-normalised, row e for texts[e].
    """
    device = model.positional_embedding.device
    embeddings = [model.text_projection.new_zeros((0, model.text_projection.shape[1]))]
    with torch.no_grad():
        for start in range(0, len(texts), _TEXTS_PER_FORWARD):
            tokens = open_clip.tokenize(
                list(texts[start : start + _TEXTS_PER_FORWARD]), context_length=model.context_length
            )
            embeddings.append(model.encode_text(tokens.to(device), normalize=True))
        return torch.cat(embeddings)


def category_embeddings(model: CLIP, names: Sequence[str], template: str) -> torch.Tensor:
    """Embed category names, each put into a prompt.

    Args:
        template: text with one `{}` where the name goes.

    Returns:
        float32[K, embed_dim], L2-normalised, row k for names[k].

    Raises:
        ConfigError: the template has no place for the name, or more than one.
    """
    if template.count("{}") != 1:
        raise ConfigError(
            f"The prompt template {template!r} needs exactly one {{}} where the category name goes, "
            "as in 'a photo of a {}.'.",
            template=template,
        )
    return encode_texts(model, [template.replace("{}", name) for name in names]).float()


def _read_clip_file(source: FileWeights, record: WeightsRecord) -> dict[str, torch.Tensor]:
    if record.sha256 not in _PUBLISHED_ARCHIVES:
        return read_state_dict(source.path)
    archive: nn.Module = torch.jit.load(source.path, map_location="cpu")  # type: ignore[no-untyped-call]
    return {name: tensor for name, tensor in archive.state_dict().items() if name not in _ARCHIVE_CONSTANTS}

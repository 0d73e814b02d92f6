"""What the frozen encoders are: architecture, input and preprocessing as plain values.

Everything here enters the cache's fingerprint, because everything here changes the features. Nothing here
imports torch, so the command line can name presets without loading it.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True, slots=True, kw_only=True)
class Normalisation:
    """Per-channel mean and standard deviation (RGB) subtracted from and divided into pixel values.

    Attributes:
        scale: pixels are divided by this before the mean is subtracted (1 keeps 0…255, 255 gives 0…1).
    """

    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    scale: float


@dataclass(frozen=True, slots=True, kw_only=True)
class SamSpec:
    """SAM's image encoder and heads, in the words of `segment_anything.ImageEncoderViT`.

    Attributes:
        image_size: side of the square input frame in pixels.
        out_channels: C, width of the neck and of the mask decoder.
        resize: kernel that squashes the original frame to the input frame.
    """

    name: str
    image_size: int
    patch_size: int
    width: int
    depth: int
    num_heads: int
    global_attn_indexes: tuple[int, ...]
    window_size: int
    out_channels: int
    decoder_mlp_dim: int
    decoder_num_heads: int
    resize: str = "pil-bilinear"
    normalisation: Normalisation = Normalisation(
        mean=(123.675, 116.28, 103.53), std=(58.395, 57.12, 57.375), scale=1.0
    )

    @property
    def grid(self) -> int:
        """P: the image embedding is [out_channels, grid, grid]."""
        return self.image_size // self.patch_size


@dataclass(frozen=True, slots=True, kw_only=True)
class ClipSpec:
    """CLIP's two towers, in the words of open_clip's model configuration.

    Attributes:
        name: open_clip model name, or the preset's own for sizes that open_clip does not list.
        image_size: side of the square input frame in pixels.
        width: channels of the patch tokens.
        embed_dim: width of the joint image-text space.
        layer: index of the block whose output is cached (raw, class token dropped); the last one.
    """

    name: str
    image_size: int
    patch_size: int
    width: int
    layers: int
    num_heads: int
    embed_dim: int
    text_width: int
    text_layers: int
    text_heads: int
    context_length: int = 77
    vocab_size: int = 49408
    quick_gelu: bool = True
    resize: str = "pil-bicubic"
    normalisation: Normalisation = Normalisation(
        mean=(0.48145466, 0.4578275, 0.40821073), std=(0.26862954, 0.26130258, 0.27577711), scale=255.0
    )
    prompt_template: str = "a photo of a {}."

    @property
    def grid(self) -> int:
        """P_clip: the patch tokens form a grid × grid square, row by row."""
        return self.image_size // self.patch_size

    @property
    def num_tokens(self) -> int:
        """Patch tokens per image, class token not counted."""
        return self.grid * self.grid

    @property
    def layer(self) -> int:
        """Zero-based index of the cached block."""
        return self.layers - 1


@dataclass(frozen=True, slots=True, kw_only=True)
class EncoderSpec:
    """The pair of frozen encoders that one cache is made with."""

    preset: str
    sam: SamSpec
    clip: ClipSpec

    def feature_shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape per image of each cached array."""
        return {
            "sam": (self.sam.out_channels, self.sam.grid, self.sam.grid),
            "clip": (self.clip.num_tokens, self.clip.width),
            "clip_pooled": (self.clip.embed_dim,),
        }

    def as_dict(self) -> dict[str, Any]:
        """Plain nested values, as they enter the fingerprint."""
        fields = asdict(self)
        fields["clip"]["layer"] = self.clip.layer
        return fields


PAPER = EncoderSpec(
    preset="paper",
    sam=SamSpec(
        name="vit_b",
        image_size=1024,
        patch_size=16,
        width=768,
        depth=12,
        num_heads=12,
        global_attn_indexes=(2, 5, 8, 11),
        window_size=14,
        out_channels=256,
        decoder_mlp_dim=2048,
        decoder_num_heads=8,
    ),
    clip=ClipSpec(
        name="ViT-L-14-336-quickgelu",
        image_size=336,
        patch_size=14,
        width=1024,
        layers=24,
        num_heads=16,
        embed_dim=768,
        text_width=768,
        text_layers=12,
        text_heads=12,
    ),
)

TINY = EncoderSpec(
    preset="tiny",
    sam=SamSpec(
        name="tiny",
        image_size=128,
        patch_size=8,
        width=128,
        depth=2,
        num_heads=4,
        global_attn_indexes=(1,),
        window_size=7,
        out_channels=64,
        decoder_mlp_dim=128,
        decoder_num_heads=4,
    ),
    clip=ClipSpec(
        name="tiny",
        image_size=80,
        patch_size=8,
        width=128,
        layers=1,
        num_heads=2,
        embed_dim=64,
        text_width=64,
        text_layers=1,
        text_heads=2,
    ),
)

PRESETS: dict[str, EncoderSpec] = {"paper": PAPER, "tiny": TINY}


def spec_from_dict(fields: dict[str, Any]) -> EncoderSpec:
    """Rebuild an `EncoderSpec` from `as_dict()` after a trip through JSON, where tuples become lists.

    Raises:
        KeyError, TypeError: a field is missing, unknown, or of a kind that this version does not build.
    """

    def normalisation(values: dict[str, Any]) -> Normalisation:
        return Normalisation(mean=tuple(values["mean"]), std=tuple(values["std"]), scale=values["scale"])

    sam, clip = dict(fields["sam"]), dict(fields["clip"])
    sam["global_attn_indexes"] = tuple(sam["global_attn_indexes"])
    layer = clip.pop("layer")
    sam["normalisation"] = normalisation(sam["normalisation"])
    clip["normalisation"] = normalisation(clip["normalisation"])
    spec = EncoderSpec(preset=fields["preset"], sam=SamSpec(**sam), clip=ClipSpec(**clip))
    if layer != spec.clip.layer:
        raise TypeError(f"CLIP layer {layer} is not the last one; this version reads no other")
    return spec

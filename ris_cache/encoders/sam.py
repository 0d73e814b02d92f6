"""SAM: building it, loading it, and running its image encoder without the full attention matrix.

Axes: B images (or windows), C channels, P side of the embedding grid, T = P·P tokens, D channels of one head.
The layout of names is that of the public checkpoint: `image_encoder.*`, `prompt_encoder.*`, `mask_decoder.*`.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import nn

from ris_cache.encoders.positions import random_position_embedding
from ris_cache.encoders.spec import SamSpec
from ris_cache.encoders.weights import (
    RandomWeights,
    WeightsRecord,
    WeightsSource,
    describe_weights,
    load_strictly,
    read_state_dict,
)
from ris_cache.errors import ShapeError
from ris_cache.vision_imports import ensure_torchvision

ensure_torchvision()  # segment_anything imports torchvision, so its import has to come after this line

from segment_anything.modeling import (  # noqa: E402
    ImageEncoderViT,
    MaskDecoder,
    PromptEncoder,
    TwoWayTransformer,
)
from segment_anything.modeling.image_encoder import (  # noqa: E402
    Attention,
    Block,
    get_rel_pos,
    window_partition,
    window_unpartition,
)

# The public build's values that no SAM variant changes.
_MLP_RATIO = 4
_MASK_IN_CHANS = 16
_NUM_MULTIMASK_OUTPUTS = 3
_DECODER_DEPTH = 2
_IOU_HEAD_DEPTH = 3

_RELATIVE_POSITION_STD = 0.02  # ViT's usual scale for such parameters
_PREPROCESSING_BUFFERS = ("pixel_mean", "pixel_std")


@dataclass(frozen=True, slots=True, kw_only=True)
class SamParts:
    """SAM's three networks."""

    image_encoder: ImageEncoderViT
    prompt_encoder: PromptEncoder
    mask_decoder: MaskDecoder

    def as_module(self) -> nn.ModuleDict:
        """The same networks under the public checkpoint's names; parameters are shared, not copied."""
        return nn.ModuleDict(
            {
                "image_encoder": self.image_encoder,
                "prompt_encoder": self.prompt_encoder,
                "mask_decoder": self.mask_decoder,
            }
        )


def build_sam(spec: SamSpec) -> SamParts:
    """Build SAM as segment_anything initialises it, on torch's current default device (`meta` works)."""
    return SamParts(
        image_encoder=ImageEncoderViT(
            img_size=spec.image_size,
            patch_size=spec.patch_size,
            embed_dim=spec.width,
            depth=spec.depth,
            num_heads=spec.num_heads,
            mlp_ratio=_MLP_RATIO,
            out_chans=spec.out_channels,
            qkv_bias=True,
            norm_layer=partial(nn.LayerNorm, eps=1e-6),
            use_rel_pos=True,
            window_size=spec.window_size,
            global_attn_indexes=spec.global_attn_indexes,
        ),
        prompt_encoder=build_prompt_encoder(spec),
        mask_decoder=build_mask_decoder(spec),
    )


def build_prompt_encoder(spec: SamSpec) -> PromptEncoder:
    """Build the prompt encoder alone, for users of the cached heads."""
    return PromptEncoder(
        embed_dim=spec.out_channels,
        image_embedding_size=(spec.grid, spec.grid),
        input_image_size=(spec.image_size, spec.image_size),
        mask_in_chans=_MASK_IN_CHANS,
    )


def build_mask_decoder(spec: SamSpec) -> MaskDecoder:
    """Build the mask decoder alone, for users of the cached heads."""
    return MaskDecoder(
        num_multimask_outputs=_NUM_MULTIMASK_OUTPUTS,
        transformer=TwoWayTransformer(
            depth=_DECODER_DEPTH,
            embedding_dim=spec.out_channels,
            mlp_dim=spec.decoder_mlp_dim,
            num_heads=spec.decoder_num_heads,
        ),
        transformer_dim=spec.out_channels,
        iou_head_depth=_IOU_HEAD_DEPTH,
        iou_head_hidden_dim=spec.out_channels,
    )


def load_sam(spec: SamSpec, source: WeightsSource) -> tuple[SamParts, WeightsRecord]:
    """Build SAM with weights, float32 on the CPU.

    Random weights leave torch's global generator as it was. segment_anything starts the image encoder's
    position parameters at zero; random weights draw them, so that trials exercise them.

    Raises:
        WeightsError: the file is missing, unreadable or of another architecture.
    """
    record = describe_weights(source)
    if isinstance(source, RandomWeights):
        # Seeding the CPU generator alone: torch.manual_seed would reseed every CUDA device as well.
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(source.seed)
            parts = build_sam(spec)
            _draw_positions(parts.image_encoder)
        return parts, record
    state = read_state_dict(source.path)
    for name in _PREPROCESSING_BUFFERS:
        state.pop(name, None)  # some saved copies carry them; the preprocessing is the spec's
    parts = build_sam(spec)
    load_strictly(parts.as_module(), state, path=source.path)
    return parts, record


def encode_sam(encoder: ImageEncoderViT, pixels: torch.Tensor) -> torch.Tensor:
    """Run an image encoder, same weights and result as `encoder(pixels)`, in far less memory and time.

    The library's attention writes out a T × T matrix for all heads several times over (T = 4096 in the global
    blocks of the full-size encoder). Here each head goes through `scaled_dot_product_attention` with its
    relative-position bias, so one bias of one head is the largest array alive.

    Args:
        pixels: float[B, 3, S, S], normalised, S the encoder's own image size.

    Returns:
        float[B, C, P, P] image_embeddings.

    Raises:
        ShapeError: other axes or another image size.
    """
    side = encoder.img_size
    if pixels.ndim != 4 or tuple(pixels.shape[1:]) != (3, side, side):
        raise ShapeError(
            f"This SAM encoder takes [B, 3, {side}, {side}], got {list(pixels.shape)}.",
            expected=(None, 3, side, side),
            found=tuple(pixels.shape),
        )
    tokens: torch.Tensor = encoder.patch_embed(pixels)
    if encoder.pos_embed is not None:
        tokens = tokens + encoder.pos_embed
    for block in encoder.blocks:
        tokens = _run_block(block, tokens)
    image_embeddings: torch.Tensor = encoder.neck(tokens.permute(0, 3, 1, 2))
    return image_embeddings


def _run_block(block: Block, tokens: torch.Tensor) -> torch.Tensor:
    """`Block.forward` with the attention replaced; tokens are [B, P, P, C]."""
    normed = block.norm1(tokens)
    if block.window_size > 0:
        windows, padded_size = window_partition(normed, block.window_size)
        attended = window_unpartition(
            _attend(block.attn, windows), block.window_size, padded_size, (tokens.shape[1], tokens.shape[2])
        )
    else:
        attended = _attend(block.attn, normed)
    tokens = tokens + attended
    hidden: torch.Tensor = block.mlp(block.norm2(tokens))
    return tokens + hidden


def _attend(attention: Attention, x: torch.Tensor) -> torch.Tensor:
    """`Attention.forward` of [B, H, W, C], one head at a time.

    One head's T × T bias stays small enough to be reused from cache and allocator; on a CPU, all heads in one
    call take twice the time and twelve times the memory.
    """
    batch, height, width, channels = x.shape
    num_tokens = height * width
    qkv = attention.qkv(x).reshape(batch, num_tokens, 3, attention.num_heads, -1)
    rows = cols = None
    if attention.use_rel_pos:
        rows = get_rel_pos(height, height, attention.rel_pos_h)  # [H, H, D]
        cols = get_rel_pos(width, width, attention.rel_pos_w)  # [W, W, D]
    heads = []
    for q, k, v in qkv.permute(3, 2, 0, 1, 4).unsqueeze(3):  # each [B, 1, T, D]
        bias = None
        if rows is not None and cols is not None:
            grid = q.reshape(batch, height, width, -1)
            to_rows = torch.einsum("bhwd,hkd->bhwk", grid, rows)
            to_cols = torch.einsum("bhwd,wkd->bhwk", grid, cols)
            bias = (to_rows[..., :, None] + to_cols[..., None, :]).reshape(batch, 1, num_tokens, num_tokens)
        heads.append(F.scaled_dot_product_attention(q, k, v, attn_mask=bias))
    mixed = torch.cat(heads, dim=1).transpose(1, 2).reshape(batch, height, width, channels)
    projected: torch.Tensor = attention.proj(mixed)
    return projected


def _draw_positions(encoder: ImageEncoderViT) -> None:
    for name, parameter in encoder.named_parameters():
        if name.rpartition(".")[2] in ("rel_pos_h", "rel_pos_w"):
            nn.init.normal_(parameter, std=_RELATIVE_POSITION_STD)
    assert encoder.pos_embed is not None
    _, grid, _, channels = encoder.pos_embed.shape
    with torch.no_grad():
        encoder.pos_embed.copy_(random_position_embedding(grid, channels).view(1, grid, grid, channels))

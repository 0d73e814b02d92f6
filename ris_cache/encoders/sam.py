"""SAM: building it, loading it, and running its image encoder without the full attention matrix.

Axes: B images (or windows), C channels, P side of the embedding grid, T = P·P tokens, D channels of one head.
The layout of names is that of the public checkpoint: `image_encoder.*`, `prompt_encoder.*`, `mask_decoder.*`.
"""

from __future__ import annotations

import math
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
_KERNEL_WIDTH_STEP = 8  # attention kernels take head widths that are multiples of this
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
    blocks of the full-size encoder). Here `scaled_dot_product_attention` does the work, with the relative
    positions either as the bias of one head at a time or folded into queries and keys, whichever is faster on
    the device. Under autocast the matrix products run in its dtype.

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
    """`Attention.forward` of [B, H, W, C]."""
    batch, height, width, channels = x.shape
    qkv = attention.qkv(x).reshape(batch, height * width, 3, attention.num_heads, -1)
    q, k, v = qkv.permute(2, 0, 3, 1, 4)  # each [B, heads, T, D]
    if not attention.use_rel_pos:
        mixed = F.scaled_dot_product_attention(q, k, v)
    else:
        rows = _by_offset(attention.rel_pos_h, height)
        cols = _by_offset(attention.rel_pos_w, width)
        # One global block of the full-size encoder, one image, two cores, by head against folded: 0.67 s
        # against 1.04 s in float32, 1.79 s against 0.88 s in bfloat16; in float16 the global blocks are
        # equal and the windows take 2.8 s against 1.2 s. On CUDA, folding needs no T × T bias, which no
        # flash kernel would take anyway.
        by_head = q.device.type == "cpu" and q.dtype == torch.float32
        mixed = (attend_by_head if by_head else attend_folded)(q, k, v, rows, cols)
    projected: torch.Tensor = attention.proj(mixed.transpose(1, 2).reshape(batch, height, width, channels))
    return projected


def attend_by_head(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, rows: torch.Tensor, cols: torch.Tensor
) -> torch.Tensor:
    """Attend with relative positions as a bias, one head at a time.

    One head's T × T bias stays small enough to be reused from cache and allocator; on a CPU, all heads in one
    call take twice the time and twelve times the memory.

    Args:
        q, k, v: float[B, heads, H·W, D].
        rows: float[H, H, D], position of key row k as seen from query row q at [q, k].
        cols: float[W, W, D], likewise for columns.

    Returns:
        float[B, heads, H·W, D].
    """
    batch, num_heads, num_tokens, head_width = q.shape
    heads = []
    for i in range(num_heads):
        head_q, head_k, head_v = q[:, i : i + 1], k[:, i : i + 1], v[:, i : i + 1]
        grid = head_q.reshape(batch, len(rows), len(cols), head_width)
        to_rows = torch.einsum("bhwd,hkd->bhwk", grid, rows)
        to_cols = torch.einsum("bhwd,wkd->bhwk", grid, cols)
        bias = (to_rows[..., :, None] + to_cols[..., None, :]).reshape(batch, 1, num_tokens, num_tokens)
        heads.append(F.scaled_dot_product_attention(head_q, head_k, head_v, attn_mask=bias))
    return torch.cat(heads, dim=1)


def attend_folded(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, rows: torch.Tensor, cols: torch.Tensor
) -> torch.Tensor:
    """Attend with relative positions folded into queries and keys; arguments as `attend_by_head`.

    The bias of query q and key k is to_rows[q, row of k] + to_cols[q, column of k]. Appending to_rows[q] and
    to_cols[q] to the query, and to the key two one-hot vectors that name its row and column, makes the dot
    product pick exactly these two. No bias is left, so fused kernels apply; they sum in float32, so in half
    precision this loses less than a bias that is itself rounded.
    """
    batch, num_heads, num_tokens, head_width = q.shape
    height, width = len(rows), len(cols)
    # The kernel multiplies by D^-½ whatever lies in the query; √D takes that back for the positions.
    undo_scale = math.sqrt(head_width)
    grid = q.reshape(batch, num_heads, height, width, head_width)
    to_rows = torch.einsum("bnhwd,hkd->bnhwk", grid, rows * undo_scale).flatten(2, 3)
    to_cols = torch.einsum("bnhwd,wkd->bnhwk", grid, cols * undo_scale).flatten(2, 3)
    key_rows = torch.eye(height, dtype=k.dtype, device=k.device)[:, None, :].expand(-1, width, -1)
    key_cols = torch.eye(width, dtype=k.dtype, device=k.device)[None, :, :].expand(height, -1, -1)
    key_places = torch.cat([key_rows, key_cols], dim=-1).reshape(num_tokens, height + width)

    # Flash kernels take values of the keys' width only.
    folded_width = head_width + height + width
    filled_width = folded_width + -folded_width % _KERNEL_WIDTH_STEP
    zero = q.new_zeros(()).expand(batch, num_heads, num_tokens, filled_width - folded_width)
    mixed = F.scaled_dot_product_attention(
        torch.cat([q, to_rows, to_cols, zero], dim=-1),
        torch.cat([k, key_places.expand(batch, num_heads, -1, -1), zero], dim=-1),
        F.pad(v, (0, filled_width - head_width)),
        scale=1 / undo_scale,
    )
    return mixed[..., :head_width]


def _by_offset(table: torch.Tensor, size: int) -> torch.Tensor:
    """Arrange a [2·size - 1, D] table of offsets as [size, size, D]: the entry of offset q - k at [q, k].

    `get_rel_pos` of the library, but its indices are made on the table's own device: copying them there
    would make the host wait for the device in every block.
    """
    assert len(table) == 2 * size - 1, f"{len(table)} offsets for {size} positions"
    position = torch.arange(size, device=table.device)
    return table[position[:, None] - position[None, :] + size - 1]


def _draw_positions(encoder: ImageEncoderViT) -> None:
    for name, parameter in encoder.named_parameters():
        if name.rpartition(".")[2] in ("rel_pos_h", "rel_pos_w"):
            nn.init.normal_(parameter, std=_RELATIVE_POSITION_STD)
    assert encoder.pos_embed is not None
    _, grid, _, channels = encoder.pos_embed.shape
    with torch.no_grad():
        encoder.pos_embed.copy_(random_position_embedding(grid, channels).view(1, grid, grid, channels))

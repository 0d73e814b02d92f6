"""DFAM: queries that read SAM's and CLIP's pyramids in turn (method Sec. 3.3; supplement Table 2: 6.90 M).

B samples, I images, E expressions in the batch (E = B if it is computed at once), Q queries, C channels,
P side of SAM's embedding grid, D_text width of BERT. Three layers, l = 1 … 3; predictions for l = 0 … 3.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ris_cache.encoders.positions import sine_positions
from ris_train.model.attention import Attention
from ris_train.model.rows import per_sample

MAX_LOGIT_SCALE = math.log(100.0)  # CLIP's bound, so that the temperature cannot run away


class DfamPrediction(NamedTuple):
    """One layer's predictions.

    Attributes:
        mask_logits: float[B, Q, P, P] over the squashed input frame.
        text_logits: float[B, Q, E], how well each query of sample b fits expression e.
        queries: float[B, Q, C], o_l.
    """

    mask_logits: Tensor
    text_logits: Tensor
    queries: Tensor


class Dfam(nn.Module):
    """Deep feature alignment: a SAM branch that carries the queries on, and a CLIP branch that reads aside.

    The text logits are exp(s)·cos(query, sentence) + b. Query and sentence meet in a space of their own
    (a projection of o_l, and one of BERT's [CLS]); the learned scale and bias are those of sigmoid losses
    over unbalanced pairs (SigLIP, Zhai et al. 2023), where nearly every pair is negative.

    Args:
        channels: C.
        text_width: D_text.
        num_queries: Q.
        num_layers: N_l, one pyramid level each.
        num_heads: attention heads.
        ffn_dim: hidden width of the feed-forward blocks.
    """

    def __init__(
        self,
        channels: int,
        *,
        text_width: int,
        num_queries: int,
        num_layers: int,
        num_heads: int,
        ffn_dim: int,
    ) -> None:
        super().__init__()
        self.query_features = nn.Embedding(num_queries, channels)
        self.query_positions = nn.Embedding(num_queries, channels)
        self.sam_level_embed = nn.Embedding(num_layers, channels)
        self.clip_level_embed = nn.Embedding(num_layers, channels)
        self.sam_layers = nn.ModuleList(QueryLayer(channels, num_heads, ffn_dim) for _ in range(num_layers))
        self.clip_layers = nn.ModuleList(QueryLayer(channels, num_heads, ffn_dim) for _ in range(num_layers))
        self.mask_norm = nn.LayerNorm(channels)
        self.mask_head = nn.Sequential(
            nn.Linear(channels, channels),
            nn.ReLU(),
            nn.Linear(channels, channels),
            nn.ReLU(),
            nn.Linear(channels, channels),
        )
        self.output_norm = nn.LayerNorm(channels)
        self.output_projection = nn.Linear(channels, channels)
        self.query_projection = nn.Linear(channels, channels)
        self.text_projection = nn.Linear(text_width, channels, bias=False)
        self.logit_scale = nn.Parameter(torch.tensor(math.log(10.0)))
        self.logit_bias = nn.Parameter(torch.tensor(-10.0))

    def forward(
        self,
        image_embeddings: Tensor,
        sam_levels: Sequence[Tensor],
        clip_levels: Sequence[Tensor],
        sentences: Tensor,
        *,
        image_index: Tensor | None = None,
    ) -> list[DfamPrediction]:
        """Run the layers and the heads after each.

        Args:
            image_embeddings: float[B, C, P, P], what the masks are read from.
            sam_levels: float[B, C, h, w] SAM pyramid, coarsest first, one per layer.
            clip_levels: float[B, C, h, w] pixel decoder levels, coarsest first, one per layer.
            sentences: float[E, D_text], BERT's [CLS] of every expression in the batch; more than B where only
                a part of the batch is computed.
            image_index: int64[B]; given, image_embeddings and sam_levels hold one row per image, [I, …], and
                image_index says which row each sample reads.

        Returns:
            Predictions for l = 0 … N_l; only the text logits relate samples to one another.
        """
        batch_size = len(image_embeddings) if image_index is None else len(image_index)
        read_out = per_sample(image_embeddings, image_index)
        kind = read_out.device.type
        if torch.is_autocast_enabled(kind):  # which would convert it each of the times that it is read
            read_out = read_out.to(torch.get_autocast_dtype(kind))
        text = F.normalize(self.text_projection(sentences), dim=-1)
        positions = self.query_positions.weight.expand(batch_size, -1, -1)
        queries = self.query_features.weight.expand(batch_size, -1, -1)
        prediction = self._predict(queries, queries, read_out, text)
        predictions = [prediction]
        for index, (sam_level, clip_level) in enumerate(zip(sam_levels, clip_levels, strict=True)):
            queries = self.sam_layers[index](
                queries,
                positions,
                sam_level + self.sam_level_embed.weight[index, :, None, None],
                attention_mask(prediction.mask_logits, sam_level.shape[-2:]),
                image_index=image_index,
            )
            aside = self.clip_layers[index](
                queries,
                positions,
                clip_level + self.clip_level_embed.weight[index, :, None, None],
                attention_mask(prediction.mask_logits, clip_level.shape[-2:]),
            )
            prediction = self._predict(queries, aside, read_out, text)
            predictions.append(prediction)
        return predictions

    def _predict(
        self, sam_queries: Tensor, clip_queries: Tensor, image_embeddings: Tensor, text: Tensor
    ) -> DfamPrediction:
        kernels = self.mask_head(self.mask_norm(sam_queries))
        outputs = self.output_projection(self.output_norm(clip_queries))
        joint = F.normalize(self.query_projection(outputs), dim=-1)
        scale = self.logit_scale.clamp(max=MAX_LOGIT_SCALE).exp()
        return DfamPrediction(
            mask_logits=torch.einsum("bqc,bchw->bqhw", kernels, image_embeddings),
            text_logits=scale * torch.einsum("bqc,ec->bqe", joint, text) + self.logit_bias,
            queries=outputs,
        )


class QueryLayer(nn.Module):
    """FFN(SelfAttn(MaskedCrossAttn(queries, level))), post-norm.

    Args:
        channels: C.
        num_heads: attention heads.
        ffn_dim: hidden width of the feed-forward block.
    """

    def __init__(self, channels: int, num_heads: int, ffn_dim: int) -> None:
        super().__init__()
        self.cross_attention = Attention(channels, num_heads)
        self.cross_norm = nn.LayerNorm(channels)
        self.self_attention = Attention(channels, num_heads)
        self.self_norm = nn.LayerNorm(channels)
        self.ffn = nn.Sequential(nn.Linear(channels, ffn_dim), nn.ReLU(), nn.Linear(ffn_dim, channels))
        self.ffn_norm = nn.LayerNorm(channels)

    def forward(
        self,
        queries: Tensor,
        positions: Tensor,
        level: Tensor,
        mask: Tensor,
        *,
        image_index: Tensor | None = None,
    ) -> Tensor:
        """Update the queries.

        Args:
            queries: float[B, Q, C].
            positions: float[B, Q, C], added to queries wherever they ask or are asked.
            level: float[B, C, h, w].
            mask: bool[B, Q, h·w], true where a query may attend.
            image_index: int64[B]; given, level holds one row per image, [I, C, h, w].

        Returns:
            float[B, Q, C].
        """
        height, width = level.shape[-2:]
        cells = level.flatten(2).transpose(1, 2)
        where = sine_positions(height, width, level.shape[1], device=level.device).flatten(2).transpose(1, 2)
        gathered = self.cross_attention(
            queries + positions,
            cells + where.to(cells.dtype),
            cells,
            mask=mask.unsqueeze(1),
            image_index=image_index,
        )
        queries = self.cross_norm(queries + gathered)
        placed = queries + positions
        queries = self.self_norm(queries + self.self_attention(placed, placed, queries))
        normed: Tensor = self.ffn_norm(queries + self.ffn(queries))
        return normed


def attention_mask(mask_logits: Tensor, size: tuple[int, int] | torch.Size) -> Tensor:
    """Turn the last layer's masks into where each query may look next.

    Args:
        mask_logits: float[B, Q, P, P].
        size: (h, w) of the level to attend to.

    Returns:
        bool[B, Q, h·w]: sigmoid of the resized logits ≥ 0.5; all true for a query whose mask is empty.
        Carries no gradient.
    """
    resized = F.interpolate(mask_logits.detach(), size=tuple(size), mode="bilinear", align_corners=False)
    allowed = (resized >= 0).flatten(2)
    return allowed | ~allowed.any(dim=-1, keepdim=True)

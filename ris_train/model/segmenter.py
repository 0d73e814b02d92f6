"""The trainable model, assembled as the paper's figure shows it.

B samples, I images, C unified width, P side of SAM's embedding grid, N patch tokens, L word pieces.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor, nn

from ris_cache.encoders.sam import build_mask_decoder, build_prompt_encoder
from ris_cache.encoders.spec import EncoderSpec
from ris_cache.vision_imports import ensure_torchvision
from ris_train.config import ModelConfig
from ris_train.model.dfam import Dfam, DfamPrediction
from ris_train.model.language import LanguageEncoder, TextFeatures
from ris_train.model.mask_decoder import BatchedMaskDecoder
from ris_train.model.no_target import NoTargetHead
from ris_train.model.pixel_decoder import NUM_LEVELS, PixelDecoder
from ris_train.model.pwam import PixelWordAttention
from ris_train.model.pyramid import SimpleFeaturePyramid
from ris_train.model.rows import per_sample
from ris_train.model.sparse_prompt import SparsePrompt

ensure_torchvision()

from transformers import BertModel  # noqa: E402


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelInputs:
    """What the model sees of a batch.

    Attributes:
        image_embeddings: float[B, C, P, P], the cache's `sam`.
        clip_features: float[B, N, D_clip], the cache's `clip`.
        token_ids: int64[B, L].
        text_mask: bool[B, L], true on real tokens.
        category_embeddings: float[B, D_joint], CLIP-T embedding of the category; None for `cls` models.
        image_index: int64[B] or None. Given, image_embeddings and clip_features hold one row per image, I
            instead of B, and image_index says which row each sample uses: what the image alone decides is
            then computed once for all its expressions. The outputs are those of the expanded batch.
    """

    image_embeddings: Tensor
    clip_features: Tensor
    token_ids: Tensor
    text_mask: Tensor
    category_embeddings: Tensor | None
    image_index: Tensor | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelOutputs:
    """What the model says.

    Attributes:
        mask_logits: float[B, 4P, 4P], M_SAM over the squashed input frame.
        dfam: predictions of DFAM for l = 0 … N_l; None where it was skipped.
        no_target_logits: float[B, 2], index 1 for "refers to nothing"; None without a head, or where DFAM,
            which the head reads, was skipped.
    """

    mask_logits: Tensor
    dfam: list[DfamPrediction] | None
    no_target_logits: Tensor | None = None

    @property
    def says_no_target(self) -> Tensor | None:
        """bool[B], where the head finds that the expression refers to nothing; None without its logits."""
        return None if self.no_target_logits is None else self.no_target_logits.argmax(dim=1) == 1


class RisModel(nn.Module):
    """From cached features and an expression to a mask.

    Args:
        config: sizes of the trainable parts.
        encoders: the frozen encoders whose features come in.
        bert: the language model, without pooler.
    """

    def __init__(self, config: ModelConfig, encoders: EncoderSpec, bert: BertModel) -> None:
        super().__init__()
        channels = encoders.sam.out_channels
        self.language = LanguageEncoder(bert, channels)
        self.pwam = PixelWordAttention(encoders.clip.width, channels)
        self.clip_pyramid = SimpleFeaturePyramid(channels, scales=(2, 1, 0.5))
        self.pixel_decoder = PixelDecoder(
            channels,
            num_layers=config.pixel_decoder_layers,
            num_heads=config.num_heads,
            num_points=config.num_deformable_points,
            ffn_dim=config.ffn_dim,
            norm_groups=config.norm_groups,
        )
        self.sam_pyramid = SimpleFeaturePyramid(channels, scales=(1, 0.5, 0.25))
        self.dfam = Dfam(
            channels,
            text_width=bert.config.hidden_size,
            num_queries=config.num_queries,
            num_layers=NUM_LEVELS,
            num_heads=config.num_heads,
            ffn_dim=config.ffn_dim,
        )
        self.category_projection = (
            nn.Linear(encoders.clip.embed_dim, channels) if config.sparse_prompt == "category" else None
        )
        self.sparse_prompt = SparsePrompt(
            channels,
            config.num_heads,
            ffn_dim=config.ffn_dim if config.sparse_prompt_ffn else None,
            reads_padding=config.sparse_prompt_padding,
        )
        self.max_tokens = config.max_tokens
        self.dense_prompt_resize = config.dense_prompt_resize
        self.mask_decoder = BatchedMaskDecoder(
            build_mask_decoder(encoders.sam), build_prompt_encoder(encoders.sam)
        )
        # The last to draw from the random generator, so that the other parts start alike with and without.
        self.no_target = NoTargetHead(channels) if config.no_target_head else None

    @property
    def has_no_target_head(self) -> bool:
        """Whether the model judges if an expression refers to anything; it needs DFAM for that."""
        return self.no_target is not None

    def encode_text(self, inputs: ModelInputs) -> TextFeatures:
        """Encode the expressions, which `forward` does itself unless it is given the result."""
        return self.language(*self._padded(inputs.token_ids, inputs.text_mask))  # type: ignore[no-any-return]

    def forward(
        self,
        inputs: ModelInputs,
        *,
        with_dfam: bool = True,
        text: TextFeatures | None = None,
        sentences: Tensor | None = None,
    ) -> ModelOutputs:
        """Segment.

        Args:
            inputs: the batch.
            with_dfam: whether to run DFAM. The mask does not depend on it, so evaluation leaves it out,
                unless the model has a no-target head, which reads DFAM's queries.
            text: of these expressions, from `encode_text`.
            sentences: float[E, D_text], BERT's [CLS] of all expressions that DFAM compares the queries with;
                those of `text` by default.
        """
        token_ids, text_mask = self._padded(inputs.token_ids, inputs.text_mask)
        if text is None:
            text = self.language(token_ids, text_mask)
        index = inputs.image_index
        fused = self.pwam(inputs.clip_features, text.words, text_mask, image_index=index)
        decoded = self.pixel_decoder(self.clip_pyramid(fused))
        if self.category_projection is None:
            query = text.sentence
        else:
            assert inputs.category_embeddings is not None, "this model needs category embeddings"
            query = self.category_projection(inputs.category_embeddings)
        dense_prompt = F.interpolate(
            decoded.dense_prompt,
            size=inputs.image_embeddings.shape[-2:],
            mode=self.dense_prompt_resize,
            align_corners=False,
        )
        mask_logits = self.mask_decoder(
            per_sample(inputs.image_embeddings, index),
            self.sparse_prompt(query, text.words, text_mask),
            dense_prompt,
        )
        predictions, no_target_logits = None, None
        if with_dfam:
            sam_levels = self.sam_pyramid(inputs.image_embeddings)
            predictions = self.dfam(
                inputs.image_embeddings,
                sam_levels[::-1],
                decoded.levels[::-1],
                text.raw_sentence if sentences is None else sentences,
                image_index=index,
            )
            if self.no_target is not None:
                no_target_logits = self.no_target(predictions[-1].queries)
        return ModelOutputs(mask_logits=mask_logits, dfam=predictions, no_target_logits=no_target_logits)

    def _padded(self, token_ids: Tensor, text_mask: Tensor) -> tuple[Tensor, Tensor]:
        """Pad to `max_tokens` where padding is read, so that a batch's longest expression decides nothing."""
        if not self.sparse_prompt.reads_padding:
            return token_ids, text_mask
        missing = self.max_tokens - token_ids.shape[1]
        pad_id = self.language.bert.config.pad_token_id or 0
        return F.pad(token_ids, (0, missing), value=pad_id), F.pad(text_mask, (0, missing), value=False)

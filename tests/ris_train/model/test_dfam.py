"""DFAM against a plain re-implementation, and what may and may not influence its predictions."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ris_cache.encoders.positions import sine_positions
from ris_train.model.attention import Attention
from ris_train.model.dfam import Dfam, DfamPrediction, QueryLayer, attention_mask

BATCH, QUERIES, CHANNELS, TEXT_WIDTH, HEADS = 3, 6, 16, 20, 4
GRID = 8
SAM_SIDES, CLIP_SIDES = (2, 4, 8), (3, 6, 12)

Features = tuple[Tensor, list[Tensor], list[Tensor], Tensor]


@pytest.fixture
def dfam() -> Dfam:
    dfam = Dfam(
        CHANNELS, text_width=TEXT_WIDTH, num_queries=QUERIES, num_layers=3, num_heads=HEADS, ffn_dim=32
    )
    with torch.no_grad():
        for name, parameter in dfam.named_parameters():
            if name.endswith("bias") and parameter.ndim == 1:
                parameter.normal_(std=0.1)  # attention's biases start at zero, which could hide a slip
    return dfam


@pytest.fixture
def features() -> Features:
    """Image embeddings, the two pyramids coarse to fine, and the sentences."""
    return (
        torch.randn(BATCH, CHANNELS, GRID, GRID),
        [torch.randn(BATCH, CHANNELS, side, side) for side in SAM_SIDES],
        [torch.randn(BATCH, CHANNELS, side, side) for side in CLIP_SIDES],
        torch.randn(BATCH, TEXT_WIDTH),
    )


def attend_by_torch(
    ours: Attention, query: Tensor, key: Tensor, value: Tensor, allowed: Tensor | None = None
) -> Tensor:
    """torch's attention with our weights; `allowed` is bool[B, Q, K], true where a query may look."""
    attended, _ = F.multi_head_attention_forward(
        query.transpose(0, 1),
        key.transpose(0, 1),
        value.transpose(0, 1),
        query.shape[-1],
        ours.num_heads,
        torch.cat([ours.q_proj.weight, ours.k_proj.weight, ours.v_proj.weight]),
        torch.cat([ours.q_proj.bias, ours.k_proj.bias, ours.v_proj.bias]),
        None,
        None,
        False,
        0.0,
        ours.out_proj.weight,
        ours.out_proj.bias,
        attn_mask=None if allowed is None else ~allowed.repeat_interleave(ours.num_heads, dim=0),
    )
    return attended.transpose(0, 1)


def layer_by_formula(
    layer: QueryLayer, queries: Tensor, positions: Tensor, level: Tensor, mask_logits: Tensor
) -> Tensor:
    """FFN(SelfAttn(MaskedCrossAttn(X, level))), post-norm; the mask is that of the layer before."""
    height, width = level.shape[-2:]
    resized = F.interpolate(mask_logits, size=(height, width), mode="bilinear", align_corners=False)
    allowed = (resized.sigmoid() >= 0.5).flatten(2)
    allowed[~allowed.any(dim=-1)] = True
    cells = level.flatten(2).transpose(1, 2)
    keys = (level + sine_positions(height, width, level.shape[1], device=level.device)).flatten(2)
    gathered = attend_by_torch(
        layer.cross_attention, queries + positions, keys.transpose(1, 2), cells, allowed
    )
    queries = layer.cross_norm(queries + gathered)
    placed = queries + positions
    queries = layer.self_norm(queries + attend_by_torch(layer.self_attention, placed, placed, queries))
    hidden = F.relu(F.linear(queries, layer.ffn[0].weight, layer.ffn[0].bias))
    return layer.ffn_norm(queries + F.linear(hidden, layer.ffn[2].weight, layer.ffn[2].bias))


def heads_by_formula(
    dfam: Dfam, sam_queries: Tensor, clip_queries: Tensor, image_embeddings: Tensor, sentences: Tensor
) -> DfamPrediction:
    """Masks from the SAM branch, text logits exp(s)·cos + b from the CLIP branch."""
    hidden = dfam.mask_norm(sam_queries)
    for index in (0, 2):
        hidden = F.relu(F.linear(hidden, dfam.mask_head[index].weight, dfam.mask_head[index].bias))
    kernels = F.linear(hidden, dfam.mask_head[4].weight, dfam.mask_head[4].bias)
    batch_size, channels, height, width = image_embeddings.shape
    masks = kernels @ image_embeddings.reshape(batch_size, channels, height * width)
    outputs = dfam.output_projection(dfam.output_norm(clip_queries))
    joint, text = dfam.query_projection(outputs), sentences @ dfam.text_projection.weight.T
    cosines = torch.einsum("bqc,ec->bqe", joint, text)
    cosines = cosines / joint.norm(dim=-1)[:, :, None] / text.norm(dim=-1)
    return DfamPrediction(
        masks.view(batch_size, -1, height, width),
        dfam.logit_scale.exp() * cosines + dfam.logit_bias,
        outputs,
    )


def dfam_by_formula(dfam: Dfam, features: Features) -> list[DfamPrediction]:
    """Method Sec. 2, item 5, line by line."""
    image_embeddings, sam_levels, clip_levels, sentences = features
    batch_size = image_embeddings.shape[0]
    positions = dfam.query_positions.weight.expand(batch_size, -1, -1)
    queries = dfam.query_features.weight.expand(batch_size, -1, -1)
    predictions = [heads_by_formula(dfam, queries, queries, image_embeddings, sentences)]
    for index in range(3):
        masks = predictions[-1].mask_logits
        sam_level = sam_levels[index] + dfam.sam_level_embed.weight[index].view(1, -1, 1, 1)
        clip_level = clip_levels[index] + dfam.clip_level_embed.weight[index].view(1, -1, 1, 1)
        queries = layer_by_formula(dfam.sam_layers[index], queries, positions, sam_level, masks)
        aside = layer_by_formula(dfam.clip_layers[index], queries, positions, clip_level, masks)
        predictions.append(heads_by_formula(dfam, queries, aside, image_embeddings, sentences))
    return predictions


def test_dfam_equals_its_formula_at_all_four_predictions(dfam: Dfam, features: Features) -> None:
    found, expected = dfam(*features), dfam_by_formula(dfam, features)
    assert len(found) == 4
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.mask_logits.shape == (BATCH, QUERIES, GRID, GRID)
        assert ours.text_logits.shape == (BATCH, QUERIES, BATCH)
        assert ours.queries.shape == (BATCH, QUERIES, CHANNELS)
        for ours_part, theirs_part in zip(ours, theirs, strict=True):
            torch.testing.assert_close(ours_part, theirs_part, rtol=1e-4, atol=1e-4)


def test_the_clip_branch_is_not_fed_back(dfam: Dfam, features: Features) -> None:
    image_embeddings, sam_levels, clip_levels, sentences = features
    before = dfam(*features)
    after = dfam(image_embeddings, sam_levels, [torch.randn_like(level) for level in clip_levels], sentences)
    for layer, (first, second) in enumerate(zip(before, after, strict=True)):
        assert torch.equal(first.mask_logits, second.mask_logits)
        # The initial queries have seen no level yet.
        assert torch.equal(first.text_logits, second.text_logits) == (layer == 0)
        assert torch.equal(first.queries, second.queries) == (layer == 0)


def test_only_the_text_logits_depend_on_the_neighbours_in_the_batch(dfam: Dfam, features: Features) -> None:
    image_embeddings, sam_levels, clip_levels, sentences = features
    together = dfam(*features)
    for row in range(BATCH):
        own = slice(row, row + 1)
        alone = dfam(
            image_embeddings[own],
            [level[own] for level in sam_levels],
            [level[own] for level in clip_levels],
            sentences[own],
        )
        for batched, single in zip(together, alone, strict=True):
            torch.testing.assert_close(batched.mask_logits[own], single.mask_logits, rtol=1e-4, atol=1e-4)
            torch.testing.assert_close(batched.queries[own], single.queries, rtol=1e-4, atol=1e-4)
            # Column `row` is the sample's own expression; the other columns are its neighbours'.
            torch.testing.assert_close(
                batched.text_logits[own, :, own], single.text_logits, rtol=1e-4, atol=1e-4
            )


def test_a_text_logit_follows_from_one_query_and_one_sentence() -> None:
    """Joint vectors (3, 4) and (4, 3): cos = 24/25; exp(s) = 5, b = −2, so the logit is 4.8 − 2 = 2.8."""
    dfam = Dfam(4, text_width=4, num_queries=1, num_layers=0, num_heads=1, ffn_dim=4)
    with torch.no_grad():
        dfam.output_projection.weight.zero_()
        dfam.output_projection.bias.copy_(torch.tensor([3.0, 4.0, 0.0, 0.0]))
        dfam.query_projection.weight.copy_(torch.eye(4))
        dfam.query_projection.bias.zero_()
        dfam.text_projection.weight.copy_(torch.eye(4))
        dfam.logit_scale.fill_(math.log(5))
        dfam.logit_bias.fill_(-2)
    (prediction,) = dfam(torch.randn(1, 4, 2, 2), [], [], torch.tensor([[4.0, 3.0, 0.0, 0.0]]))
    assert prediction.text_logits.item() == pytest.approx(2.8)


def test_the_scale_of_the_text_logits_is_bounded_by_a_hundred(dfam: Dfam, features: Features) -> None:
    with torch.no_grad():
        dfam.logit_scale.fill_(50)
        dfam.logit_bias.zero_()
    for prediction in dfam(*features):
        assert prediction.text_logits.abs().max() <= 100.001


def test_a_pyramid_with_a_level_too_few_is_refused(dfam: Dfam, features: Features) -> None:
    image_embeddings, sam_levels, clip_levels, sentences = features
    with pytest.raises(ValueError, match="shorter"):
        dfam(image_embeddings, sam_levels, clip_levels[:2], sentences)


def test_the_attention_mask_is_where_the_resized_mask_is_at_least_one_half() -> None:
    """A 4 × 4 mask halved: each cell of the level is the mean of four logits."""
    logits = torch.tensor(
        [
            [1.0, 1.0, -1.0, -1.0],
            [1.0, -2.0, -1.0, 2.0],
            [-1.0, -1.0, 0.0, 0.0],
            [-1.0, 5.0, 0.0, 0.0],
        ]
    ).view(1, 1, 4, 4)
    # Means: 1/4, −1/4, 2/4 and 0; sigmoid(0) = 0.5 is not below the threshold.
    assert attention_mask(logits, (2, 2)).tolist() == [[[True, False, True, True]]]


def test_a_query_with_an_empty_mask_attends_everywhere() -> None:
    logits = torch.full((2, 3, 4, 4), -1.0)
    logits[0, 1, 0, 0] = 100
    allowed = attention_mask(logits, (2, 2))
    assert allowed.dtype == torch.bool
    assert allowed[0, 1].tolist() == [True, False, False, False]
    assert allowed[0, 0].all()
    assert allowed[0, 2].all()
    assert allowed[1].all()


def test_the_attention_mask_carries_no_gradient() -> None:
    logits = torch.randn(1, 2, 4, 4, requires_grad=True)
    assert not attention_mask(logits, (2, 2)).requires_grad


def test_a_query_with_an_empty_mask_gathers_what_it_would_without_a_mask() -> None:
    layer = QueryLayer(CHANNELS, HEADS, 32)
    queries, positions = torch.randn(2, 3, CHANNELS), torch.randn(2, 3, CHANNELS)
    level = torch.randn(2, CHANNELS, 4, 4)
    empty = attention_mask(torch.full((2, 3, 8, 8), -5.0), (4, 4))
    found = layer(queries, positions, level, empty)
    assert found.isfinite().all()
    assert torch.equal(found, layer(queries, positions, level, torch.ones(2, 3, 16, dtype=torch.bool)))


def test_a_query_reads_no_cell_outside_its_mask() -> None:
    """Cross-attention alone: self-attention would pass on what other queries have read."""
    layer = QueryLayer(CHANNELS, HEADS, 32)
    queries, positions = torch.randn(1, 1, CHANNELS), torch.randn(1, 1, CHANNELS)
    level = torch.randn(1, CHANNELS, 4, 4)
    mask = torch.arange(16) < 8
    other = level.clone()
    other[:, :, 2:] = 1e3
    before = layer(queries, positions, level, mask.view(1, 1, 16))
    assert torch.equal(layer(queries, positions, other, mask.view(1, 1, 16)), before)
    other[:, :, 1] += 1
    assert not torch.allclose(layer(queries, positions, other, mask.view(1, 1, 16)), before)


def test_dfam_has_the_counted_size() -> None:
    """C = 256, 100 queries, three layers of two branches, FFN 1024; attention 4·65,792 = 263,168.

    Branch layer: 2·263,168 + FFN 525,568 + three norms 1,536 = 1,053,440; six of them 6,320,640.
    Queries and positions 2·25,600; level embeddings 6·256; mask head 3·65,792 and norm 512;
    output norm 512 and projection 65,792; query projection 65,792; text projection 768·256; two scalars.
    """
    dfam = Dfam(256, text_width=768, num_queries=100, num_layers=3, num_heads=8, ffn_dim=1024)
    by_hand = 6_320_640 + 51_200 + 1_536 + 197_376 + 512 + 512 + 65_792 + 65_792 + 196_608 + 2
    assert sum(parameter.numel() for parameter in dfam.parameters()) == by_hand == 6_899_970


def test_both_branches_have_their_own_weights(dfam: Dfam) -> None:
    shared = {id(parameter) for parameter in dfam.sam_layers.parameters()} & {
        id(parameter) for parameter in dfam.clip_layers.parameters()
    }
    assert not shared
    assert isinstance(dfam.sam_layers, nn.ModuleList)
    assert len(dfam.sam_layers) == len(dfam.clip_layers) == 3

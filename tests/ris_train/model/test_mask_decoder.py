"""Batched mask decoding against a loop over segment_anything's own decoder."""

from __future__ import annotations

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from ris_cache.encoders.sam import build_mask_decoder, build_prompt_encoder
from ris_cache.encoders.spec import PAPER, TINY, SamSpec
from ris_cache.errors import WeightsError
from ris_train.model.mask_decoder import BatchedMaskDecoder, PromptEncoder, load_sam_heads

SPECS = {
    "tiny": TINY.sam,
    "paper width, 16 x 16 grid": replace(PAPER.sam, image_size=256),
}
BATCH = 3


def build(spec: SamSpec) -> tuple[BatchedMaskDecoder, PromptEncoder]:
    prompt_encoder = build_prompt_encoder(spec)
    return BatchedMaskDecoder(build_mask_decoder(spec), prompt_encoder), prompt_encoder


def random_prompts(spec: SamSpec) -> tuple[Tensor, Tensor, Tensor]:
    grid = (BATCH, spec.out_channels, spec.grid, spec.grid)
    return torch.randn(grid), torch.randn(BATCH, 1, spec.out_channels), torch.randn(grid)


@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS.keys())
def test_a_batch_equals_a_loop_over_sams_own_decoder(spec: SamSpec) -> None:
    ours, prompt_encoder = build(spec)
    image_embeddings, sparse, dense = random_prompts(spec)
    with torch.no_grad():
        expected = [
            ours.decoder(
                image_embeddings=image_embeddings[row : row + 1],
                image_pe=prompt_encoder.get_dense_pe(),
                sparse_prompt_embeddings=sparse[row : row + 1],
                dense_prompt_embeddings=dense[row : row + 1],
                multimask_output=False,
            )[0][:, 0]
            for row in range(BATCH)
        ]
        found = ours(image_embeddings, sparse, dense)
    assert found.shape == (BATCH, 4 * spec.grid, 4 * spec.grid)
    torch.testing.assert_close(found, torch.cat(expected), rtol=1e-4, atol=1e-5)
    # The masks must differ, or an index that mixes samples up would go unseen.
    assert (found[0] - found[1]).abs().max() > 0.01


def test_gradients_of_a_batch_equal_those_of_a_loop() -> None:
    spec = TINY.sam
    ours, prompt_encoder = build(spec)
    theirs = copy.deepcopy(ours.decoder)
    image_embeddings, sparse, dense = random_prompts(spec)
    ours(image_embeddings, sparse, dense).square().mean().backward()
    for row in range(BATCH):
        mask, _ = theirs(
            image_embeddings=image_embeddings[row : row + 1],
            image_pe=prompt_encoder.get_dense_pe(),
            sparse_prompt_embeddings=sparse[row : row + 1],
            dense_prompt_embeddings=dense[row : row + 1],
            multimask_output=False,
        )
        (mask.square().mean() / BATCH).backward()
    expected = dict(theirs.named_parameters())
    for name, parameter in ours.decoder.named_parameters():
        if parameter.grad is None:
            # The loop computes what it does not use, so its gradients are zeros instead.
            assert expected[name].grad is None or not expected[name].grad.any(), name
        else:
            torch.testing.assert_close(parameter.grad, expected[name].grad, rtol=1e-3, atol=1e-6)


def test_the_decoder_has_the_published_size_and_no_trainable_prompt_encoder() -> None:
    ours, _ = build(replace(PAPER.sam, image_size=256))
    assert sum(parameter.numel() for parameter in ours.parameters()) == 4_058_340
    assert not [name for name, _ in ours.named_parameters() if not name.startswith("decoder.")]


def heads_of(module: BatchedMaskDecoder) -> dict[str, np.ndarray]:
    """Name the tensors as SAM's public checkpoint does."""
    heads = {f"mask_decoder.{name}": tensor.numpy() for name, tensor in module.decoder.state_dict().items()}
    matrix = module.positions.positional_encoding_gaussian_matrix
    return heads | {"prompt_encoder.pe_layer.positional_encoding_gaussian_matrix": matrix.numpy()}


def test_heads_from_a_cache_replace_every_weight_and_the_positions() -> None:
    source, _ = build(TINY.sam)
    module, _ = build(TINY.sam)
    load_sam_heads(module, heads_of(source))
    loaded, wanted = module.state_dict(), source.state_dict()
    assert loaded.keys() == wanted.keys()
    assert all(torch.equal(loaded[name], wanted[name]) for name in wanted)


def test_loaded_heads_are_a_copy_of_the_cache() -> None:
    source, _ = build(TINY.sam)
    module, _ = build(TINY.sam)
    heads = {name: array.copy() for name, array in heads_of(source).items()}
    load_sam_heads(module, heads)
    for array in heads.values():
        array += 1
    wanted = source.state_dict()
    assert all(torch.equal(tensor, wanted[name]) for name, tensor in module.state_dict().items())


def test_a_missing_head_is_named() -> None:
    module, _ = build(TINY.sam)
    heads = heads_of(module)
    del heads["mask_decoder.iou_token.weight"]
    with pytest.raises(WeightsError, match=r"mask_decoder\.iou_token\.weight is missing.*Extract") as caught:
        load_sam_heads(module, heads)
    assert caught.value.facts["name"] == "mask_decoder.iou_token.weight"


def test_a_head_of_another_width_is_named_with_both_shapes() -> None:
    module, _ = build(TINY.sam)
    heads = heads_of(module) | {"mask_decoder.iou_token.weight": np.zeros((1, 8), dtype=np.float32)}
    with pytest.raises(WeightsError, match=r"iou_token\.weight is \(1, 8\), expected \(1, 64\)"):
        load_sam_heads(module, heads)

"""The assembled model: its size, its wiring, and what its predictions may depend on."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, Literal

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ris_cache.encoders.spec import PAPER
from ris_train.config import LossConfig, ModelConfig
from ris_train.losses import Targets, total_loss
from ris_train.model.bert import random_bert
from ris_train.model.segmenter import ModelInputs, ModelOutputs, RisModel
from ris_train.optim import freeze_untrained, trainable_groups

Build = Callable[[Literal["category", "cls"]], RisModel]


def num_parameters(*modules: nn.Module | None) -> int:
    return sum(parameter.numel() for module in modules if module for parameter in module.parameters())


def row_of(inputs: ModelInputs, row: int) -> ModelInputs:
    """A batch of one sample."""
    own = slice(row, row + 1)
    assert inputs.category_embeddings is not None
    return ModelInputs(
        image_embeddings=inputs.image_embeddings[own],
        clip_features=inputs.clip_features[own],
        token_ids=inputs.token_ids[own],
        text_mask=inputs.text_mask[own],
        category_embeddings=inputs.category_embeddings[own],
    )


def tensors_of(outputs: ModelOutputs) -> list[Tensor]:
    assert outputs.dfam is not None
    return [outputs.mask_logits, *(part for prediction in outputs.dfam for part in prediction)]


def inputs_of(module: nn.Module, calls: list[tuple[Any, ...]]) -> None:
    """Note the arguments of every later call of `module` in `calls`."""
    module.register_forward_pre_hook(lambda _, arguments: calls.append(arguments))


@pytest.fixture(scope="module")
def paper_model() -> RisModel:
    """The paper's sizes, without memory for its weights."""
    with torch.device("meta"):
        config = ModelConfig()
        bert, _ = random_bert(config.bert, vocab_size=config.bert.vocab_size, seed=0)
        return RisModel(config, PAPER, bert)


def test_the_parts_have_the_sizes_counted_by_hand(paper_model: RisModel) -> None:
    """Method Sec. 7; the input projections are 768·256 + 256 for words and as much for categories."""
    found = {
        "BERT": num_parameters(paper_model.language.bert),
        "PWAM": num_parameters(paper_model.pwam),
        "CLIP pyramid": num_parameters(paper_model.clip_pyramid),
        "SAM pyramid": num_parameters(paper_model.sam_pyramid),
        "pixel decoder": num_parameters(paper_model.pixel_decoder),
        "DFAM": num_parameters(paper_model.dfam),
        "sparse prompt": num_parameters(paper_model.sparse_prompt),
        "SAM decoder": num_parameters(paper_model.mask_decoder),
        "input projections": num_parameters(paper_model.language.projection, paper_model.category_projection),
    }
    assert found == {
        "BERT": 108_891_648,
        "PWAM": 787_968,
        "CLIP pyramid": 2_067_584,
        "SAM pyramid": 1_969_152,
        "pixel decoder": 6_627_776,
        "DFAM": 6_899_970,
        "sparse prompt": 263_680,
        "SAM decoder": 4_058_340,
        "input projections": 393_728,
    }
    assert num_parameters(paper_model) == sum(found.values()) == 131_959_846


def test_a_model_of_the_sentence_has_no_category_projection(build_model: Build) -> None:
    assert build_model("cls").category_projection is None


def test_a_mask_and_four_sets_of_predictions_come_out(tiny_model: RisModel, inputs: ModelInputs) -> None:
    outputs = tiny_model(inputs)
    assert outputs.mask_logits.shape == (4, 64, 64)
    assert outputs.dfam is not None
    assert len(outputs.dfam) == 4
    for prediction in outputs.dfam:
        assert prediction.mask_logits.shape == (4, 7, 16, 16)
        assert prediction.text_logits.shape == (4, 7, 4)
        assert prediction.queries.shape == (4, 7, 64)


def test_the_mask_does_not_need_dfam(tiny_model: RisModel, inputs: ModelInputs) -> None:
    outputs = tiny_model(inputs, with_dfam=False)
    assert outputs.dfam is None
    assert torch.equal(outputs.mask_logits, tiny_model(inputs).mask_logits)


def test_dfam_reads_both_pyramids_from_coarse_to_fine(build_model: Build, inputs: ModelInputs) -> None:
    """SAM's 16² grid at scales 1/4, 1/2, 1; CLIP's 10² grid at 1/2, 1, 2; text from BERT's raw [CLS]."""
    model = build_model("category")
    calls: list[tuple[Any, ...]] = []
    layer_calls: list[tuple[Any, ...]] = []
    inputs_of(model.dfam, calls)
    for sam_layer, clip_layer in zip(model.dfam.sam_layers, model.dfam.clip_layers, strict=True):
        inputs_of(sam_layer, layer_calls)
        inputs_of(clip_layer, layer_calls)
    model(inputs)
    (dfam_call,) = calls
    image_embeddings, sam_levels, clip_levels, sentences = dfam_call
    assert torch.equal(image_embeddings, inputs.image_embeddings)
    assert [level.shape[-1] for level in sam_levels] == [4, 8, 16]
    assert [level.shape[-1] for level in clip_levels] == [5, 10, 20]
    assert [arguments[2].shape[-1] for arguments in layer_calls] == [4, 5, 8, 10, 16, 20]
    text = model.language(inputs.token_ids, inputs.text_mask)
    torch.testing.assert_close(sentences, text.raw_sentence)
    finest, middle, coarsest = model.sam_pyramid(inputs.image_embeddings)
    for found, expected in zip(sam_levels, (coarsest, middle, finest), strict=True):
        torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("kind", ["category", "cls"])
def test_sams_decoder_is_given_both_prompts(
    build_model: Build, inputs: ModelInputs, kind: Literal["category", "cls"]
) -> None:
    """Method Sec. 2, items 2-4, 6 and 7: p_dense resized to SAM's grid, and the token of the chosen query."""
    model = build_model(kind)
    calls: list[tuple[Any, ...]] = []
    inputs_of(model.mask_decoder, calls)
    model(inputs)
    ((image_embeddings, sparse, dense),) = calls
    text = model.language(inputs.token_ids, inputs.text_mask)
    fused = model.pwam(inputs.clip_features, text.words, inputs.text_mask)
    p_dense = model.pixel_decoder(model.clip_pyramid(fused)).dense_prompt
    assert p_dense.shape[-1] == 20
    if kind == "category":
        assert model.category_projection is not None
        assert inputs.category_embeddings is not None
        weight, bias = model.category_projection.weight, model.category_projection.bias
        query = inputs.category_embeddings @ weight.T + bias
    else:
        query = text.words[:, 0]
    assert torch.equal(image_embeddings, inputs.image_embeddings)
    torch.testing.assert_close(sparse, model.sparse_prompt(query, text.words, inputs.text_mask))
    torch.testing.assert_close(dense, F.interpolate(p_dense, size=(16, 16), mode="bilinear"))


def test_a_model_of_the_sentence_needs_no_category(build_model: Build, inputs: ModelInputs) -> None:
    model = build_model("cls")
    without = replace(inputs, category_embeddings=None)
    assert torch.equal(model(without).mask_logits, model(inputs).mask_logits)


def test_a_model_of_the_category_listens_to_it(tiny_model: RisModel, inputs: ModelInputs) -> None:
    assert inputs.category_embeddings is not None
    other = inputs.category_embeddings.clone()
    other[1] = torch.randn_like(other[1])
    before = tiny_model(inputs).mask_logits
    after = tiny_model(replace(inputs, category_embeddings=other)).mask_logits
    assert torch.equal(before[[0, 2, 3]], after[[0, 2, 3]])
    assert (before[1] - after[1]).abs().max() > 1e-4


def test_a_model_of_the_category_refuses_to_go_without(tiny_model: RisModel, inputs: ModelInputs) -> None:
    with pytest.raises(AssertionError, match="category"):
        tiny_model(replace(inputs, category_embeddings=None))


def test_predictions_do_not_depend_on_the_neighbours_in_the_batch(
    tiny_model: RisModel, inputs: ModelInputs
) -> None:
    together = tiny_model(inputs)
    for row in range(4):
        own = slice(row, row + 1)
        alone = tiny_model(row_of(inputs, row))
        torch.testing.assert_close(together.mask_logits[own], alone.mask_logits, rtol=1e-3, atol=1e-4)
        for batched, single in zip(together.dfam, alone.dfam, strict=True):
            torch.testing.assert_close(batched.mask_logits[own], single.mask_logits, rtol=1e-3, atol=1e-4)
            torch.testing.assert_close(batched.queries[own], single.queries, rtol=1e-3, atol=1e-4)
            torch.testing.assert_close(
                batched.text_logits[own, :, own], single.text_logits, rtol=1e-3, atol=1e-4
            )


def test_what_stands_on_padding_changes_nothing(tiny_model: RisModel, inputs: ModelInputs) -> None:
    other_ids = torch.where(inputs.text_mask, inputs.token_ids, (inputs.token_ids + 7) % 50)
    before, after = tiny_model(inputs), tiny_model(replace(inputs, token_ids=other_ids))
    for first, second in zip(tensors_of(before), tensors_of(after), strict=True):
        assert torch.equal(first, second)


def test_more_padding_changes_nothing(tiny_model: RisModel, inputs: ModelInputs) -> None:
    longer = replace(
        inputs,
        token_ids=F.pad(inputs.token_ids, (0, 5), value=1),
        text_mask=F.pad(inputs.text_mask, (0, 5), value=False),
    )
    for first, second in zip(tensors_of(tiny_model(inputs)), tensors_of(tiny_model(longer)), strict=True):
        torch.testing.assert_close(first, second, rtol=1e-3, atol=1e-4)


@pytest.mark.slow
def test_the_paper_size_runs_forward_and_backward() -> None:
    config = ModelConfig()
    bert, _ = random_bert(config.bert, vocab_size=config.bert.vocab_size, seed=0)
    model = RisModel(config, PAPER, bert).train()
    freeze_untrained(model)
    batch_size, length = 2, 12
    shapes = PAPER.feature_shapes()
    inputs = ModelInputs(
        image_embeddings=torch.randn(batch_size, *shapes["sam"]),
        clip_features=torch.randn(batch_size, *shapes["clip"]),
        token_ids=torch.randint(config.bert.vocab_size, (batch_size, length)),
        text_mask=torch.arange(length) < torch.tensor([[12], [7]]),
        category_embeddings=F.normalize(torch.randn(batch_size, *shapes["clip_pooled"]), dim=-1),
    )
    masks = torch.zeros(batch_size, 256, 256)
    masks[0, 40:160, 60:200] = 1
    masks[1, 100:250, 10:90] = 1
    targets = Targets(
        masks=masks,
        instance_masks=masks,
        instance_samples=torch.arange(batch_size),
        is_related=torch.zeros(batch_size, batch_size, dtype=torch.bool),
    )
    outputs = model(inputs)
    assert outputs.mask_logits.shape == (batch_size, 256, 256)
    assert [prediction.mask_logits.shape for prediction in outputs.dfam] == [(batch_size, 100, 64, 64)] * 4
    loss, _ = total_loss(outputs, targets, LossConfig(mask_size=256, num_points=2048))
    assert loss.isfinite()
    loss.backward()
    parameters = dict(model.named_parameters())
    for name in (name for names in trainable_groups(model).values() for name in names):
        gradient = parameters[name].grad
        assert gradient is not None, name
        assert gradient.isfinite().all(), name

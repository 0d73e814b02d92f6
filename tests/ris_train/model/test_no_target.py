"""The no-target head: what it computes, what it reads, and that the rest of the model does not feel it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from ris_train.model.no_target import NoTargetHead
from ris_train.model.segmenter import ModelInputs, ModelOutputs, RisModel

Build = Callable[..., RisModel]


def test_the_logits_are_the_maximum_over_the_queries_of_a_two_layer_mlp() -> None:
    head = NoTargetHead(5)
    queries = torch.randn(3, 4, 5)
    first, second = head.layers[0], head.layers[2]
    by_hand = torch.stack(
        [
            torch.stack(
                [
                    second.weight @ (first.weight @ query + first.bias).clamp(min=0) + second.bias
                    for query in sample
                ]
            ).amax(dim=0)
            for sample in queries
        ]
    )
    assert head(queries).shape == (3, 2)
    torch.testing.assert_close(head(queries), by_hand)


def test_at_the_papers_width_it_has_66_thousand_parameters() -> None:
    """256·256 + 256 for the first layer, 256·2 + 2 for the second."""
    assert sum(parameter.numel() for parameter in NoTargetHead(256).parameters()) == 66_306


def test_a_model_without_a_head_has_none_and_says_nothing(build_model: Build, inputs: ModelInputs) -> None:
    model = build_model("cls")
    assert not model.has_no_target_head
    outputs = model(inputs)
    assert outputs.no_target_logits is None
    assert outputs.says_no_target is None


def test_the_head_reads_the_queries_of_dfams_last_layer(build_model: Build, inputs: ModelInputs) -> None:
    model = build_model("cls", no_target_head=True)
    assert model.has_no_target_head
    outputs = model(inputs)
    assert outputs.dfam is not None
    assert torch.equal(outputs.no_target_logits, model.no_target(outputs.dfam[-1].queries))


def test_without_dfam_the_head_cannot_judge(build_model: Build, inputs: ModelInputs) -> None:
    outputs = build_model("cls", no_target_head=True)(inputs, with_dfam=False)
    assert outputs.no_target_logits is None


@pytest.mark.parametrize(
    ("logits", "expected"), [((2.0, 1.0), False), ((1.0, 2.0), True), ((1.0, 1.0), False)]
)
def test_the_second_logit_stands_for_no_target(logits: tuple[float, float], expected: bool) -> None:
    """A tie is no decision against a target."""
    outputs = ModelOutputs(
        mask_logits=torch.zeros(1, 2, 2), dfam=None, no_target_logits=torch.tensor([logits])
    )
    assert outputs.says_no_target is not None
    assert outputs.says_no_target.tolist() == [expected]


@pytest.mark.parametrize("kind", ["category", "cls"])
def test_the_head_leaves_the_initial_weights_and_the_masks_of_the_rest_as_they_are(
    build_model: Build, inputs: ModelInputs, kind: str
) -> None:
    without, with_head = build_model(kind), build_model(kind, no_target_head=True)
    state = with_head.state_dict()
    assert {name for name in state if name not in without.state_dict()} == {
        f"no_target.layers.{layer}.{part}" for layer in (0, 2) for part in ("weight", "bias")
    }
    for name, tensor in without.state_dict().items():
        assert torch.equal(tensor, state[name]), name
    assert torch.equal(without(inputs).mask_logits, with_head(inputs).mask_logits)


@pytest.mark.parametrize("kind", ["category", "cls"])
@pytest.mark.parametrize("index", [[0, 1, 1, 0], [1, 1, 1, 1], [0, 1, 2, 3], [3, 0, 2, 0]])
def test_one_row_per_image_gives_what_one_row_per_sample_gives(
    build_model: Build, inputs: ModelInputs, kind: str, index: list[int]
) -> None:
    """Images that no sample uses are allowed, and so are samples in any order."""
    model = build_model(kind, no_target_head=True)
    rows = torch.tensor(index)
    expanded = replace(
        inputs, image_embeddings=inputs.image_embeddings[rows], clip_features=inputs.clip_features[rows]
    )
    with torch.no_grad():
        expected, found = model(expanded), model(replace(inputs, image_index=rows))
    torch.testing.assert_close(found.mask_logits, expected.mask_logits, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found.no_target_logits, expected.no_target_logits, rtol=1e-4, atol=1e-5)
    assert expected.dfam is not None
    assert found.dfam is not None
    for found_layer, expected_layer in zip(found.dfam, expected.dfam, strict=True):
        for found_part, expected_part in zip(found_layer, expected_layer, strict=True):
            torch.testing.assert_close(found_part, expected_part, rtol=1e-4, atol=1e-4)


def test_gradients_are_those_of_the_expanded_batch(build_model: Build, inputs: ModelInputs) -> None:
    model = build_model("cls", no_target_head=True)
    rows = torch.tensor([0, 1, 1, 0])
    expanded = replace(
        inputs, image_embeddings=inputs.image_embeddings[rows], clip_features=inputs.clip_features[rows]
    )
    gradients = []
    for batch in (expanded, replace(inputs, image_index=rows)):
        model.zero_grad()
        outputs = model(batch)
        (outputs.mask_logits.square().mean() + outputs.no_target_logits.square().mean()).backward()
        gradients.append({name: one.grad for name, one in model.named_parameters() if one.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    for name, expected in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], expected, rtol=1e-3, atol=1e-5, msg=name)


def test_what_the_image_alone_decides_is_computed_once_per_image(
    build_model: Build, inputs: ModelInputs
) -> None:
    """Four samples of two images: SAM's pyramid, its keys and values, and PWAM's image side see two rows."""
    model = build_model("cls", no_target_head=True)
    seen: dict[str, int] = {}
    projections = [
        f"dfam.sam_layers.{layer}.cross_attention.{part}"
        for layer in range(3)
        for part in ("q_proj", "k_proj", "v_proj")
    ]
    names = ["sam_pyramid", "pwam.query", "pwam.gate", "pwam.key", *projections]
    for name in names:
        model.get_submodule(name).register_forward_pre_hook(
            lambda _, arguments, name=name: seen.__setitem__(name, len(arguments[0]))
        )
    grouped = replace(
        inputs,
        image_embeddings=inputs.image_embeddings[:2],
        clip_features=inputs.clip_features[:2],
        image_index=torch.tensor([0, 1, 1, 0]),
    )
    assert model(grouped).mask_logits.shape[0] == 4
    per_sample = {name for name in names if name == "pwam.key" or name.endswith("q_proj")}
    assert {name: rows for name, rows in seen.items() if name in per_sample} == dict.fromkeys(per_sample, 4)
    assert {name: rows for name, rows in seen.items() if name not in per_sample} == dict.fromkeys(
        set(names) - per_sample, 2
    )

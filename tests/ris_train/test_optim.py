"""What trains, in which group, with which decay and rate."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import pytest
import torch
from torch import nn
from torch.optim import AdamW

from ris_cache.encoders.spec import TINY
from ris_train.config import BertConfig, ModelConfig, TrainConfig
from ris_train.model.bert import random_bert
from ris_train.model.segmenter import RisModel
from ris_train.optim import (
    build_optimiser,
    freeze_untrained,
    rate_factor,
    set_rate,
    trainable_groups,
)

GOLDEN = Path(__file__).parents[1] / "golden" / "trainable_tiny.txt"

DECODER = "mask_decoder.decoder."
# The IoU head has three linear layers, and so has each hypernetwork; those of masks 1 to 3 are never run.
FROZEN = {
    f"{DECODER}{head}.layers.{layer}.{kind}"
    for head in ("iou_prediction_head", *(f"output_hypernetworks_mlps.{index}" for index in (1, 2, 3)))
    for layer in range(3)
    for kind in ("weight", "bias")
}
# Parameters that belong to no layer of torch, by what they are.
LOOSE_PARAMETERS = {"pixel_decoder.level_embed", "dfam.logit_scale", "dfam.logit_bias"}


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    """At these sizes, handing work to a second thread costs more than it saves."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def build(kind: Literal["category", "cls"] = "category") -> RisModel:
    config = ModelConfig(
        sparse_prompt=kind,
        num_queries=5,
        num_heads=4,
        ffn_dim=64,
        pixel_decoder_layers=2,
        norm_groups=8,
        bert=BertConfig(weights=None, hidden_size=32, num_layers=2, num_heads=2, ffn_dim=64),
    )
    bert, _ = random_bert(config.bert, vocab_size=30, seed=0)
    return RisModel(config, TINY, bert)


@pytest.fixture(scope="module")
def model() -> RisModel:
    return build()


def grouped(model: nn.Module) -> list[tuple[str, str]]:
    return [(group, name) for group, names in trainable_groups(model).items() for name in names]


def test_the_trainable_names_are_those_on_record(model: RisModel) -> None:
    """Two BERT layers and two pixel decoder layers; whoever changes the list says why."""
    recorded = [tuple(line.split("\t")) for line in GOLDEN.read_text(encoding="utf-8").splitlines()]
    assert sorted(grouped(model)) == sorted(recorded)


def test_without_a_category_its_projection_alone_is_missing(model: RisModel) -> None:
    difference = set(grouped(model)) ^ set(grouped(build("cls")))
    assert difference == {
        ("decayed", "category_projection.weight"),
        ("decayed", "category_projection.bias"),
    }


def test_everything_trains_but_the_heads_that_have_no_loss(model: RisModel) -> None:
    names = [name for _, name in grouped(model)]
    assert len(names) == len(set(names))
    assert {name for name, _ in model.named_parameters()} - set(names) == FROZEN


def test_all_of_bert_trains(model: RisModel) -> None:
    names = {name for _, name in grouped(model)}
    assert {f"language.bert.{name}" for name, _ in model.language.bert.named_parameters()} <= names


def test_norms_and_embeddings_are_not_decayed_and_layers_with_weights_are(model: RisModel) -> None:
    group_of = {name: group for group, name in grouped(model)}
    classified = set(LOOSE_PARAMETERS)
    for module_name, module in model.named_modules():
        kind = type(module).__name__
        own = {f"{module_name}.{name}" for name, _ in module.named_parameters(recurse=False)} - FROZEN
        if "Norm" in kind or kind == "Embedding":
            assert {group_of[name] for name in own} <= {"undecayed"}, module_name
            classified |= own
        elif "Linear" in kind or kind.startswith("Conv"):
            assert {group_of[name] for name in own} <= {"decayed"}, module_name
            classified |= own
    assert {group_of[name] for name in LOOSE_PARAMETERS} == {"undecayed"}
    assert classified == group_of.keys()


def test_freezing_leaves_gradients_to_what_trains_alone() -> None:
    model = build()
    freeze_untrained(model)
    assert {name for name, parameter in model.named_parameters() if not parameter.requires_grad} == FROZEN


def test_the_optimiser_holds_the_groups_with_their_decay(model: RisModel) -> None:
    optimiser = build_optimiser(model, TrainConfig(lr=3e-4, weight_decay=0.05))
    name_of = {id(parameter): name for name, parameter in model.named_parameters()}
    decay_of = {
        name_of[id(parameter)]: group["weight_decay"]
        for group in optimiser.param_groups
        for parameter in group["params"]
    }
    assert decay_of == {name: {"decayed": 0.05, "undecayed": 0.0}[group] for group, name in grouped(model)}
    assert {group["lr"] for group in optimiser.param_groups} == {3e-4}


def test_without_a_gradient_decay_shrinks_what_is_decayed_and_nothing_else() -> None:
    """One AdamW step on zero gradients: decayed parameters times 1 − 0.1·0.5 = 0.95."""
    model = build()
    group_of = {name: group for group, name in grouped(model)}
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    optimiser = build_optimiser(model, TrainConfig(lr=0.1, weight_decay=0.5))
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimiser.step()
    for name, parameter in model.named_parameters():
        factor = 0.95 if group_of.get(name) == "decayed" else 1.0
        torch.testing.assert_close(parameter.detach(), factor * before[name], msg=name)


def test_one_kernel_steps_as_the_plain_optimiser_does() -> None:
    """Six steps of random gradients at a moving rate, against torch's loop over the parameters."""
    ours = build()
    theirs = copy.deepcopy(ours)
    fused = build_optimiser(ours, TrainConfig(lr=1e-2, weight_decay=0.05))
    assert fused.defaults["fused"]
    copies = dict(theirs.named_parameters())
    name_of = {id(parameter): name for name, parameter in ours.named_parameters()}
    plain = AdamW(
        [
            {
                "params": [copies[name_of[id(parameter)]] for parameter in group["params"]],
                "weight_decay": group["weight_decay"],
            }
            for group in fused.param_groups
        ],
        foreach=False,
    )
    generator = torch.Generator().manual_seed(0)
    for step in range(6):
        for parameter, other in zip(ours.parameters(), theirs.parameters(), strict=True):
            parameter.grad = torch.randn(parameter.shape, generator=generator)
            other.grad = parameter.grad.clone()
        for optimiser in (fused, plain):
            set_rate(optimiser, step, TrainConfig(lr=1e-2, steps=6))
            optimiser.step()
    for name, parameter in ours.named_parameters():
        torch.testing.assert_close(parameter, copies[name], rtol=1e-5, atol=1e-6, msg=name)
    state, expected = (optimiser.state_dict()["state"] for optimiser in (fused, plain))
    for index, moments in expected.items():
        assert state[index].keys() == moments.keys() == {"step", "exp_avg", "exp_avg_sq"}
        for kind, moment in moments.items():
            torch.testing.assert_close(state[index][kind], moment, rtol=1e-5, atol=1e-7)


def test_parameters_that_the_one_kernel_cannot_take_are_stepped_plainly() -> None:
    with torch.device("meta"):
        model = nn.Linear(2, 2)
    assert not build_optimiser(model, TrainConfig()).defaults["fused"]


def test_the_recipe_is_that_of_the_paper() -> None:
    config = TrainConfig()
    assert (config.lr, config.weight_decay, config.clip_grad_norm) == (5e-5, 0.05, 0.01)
    assert (config.steps, config.batch_size, config.milestones) == (100_000, 32, (0.6, 0.9))


@pytest.mark.parametrize(
    ("step", "factor"),
    [(0, 1), (59_999, 1), (60_000, 0.1), (89_999, 0.1), (90_000, 0.01), (99_999, 0.01)],
)
def test_the_rate_falls_to_a_tenth_at_each_milestone(step: int, factor: float) -> None:
    assert rate_factor(step, TrainConfig(steps=100_000)) == pytest.approx(factor)


def test_the_rate_warms_up_linearly() -> None:
    """Four steps of warm-up, of ten; the milestones are steps 6 and 9."""
    config = TrainConfig(steps=10, warmup_steps=4)
    factors = [rate_factor(step, config) for step in range(10)]
    assert factors == pytest.approx([0.25, 0.5, 0.75, 1, 1, 1, 0.1, 0.1, 0.1, 0.01])


def test_the_schedule_moves_both_groups_of_the_optimiser(model: RisModel) -> None:
    config = TrainConfig(lr=0.02, steps=10, warmup_steps=2)
    optimiser = build_optimiser(model, config)
    rates = []
    for step in range(10):
        returned = set_rate(optimiser, step, config)
        rates.append([group["lr"] for group in optimiser.param_groups])
        assert returned == rates[-1][0]
    expected = [0.01, 0.02, 0.02, 0.02, 0.02, 0.02, 0.002, 0.002, 0.002, 0.0002]
    assert [first for first, _ in rates] == pytest.approx(expected)
    assert all(first == second for first, second in rates)

"""Weights converted all at once give the step that autocast gives."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from ris_train.ranks import Ranks
from ris_train.training import step as step_module
from ris_train.training.half_weights import HalfWeights
from ris_train.training.setup import prepare
from ris_train.training.step import StepComputer

CPU = torch.device("cpu")


class NoConversion(HalfWeights):
    """Leaves all to autocast."""

    def __init__(self, model: nn.Module, dtype: torch.dtype) -> None:
        super().__init__(nn.Module(), dtype)

    def refresh(self) -> None:
        pass


def gradients_of(cache, config):
    setup = prepare(cache, config, Ranks(0, 1, CPU), random_seed=0)
    setup.model.train()
    computer = StepComputer(setup.model, config, setup.ranks)
    computer.scale.value = 1.0
    values = computer.gradients(next(setup.batches(0, 1)))
    return values, {
        name: parameter.grad
        for name, parameter in setup.model.named_parameters()
        if parameter.grad is not None
    }


@pytest.mark.parametrize("settings", [["bf16", 1], ["bf16", 3], ["fp16", 1]], ids=str)
def test_a_step_is_that_of_autocast(tiny_cache, short_config, monkeypatch, settings):
    """To the bit, but for the two weights that attention reads together, and what lies before them."""
    precision, parts = settings
    config = short_config(f"train.precision={precision}", f"train.accumulate={parts}", "train.bert_layers=1")
    values, found = gradients_of(tiny_cache, config)
    monkeypatch.setattr(step_module, "HalfWeights", NoConversion)
    expected_values, expected = gradients_of(tiny_cache, config)
    assert found.keys() == expected.keys()
    assert values == pytest.approx(expected_values, rel=1e-3)
    assert values["loss"] == expected_values["loss"]
    different = {name for name in expected if not torch.equal(found[name], expected[name])}
    assert all(name.startswith("pixel_decoder.layers") for name in different)
    assert all(gradient.dtype == torch.float32 for gradient in found.values())
    for name in different:
        error = (found[name] - expected[name]).abs().max() / expected[name].abs().max()
        assert error < 0.01, name


def test_the_models_own_weights_are_back_after_use_and_follow_the_optimiser():
    layer = nn.Linear(3, 2)
    weight, bias = layer.weight, layer.bias
    halves = HalfWeights(nn.Sequential(layer, nn.ReLU(), layer), torch.bfloat16)
    with torch.no_grad():
        weight.fill_(1.5)
    halves.refresh()
    with halves.in_place():
        assert layer.weight.dtype == torch.bfloat16
        assert (layer.weight == 1.5).all()
        assert [name for name, _ in layer.named_parameters()] == ["weight", "bias"]
    assert layer.weight is weight
    with pytest.raises(RuntimeError, match="shape"), halves.in_place():
        layer(torch.ones(1, 7, dtype=torch.bfloat16))
    assert layer.weight is weight
    assert layer.bias is bias


def test_gradients_add_up_in_float32_and_are_forgotten():
    layer = nn.Linear(1, 1, bias=False)
    halves = HalfWeights(layer, torch.bfloat16)
    halves.refresh()
    for amount in (256.0, 1.0):  # 257 is no bfloat16
        with halves.in_place():
            found = layer(torch.full((1, 1), amount, dtype=torch.bfloat16))
        found.sum().backward()
        halves.take_gradients()
    assert layer.weight.grad.item() == 257
    halves.take_gradients()
    assert layer.weight.grad.item() == 257, "they were taken once"

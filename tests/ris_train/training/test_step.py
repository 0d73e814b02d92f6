"""A step computed in parts, or in another precision, is the same step."""

from __future__ import annotations

import functools
import itertools

import pytest
import torch

from ris_cache.errors import ConfigError
from ris_train.ranks import Ranks
from ris_train.training.randomness import deterministic, seed_step
from ris_train.training.setup import prepare
from ris_train.training.step import StepComputer

CPU = torch.device("cpu")
ALONE = Ranks(0, 1, CPU)


def gradients_of(cache, config):
    """Values and gradients of the first batch."""
    setup = prepare(cache, config, ALONE, random_seed=0)
    setup.model.train()
    seed_step(config.train.seed, 1)
    values = StepComputer(setup.model, config, setup.ranks).gradients(next(setup.batches(0, 1)))
    return values, {
        name: parameter.grad.clone()
        for name, parameter in setup.model.named_parameters()
        if parameter.grad is not None
    }


@pytest.mark.parametrize("accumulate", [2, 3, 4])
def test_a_batch_in_parts_gives_the_gradients_of_the_whole(tiny_cache, short_config, accumulate):
    """With dropout, no-target head, and negatives from the whole batch, some of them left out.

    The text loss counts as in the paper, so that queries are matched by the expressions too.
    """
    shared = (
        "model.no_target_head=true", "train.clip_grad_norm=1000", "train.overfit=6", "train.batch_size=6",
        "loss.dfam_vl=1",
    )  # fmt: skip
    (part,) = next(prepare(tiny_cache, short_config(*shared), ALONE, random_seed=0).batches(0, 1)).parts
    assert part.targets.is_related.any()
    whole, expected = gradients_of(tiny_cache, short_config(*shared))
    values, found = gradients_of(tiny_cache, short_config(*shared, f"train.accumulate={accumulate}"))
    assert values == pytest.approx(whole, rel=1e-5)
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-3, atol=1e-5)


def test_a_batch_by_images_gives_the_losses_of_a_batch_by_samples(tiny_cache, short_config):
    """The same samples, with features of an image read once, and as often as it has samples."""
    from dataclasses import replace

    config = short_config("train.expressions_per_image=2")
    setup = prepare(tiny_cache, config, ALONE, random_seed=0)
    setup.model.eval()
    batch = next(setup.batches(0, 1))
    assert len(batch.parts[0].inputs.image_embeddings) < len(batch.samples)
    computer = StepComputer(setup.model, config, setup.ranks)
    grouped = computer.gradients(batch)
    part = replace(batch.parts[0], inputs=setup.builder.inputs(batch.samples))
    assert computer.gradients(replace(batch, parts=(part,))) == pytest.approx(grouped, rel=1e-4)


def test_bf16_is_near_fp32_and_its_losses_are_in_fp32(tiny_cache, short_config):
    whole, _ = gradients_of(tiny_cache, short_config())
    values, found = gradients_of(tiny_cache, short_config("train.precision=bf16"))
    assert values["loss"] == pytest.approx(whole["loss"], rel=0.05)
    assert values["loss"] != whole["loss"]
    assert all(gradient.dtype == torch.float32 for gradient in found.values())


def test_all_that_trains_has_a_gradient(tiny_cache, short_config):
    _, found = gradients_of(tiny_cache, short_config())
    setup = prepare(tiny_cache, short_config(), ALONE, random_seed=0)
    assert found.keys() == {name for name, one in setup.model.named_parameters() if one.requires_grad}


def test_deterministic_algorithms_are_on_while_training_only_and_recorded(run_short, tmp_path):
    import json

    run = tmp_path / "run"
    seen = []

    def note() -> bool:
        seen.append(torch.are_deterministic_algorithms_enabled())
        return False

    run_short(run, "train.deterministic=true", "train.steps=2", should_stop=note)
    assert set(seen) == {True}
    assert not torch.are_deterministic_algorithms_enabled()
    assert json.loads((run / "env.json").read_text())["deterministic"] is True
    with deterministic(CPU, is_wanted=False):
        assert not torch.are_deterministic_algorithms_enabled()


def test_overfitting_trains_and_validates_on_the_first_expressions(run_short, tmp_path, metrics):
    run = tmp_path / "run"
    report = run_short(run, "train.overfit=3", "train.steps=2", "train.val_samples=null")
    assert (len(report.training_set.samples), report.val_size, report.best.num_samples) == (3, 3, 3)
    assert metrics(run)[-1]["val"] == "3 of refcoco:train"


def test_a_batch_smaller_than_the_processes_is_refused(tiny_cache, short_config):
    with pytest.raises(ConfigError, match="batch of all 5 processes"):
        prepare(tiny_cache, short_config(), Ranks(0, 5, CPU), random_seed=0)


def test_what_torch_compile_traces_is_the_same_step(tiny_cache, short_config, monkeypatch):
    """Traced and run as it is; generating code from it takes minutes and is torch's own matter.

    Without dropout, which is drawn for the padding too, of which there is more.
    """
    plain = ("model.bert.dropout=0", "train.batch_size=2")
    whole, expected = gradients_of(tiny_cache, short_config(*plain))
    traced = []

    def count(graph, inputs):
        traced.append(graph)
        return graph.forward

    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=count))
    config = short_config(*plain, "train.compile=true")
    setup = prepare(tiny_cache, config, ALONE, random_seed=0)
    setup.model.train()
    computer = StepComputer(setup.model, config, setup.ranks)
    batches = list(itertools.islice(setup.batches(0, 1), 4))
    values = computer.gradients(batches[0])
    assert values == pytest.approx(whole, rel=1e-5)
    assert {name for name, one in setup.model.named_parameters() if one.grad is not None} == expected.keys()
    once = len(traced)
    assert once
    lengths = {int(batch.text_mask.sum(dim=1).max()) for batch in batches}
    assert len(lengths) > 1
    for batch in batches[1:]:
        computer.gradients(batch)
    assert len(traced) == once, "a longer expression was compiled anew"

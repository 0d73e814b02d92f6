"""What a step asks of the device: no more for a larger batch, and hardly ever an answer."""

from __future__ import annotations

import collections
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from ris_train.ranks import Ranks
from ris_train.training.setup import prepare
from ris_train.training.step import StepBatch, StepComputer


@pytest.fixture
def ready(tiny_cache, short_config) -> Callable[..., tuple[StepComputer, StepBatch]]:
    """What computes a step, after a first one that makes the constants, and a batch."""

    def make(*overrides: str) -> tuple[StepComputer, StepBatch]:
        setup = prepare(tiny_cache, short_config(*overrides), Ranks(0, 1, torch.device("cpu")), random_seed=0)
        setup.model.train()
        computer = StepComputer(setup.model, setup.config, setup.ranks)
        batch = next(setup.batches(0, 1))
        computer.gradients(batch)
        return computer, batch

    return make


class Operations(TorchDispatchMode):
    """Counts them by name."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: collections.Counter[str] = collections.Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.counts[str(func)] += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_larger_batch_takes_no_more_operations(ready, precision):
    """So nothing loops over the samples of a batch, forward or backward."""
    counts = []
    for size in (3, 7):
        computer, batch = ready(f"train.batch_size={size}", f"train.precision={precision}")
        with Operations() as operations:
            computer.gradients(batch)
        counts.append(operations.counts)
    assert counts[0] == counts[1]


@pytest.mark.parametrize("scene", ["one instance each", "several instances"])
def test_the_host_waits_for_the_device_once_or_twice(ready, monkeypatch, scene):
    """For the values of the losses; and for the costs of matching where a sample has several instances."""
    computer, batch = ready("model.no_target_head=true")
    if scene == "several instances":
        batch = with_two_instances(batch)
    waits = []
    for name in (
        "item",
        "tolist",
        "cpu",
        "numpy",
        "nonzero",
        "__bool__",
        "__float__",
        "__int__",
        "__index__",
    ):
        plain = getattr(Tensor, name)

        def spy(tensor: Tensor, *args: object, plain=plain, name=name, **kwargs: object) -> object:
            caller = sys._getframe(1)
            waits.append((Path(caller.f_code.co_filename).name, name))
            return plain(tensor, *args, **kwargs)

        monkeypatch.setattr(Tensor, name, spy)
    computer.gradients(batch)
    monkeypatch.undo()
    once = [("step.py", "tolist")]
    matching = [("matching.py", "cpu"), ("matching.py", "numpy")]  # what `cpu` brought lies on the host
    assert waits == (once if scene == "one instance each" else matching + once)


def with_two_instances(batch: StepBatch) -> StepBatch:
    """Give the first sample a second instance."""
    from dataclasses import replace

    part = batch.parts[0]
    targets = part.targets
    masks = torch.cat([targets.instance_masks[:1], targets.instance_masks])
    samples = torch.cat([targets.instance_samples[:1], targets.instance_samples])
    first = replace(batch.samples[0], ann_ids=(*batch.samples[0].ann_ids, 10**9))
    part = replace(part, targets=replace(targets, instance_masks=masks, instance_samples=samples))
    return replace(batch, samples=(first, *batch.samples[1:]), parts=(part,))

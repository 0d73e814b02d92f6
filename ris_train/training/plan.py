"""What a run would do, worked out without training: `ris train --dry-run`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ris_train.config import RunConfig
from ris_train.data.merge import TrainingSet
from ris_train.losses import total_loss
from ris_train.ranks import Ranks
from ris_train.run import RunDirectory
from ris_train.tracking import require_trackers
from ris_train.training.randomness import seed_step
from ris_train.training.resume import find_resume_point, require_same_data
from ris_train.training.setup import Setup, masks_of, prepare, require_enough_for
from ris_train.training.step import build_step_batch


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryEstimate:
    """Bytes on the device of one process; temporary buffers of single operations come on top.

    Attributes:
        weights: in float32.
        gradients: of what trains.
        optimiser: two moments of what trains.
        activations: kept for the backward pass of one part of the batch, in float32: measured on one sample
            and multiplied.
    """

    weights: int
    gradients: int
    optimiser: int
    activations: int

    @property
    def total(self) -> int:
        """All together."""
        return self.weights + self.gradients + self.optimiser + self.activations


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What a run would do.

    Attributes:
        steps: of the whole run.
        steps_taken: of them before, by the run that would go on.
        num_cut: expressions that are cut at `max_tokens` word pieces, `train` and `val`.
        epochs: how often each expression is seen, on average.
        samples_at_once: of one process and one part of a batch.
        trained: parameters that train, by module.
        frozen: parameters that do not, by module.
    """

    training_set: TrainingSet
    num_samples: int
    val_label: str
    val_size: int
    num_cut: dict[str, int]
    max_tokens: int
    steps: int
    steps_taken: int
    batch_size: int
    epochs: float
    samples_at_once: int
    trained: dict[str, int]
    frozen: dict[str, int]
    memory: MemoryEstimate

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        memory = self.memory
        return {
            "num_samples": self.num_samples,
            "val": self.val_label,
            "val_size": self.val_size,
            "cut_expressions": self.num_cut,
            "steps": self.steps,
            "steps_taken": self.steps_taken,
            "batch_size": self.batch_size,
            "epochs": self.epochs,
            "samples_at_once": self.samples_at_once,
            "trained": self.trained,
            "frozen": self.frozen,
            "memory_bytes": {
                "weights": memory.weights,
                "gradients": memory.gradients,
                "optimiser": memory.optimiser,
                "activations": memory.activations,
                "total": memory.total,
            },
            "training_set": [part.as_dict() for part in self.training_set.parts],
        }


def make_plan(
    cache_root: Path,
    config: RunConfig,
    *,
    random_seed: int | None,
    resumed: RunDirectory | None = None,
    from_state: Path | None = None,
    num_processes: int = 1,
    say: Callable[[str], None] = lambda message: None,
) -> Plan:
    """Load and build all that training would, on the CPU, and pass one sample through; writes nothing.

    Args:
        cache_root: a cache directory.
        config: the whole configuration.
        random_seed: seed of random BERT weights, if those were asked for; not needed by a run that goes on.
        resumed: the run that would go on, which another process may be training.
        from_state: one of its states; the latest whole one by default.
        num_processes: that would train together.
        say: is told what would be passed over of it, and which settings would be others from there on.

    Raises:
        RisError: as training would before its first step.
    """
    require_trackers(config.train.trackers)
    require_enough_for(config, num_processes)
    point = None if resumed is None else find_resume_point(resumed, config, chosen=from_state, say=say)
    metadata = None if point is None else point.metadata
    alone = Ranks(0, 1, torch.device("cpu"))
    setup = prepare(cache_root, config, alone, random_seed=random_seed, resumed=metadata, run=resumed)
    if resumed is not None and point is not None:
        require_same_data(point, setup, resumed)
    trained: Counter[str] = Counter()
    frozen: Counter[str] = Counter()
    for name, parameter in setup.model.named_parameters():
        counts = trained if parameter.requires_grad else frozen
        counts[name.partition(".")[0]] += parameter.numel()
    num_trained = sum(trained.values())
    at_once = -(-config.train.batch_size // config.train.accumulate)
    num_samples = len(setup.training_set.samples)
    return Plan(
        training_set=setup.training_set,
        num_samples=num_samples,
        val_label=setup.validation.label,
        val_size=setup.validation.size,
        num_cut=setup.num_cut,
        max_tokens=config.model.max_tokens,
        steps=config.train.steps,
        steps_taken=0 if point is None else point.state.step,
        batch_size=config.train.batch_size,
        epochs=config.train.steps * config.train.batch_size / num_samples,
        samples_at_once=at_once,
        trained=dict(trained),
        frozen=dict(frozen),
        memory=MemoryEstimate(
            weights=4 * (num_trained + sum(frozen.values())),
            gradients=4 * num_trained,
            optimiser=8 * num_trained,
            activations=at_once * _activation_bytes(setup),
        ),
    )


def _activation_bytes(setup: Setup) -> int:
    """Measure what the backward pass of one sample keeps, beyond the parameters."""
    config = setup.config
    masks = masks_of(setup.cache, config, setup.training_set)
    batch = build_step_batch(
        1, setup.training_set.samples[:1], setup.builder, masks, config, setup.ranks
    ).parts[0]
    assert batch.targets is not None
    known = {parameter.untyped_storage().data_ptr() for parameter in setup.model.parameters()}
    kept: dict[int, int] = {}

    def count(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    setup.model.train()
    seed_step(config.train.seed, 1)
    with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
        loss, _ = total_loss(setup.model(batch.inputs), batch.targets, config.loss)
    assert loss.requires_grad  # the graph, and with it what it keeps, was alive until here
    return sum(kept.values())

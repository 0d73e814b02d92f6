"""Training steps as `ris train` takes them: one, and many that are timed, and where their time goes."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from contextlib import AbstractContextManager, closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional
from torch.optim import AdamW

import ris_train.losses
import ris_train.training.step
from ris_cache.errors import NonFiniteError
from ris_train.config import RunConfig
from ris_train.optim import build_optimiser, set_rate
from ris_train.training.randomness import seed_step
from ris_train.training.setup import Setup
from ris_train.training.step import StepBatch, StepComputer
from ris_train.training.watch import broken_terms
from training.clock import Spans, StepClock, within_spans

WAIT, ENCODERS, BACKWARD = "wait for data", "encoders", "backward"
CLIP, OPTIMISER, REST = "clip gradients", "optimiser", "the rest"
FORWARD, LOSSES = "forward: ", "losses: "
OVERFLOWS = 20
"""Steps that fp16 may lose until its scale fits; it begins at 2^16."""
_LOSS_FUNCTIONS: dict[tuple[Any, str], str] = {
    (ris_train.training.step, "total_loss"): LOSSES + "the rest",
    (ris_train.losses, "match_queries"): LOSSES + "matching",
    (ris_train.losses, "uncertain_points"): LOSSES + "drawing points",
    (ris_train.losses, "dice_loss"): LOSSES + "dice",
    (ris_train.losses, "text_loss"): LOSSES + "vl",
    (functional, "binary_cross_entropy_with_logits"): LOSSES + "bce",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """Steps of one way to train.

    Attributes:
        name: of the way.
        split: median milliseconds of each part of a step, in the order in which they come.
        ms: median milliseconds of a whole step.
        fastest, slowest: of a whole step, milliseconds.
        waiting: share of all steps' time spent waiting for data.
        peak_bytes: of the device's memory on a GPU, of the whole process on a CPU; None where it cannot be
            told.
        images: mean number of different images in a batch.
    """

    name: str
    split: dict[str, float]
    ms: float
    fastest: float
    slowest: float
    waiting: float
    peak_bytes: int | None
    images: float


class Trainee:
    """A model that is trained step by step.

    Args:
        setup: what is trained on what.
    """

    def __init__(self, setup: Setup) -> None:
        self.setup = setup
        self.model = setup.model
        self._config: RunConfig = setup.config
        self._optimiser: AdamW = build_optimiser(setup.model, setup.config.train)
        self._computer = StepComputer(setup.model, setup.config, setup.ranks)
        self.model.train()

    def step(self, batch: StepBatch) -> bool:
        """Take a step.

        Returns:
            Whether the weights moved: not, where gradients overflowed in fp16.

        Raises:
            NonFiniteError: the loss or a gradient is no number, and no scale is to blame.
        """
        seed_step(self._config.train.seed, batch.step)
        set_rate(self._optimiser, batch.step - 1, self._config.train)
        broken = broken_terms(self._computer.gradients(batch))
        if broken and not (broken == ("grad_norm",) and self._computer.scale.may_overflow):
            raise NonFiniteError(f"Step {batch.step} gave no finite {', '.join(broken)}.", terms=broken)
        is_finite = self._computer.scale.update(is_finite=not broken)
        if is_finite:
            self._optimiser.step()
        return is_finite

    def within(self, spans: Spans) -> AbstractContextManager[None]:
        """Measure the parts of all steps taken meanwhile; what is left is the caller's span."""
        functions: dict[tuple[Any, str], str] = {
            (self._computer, "_encode_text"): FORWARD + "the rest",
            (self._computer, "_part_loss"): FORWARD + "the rest",
            **_LOSS_FUNCTIONS,
            (self._computer, "_backward"): BACKWARD,
            (self._computer, "_backward_text"): BACKWARD,
            (self._computer, "_finish_gradients"): CLIP,
            (self._optimiser, "step"): OPTIMISER,
        }
        return within_spans(spans, functions, self.model, FORWARD)


def measure(
    name: str,
    trainee: Trainee,
    *,
    steps: int,
    warm_up: int,
    before: Callable[[StepBatch], StepBatch] | None = None,
) -> Measured:
    """Train some steps and time them.

    Steps that overflow in fp16 are warm-up, wherever they come: they lack their last part.

    Args:
        name: of the way.
        trainee: its configuration has `OVERFLOWS` steps more than are taken.
        steps: that count.
        warm_up: steps before them.
        before: runs on every batch first, timed as "encoders".
    """
    device = trainee.setup.ranks.device
    found: list[dict[str, float]] = []
    images = []
    forget_peak(device)
    with closing(trainee.setup.batches(0, 1)) as batches:
        taken = 0
        while len(found) < steps:
            clock = StepClock(device)
            with clock.span(WAIT):
                batch = next(batches)
            if before is not None:
                with clock.span(ENCODERS):
                    batch = before(batch)
            with trainee.within(clock), clock.span(REST):
                has_moved = trainee.step(batch)
            own = clock.own_ms()
            taken += has_moved
            if has_moved and taken > warm_up:
                found.append(own)
                images.append(len({sample.image_id for sample in batch.samples}))
    totals = [sum(own.values()) for own in found]
    return Measured(
        name=name,
        split={part: statistics.median(own.get(part, 0.0) for own in found) for part in _in_order(found[0])},
        ms=statistics.median(totals),
        fastest=min(totals),
        slowest=max(totals),
        waiting=sum(own[WAIT] for own in found) / sum(totals),
        peak_bytes=peak_bytes(device),
        images=statistics.mean(images),
    )


def _in_order(parts: dict[str, float]) -> list[str]:
    """Parts of a step as they come, what is left at the end."""
    return sorted(parts, key=lambda part: part == REST)


def forget_peak(device: torch.device) -> None:
    """Begin a new peak of memory, where the system allows it."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:  # not Linux, or not allowed: the peak is then that of the whole process
        return


def peak_bytes(device: torch.device) -> int | None:
    """Return the most memory taken since `forget_peak`."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    path = Path("/proc/self/status")
    if not path.is_file():
        return None
    entries = dict(line.split(":", 1) for line in path.read_text().splitlines() if ":" in line)
    return int(entries["VmHWM"].split()[0]) << 10

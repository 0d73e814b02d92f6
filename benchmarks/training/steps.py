"""Timing whole training steps, and where their time goes."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Generator
from contextlib import AbstractContextManager, closing, nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional

import ris_train.losses
from ris_train.data.batch import Batch
from ris_train.model.dfam import DfamPrediction
from ris_train.model.segmenter import ModelOutputs, RisModel
from ris_train.optim import build_optimiser
from training.bench import Bench
from training.clock import StepClock, timed_children, timed_functions

PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
WAIT, BACKWARD, OPTIMISER, CLIP = "wait for data", "backward", "optimiser", "clip gradients"
FORWARD, LOSSES = "forward: ", "losses: "
_LOSS_FUNCTIONS = {
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
        peak_bytes: of the device's memory on a GPU, of the process on a CPU, where memory that an earlier way
            has freed counts too; None where it cannot be told.
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


def measure(
    name: str,
    bench: Bench,
    model: RisModel,
    batches: Generator[Batch, None, None],
    *,
    steps: int,
    warm_up: int,
    precision: str,
    before: Callable[[Batch], Batch] | None = None,
) -> Measured:
    """Train some steps and time them.

    Args:
        name: of the way.
        batches: endless; closed at the end.
        warm_up: steps before the first that counts.
        precision: one of `PRECISIONS`.
        before: runs on every batch first, timed as "encoders".
    """
    optimiser = build_optimiser(model, bench.config.train)
    scaler = torch.amp.GradScaler(bench.device.type, enabled=precision == "fp16")
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    found: list[dict[str, float]] = []
    images = []
    forget_peak(bench.device)
    with closing(batches):
        for step in range(warm_up + steps):
            clock = StepClock(bench.device)
            with clock.span(WAIT):
                batch = next(batches)
            if before is not None:
                with clock.span("encoders"):
                    batch = before(batch)
            loss = compute_loss(clock, bench, model, batch, precision)
            with clock.span(BACKWARD):
                optimiser.zero_grad(set_to_none=True)
                scaler.scale(loss).backward()
            with clock.span(CLIP):
                scaler.unscale_(optimiser)
                nn.utils.clip_grad_norm_(trained, bench.config.train.clip_grad_norm)
            with clock.span(OPTIMISER):
                scaler.step(optimiser)
                scaler.update()
            if step >= warm_up:
                found.append(clock.own_ms())
                images.append(len({sample.image_id for sample in batch.samples}))
    totals = [sum(own.values()) for own in found]
    return Measured(
        name=name,
        split={part: statistics.median(own.get(part, 0.0) for own in found) for part in found[0]},
        ms=statistics.median(totals),
        fastest=min(totals),
        slowest=max(totals),
        waiting=sum(own[WAIT] for own in found) / sum(totals),
        peak_bytes=peak_bytes(bench.device),
        images=statistics.mean(images),
    )


def compute_loss(clock: StepClock, bench: Bench, model: RisModel, batch: Batch, precision: str) -> Tensor:
    """Run forward and losses as `ris train` does: the model in a precision, the losses in float32."""
    assert batch.targets is not None, "a training batch has targets"
    with (
        timed_children(clock, model, FORWARD),
        timed_functions(clock, _LOSS_FUNCTIONS),
    ):
        with clock.span(FORWARD + "the rest"), _autocast(bench.device, precision):
            outputs = model(batch.inputs)
        with clock.span(LOSSES + "the rest"):
            loss, _ = ris_train.losses.total_loss(_in_float32(outputs), batch.targets, bench.config.loss)
    return loss


def _autocast(device: torch.device, precision: str) -> AbstractContextManager[object]:
    if precision == "fp32":
        return nullcontext()
    return torch.autocast(device.type, dtype=PRECISIONS[precision])


def _in_float32(outputs: ModelOutputs) -> ModelOutputs:
    assert outputs.dfam is not None, "training runs DFAM"
    logits = outputs.no_target_logits
    return ModelOutputs(
        mask_logits=outputs.mask_logits.float(),
        dfam=[DfamPrediction(*(tensor.float() for tensor in prediction)) for prediction in outputs.dfam],
        no_target_logits=None if logits is None else logits.float(),
    )


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
    return status_bytes("VmHWM")


def status_bytes(key: str) -> int | None:
    """Return an entry of what Linux says of this process' memory; None elsewhere."""
    path = Path("/proc/self/status")
    if not path.is_file():
        return None
    for line in path.read_text().splitlines():
        name, _, value = line.partition(":")
        if name == key:
            return int(value.split()[0]) << 10
    return None

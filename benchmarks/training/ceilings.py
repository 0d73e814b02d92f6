"""The floor of a step: what its operations, or its bytes, would take at the device's own best rates."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

from ris_train.training.step import StepBatch
from training.clock import Spans
from training.operations import OperationCounter

_Shape = tuple[int, ...]
_MATMUL_SIDE = {"cuda": 8192, "cpu": 1024}
_COPY_BYTES = {"cuda": 2 << 30, "cpu": 256 << 20}
_MIN_ROUNDS = 3
_CEILING_SECONDS = 0.5
_BYTES_PER_PARAMETER = {False: 4 * (3 + 7), True: 2 * (3 + 1 + 1) + 4 * (5 + 1)}
"""Bytes that AdamW training moves for each parameter. In float32 (False) it is read forward and backward and
its gradient is written; then weight, gradient and two moments are read, and weight and moments written. In
half precision (True) the first three and the gradient's reading take 2 bytes, and so does writing the copy
that the next step reads."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """What one step does.

    Attributes:
        flops: of matrix products, convolutions and attention, forward and backward; two per multiplication
            and addition.
        parameter_bytes: moved at least for weights, gradients and AdamW's moments.
        feature_bytes: of the batch's features, read once.
        kept_bytes: of activations that this implementation keeps for the backward pass, and so moves twice
            or more; another might compute them again instead.
        operations: that compute or move something, by part of the step.
    """

    flops: int
    parameter_bytes: int
    feature_bytes: int
    kept_bytes: int
    operations: dict[str, int]

    @property
    def moved_bytes(self) -> int:
        """All bytes that must be moved at least, however the step is computed."""
        return self.parameter_bytes + self.feature_bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Ceilings:
    """What the device does at best, measured.

    Attributes:
        flops_per_s: of one large matrix product in the precision of the step.
        bytes_per_s: read and written, of one large copy.
    """

    flops_per_s: float
    bytes_per_s: float

    def floor_ms(self, work: Work) -> float:
        """Milliseconds that a step takes at least: the longer of computing and moving."""
        return 1000 * max(work.flops / self.flops_per_s, work.moved_bytes / self.bytes_per_s)


def count_work(step: Callable[[Spans], object], model: nn.Module, batch: StepBatch, *, is_half: bool) -> Work:
    """Count what one step does by doing it.

    Args:
        step: takes the whole step within spans, by which operations are counted.
        model: its trainable parameters are counted.
        batch: that the step computes; what it holds is no activation.
        is_half: whether forward and backward are in half precision.
    """
    device = batch.token_ids.device
    kept: dict[int, int] = {}
    known = {_storage(tensor) for tensor in _tensors(batch)}

    def keep(tensor: Tensor) -> Tensor:
        kept[_storage(tensor)] = tensor.untyped_storage().nbytes()
        return tensor

    def know_weights(*called: object) -> None:
        known.update(_storage(parameter) for parameter in model.parameters())

    know_weights()
    operations = OperationCounter(device)
    # Half precision has the weights' copies in their place, but only while the model computes.
    hook = model.register_forward_pre_hook(know_weights)
    try:
        with (
            FlopCounterMode(display=False, custom_mapping=_ATTENTION_ON_CPU) as flops,
            torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor),
            operations,  # the innermost, so that it sees what torch is given
        ):
            step(operations)
    finally:
        hook.remove()
    features = {
        _storage(tensor): tensor.nbytes
        for part in batch.parts
        for tensor in (part.inputs.image_embeddings, part.inputs.clip_features)
    }
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    return Work(
        flops=flops.get_total_flops(),
        parameter_bytes=_BYTES_PER_PARAMETER[is_half] * trained,
        feature_bytes=sum(features.values()),
        kept_bytes=sum(num_bytes for storage, num_bytes in kept.items() if storage not in known),
        operations=dict(operations.counts),
    )


def _attention_flops(query: _Shape, key: _Shape, value: _Shape, *others: Any, **named: Any) -> int:
    return int(sdpa_flop_count(query, key, value))


def _attention_backward_flops(
    gradient: _Shape, query: _Shape, key: _Shape, value: _Shape, *others: Any, **named: Any
) -> int:
    return int(sdpa_backward_flop_count(gradient, query, key, value))


_ATTENTION_ON_CPU = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention_flops,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward_flops,
}
"""What torch's own counter passes over."""


def _tensors(batch: StepBatch) -> Iterator[Tensor]:
    """Yield all that a batch holds."""
    for values in (batch, *(held for part in batch.parts for held in (part.inputs, part.targets))):
        for name in () if values is None else (field.name for field in fields(values)):
            value = getattr(values, name)
            if isinstance(value, Tensor):
                yield value


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def measure_ceilings(device: torch.device, dtype: torch.dtype) -> Ceilings:
    """Measure the rate of one large matrix product, in the layout of linear layers, and of one large copy."""
    side = _MATMUL_SIDE[device.type]
    left, right = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    source = torch.zeros(_COPY_BYTES[device.type] // 4, device=device)
    target = torch.zeros_like(source)
    return Ceilings(
        flops_per_s=2 * side**3 / _best_seconds(lambda: left @ right.T, device),
        bytes_per_s=2 * source.nbytes / _best_seconds(lambda: target.copy_(source), device),
    )


def _best_seconds(work: Callable[[], object], device: torch.device) -> float:
    best, spent, rounds = math.inf, 0.0, 0
    while rounds < _MIN_ROUNDS or spent < _CEILING_SECONDS:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        start = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds = time.perf_counter() - start
        best, spent, rounds = min(best, seconds), spent + seconds, rounds + 1
    return best

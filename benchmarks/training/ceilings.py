"""The floor of a step: what its operations and bytes would take at the device's own best rates."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

_MATMUL_SIDE = {"cuda": 8192, "cpu": 1024}
_COPY_BYTES = {"cuda": 2 << 30, "cpu": 256 << 20}
_MIN_ROUNDS = 3
_CEILING_SECONDS = 0.5
_PARAMETER_PASSES = 10
"""Times that AdamW training moves each parameter: read forward and backward, gradient written; then weight,
gradient and two moments read, weight and moments written."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """What one step does.

    Attributes:
        flops: of matrix products, convolutions and attention, forward and backward; two per multiplication
            and addition.
        parameter_bytes: moved for weights, gradients and AdamW's moments, float32.
        activation_bytes: kept by the forward for the backward, written once and read once.
        feature_bytes: of the batch's features, read once.
    """

    flops: int
    parameter_bytes: int
    activation_bytes: int
    feature_bytes: int

    @property
    def moved_bytes(self) -> int:
        """All bytes that must be moved at least."""
        return self.parameter_bytes + self.activation_bytes + self.feature_bytes


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


def count_work(model: nn.Module, loss: Callable[[], Tensor], features: tuple[Tensor, ...]) -> Work:
    """Count what one step does by doing it; gradients are left as they come out.

    Args:
        model: its trainable parameters are counted.
        loss: runs forward and losses.
        features: the cached features that the step reads.
    """
    kept: dict[int, int] = {}
    own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with (
        FlopCounterMode(display=False) as counter,
        torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor),
    ):
        loss().backward()
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    return Work(
        flops=counter.get_total_flops(),
        parameter_bytes=_PARAMETER_PASSES * 4 * trained,
        activation_bytes=2 * sum(kept.values()),
        feature_bytes=sum(tensor.nbytes for tensor in features),
    )


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

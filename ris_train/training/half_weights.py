"""Weights in half precision, converted all at once."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

import torch
from torch import Tensor, nn

CONVERTED: Final = (nn.Linear, nn.Conv2d, nn.ConvTranspose2d)
"""Layers that `torch.autocast` computes in half precision."""


class HalfWeights:
    """Copies of the weights of linear layers and convolutions that take their place in a step.

    `torch.autocast` converts each weight where it is used and its gradient where it comes out: with BERT, a
    fifth of all operations of a step, each too small to keep a GPU busy. These copies hold what it would
    convert to, and are made, and their gradients taken back, in a few operations for all. The step is that of
    autocast, but for rounding where a weight is used twice: its gradients are then added in half precision.

    Args:
        model: its parameters stay in float32 and are what the optimiser sees.
        dtype: of the copies.
    """

    def __init__(self, model: nn.Module, dtype: torch.dtype) -> None:
        self._places = [
            (module, name, parameter)
            for module in model.modules()
            if isinstance(module, CONVERTED)
            for name, parameter in module.named_parameters(recurse=False)
        ]
        self._halves = {
            parameter: nn.Parameter(parameter.detach().to(dtype), requires_grad=parameter.requires_grad)
            for _, _, parameter in self._places
        }

    @torch.no_grad()
    def refresh(self) -> None:
        """Convert the weights as they are now; forgets gradients."""
        self._forget_gradients()
        torch._foreach_copy_(list(self._halves.values()), list(self._halves))

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Let the model compute with the copies while entered; what it has computed may be used after."""
        try:
            for module, name, parameter in self._places:
                setattr(module, name, self._halves[parameter])
            yield
        finally:
            for module, name, parameter in self._places:
                setattr(module, name, parameter)

    @torch.no_grad()
    def take_gradients(self) -> None:
        """Add the gradients of the copies to those of the weights, in float32, and forget them."""
        found = [(weight, half.grad) for weight, half in self._halves.items() if half.grad is not None]
        if not found:
            return
        gradients = [torch.empty_like(weight) for weight, _ in found]
        torch._foreach_copy_(gradients, [gradient for _, gradient in found])
        before: list[Tensor] = []
        more: list[Tensor] = []
        for (weight, _), gradient in zip(found, gradients, strict=True):
            if weight.grad is None:
                weight.grad = gradient
            else:
                before.append(weight.grad)
                more.append(gradient)
        if more:
            torch._foreach_add_(before, more)
        self._forget_gradients()

    def _forget_gradients(self) -> None:
        for half in self._halves.values():
            half.grad = None

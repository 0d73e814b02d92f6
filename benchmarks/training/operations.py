"""How many operations a step has: on a GPU each is a launch, and takes its time however small it is."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from training.clock import Spans

_ONLY_MEMORY = (
    "aten::empty",
    "aten::empty_like",
    "aten::empty_strided",
    "aten::new_empty",
    "aten::new_empty_strided",
)
"""What takes memory, and computes nothing."""
_READ_BY_HOST = "aten::_local_scalar_dense"


class OperationCounter(Spans, TorchDispatchMode):
    """While entered, counts the operations that compute or move something, by the span that is open.

    An operation on all parameters, such as a fused AdamW, counts once, though a GPU may be given several
    kernels for it. Views, new memory without contents, and what the host computes for itself do not count.

    Args:
        device: where operations count; what has no tensor there does not.

    Attributes:
        counts: operations within each span, without those of spans inside it.
    """

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()
        self._device = device
        self._open: list[str] = ["outside of all spans"]

    def begin(self, name: str) -> None:
        """Open a span within the one that is open."""
        self._open.append(name)

    def end(self) -> None:
        """Close the span opened last."""
        self._open.pop()

    def __torch_dispatch__(
        self,
        func: Callable[..., Any],
        types: object,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Count, and compute as torch does."""
        result = func(*args, **(kwargs or {}))
        if self._is_work(func, _tensors((args, kwargs)), _tensors(result)):
            self.counts[self._open[-1]] += 1
        return result

    def _is_work(self, func: Any, inputs: list[Tensor], outputs: list[Tensor]) -> bool:
        schema = func._schema
        is_here = any(tensor.device.type == self._device.type for tensor in (*inputs, *outputs))
        if not is_here or schema.name in _ONLY_MEMORY or torch.Tag.inplace_view in func.tags:
            return False
        if schema.is_mutable or schema.name == _READ_BY_HOST:
            return True
        known = {_storage(tensor) for tensor in inputs}
        return any(tensor.numel() and _storage(tensor) not in known for tensor in outputs)


def _tensors(tree: object) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()

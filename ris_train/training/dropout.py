"""Dropout that a batch decides, not how it is cut into processes."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, Final

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

REPLACED: Final = (F.dropout, F.scaled_dot_product_attention)


class BatchDropout(TorchFunctionMode):
    """While entered, dropout draws for every row of the batch and drops in the rows that are here.

    Rows, the first dimension, are samples; the others must be the same on all processes. torch's own dropout
    draws for the rows it is given, so that the second process of two would drop what the first drops.

    Args:
        generator: of the same state on all processes, on the device of the computation.
        first: place in the batch of the first row that is here.
        total: rows of the batch.
    """

    def __init__(self, generator: torch.Generator, *, first: int, total: int) -> None:
        super().__init__()
        self._generator = generator
        self._first = first
        self._total = total

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Compute dropout here, and all else as torch does."""
        if func is F.dropout:
            return self._dropout(*args, **(kwargs or {}))
        if func is F.scaled_dot_product_attention:
            return self._attention(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))

    def _dropout(self, input: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
        """Do what F.dropout does; its arguments."""
        assert not inplace, "no part of the model drops in place"
        if not training or p == 0:
            return input
        is_kept = torch.empty(self._total, *input.shape[1:], device=input.device, dtype=input.dtype)
        is_kept.bernoulli_(1 - p, generator=self._generator)
        # Two products: the factor has digits that half precision has not.
        return input * is_kept[self._first : self._first + len(input)] * (1 / (1 - p))

    def _attention(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        **others: Any,
    ) -> Tensor:
        """Do what F.scaled_dot_product_attention does; its arguments, and written out if it is to drop."""
        if dropout_p == 0:
            return F.scaled_dot_product_attention(query, key, value, attn_mask, **others)
        is_causal, scale = others.get("is_causal", False), others.get("scale")
        assert not is_causal, "no part of the model attends causally"
        logits = query @ key.transpose(-2, -1) * (query.shape[-1] ** -0.5 if scale is None else scale)
        if attn_mask is not None and attn_mask.dtype == torch.bool:
            logits = logits.masked_fill(~attn_mask, -torch.inf)
        elif attn_mask is not None:
            logits = logits + attn_mask
        return self._dropout(logits.softmax(dim=-1), dropout_p) @ value

"""Where the time of a step goes: named spans that may lie within one another.

On a GPU a span is taken between two events on its stream, so nothing is waited for while measuring; on a CPU
by the clock.
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

import torch
from torch import nn

Stamp = Any
"""A moment: seconds on a CPU, a CUDA event on a GPU."""


class Spans(ABC):
    """Measures something within named spans, each within the one that is open."""

    @abstractmethod
    def begin(self, name: str) -> None:
        """Open a span."""

    @abstractmethod
    def end(self) -> None:
        """Close the span opened last."""

    @contextmanager
    def span(self, name: str) -> Iterator[None]:
        """Open a span and close it."""
        self.begin(name)
        try:
            yield
        finally:
            self.end()


@dataclass(slots=True)
class _Span:
    name: str
    parent: int | None
    start: Stamp
    end: Stamp = None


class StepClock(Spans):
    """Spans of one step.

    Args:
        device: where the step runs.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._spans: list[_Span] = []
        self._open: list[int] = []

    def begin(self, name: str) -> None:
        """Open a span within the one that is open."""
        self._spans.append(_Span(name, self._open[-1] if self._open else None, self._now()))
        self._open.append(len(self._spans) - 1)

    def end(self) -> None:
        """Close the span opened last."""
        self._spans[self._open.pop()].end = self._now()

    def own_ms(self) -> dict[str, float]:
        """Milliseconds of each name without the spans inside; those of one name are added up.

        The sum over all names is therefore the time of the outermost spans. Waits for the device.
        """
        assert not self._open, "a span is still open"
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        found: dict[str, float] = defaultdict(float)
        for span in self._spans:
            duration = self._ms(span.start, span.end)
            found[span.name] += duration
            if span.parent is not None:
                found[self._spans[span.parent].name] -= duration
        return dict(found)

    def _now(self) -> Stamp:
        if self._device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def _ms(self, start: Stamp, end: Stamp) -> float:
        return start.elapsed_time(end) if self._device.type == "cuda" else 1000 * (end - start)


@contextmanager
def within_spans(
    spans: Spans, functions: Mapping[tuple[Any, str], str], model: nn.Module, prefix: str
) -> Iterator[None]:
    """Give each call of some functions, and the forward of each part of a model, a span.

    Args:
        spans: measures them.
        functions: name of the span by the module or object and the name under which the function is called.
        model: the span of a part has the part's name.
        prefix: goes before that.
    """
    with ExitStack() as undone:
        for (owner, name), span in functions.items():
            undone.enter_context(patch.object(owner, name, _within(spans, getattr(owner, name), span)))
        for name, child in model.named_children():
            before = child.register_forward_pre_hook(
                lambda module, inputs, name=name: spans.begin(prefix + name)
            )
            undone.callback(before.remove)
            after = child.register_forward_hook(lambda module, inputs, output: spans.end())
            undone.callback(after.remove)
        yield


def _within(spans: Spans, function: Callable[..., Any], span: str) -> Callable[..., Any]:
    def call(*arguments: Any, **named: Any) -> Any:
        with spans.span(span):
            return function(*arguments, **named)

    return call

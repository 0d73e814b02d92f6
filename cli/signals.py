"""Ctrl-C, SIGTERM and others as a request to stop at the next good moment."""

from __future__ import annotations

import signal
import sys
from types import FrameType, TracebackType
from typing import Any, Self

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class StopRequest:
    """While entered, the first signal is a request and the second one interrupts at once."""

    def __init__(self, what_happens: str, *, signals: tuple[signal.Signals, ...] = SIGNALS) -> None:
        """Say in a word what the request leads to, e.g. "after this shard".

        Args:
            what_happens: see above.
            signals: that are requests.
        """
        self._what_happens = what_happens
        self._signals = signals
        self._before: dict[signal.Signals, Any] = {}
        self.signal: int | None = None

    def __call__(self) -> bool:
        """Whether to stop."""
        return self.signal is not None

    @property
    def exit_code(self) -> int:
        """128 and the signal's number, as shells have it: 130 SIGINT, 143 SIGTERM, 138 SIGUSR1."""
        return 128 + (self.signal or signal.SIGINT)

    def __enter__(self) -> Self:
        for number in self._signals:
            self._before[number] = signal.signal(number, self._receive)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if self.signal is not None:
            raise KeyboardInterrupt
        self.signal = number
        print(f"stopping {self._what_happens}; once more to stop at once", file=sys.stderr, flush=True)

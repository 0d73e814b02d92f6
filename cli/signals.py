"""Ctrl-C, SIGTERM and others as a request to stop at the next good moment."""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Collection
from types import FrameType, TracebackType
from typing import Any, Self

SIGNALS = (signal.SIGINT, signal.SIGTERM)
_STDERR = 2


class StopRequest:
    """While entered, the first signal is a request; the second one interrupts at once, if it may."""

    def __init__(
        self,
        what_happens: str,
        *,
        signals: tuple[signal.Signals, ...] = SIGNALS,
        interrupting: Collection[signal.Signals] | None = None,
        is_silent: bool = False,
    ) -> None:
        """Say in a word what the request leads to, e.g. "after this shard".

        Args:
            what_happens: see above.
            signals: that are requests.
            interrupting: those of which the second one interrupts; all by default. Of the others, as of what
                a scheduler sends before its time is up, any number is one request.
            is_silent: whether another process says what happens.
        """
        self._what_happens = what_happens
        self._signals = signals
        self._interrupting = signals if interrupting is None else interrupting
        self._is_silent = is_silent
        self._before: dict[signal.Signals, Any] = {}
        self._does_next_interrupt = False
        self.signal: int | None = None

    def __call__(self) -> bool:
        """Whether to stop."""
        return self.signal is not None

    @property
    def exit_code(self) -> int:
        """128 and the first signal's number, as shells have it: 130 SIGINT, 143 SIGTERM, 138 SIGUSR1."""
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
        may_interrupt = number in self._interrupting
        if may_interrupt and self._does_next_interrupt:
            raise KeyboardInterrupt
        is_first = self.signal is None
        if is_first:
            self.signal = number
        if may_interrupt:
            self._does_next_interrupt = True
            self._say(f"stopping {self._what_happens}; once more to stop at once")
        elif is_first:
            self._say(f"stopping {self._what_happens}")

    def _say(self, message: str) -> None:
        """Tell on stderr; whatever becomes of that, the work at hand goes on to where it may stop.

        Not by print: the signal may come in the middle of one, which refuses another within it. And Ctrl-C
        ends a `| tee` as well, so that nobody may be left to read.
        """
        if not self._is_silent:
            with contextlib.suppress(OSError):
                os.write(_STDERR, f"{message}\n".encode())

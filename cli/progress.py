"""Progress of long commands on stderr: a bar on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import contextlib
import sys
import time
from abc import ABC, abstractmethod
from typing import NoReturn

from tqdm import tqdm

SECONDS_BETWEEN_LINES = 30.0


class Progress(ABC):
    """A bar, or a line now and then; who inherits says what a line tells, in `_line`."""

    def __init__(self, what: str, unit: str, *, is_terminal: bool | None, interval: float) -> None:
        self._what, self._unit = what, unit
        self._is_terminal = sys.stderr.isatty() if is_terminal is None else is_terminal
        self._interval = interval
        self._bar: tqdm[NoReturn] | None = None
        self._total = self._done = self._before = 0
        self._started = self._last_line = 0.0

    def start(self, *, total: int, done: int) -> None:
        """Begin; `done` of `total` are there already."""
        self._total, self._done, self._before = total, done, done
        self._started = self._last_line = time.monotonic()
        if done < total and self._is_terminal:
            self._bar = tqdm(total=total, initial=done, unit=self._unit, desc=self._what)

    def say(self, message: str) -> None:
        """Print a message without breaking the bar."""
        if self._bar is not None:
            self._bar.write(message, file=sys.stderr)
        else:
            _print(message)

    def stop(self) -> None:
        """End the bar, or print a last line."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None
        elif self._done > self._before:
            _print(self._line())

    def _line_if_due(self) -> None:
        if time.monotonic() - self._last_line >= self._interval:
            self._last_line = time.monotonic()
            _print(self._line())

    @abstractmethod
    def _line(self) -> str:
        """What a line tells."""


class ImageProgress(Progress):
    """Images done, images per second, time left, images quarantined."""

    def __init__(
        self,
        what: str = "extract",
        *,
        is_terminal: bool | None = None,
        interval: float = SECONDS_BETWEEN_LINES,
    ) -> None:
        """Choose between bar and lines.

        Args:
            what: the command.
            is_terminal: whether stderr is one; asked of it by default.
            interval: seconds between lines.
        """
        super().__init__(what, "image", is_terminal=is_terminal, interval=interval)
        self._quarantined = 0

    def advance(self, reason: str | None) -> None:
        """Count one image, and say why if it was quarantined."""
        self._done += 1
        if reason is not None:
            self._quarantined += 1
            self.say(f"quarantined: {reason}")
        if self._bar is not None:
            self._bar.update()
            self._bar.set_postfix(quarantined=self._quarantined, refresh=False)
        else:
            self._line_if_due()

    def _line(self) -> str:
        seconds = max(time.monotonic() - self._started, 1e-9)
        rate = (self._done - self._before) / seconds
        left = (self._total - self._done) / rate if rate else float("inf")
        return (
            f"{self._what}: {self._done}/{self._total} images, {rate:.1f} images/s, "
            f"{duration(left)} left, {self._quarantined} quarantined"
        )


def _print(message: str) -> None:
    """Print on stderr; that nobody reads it any more, as after Ctrl-C on a `| tee`, ends no long work."""
    with contextlib.suppress(BrokenPipeError):
        print(message, file=sys.stderr, flush=True)


def duration(seconds: float) -> str:
    """A length of time as people say it: 45 s, 12 min, 3 h 5 min."""
    if seconds == float("inf"):
        return "unknown"
    if seconds < 100:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 100 else f"{minutes // 60} h {minutes % 60} min"

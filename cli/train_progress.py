"""Progress of training on stderr: a bar on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import sys
import time
from typing import NoReturn

from tqdm import tqdm

from cli.progress import SECONDS_BETWEEN_LINES, duration

DECAY = 0.98
"""Weight of the past in the running mean of the loss."""


class TrainProgress:
    """Steps done, loss, images per second, share of the time spent waiting for data, time left."""

    def __init__(self, *, is_terminal: bool | None = None, interval: float = SECONDS_BETWEEN_LINES) -> None:
        """Choose between bar and lines.

        Args:
            is_terminal: whether stderr is one; asked of it by default.
            interval: seconds between lines.
        """
        self._is_terminal = sys.stderr.isatty() if is_terminal is None else is_terminal
        self._interval = interval
        self._bar: tqdm[NoReturn] | None = None
        self._total = self._done = self._before = self._samples = 0
        self._waited = 0.0
        self._loss: float | None = None
        self._started = self._last_line = 0.0

    def start(self, *, total: int, done: int) -> None:
        """Begin; `done` of `total` steps were taken before."""
        self._total, self._done, self._before = total, done, done
        self._started = self._last_line = time.monotonic()
        if done < total and self._is_terminal:
            self._bar = tqdm(total=total, initial=done, unit="step", desc="train")

    def advance(self, *, loss: float, samples: int, waited: float) -> None:
        """Count one step."""
        self._done += 1
        self._samples += samples
        self._waited += waited
        self._loss = loss if self._loss is None else DECAY * self._loss + (1 - DECAY) * loss
        if self._bar is not None:
            self._bar.set_postfix_str(self._facts(), refresh=False)
            self._bar.update()
        elif time.monotonic() - self._last_line >= self._interval:
            self._last_line = time.monotonic()
            print(self._line(), file=sys.stderr, flush=True)

    def say(self, message: str) -> None:
        """Print a message without breaking the bar."""
        if self._bar is not None:
            self._bar.write(message, file=sys.stderr)
        else:
            print(message, file=sys.stderr, flush=True)

    def stop(self) -> None:
        """End the bar, or print a last line."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None
        elif self._done > self._before:
            print(self._line(), file=sys.stderr, flush=True)

    def _facts(self) -> str:
        seconds = max(time.monotonic() - self._started, 1e-9)
        return (
            f"loss {self._loss or 0:.3f}, {self._samples / seconds:.1f} images/s, "
            f"{100 * self._waited / seconds:.0f} % waiting for data"
        )

    def _line(self) -> str:
        seconds = max(time.monotonic() - self._started, 1e-9)
        taken = self._done - self._before
        left = (self._total - self._done) * seconds / taken if taken else float("inf")
        return f"train: step {self._done}/{self._total}, {self._facts()}, {duration(left)} left"

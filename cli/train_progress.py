"""Progress of training on stderr: a bar on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import time

from cli.progress import SECONDS_BETWEEN_LINES, Progress, duration

DECAY = 0.98
"""Weight of the past in the running mean of the loss."""


class TrainProgress(Progress):
    """Steps done, loss, expressions and different images per second, share of waiting for data, time left."""

    def __init__(self, *, is_terminal: bool | None = None, interval: float = SECONDS_BETWEEN_LINES) -> None:
        """Choose between bar and lines.

        Args:
            is_terminal: whether stderr is one; asked of it by default.
            interval: seconds between lines.
        """
        super().__init__("train", "step", is_terminal=is_terminal, interval=interval)
        self._samples = self._images = 0
        self._waited = self._seconds = 0.0
        self._loss: float | None = None

    def advance(self, *, loss: float, samples: int, images: int, waited: float, seconds: float) -> None:
        """Count one step."""
        self._done += 1
        self._samples += samples
        self._images += images
        self._waited += waited
        self._seconds += seconds
        self._loss = loss if self._loss is None else DECAY * self._loss + (1 - DECAY) * loss
        if self._bar is not None:
            self._bar.set_postfix_str(self._facts(), refresh=False)
            self._bar.update()
        else:
            self._line_if_due()

    def _facts(self) -> str:
        """Loss and rates; the rates are those of steps, whatever time evaluations and states take."""
        seconds = max(self._seconds, 1e-9)
        return (
            f"loss {self._loss or 0:.3f}, {self._samples / seconds:.1f} expressions/s, "
            f"{self._images / seconds:.1f} images/s, {100 * self._waited / seconds:.0f} % waiting for data"
        )

    def _line(self) -> str:
        seconds = max(time.monotonic() - self._started, 1e-9)
        taken = self._done - self._before
        left = (self._total - self._done) * seconds / taken if taken else float("inf")
        return f"train: step {self._done}/{self._total}, {self._facts()}, {duration(left)} left"

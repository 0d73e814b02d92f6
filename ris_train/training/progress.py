"""How a training run tells of itself, to whoever shows it."""

from __future__ import annotations

from typing import Protocol


class Progress(Protocol):
    """Receives what happens, on rank 0."""

    def start(self, *, total: int, done: int) -> None:
        """Training begins; `done` of `total` steps were taken before."""
        ...

    def advance(self, *, loss: float, samples: int, images: int, waited: float, seconds: float) -> None:
        """One step was taken.

        Args:
            loss: of its batch.
            samples: of its batch.
            images: different ones of its batch.
            waited: seconds until the batch was there.
            seconds: that it took in all, waiting included.
        """
        ...

    def say(self, message: str) -> None:
        """Something worth a line."""
        ...

    def stop(self) -> None:
        """Training ends, whether it is complete or not."""
        ...


class Silent:
    """Shows nothing."""

    def start(self, *, total: int, done: int) -> None:
        """Show nothing."""

    def advance(self, *, loss: float, samples: int, images: int, waited: float, seconds: float) -> None:
        """Show nothing."""

    def say(self, message: str) -> None:
        """Show nothing."""

    def stop(self) -> None:
        """Show nothing."""

"""How a training run tells of itself, to whoever shows it."""

from __future__ import annotations

from typing import Protocol


class Progress(Protocol):
    """Receives what happens, on rank 0."""

    def start(self, *, total: int, done: int) -> None:
        """Training begins; `done` of `total` steps were taken before."""
        ...

    def advance(self, *, loss: float, samples: int, images: int, waited: float) -> None:
        """One step was taken: its loss, its samples and different images, and the seconds waited for them."""
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

    def advance(self, *, loss: float, samples: int, images: int, waited: float) -> None:
        """Show nothing."""

    def say(self, message: str) -> None:
        """Show nothing."""

    def stop(self) -> None:
        """Show nothing."""

"""How long work tells of its progress, without knowing who watches."""

from __future__ import annotations

from typing import Protocol


class Progress(Protocol):
    """Who watches images being computed or copied."""

    def start(self, *, total: int, done: int) -> None:
        """Work begins: of `total` planned images `done` are there already."""
        ...

    def advance(self, reason: str | None) -> None:
        """One more image is through; with a reason, it was quarantined."""
        ...

    def say(self, message: str) -> None:
        """Something worth knowing, such as a wait."""
        ...

    def stop(self) -> None:
        """No more images will come."""
        ...


class Silent:
    """Progress that nobody watches."""

    def start(self, *, total: int, done: int) -> None:
        """Do nothing."""

    def advance(self, reason: str | None) -> None:
        """Do nothing."""

    def say(self, message: str) -> None:
        """Do nothing."""

    def stop(self) -> None:
        """Do nothing."""

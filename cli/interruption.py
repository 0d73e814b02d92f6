"""Ctrl-C outside the places that make a request of it, and what is told apart from an error by it."""

from __future__ import annotations

import signal
from types import FrameType

INTERRUPTED = 130

_is_interrupted = False


def watch_interruption() -> None:
    """Note Ctrl-C from here on, beside raising KeyboardInterrupt; not where a shell has it ignored."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _interrupt)


def is_interruption(error: BaseException) -> bool:
    """Whether an error is Ctrl-C, or what an import made of it, such as a module that is missing."""
    return isinstance(error, KeyboardInterrupt) or (_is_interrupted and isinstance(error, ImportError))


def _interrupt(number: int, frame: FrameType | None) -> None:
    global _is_interrupted
    _is_interrupted = True
    raise KeyboardInterrupt

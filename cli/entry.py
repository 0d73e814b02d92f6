"""Where `ris` begins: Ctrl-C ends it quietly from the first moment on, while modules are being imported."""

from __future__ import annotations

import signal
import sys
from types import FrameType

INTERRUPTED = 130

_is_interrupted = False


def main() -> None:
    """Entry point."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # not where a shell has it ignored
        signal.signal(signal.SIGINT, _interrupt)
    try:
        from cli.app import app

        app()
    except (KeyboardInterrupt, ImportError) as error:
        if not is_interruption(error):
            raise
        print("interrupted", file=sys.stderr)
        sys.exit(INTERRUPTED)
    finally:
        # While the interpreter ends, another Ctrl-C would only print a traceback out of its shutdown.
        signal.signal(signal.SIGINT, signal.SIG_DFL)


def is_interruption(error: BaseException) -> bool:
    """Whether an error is Ctrl-C, or what an import made of it, such as a module that is missing."""
    return isinstance(error, KeyboardInterrupt) or (_is_interrupted and isinstance(error, ImportError))


def _interrupt(number: int, frame: FrameType | None) -> None:
    global _is_interrupted
    _is_interrupted = True
    raise KeyboardInterrupt

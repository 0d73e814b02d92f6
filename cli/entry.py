"""Where `ris` begins: Ctrl-C ends it quietly from the first moment on, while modules are being imported."""

from __future__ import annotations

import signal
import sys

from cli.interruption import INTERRUPTED, is_interruption, watch_interruption


def main() -> None:
    """Entry point."""
    watch_interruption()
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

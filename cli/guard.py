"""Turns foreseen errors into one line and an exit code; a traceback only with `--debug`."""

from __future__ import annotations

import functools
import os
import sys
from collections.abc import Callable
from typing import ParamSpec

import typer

from ris_cache.errors import RisError

INTERRUPTED = 130
BROKEN_PIPE = 141
P = ParamSpec("P")

_debug = False


def set_debug(value: bool) -> None:
    """Choose whether errors show their traceback."""
    global _debug
    _debug = value


def guarded(command: Callable[P, None]) -> Callable[P, None]:
    """Wrap a command so that a user's mistake ends with a message and the right exit code."""

    @functools.wraps(command)
    def run(*args: P.args, **kwargs: P.kwargs) -> None:
        try:
            command(*args, **kwargs)
        except KeyboardInterrupt:
            print("interrupted", file=sys.stderr)
            raise typer.Exit(INTERRUPTED) from None
        except RisError as error:
            _report(str(error), error.exit_code, error)
        except (MemoryError, RuntimeError) as error:
            # torch's class for a full device is found by name, so that --help need not import torch.
            if not isinstance(error, MemoryError) and type(error).__name__ != "OutOfMemoryError":
                raise
            _report("out of memory; lower --batch-size (or --set train.batch_size=…)", 1, error)
        except BrokenPipeError:  # whoever reads the output has seen enough, as `head` has
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python complains at its end
            raise typer.Exit(BROKEN_PIPE) from None
        except OSError as error:
            _report(f"{error.strerror or error}: {error.filename or ''}".rstrip(": "), 1, error)

    return run


def _report(message: str, exit_code: int, error: Exception) -> None:
    if _debug:
        raise error
    from cli.render import printable

    print(f"error: {printable(message)}", file=sys.stderr)
    raise typer.Exit(exit_code) from None

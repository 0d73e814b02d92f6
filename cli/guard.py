"""Turns foreseen errors into one line and an exit code; a traceback only with `--debug`."""

from __future__ import annotations

import functools
import inspect
import os
import sys
from collections.abc import Callable
from typing import ParamSpec

import typer

from cli.interruption import INTERRUPTED, is_interruption
from ris_cache.errors import RisError

BROKEN_PIPE = 141
P = ParamSpec("P")

_LESS_MEMORY = {
    "train": "compute a batch in more parts, which gives the same step: --set train.accumulate=…; or lower "
    "train.batch_size",
    "predict": "name fewer expressions at a time, or another --device",
}
"""What uses less memory, by name of the command's function; of others, those with a batch size."""

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
        except (KeyboardInterrupt, ImportError) as error:
            if not is_interruption(error):
                raise
            print("interrupted", file=sys.stderr)
            raise typer.Exit(INTERRUPTED) from None
        except RisError as error:
            _report(str(error), error.exit_code, error)
        except (MemoryError, RuntimeError) as error:
            if not _is_out_of_memory(error):
                raise
            _report(f"out of memory; {_less_memory(command)}", 1, error)
        except BrokenPipeError:  # whoever reads the output has seen enough, as `head` has
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python complains at its end
            raise typer.Exit(BROKEN_PIPE) from None
        except OSError as error:
            _report(f"{error.strerror or error}: {error.filename or ''}".rstrip(": "), 1, error)

    return run


def _less_memory(command: Callable[..., None]) -> str:
    has_batch_size = "batch_size" in inspect.signature(command).parameters
    other = "lower --batch-size" if has_batch_size else "end other programs, or take a machine with more"
    return _LESS_MEMORY.get(command.__name__, other)


def _is_out_of_memory(error: Exception) -> bool:
    """Tell by name and words, so that --help need not import torch, which has no class for a full CPU."""
    is_of_torch = type(error).__name__ == "OutOfMemoryError" or "can't allocate memory" in str(error)
    return isinstance(error, MemoryError) or is_of_torch


def _report(message: str, exit_code: int, error: Exception) -> None:
    if _debug:
        raise error
    from cli.render import printable

    print(f"error: {printable(message)}", file=sys.stderr)
    raise typer.Exit(exit_code) from None

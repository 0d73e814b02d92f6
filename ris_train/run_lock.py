"""The lock of a run, which one training holds at a time; the kernel drops it when its process ends."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from ris_cache.errors import CacheError, CheckpointError
from ris_cache.store.locks import FileLock

LOCK_SECONDS: Final = 1.0
"""How long a lock that is held is asked for again: `ris runs list` holds it for an instant, to look."""
_POLL_SECONDS: Final = 0.02


@contextmanager
def held_lock(run_path: Path, lock_path: Path) -> Iterator[None]:
    """Hold the lock of a run.

    Args:
        run_path: the run's directory, which is there.
        lock_path: the file that is locked; it names the process that holds it.

    Raises:
        CheckpointError: another process trains here; or the file cannot be written to, or is on a file system
            without locks.
    """
    lock = FileLock(lock_path)
    end = time.monotonic() + LOCK_SECONDS
    while not _acquired(lock, run_path):
        if time.monotonic() > end:
            raise CheckpointError(
                f"The run {run_path} is being trained by another process{_holder(lock_path)}. Wait for it "
                "to end, stop it with SIGTERM, which saves its state, or train another run: --run NAME.",
                path=run_path,
            )
        time.sleep(_POLL_SECONDS)
    try:
        lock_path.write_text(f"{os.getpid()} {socket.gethostname()}\n", encoding="utf-8")
        yield
    finally:
        lock.release()


def _acquired(lock: FileLock, run_path: Path) -> bool:
    try:
        return lock.acquire(wait=False)
    except (CacheError, OSError) as error:
        cause = error.__cause__ if isinstance(error, CacheError) else error
        reason = cause.strerror if isinstance(cause, OSError) else str(error)
        raise CheckpointError(
            f"The run {run_path} cannot be locked, so a second training could not be kept out: "
            f"{reason}. Keep runs where you may write and where file locks work: --runs.",
            path=run_path,
        ) from error


def _holder(lock_path: Path) -> str:
    """Who holds the lock, in words; empty if that cannot be read."""
    try:
        number, host = lock_path.read_text(encoding="utf-8").split()
    except (OSError, ValueError):
        return ""
    return f" (process {number} on {host})"

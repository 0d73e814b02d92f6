"""File locks: between processes, shared, and gone with their holder."""

from __future__ import annotations

import errno
import fcntl
import gc
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from ris_cache.errors import CacheError
from ris_cache.store.locks import FileLock

HOLD = """
import sys, time
from pathlib import Path
from ris_cache.store.locks import FileLock
lock = FileLock(Path(sys.argv[1]))
assert lock.acquire(shared=sys.argv[2] == "shared", wait=False)
print("held", flush=True)
time.sleep(60)
"""


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "some.lock"


def hold_elsewhere(path: Path, kind: str = "exclusive") -> subprocess.Popen[bytes]:
    """Return a process that holds the lock."""
    process = subprocess.Popen([sys.executable, "-c", HOLD, path, kind], stdout=subprocess.PIPE)
    assert process.stdout is not None
    assert process.stdout.readline() == b"held\n"
    return process


def end(process: subprocess.Popen[bytes]) -> None:
    process.send_signal(signal.SIGKILL)
    process.communicate(timeout=30)


def can_lock(path: Path, *, shared: bool = False) -> bool:
    lock = FileLock(path)
    is_held = lock.acquire(shared=shared, wait=False)
    lock.release()
    return is_held


def num_descriptors() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


def test_one_process_keeps_out_another_until_it_is_killed(path: Path) -> None:
    process = hold_elsewhere(path)
    try:
        assert not can_lock(path)
        assert not can_lock(path, shared=True)
        waited: list[float] = []

        def wait() -> None:
            with FileLock(path):
                waited.append(time.monotonic())

        thread = threading.Thread(target=wait)
        thread.start()
        time.sleep(0.1)
        assert not waited
        killed = time.monotonic()
    finally:
        end(process)
    thread.join(timeout=30)
    assert waited[0] > killed
    assert can_lock(path)


def test_shared_holders_keep_out_only_exclusive_ones(path: Path) -> None:
    process = hold_elsewhere(path, "shared")
    try:
        assert can_lock(path, shared=True)
        assert not can_lock(path)
    finally:
        end(process)
    assert can_lock(path)


def test_objects_of_one_process_keep_each_other_out_too(path: Path) -> None:
    with FileLock(path) as held:
        is_held = [held.is_held]
        assert not can_lock(path)
    is_held.append(held.is_held)
    assert is_held == [True, False]
    assert can_lock(path)


def test_a_holder_may_share_its_lock_and_take_it_back(path: Path) -> None:
    lock, other = FileLock(path), FileLock(path)
    assert lock.acquire()
    assert lock.acquire(shared=True)
    assert other.acquire(shared=True, wait=False)
    other.release()
    assert lock.acquire(wait=False)
    assert not other.acquire(shared=True, wait=False)
    lock.release()


def test_a_change_that_fails_says_that_nothing_is_held(path: Path) -> None:
    """The kernel may drop the old lock when the new one is not to be had, so it is given up as a whole."""
    lock, other = FileLock(path), FileLock(path)
    lock.acquire(shared=True)
    other.acquire(shared=True)
    assert not lock.acquire(wait=False)
    assert not lock.is_held
    assert other.acquire(wait=False)
    other.release()


def test_a_program_started_meanwhile_does_not_inherit_the_lock(path: Path) -> None:
    lock = FileLock(path)
    lock.acquire()
    sleeper = subprocess.Popen(["sleep", "60"], close_fds=False)
    try:
        lock.release()
        assert can_lock(path)
    finally:
        sleeper.kill()
        sleeper.wait(timeout=30)


def test_a_forked_child_that_ends_does_not_take_the_lock_along(path: Path) -> None:
    lock = FileLock(path)
    lock.acquire()
    child = os.fork()
    if child == 0:
        lock.release()
        os._exit(0)
    os.waitpid(child, 0)
    assert not can_lock(path)
    lock.release()


def test_a_lock_that_is_forgotten_is_released(path: Path) -> None:
    lock = FileLock(path)
    lock.acquire()
    del lock
    gc.collect()
    assert can_lock(path)


def test_nothing_stays_open_and_the_file_stays(path: Path) -> None:
    before = num_descriptors()
    lock = FileLock(path)
    lock.release()
    for _ in range(3):
        with lock:
            assert not can_lock(path)
        lock.release()
    assert num_descriptors() == before
    assert path.read_bytes() == b""


@pytest.mark.parametrize("number", [errno.ENOTSUP, errno.ENOSYS, errno.EINVAL, errno.ENOLCK])
def test_a_file_system_without_locks_is_named_with_a_way_out(
    path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    def refuse(descriptor: int, operation: int) -> None:
        raise OSError(number, os.strerror(number))

    before = num_descriptors()
    monkeypatch.setattr(fcntl, "flock", refuse)
    with pytest.raises(CacheError, match=r"knows no file locks.*local disk") as caught:
        FileLock(path).acquire()
    assert caught.value.facts["path"] == path
    assert num_descriptors() == before


def test_other_failures_are_passed_on_as_they_are(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        FileLock(tmp_path / "absent" / "some.lock").acquire()

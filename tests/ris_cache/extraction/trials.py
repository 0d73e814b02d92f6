"""Runs extractions in processes of their own, so that tests can end them at a chosen instant.

Not a test but a program; `conftest.py` starts it and talks to it. It imports everything and loads the encoders
once, on one thread and without ever computing, so that it may fork; each trial runs in a fork of it. It reads
one JSON list of trials a line, runs these trials side by side, and answers with one line, a JSON list of what
became of them.

A trial holds `argv` (the arguments of `ris`), or `read` (the directory of a cache to be read whole), or
`extract` (`data`, `cache`, `split`, and further arguments of `ris_cache.extraction.run.extract`); and any of:

    log         file to which the name of each image is appended as it is decoded
    output      file that receives stdout and stderr
    kill_after  seconds after its start at which it gets SIGKILL
    kill_at     [call, n, when]: it kills itself `before` or `after` its n-th call, counted from 1, or in the
                `middle` of it where the call is a write
    features    "nan" or "huge": the first image of the first batch gets such features
    user        id of the user that it runs as

What became of it: `exit_code` or `signal`, `seconds`, `timed_out`, and, if it came that far, `calls` (how often
it called what `kill_at` can name), `encoded` (images), `added` and `quarantined`, or `error` and `message`.
"""

from __future__ import annotations

import fcntl
import io
import json
import os
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"

import h5py
import torch
import zarr
from pyarrow import parquet

import cli.extract
import ris_cache.extraction.pipeline as pipeline
from cli.app import app
from ris_cache.datasets import parse_selections
from ris_cache.encoders.frozen import FrozenEncoders
from ris_cache.encoders.images import decode_image
from ris_cache.errors import RisError
from ris_cache.extraction.estimate import estimate
from ris_cache.extraction.run import Layout, extract
from ris_cache.store.cache import FeatureCache

SYSTEM_CALLS = {
    "fsync": (os, "fsync"),
    "replace": (os, "replace"),
    "open": (os, "open"),
    "mkdir": (os, "mkdir"),
    "unlink": (os, "unlink"),
    "rmdir": (os, "rmdir"),
    "flock": (fcntl, "flock"),
}
MOST_SECONDS = 60.0
LIBRARIES = (estimate, zarr, h5py, parquet)  # so that no fork spends time on importing them


@dataclass
class Trial:
    """One trial under way."""

    pid: int
    report: int
    started: float
    due: list[tuple[float, int]]


class Calls:
    """Counts system calls, and ends the process at one of them."""

    def __init__(self, kill_at: list[Any] | None) -> None:
        self.counts: Counter[str] = Counter()
        self._kill_at = tuple(kill_at) if kill_at else None

    def watch(self) -> None:
        """Put counting functions in the place of the system's."""
        for name, (module, attribute) in SYSTEM_CALLS.items():
            setattr(module, attribute, self._counting(name, getattr(module, attribute)))
        plain_open = io.open

        def watched_open(file: Any, mode: str = "r", *arguments: Any, **options: Any) -> Any:
            opened = plain_open(file, mode, *arguments, **options)
            return WatchedFile(opened, self) if mode == "wb" else opened

        io.open = watched_open

    def reach(self, name: str, when: str) -> None:
        """Die here, if this is where the trial is to end."""
        if (name, self.counts[name], when) == self._kill_at:
            os.kill(os.getpid(), signal.SIGKILL)

    def is_due(self, name: str, when: str) -> bool:
        """Whether `reach` would not come back."""
        return (name, self.counts[name], when) == self._kill_at

    def _counting(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def counted(*arguments: Any, **options: Any) -> Any:
            self.counts[name] += 1
            self.reach(name, "before")
            result = function(*arguments, **options)
            self.reach(name, "after")
            return result

        return counted


class WatchedFile:
    """A file being written, whose writes count."""

    def __init__(self, opened: Any, calls: Calls) -> None:
        self._opened = opened
        self._calls = calls

    def write(self, content: Any) -> int:
        self._calls.counts["write"] += 1
        self._calls.reach("write", "before")
        if self._calls.is_due("write", "middle"):
            self._opened.write(memoryview(content)[: len(content) // 2])
            self._opened.flush()
        self._calls.reach("write", "middle")
        written = self._opened.write(content)
        self._opened.flush()
        self._calls.reach("write", "after")
        return int(written)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._opened, name)

    def __enter__(self) -> WatchedFile:
        return self

    def __exit__(self, *error: object) -> None:
        self._opened.close()


def main() -> None:
    """Answer requests until there are no more."""
    torch.set_num_threads(1)
    encoders = cli.extract.load_encoders(
        "tiny", sam_weights=None, clip_weights=None, random_seed=0, arithmetic="float32", device="cpu"
    )
    answer("ready")
    for line in sys.stdin:
        trials = [start(request, encoders) for request in json.loads(line)]
        answer(json.dumps(follow(trials)))


def answer(line: str) -> None:
    """Say a line to whoever started this program."""
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


def start(request: dict[str, Any], encoders: FrozenEncoders) -> Trial:
    """Fork a trial off."""
    reading, writing = os.pipe()
    started = time.monotonic()
    pid = os.fork()
    if pid == 0:
        os.close(reading)
        code = 99
        try:
            code = run(request, encoders, writing)
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
    os.close(writing)
    due: list[tuple[float, int]] = [(started + MOST_SECONDS, signal.SIGKILL)]
    if "kill_after" in request:
        due.insert(0, (started + request["kill_after"], signal.SIGKILL))
    return Trial(pid=pid, report=reading, started=started, due=due)


def follow(trials: list[Trial]) -> list[dict[str, Any]]:
    """Send each trial its signals when they are due, until all have ended."""
    running = {trial.pid: trial for trial in trials}
    endings: dict[int, dict[str, Any]] = {}
    while running:
        now = time.monotonic()
        for trial in running.values():
            while trial.due and trial.due[0][0] <= now:
                os.kill(trial.pid, trial.due.pop(0)[1])
        for pid in list(running):
            ended, status = os.waitpid(pid, os.WNOHANG)
            if ended:
                endings[pid] = ending_of(running.pop(pid), status)
        time.sleep(0.001)
    return [endings[trial.pid] for trial in trials]


def ending_of(trial: Trial, status: int) -> dict[str, Any]:
    """Say what became of a trial that has just ended."""
    seconds = time.monotonic() - trial.started
    with os.fdopen(trial.report) as report:
        told = json.loads(report.read() or "{}")
    has_signal = os.WIFSIGNALED(status)
    return {
        "encoded": None,
        **told,
        "signal": os.WTERMSIG(status) if has_signal else None,
        "exit_code": None if has_signal else os.WEXITSTATUS(status),
        "seconds": seconds,
        "timed_out": has_signal and seconds >= MOST_SECONDS,
    }


def run(request: dict[str, Any], encoders: FrozenEncoders, report: int) -> int:
    """Do what a trial asks for, in its own process; returns the exit code."""
    log = os.open(request["log"], os.O_WRONLY | os.O_APPEND | os.O_CREAT) if "log" in request else None
    if "output" in request:
        output = os.open(request["output"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
        os.dup2(output, 1)
        os.dup2(output, 2)
    else:
        os.dup2(2, 1)
    told: dict[str, Any] = {"encoded": 0}
    note_images(log, told)
    if "features" in request:
        spoil_features(request["features"])
    if "user" in request:
        os.setgroups([])
        os.setgid(request["user"])
        os.setuid(request["user"])
    calls = Calls(request.get("kill_at"))
    calls.watch()
    try:
        code = 0
        if "argv" in request:
            code = run_command(request["argv"], encoders)
        elif "read" in request:
            cache = FeatureCache.open(request["read"])
            cache.read(cache.image_ids.tolist())
        else:
            told |= run_extraction(request["extract"], encoders)
    except RisError as error:
        told |= {"error": type(error).__name__, "message": str(error)}
        code = error.exit_code
    os.write(report, json.dumps({**told, "calls": calls.counts}).encode())
    return code


def run_command(argv: list[str], encoders: FrozenEncoders) -> int:
    """Run `ris`; the encoders are the ones at hand, whatever it asks for."""
    cli.extract.load_encoders = lambda *arguments, **options: encoders
    try:
        app(argv)
    except SystemExit as ended:
        return int(ended.code or 0)
    return 0


def run_extraction(arguments: dict[str, Any], encoders: FrozenEncoders) -> dict[str, Any]:
    """Run an extraction; returns its report."""
    options = dict(arguments)
    report = extract(
        parse_selections(options.pop("split")),
        data_root=Path(options.pop("data")),
        cache_root=Path(options.pop("cache")),
        encoders=encoders,
        batch_size=options.pop("batch_size", 4),
        layout=Layout(backend=options.pop("store", None), shard_rows=options.pop("shard_rows", None)),
        workers=1,
        **options,
    )
    return {"added": report.added, "quarantined": report.quarantined}


def note_images(log: int | None, told: dict[str, Any]) -> None:
    """Write down which images are decoded, at once, and how many are encoded."""
    plain_encode = FrozenEncoders.encode

    def decode(path: Path, **options: Any) -> Any:
        if log is not None:
            os.write(log, f"{path.name}\n".encode())
        return decode_image(path, **options)

    def encode(self: FrozenEncoders, sam_pixels: Any, clip_pixels: Any) -> Any:
        told["encoded"] += len(sam_pixels)
        return plain_encode(self, sam_pixels, clip_pixels)

    vars(pipeline)["decode_image"] = decode
    FrozenEncoders.encode = encode  # type: ignore[method-assign]


def spoil_features(how: str) -> None:
    """Have the encoders give the first image of their first batch features that cannot be stored."""
    plain_encode = FrozenEncoders.encode
    values = iter([{"nan": float("nan"), "huge": 1e5}[how]])

    def encode(self: FrozenEncoders, sam_pixels: Any, clip_pixels: Any) -> Any:
        features = plain_encode(self, sam_pixels, clip_pixels)
        for value in values:
            features["sam"][0, 0, 0, 0] = value
        return features

    FrozenEncoders.encode = encode  # type: ignore[method-assign]


if __name__ == "__main__":
    main()

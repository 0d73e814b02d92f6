"""Ctrl-C and SIGTERM: what is committed, what is said, and what the shell is told."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from cli.extract import load_encoders
from cli.signals import SIGNALS, StopRequest
from cli.train import _request as training_request
from ris_cache.datasets import parse_selections
from ris_cache.datasets.shapes import write_shapes_dataset
from ris_cache.extraction.run import Layout, extract, make_recipe
from ris_cache.store.planning import NewImage
from ris_cache.store.writer import CacheWriter

NUM_IMAGES = 52
MOST_SECONDS = 90.0
BEGUN_SECONDS = 0.15  # the whole shard takes 0.8 and more


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_the_first_signal_is_a_request_and_the_second_one_interrupts(number, code, capfd):
    with StopRequest("after this page") as stop:
        assert not stop()
        os.kill(os.getpid(), number)
        assert stop()
        assert stop.exit_code == code
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)

    captured = capfd.readouterr()
    assert captured.err == "stopping after this page; once more to stop at once\n"
    assert captured.out == ""


USR1, TERM, INT = signal.SIGUSR1, signal.SIGTERM, signal.SIGINT


@pytest.mark.parametrize(
    ("numbers", "code", "said"),
    [
        ((USR1, TERM, USR1, TERM), 138, [""]),
        ((TERM, TERM), 143, [""]),
        ((TERM, INT), 143, ["", "; once more to stop at once"]),
        ((INT, TERM), 130, ["; once more to stop at once"]),
    ],
)
def test_training_is_interrupted_by_no_other_signal_than_a_second_ctrl_c(numbers, code, said, capfd):
    """A scheduler that warns with SIGUSR1 and follows by SIGTERM would lose the state that is being saved."""
    with training_request(is_one_of_several=False) as stop:
        for number in numbers:
            os.kill(os.getpid(), number)
            assert stop.exit_code == code
        if INT in numbers:
            with pytest.raises(KeyboardInterrupt):
                os.kill(os.getpid(), INT)

    assert capfd.readouterr().err.splitlines() == [f"stopping after this step or batch{end}" for end in said]


def test_several_processes_that_train_are_interrupted_by_none_and_the_first_one_speaks(capfd, monkeypatch):
    for rank in "01":
        monkeypatch.setenv("RANK", rank)
        with training_request(is_one_of_several=True) as stop:
            for number in (INT, INT, TERM, USR1):
                os.kill(os.getpid(), number)
        assert stop.exit_code == 130
        said = "stopping all processes after this step or batch\n" if rank == "0" else ""
        assert capfd.readouterr().err == said


def test_what_signals_did_before_they_do_again():
    before = [signal.getsignal(number) for number in SIGNALS]

    with contextlib.suppress(ZeroDivisionError), StopRequest("soon"):
        assert [signal.getsignal(number) for number in SIGNALS] != before
        raise ZeroDivisionError

    assert [signal.getsignal(number) for number in SIGNALS] == before


def test_without_a_signal_the_exit_code_is_that_of_an_interrupt():
    assert StopRequest("soon").exit_code == 130


class Command:
    """A real `ris extract`, started and watched from outside."""

    def __init__(self, directory: Path, data: Path, *options: str) -> None:
        directory.mkdir(exist_ok=True)
        self.cache = directory / "feats"
        self._err = directory / "stderr"
        with (directory / "stdout").open("wb") as out, self._err.open("wb") as err:
            self._process = subprocess.Popen(
                [
                    *(sys.executable, "-m", "cli", "extract", "--split", "refcoco", "--data", data),
                    *("--cache", self.cache, "--preset", "tiny", "--random-weights", "--device", "cpu"),
                    *("--workers", "1", "--batch-size", "2", *options),
                ],
                stdout=out,
                stderr=err,
                env=os.environ | {"OMP_NUM_THREADS": "1"},
            )  # fmt: skip

    @property
    def said(self) -> str:
        """Everything on stderr so far."""
        return self._err.read_text()

    @property
    def lines(self) -> list[str]:
        """What it said itself, without progress and without what installed libraries warn of."""
        return [line for line in self.said.splitlines() if not line.startswith(("extract: ", "WARNING: "))]

    def wait_until_it_says(self, words: str) -> None:
        """Watch stderr, while the command runs."""
        end = time.monotonic() + MOST_SECONDS
        while words not in self.said:
            assert self._process.poll() is None, f"it ended too early: {self.said}"
            assert time.monotonic() < end, f"it never said so: {self.said}"
            time.sleep(0.002)

    def send(self, number: int) -> None:
        """Send it a signal."""
        self._process.send_signal(number)

    def end(self) -> int:
        """Wait for its end; returns the exit code."""
        return self._process.wait(MOST_SECONDS)

    def kill(self) -> None:
        """End it, if it has not ended."""
        if self._process.poll() is None:
            self._process.kill()
            self._process.wait()

    def records(self) -> list[Path]:
        """The commit records that are there now."""
        return list((self.cache / "extraction/shards").glob("*.json"))

    def is_computing(self) -> bool:
        """Whether it claimed its first shard long enough ago to have begun with it."""
        claims = list((self.cache / "extraction/claims").glob("*.lock"))
        return bool(claims) and time.time() - claims[0].stat().st_mtime > BEGUN_SECONDS


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Data root with 52 drawn images."""
    root = tmp_path_factory.mktemp("drawn") / "data"
    write_shapes_dataset(root, num_images={"train": 36, "val": 8, "testA": 4, "testB": 4}, seed=3)
    return root


@pytest.fixture(scope="module")
def encoders() -> Any:
    """The encoders that the commands load."""
    return load_encoders(
        "tiny", sam_weights=None, clip_weights=None, random_seed=0, arithmetic="float32", device="cpu"
    )


@pytest.fixture(scope="module")
def run_here(data: Path, encoders: Any) -> Iterator[Callable[..., Any]]:
    """Extract in this process, on as many threads as the commands have, so that every bit is the same."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)

    def run_here(cache: Path, shard_rows: int | None = None) -> Any:
        return extract(
            parse_selections("refcoco"),
            data_root=data,
            cache_root=cache,
            encoders=encoders,
            batch_size=2,
            layout=Layout(shard_rows=shard_rows),
        )

    yield run_here
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def expected(run_here, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What an extraction in shards of 4 makes that nobody disturbs."""
    cache = tmp_path_factory.mktemp("undisturbed") / "feats"
    run_here(cache, shard_rows=4)
    return content(cache)


@pytest.fixture(scope="module")
def commands(
    tmp_path_factory: pytest.TempPathFactory, data: Path, encoders: Any
) -> Iterator[dict[str, Command]]:
    """All the commands that this file watches, started at once, since starting is most of what they do.

    The command `waiting` finds another writer, this process, at work on its cache.
    """
    root = tmp_path_factory.mktemp("commands")
    busy = root / "waiting" / "feats"
    image = NewImage(image_id=7, file_name="7.jpg", height=2, width=2)
    writer = CacheWriter.open(
        busy,
        make_recipe(encoders, busy, Layout(shard_rows=4)),
        purpose="extract",
        request={"--split": "other"},
        choose=lambda known: [image],
    )
    shard_rows = {"interrupted": 4, "terminated": 4, "twice": 64, "waiting": 4}
    started = {
        name: Command(root / name, data, "--shard-rows", str(rows)) for name, rows in shard_rows.items()
    }
    yield started
    writer.close()
    for command in started.values():
        command.kill()


def content(cache: Path) -> dict[str, Any]:
    """Every file by digest, but for the lock; of the manifest what does not tell the time."""
    found: dict[str, Any] = {
        path.relative_to(cache).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in cache.rglob("*")
        if path.is_file() and path.name not in (".lock", "manifest.json")
    }
    manifest = json.loads((cache / "manifest.json").read_bytes())
    return found | {name: value for name, value in manifest.items() if name not in ("recorded", "digest")}


@pytest.fixture(scope="module")
def endings(commands: dict[str, Command]) -> dict[str, int]:
    """Send every command its signals as soon as it has come far enough; returns the exit codes."""
    is_ready: dict[str, Callable[[Command], object]] = {
        "interrupted": Command.records,
        "terminated": Command.records,
        "twice": Command.is_computing,
        "waiting": lambda command: "waiting" in command.said,
    }
    left = dict(commands)
    end = time.monotonic() + MOST_SECONDS
    while left:
        assert time.monotonic() < end, f"never came far enough: {list(left)}"
        for name in [name for name, command in left.items() if is_ready[name](command)]:
            command = left.pop(name)
            command.send(signal.SIGTERM if name == "terminated" else signal.SIGINT)
            if name == "twice":
                command.wait_until_it_says("once more")
                command.send(signal.SIGINT)
        time.sleep(0.002)
    return {name: command.end() for name, command in commands.items()}


@pytest.mark.parametrize(("name", "code"), [("interrupted", 130), ("terminated", 143)])
def test_a_signal_commits_the_shard_at_hand_and_the_same_command_goes_on(
    name, code, commands, endings, run_here, expected
):
    command = commands[name]

    assert endings[name] == code
    done = 4 * len(command.records())
    assert 4 <= done < NUM_IMAGES, "it was no longer, or not yet, at work"
    assert command.lines == [
        "stopping after the shard at hand; once more to stop at once",
        f"stopped: Stopped after a whole shard; {done} of {NUM_IMAGES} images are done. The same command goes on "
        "from there.",
    ]
    assert not list(command.cache.rglob("*.tmp"))
    assert run_here(command.cache).added == NUM_IMAGES - done
    assert content(command.cache) == expected


def test_a_second_interrupt_ends_it_at_once(commands, endings, run_here):
    command = commands["twice"]

    assert endings["twice"] == 130
    assert command.lines == ["stopping after the shard at hand; once more to stop at once", "interrupted"]
    assert command.records() == []
    assert run_here(command.cache).added == NUM_IMAGES


def test_an_interrupt_ends_the_waiting_for_another_writer(commands, endings):
    command = commands["waiting"]

    assert endings["waiting"] == 130
    reason = f"another `ris extract` is at work on {command.cache} (--split other)"
    assert command.lines == [
        f"{reason}; waiting for it to end",
        "stopping after the shard at hand; once more to stop at once",
        f"stopped: Stopped while {reason}.",
    ]

"""What every command ends with: Ctrl-C at any moment, and too little memory."""

from __future__ import annotations

import signal
import sys
from collections.abc import Iterator

import pytest
import typer

import cli.entry
import cli.interruption
from cli.guard import guarded


@pytest.fixture(autouse=True)
def _signals_as_they_were() -> Iterator[None]:
    before = signal.getsignal(signal.SIGINT)
    yield
    signal.signal(signal.SIGINT, before)
    cli.interruption._is_interrupted = False


class Importing:
    """Takes the place of a module that is imported while the signal arrives."""

    def __init__(self, becomes: type[BaseException]) -> None:
        self._becomes = becomes

    def __getattr__(self, name: str) -> object:
        try:
            signal.raise_signal(signal.SIGINT)
        except KeyboardInterrupt:
            raise self._becomes from None
        raise AssertionError("no signal arrived")


@pytest.mark.parametrize("becomes", [KeyboardInterrupt, ModuleNotFoundError])
def test_ctrl_c_while_modules_are_imported_ends_without_a_traceback(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], becomes: type[BaseException]
) -> None:
    monkeypatch.setitem(sys.modules, "cli.app", Importing(becomes))  # type: ignore[arg-type]
    with pytest.raises(SystemExit) as caught:
        cli.entry.main()
    assert caught.value.code == 130
    assert capsys.readouterr().err == "interrupted\n"
    assert signal.getsignal(signal.SIGINT) is signal.SIG_DFL, "another one ends it in silence"


def test_a_module_that_is_missing_is_told_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cli.app", None)
    with pytest.raises(ImportError):
        cli.entry.main()


def test_ctrl_c_while_a_command_imports_ends_without_a_traceback(capsys: pytest.CaptureFixture[str]) -> None:
    def command() -> None:
        raise ModuleNotFoundError("Could not import module 'BertModel'")

    with pytest.raises(ModuleNotFoundError):
        guarded(command)()
    cli.interruption._is_interrupted = True
    with pytest.raises(typer.Exit) as caught:
        guarded(command)()
    assert (caught.value.exit_code, capsys.readouterr().err) == (130, "interrupted\n")


class OutOfMemoryError(RuntimeError):
    """Named as torch's."""


ON_THE_CPU = (
    "[enforce fail at alloc_cpu.cpp:118] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to"
)


def train(fail: Exception) -> None:
    raise fail


def predict(fail: Exception) -> None:
    raise fail


def extract(fail: Exception, batch_size: int = 1) -> None:
    raise fail


def show(fail: Exception) -> None:
    raise fail


@pytest.mark.parametrize(
    "fail", [MemoryError(), OutOfMemoryError("CUDA"), RuntimeError(ON_THE_CPU)], ids=repr
)
@pytest.mark.parametrize(
    ("command", "hint"),
    [
        (train, "--set train.accumulate=…; or lower train.batch_size"),
        (predict, "name fewer expressions at a time"),
        (extract, "lower --batch-size"),
        (show, "end other programs"),
    ],
)
def test_too_little_memory_names_what_this_command_has_against_it(
    capsys: pytest.CaptureFixture[str], command: object, hint: str, fail: Exception
) -> None:
    assert callable(command)
    with pytest.raises(typer.Exit) as caught:
        guarded(command)(fail)
    message = capsys.readouterr().err
    assert caught.value.exit_code == 1
    assert message.startswith("error: out of memory; ")
    assert hint in message


def test_torch_says_of_the_cpu_what_is_looked_for() -> None:
    import torch

    with pytest.raises(RuntimeError, match="can't allocate memory"):
        torch.empty(2**56, dtype=torch.uint8)
    with pytest.raises(RuntimeError, match="another"):
        guarded(train)(RuntimeError("another error"))

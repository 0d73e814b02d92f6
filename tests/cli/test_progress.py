"""What a long command says on stderr while it works."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from cli import progress
from cli.progress import ImageProgress, duration


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    """A clock that stands still until it is told to go on."""
    now = [1000.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])

    def go_on(seconds: float) -> None:
        now[0] += seconds

    return go_on


def test_lines_tell_images_speed_time_left_and_quarantine(clock, capsys):
    watcher = ImageProgress(is_terminal=False, interval=10)
    watcher.start(total=100, done=20)
    for _ in range(9):
        clock(1.0)
        watcher.advance(None)
    assert capsys.readouterr().err == ""
    clock(1.0)
    watcher.advance("x.jpg is torn")

    assert capsys.readouterr().err.splitlines() == [
        "quarantined: x.jpg is torn",
        "extract: 30/100 images, 1.0 images/s, 70 s left, 1 quarantined",
    ]


def test_what_was_there_before_counts_neither_for_speed_nor_for_time_left(clock, capsys):
    watcher = ImageProgress(is_terminal=False, interval=1)
    watcher.start(total=1000, done=900)
    clock(50.0)

    watcher.advance(None)

    assert capsys.readouterr().err == "extract: 901/1000 images, 0.0 images/s, 82 min left, 0 quarantined\n"


def test_a_line_comes_once_an_interval_and_one_at_the_end(clock, capsys):
    watcher = ImageProgress(is_terminal=False, interval=30)
    watcher.start(total=100, done=0)
    for _ in range(100):
        clock(1.0)
        watcher.advance(None)
    watcher.stop()

    shown = [line.split()[1] for line in capsys.readouterr().err.splitlines()]
    assert shown == ["30/100", "60/100", "90/100", "100/100"]


def test_nothing_is_said_where_nothing_is_done(clock, capsys):
    watcher = ImageProgress(is_terminal=False, interval=0)
    watcher.start(total=5, done=5)
    watcher.stop()
    ImageProgress(is_terminal=False).stop()

    assert capsys.readouterr().err == ""


def test_lines_are_for_people_so_stdout_stays_free(clock, capsys):
    watcher = ImageProgress(is_terminal=False, interval=0)
    watcher.start(total=2, done=0)
    watcher.advance(None)
    watcher.say("waiting")
    watcher.stop()

    captured = capsys.readouterr()
    assert captured.out == ""
    assert "waiting\n" in captured.err


def test_a_terminal_gets_a_bar(capsys):
    watcher = ImageProgress(is_terminal=True, interval=0)
    watcher.start(total=4, done=1)
    for reason in (None, "x.jpg is torn", None):
        watcher.advance(reason)
    watcher.say("nearly there")
    watcher.stop()

    captured = capsys.readouterr()
    assert captured.out == ""
    assert "4/4" in captured.err
    assert "quarantined=1" in captured.err
    assert "quarantined: x.jpg is torn\n" in captured.err
    assert "nearly there\n" in captured.err
    assert "images/s," not in captured.err


def test_whether_stderr_is_a_terminal_is_asked_of_it(capsys):
    watcher = ImageProgress(interval=0)
    watcher.start(total=1, done=0)
    watcher.advance(None)

    assert capsys.readouterr().err.startswith("extract: 1/1 images")


@pytest.mark.parametrize(
    ("seconds", "said"),
    [
        (0, "0 s"),
        (0.4, "0 s"),
        (45.3, "45 s"),
        (99.4, "99 s"),
        (100, "2 min"),
        (719, "12 min"),
        (99 * 60, "99 min"),
        (100 * 60, "1 h 40 min"),
        (3 * 3600 + 5 * 60, "3 h 5 min"),
        (60 * 3600, "60 h 0 min"),
        (float("inf"), "unknown"),
    ],
)
def test_a_length_of_time_is_said_as_people_do(seconds, said):
    assert duration(seconds) == said


def test_a_longer_time_is_never_said_as_a_shorter_one():
    minutes = {"s": 1 / 60, "min": 1, "h": 60}
    lengths = []
    for seconds in range(0, 20_000, 7):
        words = duration(seconds).split()
        lengths.append(sum(int(n) * minutes[unit] for n, unit in zip(words[::2], words[1::2], strict=True)))

    assert lengths == sorted(lengths)

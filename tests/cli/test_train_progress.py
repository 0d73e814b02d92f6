"""Progress of training: a line now and then, and one at the end."""

from __future__ import annotations

import time

from cli.train_progress import TrainProgress


def test_a_line_has_loss_rate_waiting_and_time_left(capsys, monkeypatch):
    """Rates are of the steps' own 4 s, of the 100 s that an evaluation took besides; the time left is of all."""
    now = [1000.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    progress = TrainProgress(is_terminal=False, interval=0.0)
    progress.start(total=10, done=4)
    progress.advance(loss=2.0, samples=8, images=6, waited=0.0, seconds=1.0)
    now[0] += 104
    progress.advance(loss=1.0, samples=8, images=6, waited=1.0, seconds=3.0)
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 2
    assert lines[1] == (
        "train: step 6/10, loss 1.980, 4.0 expressions/s, 3.0 images/s, 25 % waiting for data, 3 min left"
    )


def test_nothing_is_printed_between_lines_but_what_is_said(capsys):
    progress = TrainProgress(is_terminal=False, interval=1000.0)
    progress.start(total=3, done=0)
    progress.advance(loss=2.0, samples=8, images=6, waited=0.0, seconds=1.0)
    progress.say("step 1: val oIoU 3.00")
    assert capsys.readouterr().err == "step 1: val oIoU 3.00\n"
    progress.stop()
    assert "step 1/3" in capsys.readouterr().err


def test_a_terminal_gets_a_bar_with_the_same_facts(capsys):
    progress = TrainProgress(is_terminal=True)
    progress.start(total=2, done=0)
    progress.advance(loss=2.0, samples=8, images=6, waited=0.0, seconds=1.0)
    progress.stop()
    shown = capsys.readouterr().err
    assert "train:" in shown
    assert "waiting for data" in shown


def test_a_run_that_was_finished_shows_no_bar(capsys):
    progress = TrainProgress(is_terminal=True)
    progress.start(total=2, done=2)
    progress.stop()
    assert capsys.readouterr().err == ""

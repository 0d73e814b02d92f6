"""benchmarks/train_step.py runs every way, its parts add up, and what it counts is what was done."""

from __future__ import annotations

import contextlib
import importlib
import io
import json
import shlex
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))  # as `python benchmarks/train_step.py` does
train_step, bench, ceilings, clock, larger, report, startup = (
    importlib.import_module(name)
    for name in (
        "train_step",
        *(f"training.{part}" for part in ("bench", "ceilings", "clock", "larger", "report", "startup")),
    )
)
sys.path.remove(str(BENCHMARKS))

CPU = torch.device("cpu")
SMALL = "--images 2 --batch 4 --steps 1 --warm-up 1 --device cpu"


def run(options: str, root: Path) -> dict[str, Any]:
    path = root / "results.json"
    assert train_step.main(shlex.split(f"{options} --dir {root} --json {path}")) == 0
    results: dict[str, Any] = json.loads(path.read_text())
    return results


def test_every_part_and_every_way_is_in_the_tables_and_the_json(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    results = run(f"{SMALL} --markdown", tmp_path)
    text = capsys.readouterr().out
    ours, looped, live = results["ways"]
    assert (looped["name"][:3], live["name"][:3]) == ("(a)", "(b)")
    parts = {
        "wait for data",
        "forward: language",
        "forward: pixel_decoder",
        "forward: dfam",
        "forward: mask_decoder",
        "losses: matching",
        "losses: dice",
        "losses: bce",
        "losses: vl",
        "backward",
        "optimiser",
    }
    assert parts <= set(ours["split"])
    assert set(live["split"]) - set(ours["split"]) == {"encoders"}
    for way in results["ways"]:
        # Of one step, the medians are the step's own values.
        assert sum(way["split"].values()) == pytest.approx(way["ms"])
        assert way["waiting"] == pytest.approx(way["split"]["wait for data"] / way["ms"])
        assert all(ms >= 0 for ms in way["split"].values()), way
        assert f"| {way['name']}" in text
    assert results["floor"]["floor_ms"] > 0
    assert "% of what the device could do" in text
    assert results["command"] in text
    assert results["machine"]["libraries"]["torch"] in text
    assert [path.name for path in tmp_path.iterdir()] == ["results.json"]


def test_grouping_puts_fewer_images_into_a_batch(tmp_path: Path) -> None:
    ways = run(f"{SMALL} --grouped 1,4 --steps 2", tmp_path)["ways"]
    assert [way["name"] for way in ways] == ["each expression by itself", "4 expressions of an image"]
    assert ways[1]["images"] <= 2


def test_starting_up_is_measured_for_the_number_asked_for_and_a_tenth(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def in_this_process(command: list[str], **options: Any) -> subprocess.CompletedProcess[str]:
        assert command[1] == startup.__file__
        with contextlib.redirect_stdout(io.StringIO()) as printed:
            assert startup.main(command[2:]) == 0
        return subprocess.CompletedProcess(command, 0, stdout=printed.getvalue())

    monkeypatch.setattr(train_step, "subprocess", SimpleNamespace(run=in_this_process, PIPE=subprocess.PIPE))
    small, large = run("--startup 1000 --steps 1 --images 2 --device cpu", tmp_path)["startup"]
    assert 85 <= small["expressions"] < 100 < 900 <= large["expressions"] < 1000  # of train
    for found in (small, large):
        seconds = [after for _, after, _, _ in found["stages"]]
        assert seconds == sorted(seconds)
        assert found["step_ms"] > 0
    assert "first batch" in capsys.readouterr().out


def test_a_larger_set_is_trained_on_beside_the_smaller_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def in_this_process(command: list[str], **options: Any) -> subprocess.CompletedProcess[str]:
        assert command[1] == larger.__file__
        with contextlib.redirect_stdout(io.StringIO()) as printed:
            assert larger.main(command[2:]) == 0
        return subprocess.CompletedProcess(command, 0, stdout=printed.getvalue())

    monkeypatch.setattr(train_step, "subprocess", SimpleNamespace(run=in_this_process, PIPE=subprocess.PIPE))
    one, three = run("--larger 3 --images 1 --batch 2 --steps 2 --device cpu", tmp_path)["larger"]
    assert (one["images"], three["images"]) == (1, 3)
    assert 0 < one["expressions"] < three["expressions"]
    for found in (one, three):
        assert list(found["memory"]) == ["0", "1", "2"]
        assert found["steps_per_s"] > 0
    assert "MB at step 2" in capsys.readouterr().out


def test_what_an_expression_takes_is_the_difference_over_both_sets() -> None:
    """1,000 expressions more and 3 MB before the first step: 3 KB each."""
    runs = [
        {"images": 1, "expressions": 10, "steps_per_s": 4.0, "memory": {"0": 10_000_000}},
        {"images": 9, "expressions": 1010, "steps_per_s": 3.0, "memory": {"0": 13_000_000}},
    ]
    said = report.larger_table(runs, markdown=False)[-1]
    assert "3.00 KB at step 0" in said
    assert "0.75" in said


def test_a_loop_over_samples_decodes_the_same_masks() -> None:
    class Decoder(nn.Module):
        def forward(self, image_embeddings: Any, sparse_prompt: Any, dense_prompt: Any) -> Any:
            return (image_embeddings * dense_prompt).sum(1) + sparse_prompt.sum((1, 2))[:, None, None]

    inputs = torch.randn(3, 4, 2, 2), torch.randn(3, 1, 4), torch.randn(3, 4, 2, 2)
    torch.testing.assert_close(bench.LoopedMaskDecoder(Decoder())(*inputs), Decoder()(*inputs))


def test_a_span_does_not_count_what_lies_within_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """The outer span takes 1 + 2 + 1 + 4 + 1 s, of which 2 and 4 are the inner ones'."""
    moments = iter([0.0, 1.0, 3.0, 4.0, 8.0, 9.0])
    monkeypatch.setattr(clock.time, "perf_counter", lambda: next(moments))
    found = clock.StepClock(CPU)
    with found.span("outer"):
        with found.span("inner"):
            pass
        with found.span("inner"):
            pass
    assert found.own_ms() == {"outer": 3000, "inner": 6000}


def test_the_children_and_functions_of_a_step_are_timed_and_then_left_alone() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.ReLU())
    found = clock.StepClock(CPU)
    relu = nn.functional.relu
    with (
        clock.timed_children(found, model, "part "),
        clock.timed_functions(found, {(nn.functional, "relu"): "relu"}),
        found.span("rest"),
    ):
        model(torch.ones(1, 2))
    assert set(found.own_ms()) == {"rest", "part 0", "part 1", "relu"}
    model(torch.ones(1, 2))
    assert set(found.own_ms()) == {"rest", "part 0", "part 1", "relu"}
    assert nn.functional.relu is relu


def test_the_work_of_a_linear_layer_is_counted_by_hand() -> None:
    """[4, 8] times [8, 16], forward and for the weight's gradient; the input needs none."""
    model, inputs = nn.Linear(8, 16), torch.randn(4, 8)
    work = ceilings.count_work(model, lambda: model(inputs).sum(), (inputs,))
    assert work.flops == 2 * (2 * 4 * 8 * 16)
    assert work.parameter_bytes == 10 * 4 * (8 * 16 + 16)
    assert work.activation_bytes == 2 * 4 * 4 * 8
    assert work.feature_bytes == 4 * 4 * 8


def test_the_floor_is_the_longer_of_computing_and_moving() -> None:
    work = ceilings.Work(flops=6000, parameter_bytes=100, activation_bytes=200, feature_bytes=300)
    for rates, floor in (((1000, 600), 6000), ((6000, 100), 6000), ((6000, 300), 2000)):
        found = ceilings.Ceilings(flops_per_s=rates[0], bytes_per_s=rates[1])
        assert found.floor_ms(work) == floor


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ("--startup 1000 --preset paper", "--startup takes preset tiny"),
        ("--larger 10 --preset paper", "--larger takes preset tiny"),
        ("--json no/such/file", "no/such"),
    ],
)
def test_what_cannot_be_measured_is_refused_at_once(
    options: str, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train_step.main(shlex.split(options)) == 2
    assert said in capsys.readouterr().err


@pytest.mark.parametrize("options", ["--startup 10", "--larger 1", "--grouped 1,0", "--batch many"])
def test_numbers_that_mean_nothing_are_refused(options: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        train_step.main(shlex.split(options))
    assert options.split()[0] in capsys.readouterr().err

"""benchmarks/train_step.py runs every way, its parts add up, and what it counts is what was done."""

from __future__ import annotations

import contextlib
import importlib
import io
import json
import shlex
import sys
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from ris_train.config import load_config
from ris_train.data.batch import Batch
from ris_train.model.segmenter import ModelInputs
from ris_train.ranks import Ranks
from ris_train.training.setup import prepare
from ris_train.training.start import train
from ris_train.training.step import StepBatch

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))  # as `python benchmarks/train_step.py` does
PARTS = ("bench", "ceilings", "child", "clock", "larger", "operations", "report", "startup", "steps", "way")
train_step, bench, ceilings, child, clock, larger, operations, report, startup, steps, way = (
    importlib.import_module(name) for name in ("train_step", *(f"training.{part}" for part in PARTS))
)
sys.path.remove(str(BENCHMARKS))

CPU = torch.device("cpu")
in_own_process = child.in_own_process
SMALL = "--images 2 --batch 4 --steps 1 --warm-up 1 --device cpu"


@pytest.fixture(autouse=True)
def in_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Measure here what otherwise takes a process of its own each time."""

    def run_here(module: str, *arguments: object) -> Any:
        with contextlib.redirect_stdout(io.StringIO()) as printed:
            assert sys.modules[module].main([str(argument) for argument in arguments]) == 0
        return json.loads(printed.getvalue())

    monkeypatch.setattr(child, "in_own_process", run_here)


def run(options: str, root: Path) -> dict[str, Any]:
    path = root / "results.json"
    assert train_step.main(shlex.split(f"{options} --dir {root} --json {path}")) == 0
    results: dict[str, Any] = json.loads(path.read_text())
    return results


def test_every_part_and_every_way_is_in_the_tables_and_the_json(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(ceilings, "_CEILING_SECONDS", 0)  # of three rounds at least
    loaded = []
    load_encoders = bench.load_encoders
    monkeypatch.setattr(
        bench, "load_encoders", lambda *options: loaded.append(options) or load_encoders(*options)
    )
    results = run(f"{SMALL} --markdown", tmp_path)
    assert len(loaded) == 2, "to extract, and for the way that runs them in every step"
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
        "clip gradients",
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
    counted = results["floor"]["work"]["operations"]
    assert parts - {"wait for data"} <= set(counted) <= set(ours["split"])
    assert f"{sum(counted.values()):,} (forward" in text
    assert "% of what the device could do" in text
    assert results["command"] in text
    assert results["machine"]["libraries"]["torch"] in text
    assert [path.name for path in tmp_path.iterdir()] == ["results.json"]


def test_grouping_puts_fewer_images_into_a_batch(tmp_path: Path) -> None:
    ways = run(f"{SMALL} --grouped 1,4", tmp_path)["ways"]
    assert [way["name"] for way in ways] == ["each expression by itself", "4 expressions of an image"]
    assert ways[1]["images"] <= 2


def test_starting_up_is_measured_for_the_number_asked_for_and_a_tenth(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    small, large = run("--startup 1000 --steps 1 --images 2 --device cpu", tmp_path)["startup"]
    assert 85 <= small["expressions"] < 100 < 900 <= large["expressions"] < 1000  # of train
    for found in (small, large):
        seconds = [after for _, after, _, _ in found["stages"]]
        names = [name for name, *_ in found["stages"]]
        assert names[1:5] == [
            "open the cache",
            "training samples",
            "validation samples and truth",
            "model",
        ]
        assert names[-2:] == ["first step", "2 steps"]
        assert seconds == sorted(seconds)
        assert found["step_ms"] > 0
    assert "first batch" in capsys.readouterr().out


def test_a_larger_set_is_trained_on_beside_the_smaller_one(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
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
        clock.within_spans(found, {(nn.functional, "relu"): "relu"}, model, "part "),
        found.span("rest"),
    ):
        model(torch.ones(1, 2))
    assert set(found.own_ms()) == {"rest", "part 0", "part 1", "relu"}
    model(torch.ones(1, 2))
    assert set(found.own_ms()) == {"rest", "part 0", "part 1", "relu"}
    assert nn.functional.relu is relu


def test_the_step_that_is_measured_is_that_of_ris_train(tmp_path: Path) -> None:
    """The weights after two steps are the very ones of a run, schedule, dropout and clipping included."""
    cache = bench.draw_cache("tiny", CPU, tmp_path, 1)
    overrides = ["train.steps=2", "train.batch_size=3", "data.val=refcoco:train", "train.val_samples=1"]
    config = load_config(recipe="tiny", overrides=[*overrides, "model.bert.dropout=0.5"])
    train(cache, config, tmp_path / "run", device=CPU, random_seed=0)
    trainee = steps.Trainee(prepare(cache, config, Ranks(0, 1, CPU), random_seed=0))
    with closing(trainee.setup.batches(0, 1)) as batches:
        assert [trainee.step(batch) for batch in batches] == [True, True]
    kept = load_file(tmp_path / "run" / "checkpoints" / "state-2" / "model.safetensors")
    own = trainee.model.state_dict()
    assert kept
    for name, weight in kept.items():
        assert torch.equal(own[name], weight), name


def whole_batch(features: torch.Tensor) -> StepBatch:
    tokens = torch.zeros(1, 1, dtype=torch.int64)
    inputs = ModelInputs(
        image_embeddings=features,
        clip_features=features,
        token_ids=tokens,
        text_mask=tokens == 0,
        category_embeddings=None,
    )
    part = Batch(samples=(), inputs=inputs, targets=None)
    return StepBatch(step=1, samples=(), parts=(part,), token_ids=tokens, text_mask=tokens == 0, first=0)


def work_of(
    step: Callable[[], torch.Tensor], model: nn.Module, features: torch.Tensor, **options: Any
) -> Any:
    def within(spans: Any) -> None:
        with spans.span("step"):
            step().sum().backward()

    return ceilings.count_work(within, model, whole_batch(features), **{"is_half": False, **options})


def test_the_work_of_a_linear_layer_is_counted_by_hand() -> None:
    """[4, 8] times [8, 16], forward and for the weight's gradient; the features need none.

    The backward pass needs the features, which are no activation, and what ReLU puts out.
    """
    model, features = nn.Sequential(nn.Linear(8, 16), nn.ReLU()), torch.randn(4, 8)
    work = work_of(lambda: model(features), model, features)
    assert work.flops == 2 * (2 * 4 * 8 * 16)
    assert work.parameter_bytes == 10 * 4 * (8 * 16 + 16)
    assert work.kept_bytes == 4 * 4 * 16
    assert work.feature_bytes == 4 * 4 * 8
    assert work.moved_bytes == work.parameter_bytes + work.feature_bytes
    half = work_of(lambda: model(features), model, features, is_half=True)
    assert half.parameter_bytes == 34 * (8 * 16 + 16)


def test_attention_on_a_cpu_is_counted() -> None:
    """Two products forward; backward scores again, and the gradients of weights, value, query and key."""
    query = torch.randn(2, 3, 5, 8, requires_grad=True)
    work = work_of(
        lambda: nn.functional.scaled_dot_product_attention(query, query, query), nn.Identity(), query
    )
    assert work.flops == (2 + 5) * (2 * 2 * 3 * 5 * 5 * 8)


@pytest.mark.parametrize(
    ("work", "number"),
    [
        (lambda x: x.view(4, 1)[1:].t().unsqueeze(0).detach(), 0),
        (lambda x: torch.empty_like(x).new_empty(3).transpose_(0, 0), 0),
        (lambda x: (x + 1).add_(2), 2),
        (lambda x: x[0, 0].item(), 1),
        (lambda x: torch.empty(2, 2, device="meta") + 1, 0),
        (lambda x: torch._foreach_add([x, x], 1), 1),
    ],
)
def test_operations_that_compute_or_move_are_counted(
    work: Callable[[torch.Tensor], object], number: int
) -> None:
    values = torch.ones(2, 2)
    with operations.OperationCounter(CPU) as counter, counter.span("outer"):
        with counter.span("inner"):
            work(values)
        values.neg()
    assert (counter.counts["inner"], counter.counts["outer"]) == (number, 1)


def test_the_floor_is_the_longer_of_computing_and_moving() -> None:
    """What an implementation keeps, and how many operations it has, is no bound on others."""
    work = ceilings.Work(
        flops=6000, parameter_bytes=100, feature_bytes=500, kept_bytes=10**9, operations={"step": 10**9}
    )
    for rates, floor in (((1000, 600), 6000), ((6000, 100), 6000), ((6000, 300), 2000)):
        found = ceilings.Ceilings(flops_per_s=rates[0], bytes_per_s=rates[1])
        assert found.floor_ms(work) == floor


def test_a_process_of_its_own_gives_what_it_prints_or_says_that_it_failed(tmp_path: Path) -> None:
    path = tmp_path / "found.json"
    path.write_text('{"ms": 1.5}')
    assert in_own_process("json.tool", path) == {"ms": 1.5}
    path.write_text("{")
    with pytest.raises(child.ChildError) as raised:
        in_own_process("json.tool", path)
    assert raised.value.facts["exit_code"] == 1


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

"""Several processes compute what one does, and end together."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from ris_cache import FeatureCache
from ris_cache.errors import ConfigError
from ris_train.checkpoint import load_checkpoint
from ris_train.data.text import Tokenizer
from ris_train.ranks import OtherRankError, Ranks
from ris_train.validation import Validation

SETTINGS = (
    "train.batch_size=5", "train.eval_every=10", "train.log_every=1", "train.val_samples=6",
    "train.warmup_steps=0", "loss.num_points=32", "loss.mask_size=32",
)  # fmt: skip


def torchrun(processes: int, *arguments: object) -> subprocess.Popen[str]:
    """Start processes on this machine, one thread each."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node"]
    return subprocess.Popen(
        [*launcher, str(processes), *map(str, arguments)],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,
    )


def train(processes: int, cache: Path, runs: Path, steps: int) -> subprocess.Popen[str]:
    settings = [part for setting in SETTINGS for part in ("--set", setting)]
    return torchrun(
        processes, "-m", "--", "cli", "train", "--cache", cache, "--runs", runs, "--run", processes,
        "--random-weights", "--device", "cpu", "--max-steps", steps, "--json", *settings,
    )  # fmt: skip


def logged(runs: Path, name: str) -> list[dict[str, object]]:
    return [json.loads(line) for line in (runs / name / "metrics.jsonl").read_text().splitlines()]


TWENTY_STEPS = """
import json, sys
from dataclasses import replace
from pathlib import Path
import torch
from safetensors.torch import save_file
from ris_train.config import load_config
from ris_train.optim import build_optimiser, set_rate
from ris_train.ranks import join_ranks, leave_ranks
from ris_train.training.randomness import seed_step
from ris_train.training.setup import prepare
from ris_train.training.step import StepComputer

def double(values):
    names = values.__dataclass_fields__
    tensors = {name: getattr(values, name) for name in names}
    wide = {n: t.double() for n, t in tensors.items() if t is not None and t.is_floating_point()}
    return replace(values, **wide)

cache, out, *overrides = sys.argv[1:]
config = load_config(recipe="tiny", overrides=overrides)
ranks = join_ranks(torch.device("cpu"))
losses = {}
for dtype in (torch.float32, torch.float64):
    setup = prepare(Path(cache), config, ranks, random_seed=0)
    model = setup.model.to(dtype).train()
    torch.set_default_dtype(dtype)
    for module in model.modules():  # SAM computes positions in float32, whatever it is in
        if hasattr(module, "positional_encoding_gaussian_matrix"):
            module.float()
    optimiser, computer = build_optimiser(model, config.train), StepComputer(model, config, ranks)
    own = losses[str(dtype)] = []
    for batch, step in zip(setup.batches(0, 1), range(1, 21)):
        if dtype == torch.float64:
            parts = (replace(p, inputs=double(p.inputs), targets=double(p.targets)) for p in batch.parts)
            batch = replace(batch, parts=tuple(parts))
        seed_step(0, step)
        set_rate(optimiser, step - 1, config.train)
        own.append(computer.gradients(batch)["loss"])
        optimiser.step()
    if ranks.is_main:
        save_file(model.state_dict(), f"{out}.{dtype}.safetensors")
if ranks.is_main:
    Path(out + ".json").write_text(json.dumps([ranks.world, losses]))
leave_ranks()
assert not torch.distributed.is_initialized()
"""


def test_one_and_two_processes_come_to_the_same_losses_and_weights_after_twenty_steps(tiny_cache, tmp_path):
    """A batch of 5 is cut into 2 and 3, one of them in two parts; all 5 expressions are compared.

    The expressions are of few images, so that some pairs are left out of the text loss; its weight is the
    paper's, so that it has a say in the matching, and so is the learning rate.

    In float32 single weights may differ by more than the sums' rounding: AdamW divides a gradient by its own
    size, so one that is rounding alone moves its weight as far as any other.
    """
    script = tmp_path / "steps.py"
    script.write_text(TWENTY_STEPS)
    settings = (*SETTINGS, "train.overfit=6", "loss.dfam_vl=1", "train.lr=5e-5", "model.bert.dropout=0.1")
    running = [
        torchrun(processes, script, tiny_cache, tmp_path / str(processes), *settings, *more)
        for processes, more in ((1, ()), (2, ("train.accumulate=2",)))
    ]
    for process in running:
        _, errors = process.communicate(timeout=240)
        assert process.returncode == 0, errors
    (world, losses), (others_world, others) = (
        json.loads((tmp_path / f"{name}.json").read_text()) for name in "12"
    )
    assert (world, others_world) == (1, 2)
    for dtype in ("torch.float32", "torch.float64"):
        assert len(losses[dtype]) == 20
        assert losses[dtype][-1] < losses[dtype][0]
        assert others[dtype] == pytest.approx(losses[dtype], rel=1e-5)
        one, two = (flat_weights(tmp_path / f"{name}.{dtype}.safetensors") for name in "12")
        assert (two - one).square().mean().sqrt() < 1e-5
        if dtype == "torch.float64":
            torch.testing.assert_close(two, one, rtol=0, atol=1e-5)


def flat_weights(path: Path) -> torch.Tensor:
    tensors = load_file(path)
    return torch.cat([tensors[name].double().flatten() for name in sorted(tensors)])


def test_one_process_of_several_writes_and_speaks(tiny_cache, tmp_path):
    process = train(2, tiny_cache, tmp_path, steps=2)
    output, errors = process.communicate(timeout=240)
    assert process.returncode == 0, errors
    assert json.loads(output)["run"] == str(tmp_path / "2")
    assert [line["step"] for line in logged(tmp_path, "2")] == [1, 2, 2]
    assert json.loads((tmp_path / "2" / "env.json").read_text())["processes"] == 2


SCORE = """
import sys, json, torch
from pathlib import Path
from ris_cache import FeatureCache
from ris_cache.errors import StoppedError
from ris_train import validation
from ris_train.checkpoint import load_checkpoint
from ris_train.data.text import Tokenizer
from ris_train.ranks import join_ranks, leave_ranks
from ris_train.validation import Validation
cpu = torch.device("cpu")
ranks = join_ranks(cpu)
model, metadata = load_checkpoint(Path(sys.argv[2]), device=cpu)
config = metadata.config
tokenizer = Tokenizer.load(config.model.bert, config.model.max_tokens)
val = Validation(FeatureCache.open(Path(sys.argv[1])), tokenizer, config, cpu)
scores = val.score(model, ranks)
validation.BATCHES_PER_QUESTION, batches = 2, []
model.register_forward_pre_hook(lambda *rest: batches.append(rest))
try:
    val.score(model, ranks, should_stop=lambda: ranks.rank == 1)
except StoppedError:
    stopped_after = [len(batches)]
try:
    val.score(model, ranks, should_stop=lambda: ranks.rank == 1 and len(batches) == 1)
except StoppedError:
    stopped_after += [len(batches)]
stopped = ranks.collect(stopped_after)
if ranks.is_main:
    print(json.dumps([ranks.world, scores.num_samples, scores.values, stopped]))
leave_ranks()
assert not torch.distributed.is_initialized()
"""


@pytest.mark.parametrize("processes", [pytest.param(2, marks=pytest.mark.exhaustive), 3])
def test_several_processes_score_what_one_does_to_the_last_digit(tiny_cache, tiny_runs, tmp_path, processes):
    script = tmp_path / "score.py"
    script.write_text(SCORE)
    checkpoint = tiny_runs / "first" / "checkpoints" / "best.safetensors"
    process = torchrun(processes, script, tiny_cache, checkpoint)
    output, errors = process.communicate(timeout=240)
    assert process.returncode == 0, errors
    cpu = torch.device("cpu")
    model, metadata = load_checkpoint(checkpoint, device=cpu)
    tokenizer = Tokenizer.load(metadata.config.model.bert, metadata.config.model.max_tokens)
    expected = Validation(FeatureCache.open(tiny_cache), tokenizer, metadata.config, cpu).score(model)
    *found, stopped = json.loads(output)
    assert found == [processes, expected.num_samples, expected.values]
    assert stopped == [[0, 2]] * processes, "one was asked to: at the next question all stop"


def test_killing_one_process_ends_the_others_with_a_message(tiny_cache, tmp_path):
    process = train(2, tiny_cache, tmp_path, steps=100_000)
    try:
        ranks = ranks_at_work(process, tmp_path / "2")
        os.kill(ranks[1], signal.SIGKILL)
        began = time.monotonic()
        _, errors = process.communicate(timeout=60)
        assert time.monotonic() - began < 30
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode != 0
    assert "Another process of this training ended" in errors
    assert not any(Path(f"/proc/{child}").exists() for child in ranks)


def ranks_at_work(process: subprocess.Popen[str], run: Path) -> list[int]:
    """Wait for the state of step 10; returns the process ids of the two ranks."""
    while not (run / "checkpoints" / "state-10").is_dir():
        assert process.poll() is None, process.communicate()
        time.sleep(0.05)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    ranks = [int(child) for child in children if b"cli" in Path(f"/proc/{child}/cmdline").read_bytes()]
    assert len(ranks) == 2
    return ranks


@pytest.mark.parametrize(
    ("number", "is_to_launcher"),
    [
        (signal.SIGUSR1, False),
        pytest.param(signal.SIGTERM, False, marks=pytest.mark.exhaustive),
        pytest.param(signal.SIGTERM, True, marks=pytest.mark.exhaustive),
    ],
    ids=["SIGUSR1-to-one", "SIGTERM-to-one", "SIGTERM-to-launcher"],
)
def test_a_signal_to_one_process_stops_all_after_the_same_step(
    tiny_cache, tmp_path, ris, number, is_to_launcher
):
    process = train(2, tiny_cache, tmp_path, steps=100_000)
    try:
        ranks = ranks_at_work(process, tmp_path / "2")
        os.kill(process.pid if is_to_launcher else ranks[1], number)
        output, errors = process.communicate(timeout=60)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    assert (process.returncode, output) == (1, ""), "torchrun's own code, whatever its processes end with"
    step = max(int(path.name.removeprefix("state-")) for path in tmp_path.glob("2/checkpoints/state-*"))
    assert errors.count(f"after step {step} of 100000; its state is saved") == 1
    assert "Another process" not in errors
    assert "/ris_train/" not in errors, "the only traceback is that of torchrun"
    assert not any(Path(f"/proc/{child}").exists() for child in ranks)
    options = ("--cache", tiny_cache, "--runs", tmp_path, "--run", 2, "--device", "cpu", "--json")
    assert ris("train", *options, "--max-steps", step + 1).exit_code == 0, "one process goes on"
    assert logged(tmp_path, "2")[-1]["step"] == step + 1


def failing(*exit_codes: int) -> type[Ranks]:
    """Processes as each of them sees them, that fail with these exit codes; 0 is success."""

    class Agreed(Ranks):
        def collect(self, value: object) -> list[object]:
            assert value == exit_codes[self.rank], "each tells of itself"
            return list(exit_codes)

    return Agreed


def test_what_fails_on_some_processes_stops_all_and_one_says_why():
    def fail() -> None:
        raise ConfigError("no such tracker")

    kind = failing(0, 2, 2)
    alone, first, second = (kind(rank, 3, torch.device("cpu")) for rank in range(3))
    with pytest.raises(ConfigError, match="no such tracker"):
        first.together(fail)
    for ranks, work in ((alone, int), (second, fail)):
        with pytest.raises(OtherRankError, match="Process 1 of this training failed") as caught:
            ranks.together(work)
        assert caught.value.exit_code == 2


def test_what_fails_nowhere_or_in_one_process_alone_is_as_it_is():
    def fail() -> None:
        raise ZeroDivisionError

    assert failing(0, 0)(1, 2, torch.device("cpu")).together(lambda: 7) == 7
    assert Ranks(0, 1, torch.device("cpu")).together(lambda: 7) == 7
    with pytest.raises(ZeroDivisionError):
        failing(1, 0)(0, 2, torch.device("cpu")).together(fail)


@pytest.mark.parametrize(("count", "world"), [(5, 2), (7, 3), (3, 3), (1, 1)])
def test_slices_are_the_batch_in_order_and_differ_by_one_at_most(count, world):
    slices = [Ranks(rank, world, torch.device("cpu")).slice_of(count) for rank in range(world)]
    assert [position for part in slices for position in part] == list(range(count))
    assert max(map(len, slices)) - min(map(len, slices)) <= 1

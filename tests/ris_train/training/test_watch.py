"""Numbers that break stop the run, say where, and can be made to break again."""

from __future__ import annotations

import errno
import functools
import json
import math
from contextlib import closing
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch
from safetensors.torch import load_file

from ris_cache.errors import CheckpointError, NonFiniteError, RisError
from ris_train.ranks import OtherRankError, Ranks
from ris_train.run import RunDirectory
from ris_train.training import reproduce, watch
from ris_train.training.setup import prepare
from ris_train.training.step import LossScale, StepComputer
from ris_train.training.watch import broken_terms, read_reproduction, stop_for

CPU = torch.device("cpu")


def test_a_rate_that_blows_the_weights_up_stops_the_run_and_is_reproduced(run_short, tmp_path, tiny_cache):
    """The first step's update is of the size of the rate; the second overflows."""
    run = tmp_path / "run"
    with pytest.raises(NonFiniteError, match=r"Step 2: .* is not finite") as caught:
        run_short(run, "train.lr=1e30", "train.warmup_steps=0")
    facts = caught.value.facts
    assert facts["step"] == 2
    record = read_reproduction(run / "nonfinite-2.json")
    assert [one.sent_id for one in record.samples] == facts["sent_ids"]
    assert {one.table_name for one in record.samples} == {"refcoco.unc"}
    found = reproduce(run / "nonfinite-2.json")
    assert found.terms == record.terms == facts["terms"]
    assert [sample.sent_id for sample in found.batch.samples] == facts["sent_ids"]


def test_a_gradient_that_breaks_is_named_and_reproduced_to_the_bit(run_short, tmp_path, monkeypatch):
    """The loss is finite; the values of the step are those of the file, dropout and points included."""
    run = tmp_path / "run"
    gradients = StepComputer.gradients

    broken = "dfam.logit_bias"

    def break_one(self: StepComputer, batch):
        values = gradients(self, batch)
        if batch.step == 3:
            dict(self._model.named_parameters())[broken].grad.fill_(math.inf)
            return values | {"grad_norm": math.inf}
        return values

    monkeypatch.setattr(StepComputer, "gradients", break_one)
    with pytest.raises(
        NonFiniteError, match=r"grad_norm is not finite\. First in the gradient of dfam"
    ) as caught:
        run_short(run)
    assert caught.value.facts["parameters"] == (broken,)
    monkeypatch.undo()
    path = run / "nonfinite-3.json"
    record = read_reproduction(path)
    values = reproduce(path).values
    assert {name: value for name, value in values.items() if name != "grad_norm"} == {
        name: value for name, value in record.values.items() if name != "grad_norm"
    }


@pytest.fixture(scope="module")
def step(tiny_cache, short_config):
    """What is trained on what, and the first batch."""
    setup = prepare(tiny_cache, short_config(), Ranks(0, 1, CPU), random_seed=0)
    with closing(setup.batches(0, 1)) as batches:
        return setup, next(batches)


met: list[int] = []


class Met(Ranks):
    """One of several processes, all of which are at the same point."""

    def collect(self, value: object) -> list[object]:
        met.append(self.rank)
        return [value] * self.world


def stop(step, run: Path, ranks: Ranks, values: dict[str, float]) -> RisError:
    """What the loop raises where the values of its step are none."""
    setup, batch = step
    return stop_for(
        RunDirectory(run), setup.model, batch, setup.metadata, ranks,
        cache_root=setup.cache.root, values=values, terms=broken_terms(values) or ("matching",), scale=1.0,
    )  # fmt: skip


def test_a_process_that_alone_knows_of_a_break_writes_and_speaks_and_waits_for_none(step, tmp_path):
    error = stop(step, tmp_path, Ranks(1, 2, CPU), {})
    assert isinstance(error, NonFiniteError)
    assert "Step 1: matching is not finite" in str(error)
    assert "--set train.lr=…`" in str(error)
    record = read_reproduction(tmp_path / "nonfinite-1.json")
    assert (record.world, record.terms) == (2, ("matching",))
    assert reproduce(tmp_path / "nonfinite-1.json").terms == (), "here nothing has broken"


def test_of_processes_that_all_know_the_first_one_writes_before_any_of_them_ends(step, tmp_path):
    values = {"loss": math.nan, "grad_norm": 1.0}
    met.clear()
    other = stop(step, tmp_path, Met(1, 2, CPU), values)
    assert isinstance(other, OtherRankError)
    assert (other.exit_code, met, list(tmp_path.iterdir())) == (NonFiniteError.exit_code, [1], [])
    first = stop(step, tmp_path, Met(0, 2, CPU), values)
    assert isinstance(first, NonFiniteError)
    assert met == [1, 0]
    assert read_reproduction(tmp_path / "nonfinite-1.json").terms == ("loss",)


def test_where_the_step_cannot_be_written_its_number_is_told_all_the_same(step, tmp_path, monkeypatch):
    full = OSError(errno.ENOSPC, "No space left on device")
    monkeypatch.setattr(watch, "write_atomically", Mock(side_effect=full))
    error = stop(step, tmp_path, Ranks(0, 1, CPU), {"loss": math.nan, "grad_norm": 1.0})
    assert str(error).startswith("Step 1: loss is not finite. Go on from the last state")
    assert "nonfinite-1.json, which would hold the step, could not be written: No space left" in str(error)
    assert error.facts["path"] is None


def test_a_loss_that_breaks_names_its_term(run_short, tmp_path, monkeypatch):
    gradients = StepComputer.gradients
    monkeypatch.setattr(
        StepComputer,
        "gradients",
        lambda self, batch: gradients(self, batch) | {"loss": math.nan, "dfam_vl": math.nan},
    )
    with pytest.raises(NonFiniteError, match="Step 1: loss, dfam_vl is not finite"):
        run_short(tmp_path / "run")


def test_a_file_that_is_no_reproduction_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match="There is no file"):
        reproduce(tmp_path / "nonfinite-1.json")
    (tmp_path / "nonfinite-1.json").write_text(json.dumps({"step": 1}))
    with pytest.raises(CheckpointError, match=r"is no nonfinite"):
        reproduce(tmp_path / "nonfinite-1.json")


def test_the_scale_of_fp16_is_halved_by_an_overflow_and_doubled_after_a_while():
    scale = LossScale(value=8.0, interval=3)
    assert not scale.update(is_finite=False)
    assert scale.value == 4.0
    assert all(scale.update(is_finite=True) for _ in range(3))
    assert (scale.value, scale.good_steps) == (8.0, 0)
    other = LossScale()
    other.load(scale.as_dict())
    assert other.value == 8.0


def test_an_overflow_in_fp16_costs_the_step_and_changes_no_weight(run_short, tmp_path, monkeypatch, metrics):
    from ris_train.training import step

    monkeypatch.setattr(step, "LossScale", functools.partial(LossScale, value=2.0**100))
    run = tmp_path / "run"
    run_short(run, "train.precision=fp16", "train.log_every=1", "train.steps=2", "train.keep_last=9")
    logged = [line for line in metrics(run) if "scale" in line]
    assert [line["scale"] for line in logged] == [2.0**99, 2.0**98]
    assert all(math.isfinite(line["loss"]) and line["grad_norm"] is None for line in logged)
    before, after = (
        load_file(run / "checkpoints" / f"state-{number}" / "model.safetensors") for number in (0, 2)
    )
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_training_in_fp16_takes_its_steps(run_short, tmp_path, metrics):
    """The scale it begins with is halved a few times first."""
    run = tmp_path / "run"
    settings = ("train.steps=10", "train.batch_size=2", "train.eval_every=10", "train.log_every=1")
    run_short(run, "train.precision=fp16", *settings)
    norms = [line["grad_norm"] for line in metrics(run) if "scale" in line]
    assert len(norms) == 10
    assert all(norms[-2:])

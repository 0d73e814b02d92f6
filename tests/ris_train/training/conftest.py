"""Short runs on the drawn data, and what two runs have to agree on."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from ris_train.config import RunConfig, load_config
from ris_train.training import TrainingReport, train


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Small tensors on few cores are quicker, and steadier, on one thread."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def short_config() -> Callable[..., RunConfig]:
    """Configuration of six steps with dropout; overrides are laid over it."""

    def make(*overrides: str) -> RunConfig:
        return load_config(
            recipe="tiny",
            overrides=[
                "train.steps=6", "train.batch_size=4", "train.eval_every=2", "train.log_every=3",
                "train.val_samples=2", "train.warmup_steps=2", "model.bert.dropout=0.1",
                "loss.num_points=16", "loss.mask_size=32", *overrides,
            ],
        )  # fmt: skip

    return make


@pytest.fixture
def run_short(tiny_cache: Path, short_config: Callable[..., RunConfig]) -> Callable[..., TrainingReport]:
    """Train into a directory."""

    def run(run_dir: Path, *overrides: str, **arguments: Any) -> TrainingReport:
        config = short_config(*overrides)
        return train(tiny_cache, config, run_dir, device=torch.device("cpu"), random_seed=0, **arguments)

    return run


@pytest.fixture(scope="session")
def whole(
    tmp_path_factory: pytest.TempPathFactory, tiny_cache: Path, short_config: Callable[..., RunConfig]
) -> Path:
    """A run that never stopped; tests must not change it."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    path = tmp_path_factory.mktemp("whole") / "run"
    train(tiny_cache, short_config(), path, device=torch.device("cpu"), random_seed=0)
    torch.set_num_threads(before)
    return path


@pytest.fixture(scope="session")
def metrics() -> Callable[[Path], list[dict[str, Any]]]:
    """Lines of a run's metrics but for the wall clock."""

    def read(run_dir: Path) -> list[dict[str, Any]]:
        lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
        return [{name: value for name, value in line.items() if name != "seconds"} for line in lines]

    return read


@pytest.fixture(scope="session")
def same_weights() -> Callable[[Path, Path], bool]:
    """Whether two checkpoints hold the same bits."""

    def compare(first: Path, second: Path) -> bool:
        one, other = load_file(first), load_file(second)
        return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)

    return compare

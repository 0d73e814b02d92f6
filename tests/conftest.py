"""One small drawn dataset, its cache and a run of a few steps, made once by the public commands."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import CliRunner

from cli.app import app


@pytest.fixture(scope="session")
def ris() -> Callable[..., object]:
    """Run one `ris` command in this process; the result has exit_code, stdout and stderr."""
    runner = CliRunner()

    def run(*arguments: object):
        return runner.invoke(app, [str(argument) for argument in arguments])

    return run


@pytest.fixture(scope="session")
def drawn_data(tmp_path_factory, ris) -> Path:
    """Data root with a drawn refcoco: 24 training images, 4 of each other split."""
    root = tmp_path_factory.mktemp("drawn") / "data"
    result = ris("data", "synth", "--out", root, "--train", 24, "--val", 4, "--test", 4, "--seed", 3)
    assert result.exit_code == 0, result.output
    return root


@pytest.fixture(scope="session")
def tiny_cache(tmp_path_factory, drawn_data, ris) -> Path:
    """Cache of the drawn data by the tiny encoders."""
    root = tmp_path_factory.mktemp("cache") / "feats"
    result = ris(
        "extract", "--split", "refcoco", "--data", drawn_data, "--cache", root, "--preset", "tiny",
        "--random-weights", "--device", "cpu",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    return root


@pytest.fixture(scope="session")
def tiny_runs(tmp_path_factory, tiny_cache, ris) -> Path:
    """Runs directory with `first`, trained for six steps."""
    runs = tmp_path_factory.mktemp("runs")
    result = ris(
        "train", "--cache", tiny_cache, "--runs", runs, "--run", "first", "--random-weights", "--device", "cpu",
        "--set", "train.steps=6", "--set", "train.batch_size=4", "--set", "train.eval_every=3",
        "--set", "train.log_every=2", "--json",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["run"] == str(runs / "first")
    return runs

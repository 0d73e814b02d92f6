"""benchmarks/evaluate.py runs, prints rates that fit its ratios, and notices other counts."""

from __future__ import annotations

import importlib
import re
import shlex
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))  # as `python benchmarks/evaluate.py` does
benchmark = importlib.import_module("evaluate")
sys.path.remove(str(BENCHMARKS))


def test_it_prints_the_rate_of_each_way_and_that_the_counts_are_the_same(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    options = f"--images 2 --rounds 1 --rules ris,lavt,cris --device cpu --batch-size 4 --dir {tmp_path}"
    assert benchmark.main(shlex.split(options)) == 0
    printed = capsys.readouterr().out
    rows = re.findall(r"^(\S.*?) +([\d.]+) samples/s +([\d.]+) x", printed, re.M)
    assert [row[0] for row in rows] == ["plain loop", "plain loop without DFAM", "count_samples"]
    plain = float(rows[0][1])
    for _, rate, ratio in rows:
        assert float(rate) / plain == pytest.approx(float(ratio), rel=0.05)
    assert "on 2 images, 3 views" in printed
    assert re.search(r"^counts: identical for (all )?\d+ ", printed, re.M)
    assert not any(tmp_path.iterdir())


def test_other_counts_end_the_benchmark(tmp_path: Path) -> None:
    options = benchmark._parser().parse_args(shlex.split("--images 1 --device cpu"))
    bench = benchmark.prepare(options, tmp_path)
    plain = benchmark.plain_loop(bench, with_dfam=True)
    counted = benchmark.ours(bench)
    assert "identical" in benchmark.compare(bench, plain, counted)
    other = counted["original"]
    more = other.predicted + 50 * (np.arange(len(other)) == 0)
    with pytest.raises(AssertionError, match=r"original, sample 0: .* pixels differ"):
        benchmark.compare(bench, plain, {"original": replace(other, predicted=more)})


@pytest.mark.parametrize("arguments", ["--images 0", "--rounds 0"])
def test_options_that_make_no_sense_are_refused(arguments: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        benchmark.main(shlex.split(arguments))
    assert "0 is not positive" in capsys.readouterr().err

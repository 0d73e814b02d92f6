"""benchmarks/extract.py runs, and prints a ratio that is what it says."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "benchmarks/extract.py", *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )


def test_it_prints_every_stage_and_their_ratio(tmp_path: Path) -> None:
    finished = run(
        "--images",
        "6",
        "--batch-size",
        "4",
        "--rounds",
        "1",
        "--floor",
        "--device",
        "cpu",
        "--dir",
        str(tmp_path),
    )
    assert finished.returncode == 0, finished.stderr
    rates = dict(re.findall(r"^ *(\S.*?)  +([\d.]+) images/s", finished.stdout, re.M))
    assert {"encoders alone", "files to cache", "storing alone", "floor: products alone"} <= set(rates)
    (ratio,) = re.findall(r"^files to cache / encoders alone +([\d.]+)", finished.stdout, re.M)
    expected = float(rates["files to cache"]) / float(rates["encoders alone"])
    assert abs(float(ratio) - expected) < 0.01
    assert "error of clip_pooled" in finished.stdout
    assert not any(tmp_path.iterdir())


def test_no_images_are_refused(tmp_path: Path) -> None:
    finished = run("--images", "0", "--dir", str(tmp_path))
    assert finished.returncode == 2
    assert "0 is not positive" in finished.stderr

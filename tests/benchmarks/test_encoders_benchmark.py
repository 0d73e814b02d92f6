"""The encoder benchmark: its count of operations against torch's counter, and one run of it."""

from __future__ import annotations

import importlib
import re
import shlex
import sys
from pathlib import Path

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from ris_cache.encoders.clip import build_clip
from ris_cache.encoders.sam import build_sam
from ris_cache.encoders.spec import PAPER, PRESETS, TINY

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))  # as `python benchmarks/encoders.py` does
benchmark = importlib.import_module("encoders")
sys.path.remove(str(BENCHMARKS))


def counted_flops(encoder: torch.nn.Module, image_size: int) -> int:
    """Let torch count one forward. Fused attention would escape the counter, so it is switched off."""
    pixels = torch.zeros(1, 3, image_size, image_size)
    fused = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            encoder.eval()(pixels)
    finally:
        torch.backends.mha.set_fastpath_enabled(fused)
    return counter.get_total_flops()


def test_operations_are_counted_as_torch_counts_those_of_the_libraries() -> None:
    sam, clip = build_sam(TINY.sam).image_encoder, build_clip(TINY.clip).visual
    assert benchmark.sam_flops(TINY.sam) == counted_flops(sam, TINY.sam.image_size)
    assert benchmark.clip_flops(TINY.clip) == counted_flops(clip, TINY.clip.image_size)


def test_a_full_size_image_takes_a_bit_more_than_one_and_a_third_teraflop() -> None:
    total = benchmark.sam_flops(PAPER.sam) + benchmark.clip_flops(PAPER.clip)
    assert total / 1e12 == pytest.approx(1.354, abs=5e-4)


def test_a_tiny_run_prints_a_row_for_each_arithmetic_and_batch_size(
    capsys: pytest.CaptureFixture[str],
) -> None:
    code = benchmark.main(
        shlex.split("--preset tiny --device cpu --images 4 --arithmetic float32 bfloat16 --batch-size 1 4")
    )
    printed = capsys.readouterr().out
    assert code == 0
    rows = re.findall(r"^ris, (\w+) +(\d+) +(\S+) +(\S+) +(\S+) +(\S+)", printed, flags=re.MULTILINE)
    assert [row[:2] for row in rows] == [
        ("float32", "1"), ("float32", "4"), ("bfloat16", "1"), ("bfloat16", "4"),
    ]  # fmt: skip
    plain = re.search(r"^libraries' plain loop, float32 +1 +(\S+) +1\.00", printed, flags=re.MULTILINE)
    assert plain is not None
    for arithmetic, _, rate, ratio, of_floor, sam_error in rows:
        assert float(rate) / float(plain[1]) == pytest.approx(float(ratio), abs=0.01)
        assert float(of_floor) > 0
        assert (float(sam_error) < 1e-5) == (arithmetic == "float32")


@pytest.mark.parametrize("arguments", [["--images", "0"], ["--batch-size", "0"], ["--device", "meta"]])
def test_options_that_make_no_sense_end_with_a_message(
    capsys: pytest.CaptureFixture[str], arguments: list[str]
) -> None:
    assert benchmark.main(["--preset", "tiny", "--device", "cpu", *arguments]) == 2
    assert capsys.readouterr().err


def test_every_preset_has_a_default_number_of_images() -> None:
    assert {preset for preset, _ in benchmark._DEFAULT_IMAGES} == set(PRESETS)

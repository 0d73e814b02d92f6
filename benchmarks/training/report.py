"""The tables of `benchmarks/train_step.py`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from layouts.report import table

from training.ceilings import Ceilings, Work
from training.steps import Measured


def split_table(measured: Measured, *, markdown: bool) -> list[str]:
    """Return where the time of a step goes, in the order of the step."""
    rows = [
        (part, f"{ms:,.1f}", f"{ms / sum(measured.split.values()):.1%}")
        for part, ms in measured.split.items()
    ]
    rows.append(("sum", f"{sum(measured.split.values()):,.1f}", ""))
    return table(("part of a step", "ms", "share"), rows, markdown=markdown, ends_with_text=False)


def ways_table(ways: Sequence[Measured], *, markdown: bool) -> list[str]:
    """Return whole steps of each way beside the first one's."""
    header = ("way", "ms/step", "fastest", "slowest", "x", "waiting", "peak GB", "images")
    rows = [
        (
            way.name,
            f"{way.ms:,.1f}",
            f"{way.fastest:,.1f}",
            f"{way.slowest:,.1f}",
            f"{way.ms / ways[0].ms:.2f}",
            f"{way.waiting:.1%}",
            "-" if way.peak_bytes is None else f"{way.peak_bytes / 1e9:.2f}",
            f"{way.images:.1f}",
        )
        for way in ways
    ]
    return table(header, rows, markdown=markdown, ends_with_text=False)


def floor_lines(work: Work, ceilings: Ceilings, measured: Measured) -> list[str]:
    """Return the floor beside the measured step."""
    floor = ceilings.floor_ms(work)
    return [
        f"Work of a step: {work.flops / 1e9:,.2f} GFLOP; at least {work.moved_bytes / 1e9:,.3f} GB moved "
        f"(weights, gradients and moments {work.parameter_bytes / 1e9:,.3f}, features "
        f"{work.feature_bytes / 1e9:,.3f}). Activations kept for the backward pass, and so moved twice or "
        f"more, as this is computed: {work.kept_bytes / 1e9:,.3f} GB.",
        f"Operations of a step, each at least one launch on a GPU: {sum(work.operations.values()):,} "
        f"({_by_stage(work.operations)}).",
        f"Ceilings measured here: matrix product {ceilings.flops_per_s / 1e9:,.1f} GFLOP/s, copy "
        f"{ceilings.bytes_per_s / 1e9:,.1f} GB/s.",
        f"Floor {floor:,.1f} ms (computing {1000 * work.flops / ceilings.flops_per_s:,.1f}, moving "
        f"{1000 * work.moved_bytes / ceilings.bytes_per_s:,.1f}); measured {measured.ms:,.1f} ms: "
        f"{floor / measured.ms:.0%} of what the device could do.",
    ]


def _by_stage(operations: Mapping[str, int]) -> str:
    """Add up the parts of forward, and those of the losses."""
    stages: Counter[str] = Counter()
    for part, number in operations.items():
        stages[part.partition(":")[0]] += number
    return ", ".join(f"{stage} {number:,}" for stage, number in stages.items())


def startup_table(runs: Sequence[dict[str, Any]], *, markdown: bool) -> list[str]:
    """Return seconds since the start and memory after each stage, three columns per run."""
    header = ["stage"]
    rows: list[list[str]] = []
    for run in runs:
        stages = run["stages"]
        header += [f"s, {run['expressions']:,} expressions", "CPU s", "MB"]
        for index, (stage, seconds, computing, num_bytes) in enumerate(stages):
            if len(rows) <= index:
                rows.append([stage])
            rows[index] += [f"{seconds:.2f}", f"{computing:.2f}", f"{num_bytes / 1e6:,.0f}"]
        if len(rows) <= len(stages):
            rows.append(["a later step, ms (fastest-slowest)"])
        fastest, slowest = run["step_range_ms"]
        rows[len(stages)] += [f"{run['step_ms']:.1f} ({fastest:.1f}-{slowest:.1f})", "", ""]
    return table(tuple(header), [tuple(row) for row in rows], markdown=markdown, ends_with_text=False)


def larger_table(runs: Sequence[dict[str, Any]], *, markdown: bool) -> list[str]:
    """Return speed and memory by size of the drawn set, and what one expression more takes."""
    first, *_, last = runs
    steps = list(first["memory"])
    header = ("images", "expressions", "steps/s", *(f"MB at step {step}" for step in steps))
    rows = [
        (
            f"{run['images']:,}",
            f"{run['expressions']:,}",
            f"{run['steps_per_s']:.2f}",
            *(f"{run['memory'][step] / 1e6:,.0f}" for step in steps),
        )
        for run in runs
    ]
    more = last["expressions"] - first["expressions"]
    grown = ", ".join(
        f"{(last['memory'][step] - first['memory'][step]) / more / 1e3:.2f} KB at step {step}"
        for step in steps
    )
    return [
        *table(header, rows, markdown=markdown, ends_with_text=False),
        "",
        f"Steps per second of the largest set against the smallest: "
        f"{last['steps_per_s'] / first['steps_per_s']:.2f}. Each expression more took {grown}.",
    ]

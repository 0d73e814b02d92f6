"""Where the time of a training step goes, what it could be, and what other ways to train would take.

    python benchmarks/train_step.py                                  # tiny, a CPU or the GPU at hand
    python benchmarks/train_step.py --preset paper --batch 2 --device cpu --steps 1
    python benchmarks/train_step.py --preset paper --batch 32 --precision bf16 --device cuda
    python benchmarks/train_step.py --grouped 1,2,4
    python benchmarks/train_step.py --startup 140000
    python benchmarks/train_step.py --larger 10 --images 300 --steps 60

Images are drawn and extracted with random weights, which change nothing about speed; the page cache is warm.
The step is that of `ris train`: batches built on a thread ahead, forward, losses, backward, clipping, AdamW.
Beside it, in the same run: (a) the same model decoding masks sample by sample, (b) the frozen encoders run in
every step, on pixels that are decoded already. The floor is the longer of the step's operations at the rate
of one large matrix product, and its bytes at that of one large copy, both measured here.

`--grouped` measures steps with k expressions of each image in a batch, which share its features and what the
image alone decides. `--startup` measures the way from nothing to the first step over tables of so many
expressions, and of a tenth of them. `--larger` draws a set and one so many times as large, trains on each in
a process of its own and compares speed and memory. On a CPU, peak memory counts what earlier ways have freed.
"""

from __future__ import annotations

import argparse
import json
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import closing
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from layouts import report as machine_report
from training import larger, report, startup
from training.bench import (
    Bench,
    LoopedMaskDecoder,
    batches,
    draw_cache,
    live_batch,
    load_encoders,
    make_model,
    prepare,
)
from training.ceilings import Work, count_work, measure_ceilings
from training.clock import StepClock
from training.large import write_large_cache
from training.steps import PRECISIONS, Measured, compute_loss, measure

from ris_cache.encoders.spec import PRESETS
from ris_cache.errors import ConfigError, RisError
from ris_cache.memory import keep_freed_memory

_OURS = "ris: features from the cache"
_LOOPED = "(a) masks decoded sample by sample"
_LIVE = "(b) frozen encoders in every step"
_IMAGES = {("tiny", "cpu"): 64, ("tiny", "cuda"): 128, ("paper", "cpu"): 2, ("paper", "cuda"): 64}
_STEPS = {("tiny", "cpu"): 20, ("tiny", "cuda"): 50, ("paper", "cpu"): 1, ("paper", "cuda"): 30}
_STARTUP_STEPS = 10
_LARGER_IMAGES, _LARGER_STEPS = 300, 60


def main(argv: Sequence[str]) -> int:
    """Run the benchmark and print its tables; return the exit code."""
    options = _parser().parse_args(argv)
    command = shlex.join(["python", "benchmarks/train_step.py", *argv])
    try:
        _check_options(options)
        keep_freed_memory()  # as `ris train` does
        with tempfile.TemporaryDirectory(prefix="ris-benchmark-", dir=options.dir) as directory:
            results = _run(options, Path(directory), command)
    except RisError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    if options.json:
        options.json.write_text(json.dumps(results, indent=1) + "\n")
    return 0


def _run(options: argparse.Namespace, root: Path, command: str) -> dict[str, Any]:
    device = torch.device(options.device)
    machine = machine_report.describe_machine(root)
    started = time.strftime("%Y-%m-%d %H:%M")
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    heading = [
        f"`{command}`",
        *machine_report.machine_lines(machine),
        f"{name}, {torch.get_num_threads()} threads, preset {options.preset}, batches of {options.batch}, "
        f"{options.precision}, {started}",
    ]
    print(*heading, "", sep="\n\n" if options.markdown else "\n", flush=True)
    if options.larger:
        found = _larger(root, options)
    else:
        num_images = options.images or _IMAGES[options.preset, device.type]
        bench = prepare(options.preset, root, num_images=num_images, batch_size=options.batch, device=device)
        if options.startup:
            found = _startup(bench, root, options)
        elif options.grouped:
            found = _grouped(bench, options)
        else:
            found = _ways(bench, options)
    return {"command": command, "date": started, "machine": asdict(machine), **found}


def _ways(bench: Bench, options: argparse.Namespace) -> dict[str, Any]:
    ours = _measured(bench, options, _OURS)
    print(*report.split_table(ours, markdown=options.markdown), "", sep="\n", flush=True)
    work = _work(bench, options.precision)
    ceilings = measure_ceilings(bench.device, PRECISIONS[options.precision])
    print(*report.floor_lines(work, ceilings, ours), "", sep="\n", flush=True)
    ways = [ours, *(_measured(bench, options, name) for name in (_LOOPED, _LIVE))]
    print(*report.ways_table(ways, markdown=options.markdown), sep="\n")
    floor = {"work": asdict(work), "ceilings": asdict(ceilings), "floor_ms": ceilings.floor_ms(work)}
    return {"ways": [asdict(way) for way in ways], "floor": floor}


def _work(bench: Bench, precision: str) -> Work:
    model = make_model(bench)
    with closing(batches(bench)) as ready:
        batch = next(ready)

    def loss() -> torch.Tensor:
        return compute_loss(StepClock(bench.device), bench, model, batch, precision)

    return count_work(model, loss, (batch.inputs.image_embeddings, batch.inputs.clip_features))


def _measured(bench: Bench, options: argparse.Namespace, name: str) -> Measured:
    model = make_model(bench)
    before = None
    if name == _LOOPED:
        model.mask_decoder = LoopedMaskDecoder(model.mask_decoder)
    if name == _LIVE:
        spec = bench.encoders.spec
        pixels = tuple(
            torch.zeros((options.batch, side, side, 3), dtype=torch.uint8)
            for side in (spec.sam.image_size, spec.clip.image_size)
        )
        before = lambda batch: live_batch(bench, batch, (pixels[0], pixels[1]))  # noqa: E731
    return measure(
        name,
        bench,
        model,
        batches(bench),
        steps=options.steps or _STEPS[options.preset, bench.device.type],
        warm_up=options.warm_up,
        precision=options.precision,
        before=before,
    )


def _grouped(bench: Bench, options: argparse.Namespace) -> dict[str, Any]:
    ways = [
        measure(
            f"{k} expressions of an image" if k > 1 else "each expression by itself",
            bench,
            make_model(bench),
            batches(bench, expressions_per_image=k, is_grouped=k > 1),
            steps=options.steps or _STEPS[options.preset, bench.device.type],
            warm_up=options.warm_up,
            precision=options.precision,
        )
        for k in options.grouped
    ]
    print(*report.ways_table(ways, markdown=options.markdown), sep="\n")
    return {"ways": [asdict(way) for way in ways]}


def _startup(bench: Bench, root: Path, options: argparse.Namespace) -> dict[str, Any]:
    runs = []
    for number in (options.startup // 10, options.startup):
        cache_root = root / f"large-{number}"
        write_large_cache(bench.cache, cache_root, num_expressions=number, table_name=startup.TABLE_NAME)
        steps = options.steps or _STARTUP_STEPS
        found = subprocess.run(
            [sys.executable, startup.__file__, str(cache_root), str(steps + 1)],
            check=True,
            stdout=subprocess.PIPE,
        )
        runs.append(json.loads(found.stdout))
    print(*report.startup_table(runs, markdown=options.markdown), sep="\n")
    return {"startup": runs}


def _larger(root: Path, options: argparse.Namespace) -> dict[str, Any]:
    encoders = load_encoders(options.preset, torch.device(options.device))
    runs = []
    for factor in (1, options.larger):
        num_images = factor * (options.images or _LARGER_IMAGES)
        cache_root = draw_cache(encoders, root / f"x{factor}", num_images)
        arguments = (cache_root, options.steps or _LARGER_STEPS, options.batch)
        found = subprocess.run(
            [sys.executable, larger.__file__, *map(str, arguments)], check=True, stdout=subprocess.PIPE
        )
        runs.append(json.loads(found.stdout))
    print(*report.larger_table(runs, markdown=options.markdown), sep="\n")
    return {"larger": runs}


def _check_options(options: argparse.Namespace) -> None:
    """Refuse what would only fail after minutes."""
    device = torch.device(options.device)
    if device.type not in ("cpu", "cuda"):
        raise ConfigError(f"This benchmark runs on cpu and cuda, not on {device}.", device=options.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ConfigError(f"--device {options.device}: torch sees no GPU; leave it out.", device=device)
    for name in ("startup", "larger"):
        if getattr(options, name) and (options.preset, device.type) != ("tiny", "cpu"):
            raise ConfigError(f"--{name} takes preset tiny on a CPU; leave --preset and --device out.")
    if options.json is not None and not options.json.parent.is_dir():
        raise ConfigError(f"--json: there is no directory {options.json.parent}.", path=options.json)
    if options.dir is not None and not options.dir.is_dir():
        raise ConfigError(f"--dir: {options.dir} is no directory; make it first.", path=options.dir)


def _parser() -> argparse.ArgumentParser:
    description, _, rest = (__doc__ or "").partition("\n")
    parser = argparse.ArgumentParser(
        description=description, epilog=rest, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--preset", choices=sorted(PRESETS), default="tiny", help="size of encoders and model (tiny)")
    add("--batch", type=_positive, default=32, help="expressions per step (32)")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu or cuda")
    add("--steps", type=_positive, help="that count, per way (by preset and device)")
    add("--warm-up", type=_positive, default=3, help="steps before those (3)")
    add("--precision", choices=sorted(PRECISIONS), default="fp32", help="of forward and losses (fp32)")
    add("--images", type=_positive, help="images drawn (by preset and device)")
    add("--grouped", type=_numbers, metavar="K,…", help="measure k expressions per image instead")
    add("--startup", type=_tenfold, metavar="N", help="measure starting up with N expressions instead")
    add("--larger", type=_factor, metavar="K", help="measure training on K times as many images instead")
    add("--dir", type=Path, help="where to put the files for a while (the system's temporary directory)")
    add("--json", type=Path, metavar="FILE", help="write the results there")
    add("--markdown", action="store_true", help="print Markdown tables")
    return parser


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"{text} is not a whole number above 0")
    return int(text)


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(_positive(part.strip()) for part in text.split(","))


def _tenfold(text: str) -> int:
    if _positive(text) < 1000:
        raise argparse.ArgumentTypeError(f"{text} is fewer than 1000 expressions")
    return int(text)


def _factor(text: str) -> int:
    if _positive(text) == 1:
        raise argparse.ArgumentTypeError("1 is not larger")
    return int(text)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

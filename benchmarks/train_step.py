"""Where the time of a training step goes, what it could be, and what other ways to train would take.

    python benchmarks/train_step.py                                  # tiny, a CPU or the GPU at hand
    python benchmarks/train_step.py --preset paper --batch 2 --device cpu --steps 1
    python benchmarks/train_step.py --preset paper --batch 32 --precision bf16 --device cuda
    python benchmarks/train_step.py --grouped 1,2,4
    python benchmarks/train_step.py --startup 140000
    python benchmarks/train_step.py --larger 10 --images 300 --steps 60

Images are drawn and extracted with random weights, which change nothing about speed; the page cache is warm.
The step is that of `ris train`: batches built on a thread ahead, forward, losses, backward, clipping, AdamW,
by the same code with the same configuration. Beside it: (a) the same model decoding masks sample by sample,
(b) the frozen encoders run in every step, on pixels that are decoded already. Each way is measured in a
process of its own, so peak memory is that way's: of the device on a GPU, of the whole process on a CPU.

The floor is the longer of the step's operations at the rate of one large matrix product, and the bytes of
weights, gradients, moments and features at that of one large copy, both measured here. What is printed beside
it is how many operations a step is made of: on a GPU each is launched by itself.

`--grouped` measures steps with k expressions of each image in a batch, which share its features and what the
image alone decides. `--startup` measures `ris train` from nothing to its first step over tables of so many
expressions, and of a tenth of them. `--larger` draws a set and one so many times as large, trains on each in
a process of its own and compares speed and memory.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, get_args

import torch
from layouts import report as machine_report
from training import child, report
from training.bench import SELECTION, Way, draw_cache
from training.ceilings import Ceilings, Work
from training.large import write_large_cache
from training.steps import Measured

from ris_cache import FeatureCache
from ris_cache.encoders.spec import PRESETS
from ris_cache.errors import ConfigError, RisError
from ris_cache.memory import keep_freed_memory
from ris_train.config.schema import TrainConfig

_OURS = "ris: features from the cache"
_LOOPED = "(a) masks decoded sample by sample"
_LIVE = "(b) frozen encoders in every step"
_IMAGES = {("tiny", "cpu"): 64, ("tiny", "cuda"): 128, ("paper", "cpu"): 2, ("paper", "cuda"): 64}
_STEPS = {("tiny", "cpu"): 20, ("tiny", "cuda"): 50, ("paper", "cpu"): 1, ("paper", "cuda"): 30}
_PRECISIONS = get_args(TrainConfig.model_fields["precision"].annotation)
_STARTUP_STEPS = 10
_LARGER_IMAGES, _LARGER_STEPS = 300, 60


def main(argv: Sequence[str]) -> int:
    """Run the benchmark and print its tables; return the exit code."""
    options = _parser().parse_args(argv)
    command = shlex.join(["python", "benchmarks/train_step.py", *argv])
    try:
        _check_options(options)
        keep_freed_memory()  # as `ris extract` does
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
        cache = draw_cache(options.preset, device, root, num_images)
        if options.startup:
            found = _startup(cache, root, options)
        elif options.grouped:
            found = _grouped(cache, options)
        else:
            found = _ways(cache, options)
    return {"command": command, "date": started, "machine": asdict(machine), **found}


def _ways(cache: Path, options: argparse.Namespace) -> dict[str, Any]:
    counted = _in_own_process(_way(cache, options, _OURS, is_counted=True))
    ours = Measured(**counted["measured"])
    print(*report.split_table(ours, markdown=options.markdown), "", sep="\n", flush=True)
    work, ceilings = Work(**counted["work"]), Ceilings(**counted["ceilings"])
    print(*report.floor_lines(work, ceilings, ours), "", sep="\n", flush=True)
    others = (_way(cache, options, _LOOPED, kind="looped"), _way(cache, options, _LIVE, kind="live"))
    ways = [ours, *(Measured(**_in_own_process(way)["measured"]) for way in others)]
    print(*report.ways_table(ways, markdown=options.markdown), sep="\n")
    floor = {"work": asdict(work), "ceilings": asdict(ceilings), "floor_ms": ceilings.floor_ms(work)}
    return {"ways": [asdict(way) for way in ways], "floor": floor}


def _way(cache: Path, options: argparse.Namespace, name: str, **others: Any) -> Way:
    device = torch.device(options.device)
    return Way(
        name=name,
        cache=str(cache),
        preset=options.preset,
        device=options.device,
        precision=options.precision,
        batch=options.batch,
        steps=options.steps or _STEPS[options.preset, device.type],
        warm_up=options.warm_up,
        **others,
    )


def _in_own_process(way: Way) -> dict[str, Any]:
    found: dict[str, Any] = child.in_own_process("training.way", way.as_json())
    return found


def _grouped(cache: Path, options: argparse.Namespace) -> dict[str, Any]:
    ways = []
    for k in options.grouped:
        name = f"{k} expressions of an image" if k > 1 else "each expression by itself"
        way = _way(cache, options, name, expressions_per_image=k)
        ways.append(Measured(**_in_own_process(way)["measured"]))
    print(*report.ways_table(ways, markdown=options.markdown), sep="\n")
    return {"ways": [asdict(way) for way in ways]}


def _startup(cache: Path, root: Path, options: argparse.Namespace) -> dict[str, Any]:
    source = FeatureCache.open(cache)
    runs = []
    for number in (options.startup // 10, options.startup):
        large = root / f"large-{number}"
        write_large_cache(source, large, num_expressions=number, table_name=SELECTION.table_name)
        steps = options.steps or _STARTUP_STEPS
        runs.append(child.in_own_process("training.startup", large.resolve(), steps + 1))
    print(*report.startup_table(runs, markdown=options.markdown), sep="\n")
    return {"startup": runs}


def _larger(root: Path, options: argparse.Namespace) -> dict[str, Any]:
    runs = []
    for factor in (1, options.larger):
        num_images = factor * (options.images or _LARGER_IMAGES)
        cache = draw_cache(options.preset, torch.device(options.device), root / f"x{factor}", num_images)
        steps = options.steps or _LARGER_STEPS
        runs.append(child.in_own_process("training.larger", cache, steps, options.batch))
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
    add("--precision", choices=_PRECISIONS, default="fp32", help="of forward and losses (fp32)")
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

"""How fast features come back from disk: the cache of `ris` beside the usual layouts and libraries.

    python benchmarks/store.py                     # 384 images of paper size, 16 GB of disk and memory
    python benchmarks/store.py --images 64 --rounds 3 --only 'ris-*,npy'
    python benchmarks/store.py --cold --only ris-zarr,ris-hdf5

Random float16 features are written in every layout, read back whole and compared bit by bit, and then timed:
random batches into reused buffers, page cache warm. The ratio is to the ceiling, the same bytes in the same
order copied out of one flat memory map, read in turn with each layout. `--cold` adds reading with the page
cache emptied, against the disk's sequential speed.

Rows of litdata, mosaicml-streaming, tensorstore and zarrs need these packages (`pip install ris[bench]`).
"""

from __future__ import annotations

import argparse
import json
import math
import shlex
import shutil
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict
from fnmatch import fnmatchcase
from pathlib import Path

from layouts import cold, report, timing
from layouts.contract import SHAPES, Layout, draw_features
from layouts.datasets import DATASETS
from layouts.flat import FLAT, FLAT_NAME
from layouts.libraries import LIBRARIES
from layouts.ours import HDF5, ZARR, our_layouts
from layouts.per_image import PER_IMAGE

from ris_cache.errors import ConfigError, RisError
from ris_cache.memory import available_memory

_SPARE = 1.25
"""Free room asked for, per byte needed: the rest of the machine wants some too."""


def main(argv: Sequence[str]) -> int:
    """Run the benchmark and print its tables; return the exit code."""
    options = _parser().parse_args(argv)
    if options.list:
        for layout in _all_layouts(options.device):
            print(f"{layout.name:26}{layout.description}")
        return 0
    try:
        _check_options(options)
        layouts = _chosen(options)
        with tempfile.TemporaryDirectory(prefix="ris-benchmark-", dir=options.dir) as root:
            _run(options, layouts, Path(root), shlex.join(["python", "benchmarks/store.py", *argv]))
    except RisError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    return 0


def _parser() -> argparse.ArgumentParser:
    description, _, rest = (__doc__ or "").partition("\n")
    parser = argparse.ArgumentParser(
        description=description, epilog=rest, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--images", type=_positive, default=384, help="images drawn (384)")
    add("--batch", type=_positive, default=32, help="images per batch (32)")
    add("--rounds", type=_positive, default=5, help="passes over all images per layout (5)")
    add("--shape", choices=sorted(SHAPES), default="paper", help="size of one image's features (paper)")
    add("--only", help="comma-separated names of layouts, * and ? allowed (all)")
    add("--dir", type=Path, help="where to put the files for a while (the system's temporary directory)")
    add("--device", default="cpu", help="where the -decoded rows decode: cpu or cuda (cpu)")
    add("--seed", type=int, default=0, help="of the features and the orders (0)")
    add("--cold", action="store_true", help="measure with an empty page cache too")
    add("--depth", type=_positive, help="--cold: batches that prefetch reads ahead (the cache's default)")
    add("--threads", type=_positive, help="--cold: threads of prefetch (the cache's default)")
    add("--json", type=Path, metavar="FILE", help="write the results there")
    add("--markdown", action="store_true", help="print Markdown tables")
    add("--list", action="store_true", help="print the names of all layouts and stop")
    return parser


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"{text} is not a whole number above 0")
    return int(text)


def _all_layouts(device: str) -> tuple[Layout, ...]:
    return (FLAT, *our_layouts(device), *PER_IMAGE, *LIBRARIES, *DATASETS)


def _check_options(options: argparse.Namespace) -> None:
    """Refuse what would only fail after minutes of measuring."""
    if options.json is not None and not options.json.parent.is_dir():
        raise ConfigError(f"--json: there is no directory {options.json.parent}.", path=options.json)
    if options.dir is not None and not options.dir.is_dir():
        raise ConfigError(f"--dir: {options.dir} is no directory; make it first.", path=options.dir)
    if options.device != "cpu":
        import torch

        if not torch.cuda.is_available():
            raise ConfigError(
                f"--device {options.device}: torch sees no GPU; leave it out.", device=options.device
            )


def _chosen(options: argparse.Namespace) -> list[Layout]:
    """Return the layouts asked for, and those that the other figures need."""
    layouts = _all_layouts(options.device)
    patterns = [pattern.strip() for pattern in (options.only or "*").split(",")]
    for pattern in patterns:
        if not any(fnmatchcase(layout.name, pattern) for layout in layouts):
            raise ConfigError(
                f"--only: no layout is called {pattern!r}; there are "
                f"{', '.join(layout.name for layout in layouts)}.",
                pattern=pattern,
            )
    needed = (FLAT, ZARR, HDF5) if options.cold else (FLAT,)
    return [
        layout
        for layout in layouts
        if layout in needed or any(fnmatchcase(layout.name, pattern) for pattern in patterns)
    ]


def _require_room(layouts: Sequence[Layout], options: argparse.Namespace, root: Path) -> None:
    """Refuse a run whose files do not fit on the disk, or not into the page cache that is to hold them."""
    image_bytes = 2 * sum(math.prod(shape) for shape in SHAPES[options.shape].values())
    sizes = {layout.directory: layout.size for layout in layouts}
    on_disk = int(image_bytes * options.images * (1 + sum(sizes.values())))
    in_memory = on_disk + image_bytes * options.batch * (len(layouts) + 1)
    for place, needed, free in (
        (f"the disk of {root.parent}", on_disk, shutil.disk_usage(root).free),
        ("memory", in_memory, available_memory()),
    ):
        if needed * _SPARE > free:
            raise ConfigError(
                f"{options.images} images in {len(sizes)} layouts take {needed / 1e9:.1f} GB, and a quarter "
                f"more is kept clear, but {place} has {free / 1e9:.1f} GB free. Take fewer --images, or "
                "fewer layouts with --only.",
                needed=needed,
                free=free,
            )


def _run(options: argparse.Namespace, layouts: Sequence[Layout], root: Path, command: str) -> None:
    _require_room(layouts, options, root)
    machine = report.describe_machine(root)
    started = time.strftime("%Y-%m-%d %H:%M")
    features = draw_features(root / "drawn.bin", SHAPES[options.shape], options.images, options.seed)
    warm = timing.measure(
        layouts, features, root, batch_size=options.batch, rounds=options.rounds, seed=options.seed
    )
    heading = [
        f"`{command}`",
        *report.machine_lines(machine),
        f"{options.images} images of {features.num_bytes / features.num_images / 1e6:.2f} MB, batches of "
        f"{options.batch}, median of {options.rounds} rounds, {started}",
    ]
    print(*heading, "", sep="\n" if not options.markdown else "\n\n")
    print(*report.warm_table(warm, markdown=options.markdown), "", *report.warm_notes(warm), sep="\n")
    results: dict[str, object] = {
        "command": command,
        "date": started,
        "machine": asdict(machine),
        "images": options.images,
        "batch": options.batch,
        "rounds": options.rounds,
        "image_bytes": features.num_bytes // features.num_images,
        "warm": [asdict(result) for result in warm],
    }
    if options.cold:
        found = cold.measure_cold(
            features,
            root,
            root / FLAT.directory / FLAT_NAME,
            batch_size=options.batch,
            rounds=options.rounds,
            seed=options.seed,
            depth=options.depth,
            threads=options.threads,
        )
        table = report.cold_table(found, markdown=options.markdown)
        print("", *table, "", *report.cold_notes(found), sep="\n")
        results["cold"] = [asdict(result) for result in found]
    if options.json:
        options.json.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

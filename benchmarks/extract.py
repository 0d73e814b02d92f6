"""How much of the encoders' speed an extraction reaches, end to end.

    python benchmarks/extract.py                        # tiny encoders, 256 images
    python benchmarks/extract.py --preset paper --images 6 --batch-size 2

JPEG files of COCO's size are drawn; then, in turn, the encoders alone run over pixels that lie ready in
memory, and a whole extraction runs from files to a finished cache. The ratio of the two is what decoding,
storing, checksums and syncing cost. Below it stands what each stage would do alone, with all threads to
itself. Random weights change nothing about speed.
"""

from __future__ import annotations

import argparse
import os
import platform
import shlex
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from encoders import clip_flops, matmul_flops_per_s, measure_ours, measure_plain, sam_flops
from PIL import Image

from ris_cache.ahead import map_ahead
from ris_cache.datasets import ImageRecord
from ris_cache.encoders.batch_size import find_batch_size
from ris_cache.encoders.frozen import FrozenEncoders
from ris_cache.encoders.images import decode_image
from ris_cache.encoders.spec import PRESETS
from ris_cache.encoders.weights import resolve_clip_weights, resolve_sam_weights
from ris_cache.errors import RisError
from ris_cache.extraction.pipeline import Pipeline
from ris_cache.extraction.run import Layout, compute_features, default_workers, make_recipe
from ris_cache.extraction.sources import Sources
from ris_cache.progress import Silent
from ris_cache.store.precision import DTYPES, encode
from ris_cache.store.writer import CacheWriter, Outcome

_HEIGHT, _WIDTH = 480, 640
_DEFAULT_IMAGES = {"tiny": 256, "paper": 4}

Batches = list[tuple[torch.Tensor, torch.Tensor]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Bench:
    """What every measurement needs."""

    encoders: FrozenEncoders
    sources: Sources
    batch_size: int
    workers: int
    layout: Layout
    root: Path

    @property
    def num_images(self) -> int:
        """How many images each measurement handles."""
        return len(self.sources.images)

    def decode(self, path: Path) -> tuple[np.ndarray, np.ndarray]:
        """Do what an extraction does before the encoders."""
        return self.encoders.prepare(decode_image(path, expected_size=(_HEIGHT, _WIDTH)))


def main(argv: Sequence[str]) -> int:
    """Run the benchmark and print its table; return the exit code."""
    options = _parser().parse_args(argv)
    try:
        _run(options, shlex.join(["python", "benchmarks/extract.py", *argv]))
    except RisError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    return 0


def _run(options: argparse.Namespace, command: str) -> None:
    num_images = options.images or _DEFAULT_IMAGES[options.preset]
    encoders = _load(options)
    with tempfile.TemporaryDirectory(prefix="ris-benchmark-", dir=options.dir) as directory:
        root = Path(directory)
        bench = Bench(
            encoders=encoders,
            sources=draw_sources(root / "images", num_images),
            batch_size=options.batch_size or find_batch_size(encoders),
            workers=options.workers or default_workers(),
            layout=Layout(backend=options.store, dtype=options.dtype),
            root=root,
        )
        batches = _batches(bench)
        _time(lambda: encode_alone(bench, batches[:1]))  # the first pass allocates
        alone, whole = [], []
        for _ in range(options.rounds):
            alone.append(num_images / _time(lambda: encode_alone(bench, batches)))
            whole.append(num_images / _time(lambda: extract_all(bench)))
        ratios = [end / bare for end, bare in zip(whole, alone, strict=True)]
        rows = [
            ("encoders alone", statistics.median(alone)),
            ("files to cache", statistics.median(whole)),
            (f"  decoding alone, {bench.workers} threads", num_images / _time(lambda: decode_all(bench))),
            ("  storing alone", num_images / _time(_storing(bench, batches))),
        ]
    print(f"$ {command}")
    print(
        f"{options.preset}, {num_images} images of {_HEIGHT}x{_WIDTH}, batches of {bench.batch_size}, "
        f"{encoders.arithmetic} on {_device_name(encoders.device)}, {os.cpu_count()} cores, "
        f"torch {torch.__version__}, Python {platform.python_version()}"
    )
    for name, rate in rows:
        print(f"{name:32}{rate:12.2f} images/s")
    listed = ", ".join(f"{ratio:.3f}" for ratio in ratios)
    print(f"{'files to cache / encoders alone':32}{statistics.median(ratios):12.3f}   (rounds: {listed})")
    if options.floor:
        _print_floor(encoders, num_images, bench.batch_size, statistics.median(whole))


def _print_floor(encoders: FrozenEncoders, num_images: int, batch_size: int, whole: float) -> None:
    """Print what the device's own products would allow, and what the libraries' plain loop reaches."""
    flops = sam_flops(encoders.spec.sam) + clip_flops(encoders.spec.clip)
    floor = matmul_flops_per_s(encoders.device, encoders.arithmetic) / flops
    plain, reference = measure_plain(encoders, num_images, floor)
    ours = measure_ours(encoders, num_images, batch_size, reference, floor)
    print(f"{'floor: products alone':32}{floor:12.2f} images/s   ({flops / 1e12:.3f} TFLOP an image)")
    print(f"{'files to cache / floor':32}{whole / floor:12.3f}")
    print(f"{'plain loop, float32':32}{plain.images_per_s:12.2f} images/s")
    print(f"{'files to cache / plain loop':32}{whole / plain.images_per_s:12.2f}")
    for name, (relative, largest) in ours.errors.items():
        print(f"{f'error of {name}':32}{relative:12.1e} relative, {largest:.1e} at most")


def draw_sources(directory: Path, num_images: int) -> Sources:
    """Draw smooth random JPEG files, which compress about as photographs do."""
    directory.mkdir(parents=True)
    random = np.random.default_rng(0)
    images, paths = {}, {}
    for image_id in range(1, num_images + 1):
        coarse = random.integers(0, 256, (_HEIGHT // 10, _WIDTH // 10, 3), dtype=np.uint8)
        smooth = np.asarray(Image.fromarray(coarse).resize((_WIDTH, _HEIGHT), Image.Resampling.BICUBIC))
        grain = random.integers(-12, 13, smooth.shape)
        name = f"COCO_train2014_{image_id:012d}.jpg"
        Image.fromarray(np.clip(smooth + grain, 0, 255).astype(np.uint8)).save(directory / name, quality=90)
        images[image_id] = ImageRecord(image_id=image_id, file_name=name, height=_HEIGHT, width=_WIDTH)
        paths[image_id] = directory / name
    return Sources(parts=(), images=images, paths=paths)


def encode_alone(bench: Bench, batches: Batches) -> None:
    """Run the encoders over pixels in memory and wait for the device."""
    for sam_pixels, clip_pixels in batches:
        bench.encoders.encode(sam_pixels, clip_pixels)
    if bench.encoders.device.type == "cuda":
        torch.cuda.synchronize(bench.encoders.device)


def decode_all(bench: Bench) -> None:
    """Decode and squash every image, as far ahead as an extraction would."""
    paths = [path for path in bench.sources.paths.values() if path is not None]
    for _ in map_ahead(bench.decode, paths, workers=bench.workers, depth=2 * bench.batch_size):
        pass


def extract_all(bench: Bench) -> None:
    """Extract into a new cache."""
    cache = bench.root / "cache"
    writer = _open_writer(bench, cache)
    pipeline = Pipeline(
        encoders=bench.encoders,
        paths=bench.sources.paths,
        dtype=make_recipe(bench.encoders, cache, bench.layout).dtype,
        batch_size=bench.batch_size,
        workers=bench.workers,
        strict=True,
    )
    recipe = make_recipe(bench.encoders, cache, bench.layout)
    added = compute_features(writer, pipeline, recipe, Silent(), lambda: False)
    writer.finish(lambda draft: None)
    assert added == bench.num_images
    shutil.rmtree(cache)


def _storing(bench: Bench, batches: Batches) -> Callable[[], None]:
    """Return what converts and commits features that lie ready on the device."""
    cache = bench.root / "cache"
    features = [bench.encoders.encode(*batch) for batch in batches[:1]]
    recipe = make_recipe(bench.encoders, cache, bench.layout)

    def store() -> None:
        writer = _open_writer(bench, cache)
        for claim in writer.free_claims():
            parts = []
            left = len(claim.images)
            while left > 0:
                encoded = encode(recipe.dtype, features[0])
                parts.append({name: tensor[:left].cpu().numpy() for name, tensor in encoded.arrays.items()})
                left -= len(features[0]["sam"])
            arrays = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
            claim.commit(arrays, [Outcome(sha256="0" * 64)] * len(claim.images))
        writer.finish(lambda draft: None)
        shutil.rmtree(cache)

    return store


def _open_writer(bench: Bench, cache: Path) -> CacheWriter:
    return CacheWriter.open(
        cache,
        make_recipe(bench.encoders, cache, bench.layout),
        purpose="extract",
        request={},
        choose=lambda known: bench.sources.needing_features(known, cache),
    )


def _batches(bench: Bench) -> Batches:
    prepared = [bench.decode(path) for path in bench.sources.paths.values() if path is not None]
    return [
        (
            torch.from_numpy(np.stack([sam for sam, _ in prepared[start : start + bench.batch_size]])),
            torch.from_numpy(np.stack([clip for _, clip in prepared[start : start + bench.batch_size]])),
        )
        for start in range(0, len(prepared), bench.batch_size)
    ]


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} is not positive")
    return value


def _time(action: Callable[[], object]) -> float:
    start = time.perf_counter()
    action()
    return time.perf_counter() - start


def _load(options: argparse.Namespace) -> FrozenEncoders:
    spec = PRESETS[options.preset]
    return FrozenEncoders.load(
        spec,
        sam_source=resolve_sam_weights(None, spec.sam, random_seed=0),
        clip_source=resolve_clip_weights(None, spec.clip, random_seed=0),
        device=options.device,
        arithmetic=options.arithmetic,
    )


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or "CPU"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--preset", choices=sorted(PRESETS), default="tiny")
    parser.add_argument("--images", type=_positive, help="images; 256 for tiny, 4 for paper by default")
    parser.add_argument("--batch-size", type=_positive, help="by default what ris extract would take")
    parser.add_argument("--workers", type=_positive, help="decoding threads")
    parser.add_argument("--rounds", type=_positive, default=3, help="of both measurements in turn")
    parser.add_argument("--floor", action="store_true", help="also the device's own limit and the plain loop")
    parser.add_argument("--store", choices=["zarr", "hdf5"], default="zarr")
    parser.add_argument("--dtype", choices=DTYPES, default="float16")
    parser.add_argument("--arithmetic", default="auto")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dir", type=Path, help="where to put images and cache")
    return parser


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

"""How fast the frozen encoders run: images/s beside the libraries' plain loop and the device's own ceiling.

    python benchmarks/encoders.py                              # full size on the device at hand
    python benchmarks/encoders.py --images 1 --device cpu      # full size on a CPU: minutes
    python benchmarks/encoders.py --preset tiny --compile

The plain loop is what one writes with segment_anything and open_clip: float32, one image at a time. The
share "of floor" is of what the operations alone would allow at the rate of one large matrix product,
measured in the same run and dtype (above 1 on a machine that was busy just then). The last columns say how
far features are from the plain loop's: norm of the difference over norm, and largest difference over
largest value. Weights are random unless named, which changes errors but not speed. Pixels start in host
memory, features stay on the device.
"""

from __future__ import annotations

import argparse
import math
import shlex
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch

from ris_cache.encoders.batch_size import find_batch_size
from ris_cache.encoders.clip import encode_clip_images
from ris_cache.encoders.frozen import ARITHMETICS, FrozenEncoders
from ris_cache.encoders.images import normalise
from ris_cache.encoders.spec import PRESETS, ClipSpec, EncoderSpec, SamSpec
from ris_cache.encoders.weights import resolve_clip_weights, resolve_sam_weights
from ris_cache.errors import ConfigError, RisError

_COMPARED_IMAGES = 4
_MLP_RATIO = 4
_MATMUL_SIDE = {"cuda": 8192, "cpu": 1024}
_MIN_ROUNDS = 3
_CEILING_SECONDS = 1.0
_DEFAULT_IMAGES = {("paper", "cuda"): 256, ("paper", "cpu"): 1, ("tiny", "cuda"): 1024, ("tiny", "cpu"): 64}
# On a CPU half precision has to be asked for: full-size float16 takes minutes per image there.
_DEFAULT_ARITHMETICS = {"cuda": ("float32", "float16", "bfloat16"), "cpu": ("float32",)}

Pixels = tuple[torch.Tensor, torch.Tensor]
Features = dict[str, torch.Tensor]


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """One way to encode.

    Attributes:
        images_per_s: over all images, the first batch not counted.
        floor_images_per_s: what the arithmetic's matrix products would allow.
        errors: per feature, relative error (norm over norm) and largest difference over largest value.
    """

    name: str
    batch_size: int
    images_per_s: float
    floor_images_per_s: float
    errors: dict[str, tuple[float, float]]


def sam_flops(spec: SamSpec) -> int:
    """Count floating-point operations of one image through SAM's image encoder, attention included.

    Matrix products and convolutions only, two operations per multiplication and addition; relative positions
    as the library computes them.
    """
    tokens, width = spec.grid**2, spec.width
    head_width = width // spec.num_heads
    total = 2 * tokens * width * 3 * spec.patch_size**2
    for block in range(spec.depth):
        is_global = block in spec.global_attn_indexes
        side = spec.grid if is_global else spec.window_size
        windows = 1 if is_global else math.ceil(spec.grid / side) ** 2  # the last ones are padded
        queries, keys = windows * side**2, side**2
        total += 2 * queries * width * (3 * width + width)  # qkv and projection
        total += 2 * 2 * queries * keys * width  # logits, and values mixed
        total += 2 * queries * 2 * side * head_width * spec.num_heads  # relative rows and columns
        total += 2 * 2 * tokens * width * _MLP_RATIO * width
    neck = 2 * tokens * (width * spec.out_channels + 9 * spec.out_channels**2)
    return total + neck


def clip_flops(spec: ClipSpec) -> int:
    """Count floating-point operations of one image through CLIP's image tower, as `sam_flops` does."""
    tokens, width = spec.num_tokens + 1, spec.width
    patches = 2 * spec.num_tokens * width * 3 * spec.patch_size**2
    linear = 2 * tokens * width * (3 * width + width + 2 * _MLP_RATIO * width)
    attention = 2 * 2 * tokens**2 * width
    return patches + spec.layers * (linear + attention) + 2 * width * spec.embed_dim


def matmul_flops_per_s(device: torch.device, arithmetic: str) -> float:
    """Measure the best rate of a large square matrix product, in the layout of linear layers."""
    side = _MATMUL_SIDE[device.type]
    left, right = (torch.randn(side, side, device=device).to(getattr(torch, arithmetic)) for _ in range(2))
    seconds: list[float] = []
    while len(seconds) < _MIN_ROUNDS or sum(seconds) < _CEILING_SECONDS:
        seconds.append(_seconds(lambda: left @ right.T, device))
    return 2 * side**3 / min(seconds)


def plain_loop(encoders: FrozenEncoders, pixels: Pixels) -> Features:
    """Encode image by image with the libraries' own forwards in float32."""
    spec = encoders.spec
    sam, clip, clip_pooled = [], [], []
    with torch.no_grad():
        for sam_image, clip_image in zip(*(torch.split(frames, 1) for frames in pixels), strict=True):
            sam_input = normalise(sam_image.to(encoders.device), spec.sam.normalisation)
            sam.append(encoders.sam.image_encoder(sam_input))
            clip_input = normalise(clip_image.to(encoders.device), spec.clip.normalisation)
            tokens, pooled = encode_clip_images(encoders.clip, clip_input)  # open_clip's own forward
            clip.append(tokens)
            clip_pooled.append(pooled)
    return {"sam": torch.cat(sam), "clip": torch.cat(clip), "clip_pooled": torch.cat(clip_pooled)}


def measure_plain(encoders: FrozenEncoders, num_images: int, floor: float) -> tuple[Result, Features]:
    """Time the plain loop; also return its features of the first images, for comparison."""
    pixels = draw_pixels(encoders.spec, min(num_images, _COMPARED_IMAGES), encoders.device)
    reference = plain_loop(encoders, pixels)
    one = (pixels[0][:1], pixels[1][:1])
    seconds = _seconds(lambda: [plain_loop(encoders, one) for _ in range(num_images)], encoders.device)
    name = "libraries' plain loop, float32"
    result = Result(
        name=name, batch_size=1, images_per_s=num_images / seconds, floor_images_per_s=floor, errors={}
    )
    return result, reference


def measure_ours(
    encoders: FrozenEncoders, num_images: int, batch_size: int, reference: Features, floor: float
) -> Result:
    """Time whole batches and compare the first images with the reference."""
    pixels = draw_pixels(encoders.spec, batch_size, encoders.device)
    found = encoders.encode(*pixels)  # also compiles
    errors = {}
    for name, expected in reference.items():
        count = min(len(expected), batch_size)
        difference = found[name][:count] - expected[:count]
        errors[name] = (
            (difference.norm() / expected[:count].norm()).item(),
            (difference.abs().max() / expected[:count].abs().max()).item(),
        )
    rounds = math.ceil(num_images / batch_size)

    def encode_all() -> None:
        for _ in range(rounds):
            encoders.encode(*pixels)

    return Result(
        name=f"ris, {encoders.arithmetic}{', compiled' if encoders.compiled else ''}",
        batch_size=batch_size,
        images_per_s=rounds * batch_size / _seconds(encode_all, encoders.device),
        floor_images_per_s=floor,
        errors=errors,
    )


def draw_pixels(spec: EncoderSpec, num_images: int, device: torch.device) -> Pixels:
    """Draw random input frames; the first ones are the same whatever the number. Pinned for CUDA."""
    generator = torch.Generator().manual_seed(0)
    images = [
        [
            torch.randint(0, 256, (side, side, 3), dtype=torch.uint8, generator=generator)
            for side in (spec.sam.image_size, spec.clip.image_size)
        ]
        for _ in range(num_images)
    ]
    sam, clip = (torch.stack(frames) for frames in zip(*images, strict=True))
    return (sam.pin_memory(), clip.pin_memory()) if device.type == "cuda" else (sam, clip)


def main(argv: Sequence[str]) -> int:
    """Run the benchmark and print its table; return the exit code."""
    options = _parser().parse_args(argv)
    try:
        _run(options, shlex.join(["python", "benchmarks/encoders.py", *argv]))
    except RisError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").partition("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--preset", choices=tuple(PRESETS), default="paper")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--images", type=int, help="images to time; by default what takes about a minute")
    parser.add_argument("--batch-size", type=int, nargs="+", help="one row each; by default what fits")
    parser.add_argument(
        "--arithmetic",
        nargs="+",
        choices=[name for name in ARITHMETICS if name != "auto"],
        help="one row each; by default all on CUDA, float32 on a CPU",
    )
    parser.add_argument("--compile", action="store_true", help="add rows with torch.compile")
    parser.add_argument("--sam-weights", help="file; random weights by default")
    parser.add_argument("--clip-weights", help="file; random weights by default")
    return parser


def _run(options: argparse.Namespace, command: str) -> None:
    spec = PRESETS[options.preset]
    encoders = FrozenEncoders.load(
        spec,
        sam_source=resolve_sam_weights(
            options.sam_weights, spec.sam, random_seed=None if options.sam_weights else 0
        ),
        clip_source=resolve_clip_weights(
            options.clip_weights, spec.clip, random_seed=None if options.clip_weights else 0
        ),
        device=options.device,
        compile=options.compile,
    )
    device = encoders.device
    if device.type not in _MATMUL_SIDE:
        raise ConfigError(f"This benchmark runs on {' and '.join(_MATMUL_SIDE)}, not on {device}.")
    num_images = options.images
    if num_images is None:
        num_images = _DEFAULT_IMAGES[options.preset, device.type]
    if min([num_images, *(options.batch_size or [])]) < 1:
        raise ConfigError("--images and --batch-size count images: give 1 or more.")
    flops = sam_flops(spec.sam) + clip_flops(spec.clip)
    arithmetics = options.arithmetic or _DEFAULT_ARITHMETICS[device.type]
    ceilings = {name: matmul_flops_per_s(device, name) for name in {"float32", *arithmetics}}
    _print_heading(command, spec, device, ceilings, num_images)

    plain, reference = measure_plain(encoders, num_images, ceilings["float32"] / flops)
    _print_row(plain, plain)
    for arithmetic in arithmetics:
        for compiled in (False, True) if options.compile else (False,):
            variant = replace(encoders, arithmetic=arithmetic, compiled=compiled)
            for batch_size in options.batch_size or [find_batch_size(variant)]:
                result = measure_ours(
                    variant,
                    num_images,
                    min(batch_size, num_images),
                    reference,
                    ceilings[arithmetic] / flops,
                )
                _print_row(result, plain)


def _print_heading(
    command: str, spec: EncoderSpec, device: torch.device, ceilings: dict[str, float], num_images: int
) -> None:
    name = (
        torch.cuda.get_device_name(device) if device.type == "cuda" else f"{torch.get_num_threads()} threads"
    )
    sam, clip = sam_flops(spec.sam), clip_flops(spec.clip)
    print(f"{command}\n{device} ({name}), torch {torch.__version__}, {num_images} images")
    print(f"{(sam + clip) / 1e12:.4g} TFLOP per image: SAM {sam / 1e12:.4g}, CLIP {clip / 1e12:.4g}")
    for arithmetic, rate in sorted(ceilings.items()):
        floor = rate / (sam + clip)
        print(f"{arithmetic} matrix product: {rate / 1e12:.4g} TFLOP/s, at most {floor:.4g} images/s")
    print(
        f"\n{'':32}{'batch':>6}{'images/s':>10}{'x plain':>9}{'of floor':>9}"
        f"{'sam rel':>10}{'max':>9}{'clip rel':>10}{'max':>9}{'pooled rel':>12}{'max':>9}"
    )


def _print_row(result: Result, plain: Result) -> None:
    errors = "".join(
        f"{relative:>{width}.1e}{largest:>9.1e}"
        for (relative, largest), width in zip(result.errors.values(), (10, 10, 12), strict=False)
    )
    print(
        f"{result.name:32}{result.batch_size:>6}{result.images_per_s:>10.4g}"
        f"{result.images_per_s / plain.images_per_s:>9.2f}"
        f"{result.images_per_s / result.floor_images_per_s:>9.2f}{errors}",
        flush=True,
    )


def _seconds(work: Callable[[], object], device: torch.device) -> float:
    """Time work to its end, on the device too."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

"""How fast an evaluation counts, beside a plain loop over samples.

    python benchmarks/evaluate.py                       # tiny encoders, 64 drawn images
    python benchmarks/evaluate.py --rules all
    python benchmarks/evaluate.py --preset paper --images 4

Images are drawn and extracted with random weights, which change nothing about speed. Then, in turn, every
expression is evaluated one after the other as one would write it down, and by `count_samples`. The plain loop
reads the image's features, runs the whole model, resizes on the CPU and counts with numpy, for each sample
anew. Both must count the same pixels; float32 sums are rounded differently in a batch, so a pixel may differ
whose logit is the threshold within rounding, and only such a one.
"""

from __future__ import annotations

import argparse
import os
import platform
import shlex
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from ris_cache import FeatureCache
from ris_cache.datasets import Selection
from ris_cache.datasets.shapes import write_shapes_dataset
from ris_cache.encoders.frozen import FrozenEncoders
from ris_cache.encoders.spec import PRESETS
from ris_cache.encoders.weights import resolve_clip_weights, resolve_sam_weights
from ris_cache.errors import RisError
from ris_cache.extraction.run import extract
from ris_cache.memory import keep_freed_memory
from ris_train.config import load_config
from ris_train.data.batch import BatchBuilder
from ris_train.data.samples import Sample, load_samples
from ris_train.data.text import TINY_VOCABULARY, Tokenizer
from ris_train.evaluate import count_samples
from ris_train.frames import logit_of
from ris_train.model.segmenter import ModelInputs, RisModel
from ris_train.scoring import Counts, View, collect, count_pixels, rules_named, truth_mask
from ris_train.scoring.results import views_of
from ris_train.training import build_model
from ris_train.truth import GroundTruth

_SELECTION = Selection(dataset="refcoco", split_by="unc", split="val")
_ROUNDING = 1e-5
"""Of the largest logit: how far from the threshold a pixel may lie that float32 sums decide either way."""

_Rows = dict[str, Counts]


@dataclass(frozen=True, slots=True, kw_only=True)
class Bench:
    """What both ways need."""

    cache: FeatureCache
    model: RisModel
    tokenizer: Tokenizer
    samples: tuple[Sample, ...]
    views: tuple[View, ...]
    batch_size: int
    device: torch.device


def main(argv: Sequence[str]) -> int:
    """Run the benchmark and print its table; return the exit code."""
    options = _parser().parse_args(argv)
    try:
        _run(options, shlex.join(["python", "benchmarks/evaluate.py", *argv]))
    except RisError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    return 0


def _run(options: argparse.Namespace, command: str) -> None:
    keep_freed_memory()  # for both: as `ris eval` does
    with tempfile.TemporaryDirectory(prefix="ris-benchmark-", dir=options.dir) as directory:
        bench = prepare(options, Path(directory))
        ways: dict[str, Callable[[], _Rows]] = {
            "plain loop": lambda: plain_loop(bench, with_dfam=True),
            "plain loop without DFAM": lambda: plain_loop(bench, with_dfam=False),
            "count_samples": lambda: ours(bench),
        }
        seconds: dict[str, list[float]] = {name: [] for name in ways}
        found: dict[str, _Rows] = {}
        ours(bench)  # the first pass allocates
        for _ in range(options.rounds):
            for name, way in ways.items():
                start = time.perf_counter()
                found[name] = way()
                seconds[name].append(time.perf_counter() - start)
        verdict = compare(bench, found["plain loop"], found["count_samples"])
    print(f"$ {command}")
    print(
        f"{options.preset}, {len(bench.samples)} expressions on {len({s.image_id for s in bench.samples})} "
        f"images, {len(bench.views)} views, batches of {bench.batch_size}, {bench.device}, "
        f"{os.cpu_count()} cores, {torch.get_num_threads()} threads, torch {torch.__version__}, "
        f"Python {platform.python_version()}"
    )
    for name, times in seconds.items():
        ratios = [plain / own for plain, own in zip(seconds["plain loop"], times, strict=True)]
        listed = ", ".join(f"{ratio:.2f}" for ratio in ratios)
        rate = len(bench.samples) / statistics.median(times)
        print(f"{name:26}{rate:10.1f} samples/s{statistics.median(ratios):8.2f} x   (rounds: {listed})")
    print(f"counts: {verdict}")


def prepare(options: argparse.Namespace, root: Path) -> Bench:
    """Draw images, extract their features with random encoders and build a model with random weights."""
    device = torch.device(options.device)
    spec = PRESETS[options.preset]
    write_shapes_dataset(root / "data", num_images={"val": options.images}, seed=0)
    encoders = FrozenEncoders.load(
        spec,
        sam_source=resolve_sam_weights(None, spec.sam, random_seed=0),
        clip_source=resolve_clip_weights(None, spec.clip, random_seed=0),
        device=device,
    )
    extract([_SELECTION], data_root=root / "data", cache_root=root / "feats", encoders=encoders)
    cache = FeatureCache.open(root / "feats")
    config = load_config(
        recipe=options.preset,
        overrides=["model.sparse_prompt=cls", f"model.bert.vocabulary={TINY_VOCABULARY}"],
    )
    tokenizer = Tokenizer.load(config.model.bert, config.model.max_tokens)
    torch.manual_seed(0)
    model, _ = build_model(cache, config, tokenizer, random_seed=0)
    return Bench(
        cache=cache,
        model=model.to(device).eval(),
        tokenizer=tokenizer,
        samples=load_samples(cache, _SELECTION, text="sent").samples,
        views=views_of(rules_named(options.rules)),
        batch_size=options.batch_size,
        device=device,
    )


def ours(bench: Bench) -> _Rows:
    """Evaluate as `ris eval` does, from tables that are not rasterised yet."""
    table_name = _SELECTION.table_name
    builder = BatchBuilder(
        bench.cache,
        bench.tokenizer,
        categories=bench.cache.categories(bench.cache.manifest.datasets[table_name].category_set),
        category_source="none",
        device=bench.device,
    )
    truth = GroundTruth.from_cache(bench.cache, [table_name])
    return count_samples(
        bench.model, bench.samples, builder, truth, views=bench.views, batch_size=bench.batch_size
    )


@torch.no_grad()
def plain_loop(bench: Bench, *, with_dfam: bool) -> _Rows:
    """Evaluate one sample after the other."""
    instances, sizes = bench.cache.instances(_SELECTION.table_name), bench.cache.sizes
    rows = {view.name: [] for view in bench.views}
    for sample in bench.samples:
        logits = _plain_logits(bench, sample, with_dfam=with_dfam)
        segmentations = [instances[ann_id].segmentation for ann_id in sample.ann_ids]
        for view in bench.views:
            frame_size = sizes[sample.image_id]
            predicted = _resized(logits, view.grid_size(frame_size)) > logit_of(view.threshold)
            truth = truth_mask(segmentations, view, frame_size=frame_size)
            rows[view.name].append(count_pixels(predicted, truth, is_no_target=not sample.ann_ids))
    return {name: collect(counted) for name, counted in rows.items()}


def compare(bench: Bench, plain: _Rows, counted: _Rows) -> str:
    """Say that both counted the same pixels, but for undecided ones.

    Raises:
        AssertionError: they did not.
    """
    num_differing = num_pixels = 0
    sizes = bench.cache.sizes
    for view in bench.views:
        one, other = plain[view.name], counted[view.name]
        assert np.array_equal(one.annotated, other.annotated), f"{view.name}: other ground truth"
        differences = np.maximum(
            np.abs(one.predicted - other.predicted), np.abs(one.intersection - other.intersection)
        )
        for index in np.flatnonzero(differences).tolist():
            with torch.no_grad():
                logits = _plain_logits(bench, bench.samples[index], with_dfam=False)
            resized = _resized(logits, view.grid_size(sizes[bench.samples[index].image_id]))
            near = np.abs(resized - logit_of(view.threshold)) <= _ROUNDING * np.abs(resized).max()
            assert differences[index] <= np.count_nonzero(near), (
                f"{view.name}, sample {index}: {differences[index]} pixels differ, {np.count_nonzero(near)} "
                "are undecided"
            )
            num_differing += 1
            num_pixels += int(differences[index])
    total = len(bench.samples) * len(bench.views)
    if not num_differing:
        return f"identical for all {total} pairs of sample and view"
    return (
        f"identical for {total - num_differing} of {total} pairs of sample and view; the others differ by "
        f"{num_pixels} pixels in all, each within float32 rounding of the threshold"
    )


def _plain_logits(bench: Bench, sample: Sample, *, with_dfam: bool) -> torch.Tensor:
    """Mask logits float[1, 1, S, S] on the CPU."""
    features = bench.cache.read([sample.image_id]).to(bench.device)
    token_ids, text_mask = bench.tokenizer.encode([sample.text])
    inputs = ModelInputs(
        image_embeddings=features["sam"],
        clip_features=features["clip"],
        token_ids=token_ids.to(bench.device),
        text_mask=text_mask.to(bench.device),
        category_embeddings=None,
    )
    return bench.model(inputs, with_dfam=with_dfam).mask_logits[:, None].float().cpu()


def _resized(logits: torch.Tensor, size: tuple[int, int]) -> np.ndarray:
    return F.interpolate(logits, size=size, mode="bilinear", align_corners=False)[0, 0].numpy()


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} is not positive")
    return value


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--preset", choices=sorted(PRESETS), default="tiny")
    parser.add_argument("--images", type=_positive, default=64)
    parser.add_argument("--batch-size", type=_positive, default=32)
    parser.add_argument("--rules", default="ris", help="rule sets whose views are counted, or all")
    parser.add_argument("--rounds", type=_positive, default=3, help="of every way in turn")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dir", type=Path, help="where to put images and cache")
    return parser


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

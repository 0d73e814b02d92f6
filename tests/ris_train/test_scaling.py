"""Starting up and training do not slow down, or take more memory than samples need, as the tables grow."""

from __future__ import annotations

import importlib
import sys
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch

from ris_cache import FeatureCache
from ris_cache.datasets.selection import Selection
from ris_cache.store import columns, tables
from ris_train.config import load_config
from ris_train.data.batch import BatchBuilder
from ris_train.data.masks import TargetMasks
from ris_train.data.merge import load_training_set
from ris_train.data.sampler import SampleOrder
from ris_train.data.samples import Samples, load_samples
from ris_train.data.text import Tokenizer
from ris_train.truth import GroundTruth

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))  # as `python benchmarks/train_step.py` does
large = importlib.import_module("training.large")
sys.path.remove(str(BENCHMARKS))

TABLE = "refcoco.unc"
NUM_EXPRESSIONS = 140_000
BATCH_SIZE = 32


@pytest.fixture(scope="module")
def table_of(tiny_cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], Path]:
    """A cache with so many expressions, written once."""
    known: dict[int, Path] = {}

    def write(num_expressions: int) -> Path:
        if num_expressions not in known:
            root = tmp_path_factory.mktemp("large") / "feats"
            large.write_large_cache(
                FeatureCache.open(tiny_cache), root, num_expressions=num_expressions, table_name=TABLE
            )
            known[num_expressions] = root
        return known[num_expressions]

    return write


def training_samples(cache: FeatureCache) -> Samples:
    return load_training_set(
        cache, "refcoco:train", text="sent", leakage="exclude", with_no_target=False
    ).samples


def batch_maker(cache: FeatureCache, samples: Samples) -> Callable[[int], Any]:
    """Builds the batch of a step."""
    config = load_config(recipe="tiny")
    builder = BatchBuilder(
        cache,
        Tokenizer.load(config.model.bert, config.model.max_tokens),
        categories=cache.categories(cache.manifest.datasets[TABLE].category_set),
        category_source="none",
        device=torch.device("cpu"),
    )
    masks = TargetMasks({TABLE: cache.instances(TABLE)}, cache.sizes, config.loss.mask_size)
    order = SampleOrder(samples.column("image_id"), seed=0, fingerprint="0" * 64, selection="train")

    def make(step: int) -> Any:
        chosen = [samples[index] for index in order.take(step * BATCH_SIZE, BATCH_SIZE).tolist()]
        return builder.training_batch(chosen, masks, vl_exclude="referent")

    return make


def test_the_first_batch_of_a_whole_dataset_is_ready_within_seconds(table_of: Callable[[int], Path]) -> None:
    """Meant to be 10 s from the command to the first step on an idle machine, imports and model included.

    Measured is the time that this process computes, which others cannot lengthen much; it is about 1.5 s.
    """
    root = table_of(NUM_EXPRESSIONS)
    with (
        patch.object(columns, "from_json", side_effect=columns.from_json) as parse,
        patch.object(tables, "CachedExpression", side_effect=AssertionError("a record of an expression")),
        patch.object(tables, "CachedImage", side_effect=AssertionError("a record of an image")),
    ):
        start = time.process_time()
        cache = FeatureCache.open(root)
        samples = training_samples(cache)
        val = load_samples(cache, Selection(dataset="refcoco", split_by="unc", split="val"), text="sent")
        truth = GroundTruth.from_cache(cache, [TABLE])
        batch = batch_maker(cache, samples)(0)
        seconds = time.process_time() - start
    assert seconds < 8
    assert truth is not None
    assert len(samples) + len(val.samples) == NUM_EXPRESSIONS
    targets = {ann_id for sample in batch.samples for ann_id in sample.ann_ids}
    assert parse.call_count == len(targets)


def test_a_sample_takes_a_hundred_bytes(table_of: Callable[[int], Path]) -> None:
    cache = FeatureCache.open(table_of(NUM_EXPRESSIONS // 10))
    training_samples(cache)  # what is remembered from the first time on is not a sample's
    tracemalloc.start()
    try:
        samples = training_samples(cache)
        held, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert held / len(samples) < 120
    # Plain values of the columns, once, and of the splits' images beside them.
    assert peak / len(samples) < 700


def test_a_batch_costs_the_same_whatever_the_number_of_samples(table_of: Callable[[int], Path]) -> None:
    """Memory that a batch takes while it is built, and segmentations that are parsed for it."""
    found = {}
    for num_expressions in (NUM_EXPRESSIONS // 100, NUM_EXPRESSIONS // 10):
        cache = FeatureCache.open(table_of(num_expressions))
        make = batch_maker(cache, training_samples(cache))
        make(0)  # opens files, permutes the epoch
        tracemalloc.start()
        try:
            with patch.object(columns, "from_json", side_effect=columns.from_json) as parse:
                make(1)
            found[num_expressions] = tracemalloc.get_traced_memory()[1], parse.call_count
        finally:
            tracemalloc.stop()
    (small_bytes, small_parsed), (large_bytes, large_parsed) = found.values()
    assert large_bytes < 1.1 * small_bytes
    assert 0 < small_parsed <= BATCH_SIZE
    assert 0 < large_parsed <= BATCH_SIZE

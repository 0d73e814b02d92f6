"""From nothing to the first step, and what a step then costs: run in a process of its own.

    python benchmarks/training/startup.py CACHE STEPS

Prints JSON: seconds, seconds of computing and resident memory after each stage, and milliseconds per step
after the first. Others on the machine lengthen the seconds, and hardly those of computing.
"""

from __future__ import annotations

import time

_START = time.perf_counter()

import json  # noqa: E402
import statistics  # noqa: E402
import sys  # noqa: E402
from collections.abc import Sequence  # noqa: E402
from pathlib import Path  # noqa: E402

import torch  # noqa: E402

from ris_cache import FeatureCache  # noqa: E402
from ris_cache.datasets import Selection  # noqa: E402
from ris_cache.memory import keep_freed_memory, own_memory, return_freed_memory  # noqa: E402
from ris_train.config import load_config  # noqa: E402
from ris_train.data.batch import BatchBuilder, default_category_source  # noqa: E402
from ris_train.data.masks import TargetMasks  # noqa: E402
from ris_train.data.merge import load_training_set  # noqa: E402
from ris_train.data.sampler import SampleOrder  # noqa: E402
from ris_train.data.samples import load_samples  # noqa: E402
from ris_train.data.text import Tokenizer  # noqa: E402
from ris_train.losses import total_loss  # noqa: E402
from ris_train.optim import build_optimiser  # noqa: E402
from ris_train.training.building import build_model  # noqa: E402
from ris_train.truth import GroundTruth  # noqa: E402

TABLE_NAME = "refcoco.unc"


def main(argv: Sequence[str]) -> int:
    """Start, train, and print what it took."""
    root, steps = Path(argv[0]), int(argv[1])
    keep_freed_memory()
    stages: list[tuple[str, float, float, int]] = []

    def done(stage: str) -> None:
        stages.append((stage, time.perf_counter() - _START, time.process_time(), own_memory()))

    done("import")
    cache = FeatureCache.open(root)
    done("open the cache")
    config = load_config(recipe="tiny")
    training = load_training_set(
        cache, "refcoco:train", text="sent", leakage="exclude", with_no_target=False
    ).samples
    done("training samples")
    load_samples(cache, Selection(dataset="refcoco", split_by="unc", split="val"), text="sent")
    truth = GroundTruth.from_cache(cache, [TABLE_NAME])
    done("validation samples and truth")
    tokenizer = Tokenizer.load(config.model.bert, config.model.max_tokens)
    model, _ = build_model(cache, config, tokenizer, random_seed=0)
    optimiser = build_optimiser(model, config.train)
    done("model")
    return_freed_memory()
    done("freed memory returned")
    builder = BatchBuilder(
        cache,
        tokenizer,
        categories=cache.categories(cache.manifest.datasets[TABLE_NAME].category_set),
        category_source=default_category_source(config),
        device=torch.device("cpu"),
    )
    masks = TargetMasks(truth.instances, cache.sizes, config.loss.mask_size)
    order = SampleOrder(
        training.column("image_id"),
        seed=0,
        fingerprint=cache.fingerprint.digest,
        selection="train",
    )
    durations = []
    size = config.train.batch_size
    for step in range(steps):
        started = time.perf_counter()
        samples = [training[index] for index in order.take(step * size, size).tolist()]
        batch = builder.training_batch(samples, masks, vl_exclude=config.loss.vl_exclude)
        if step == 0:
            done("first batch")
        assert batch.targets is not None, "a training batch has targets"
        loss, _ = total_loss(model(batch.inputs), batch.targets, config.loss)
        loss.backward()
        optimiser.step()
        optimiser.zero_grad(set_to_none=True)
        durations.append(1000 * (time.perf_counter() - started))
        if step == 0:
            done("first step")
    done(f"{steps} steps")
    print(
        json.dumps(
            {
                "expressions": len(training),
                "stages": stages,
                "step_ms": statistics.median(durations[1:]),
                "step_range_ms": (min(durations[1:]), max(durations[1:])),
            }
        )
    )
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

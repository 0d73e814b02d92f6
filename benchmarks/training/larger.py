"""Steps of `ris train` on a cache, and the memory that the process then holds: run in a process of its own.

    cd benchmarks; python -m training.larger CACHE STEPS BATCH

Prints JSON: expressions, steps per second from the fourth step on, and resident memory before the first step,
in the middle and after the last.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path

import torch

from ris_cache.memory import keep_freed_memory, own_memory
from ris_train.config import load_config
from ris_train.ranks import Ranks
from ris_train.training.setup import prepare
from training.steps import Trainee

WARM_UP = 3
"""Steps that do not count: they fault memory in."""


def main(argv: Sequence[str]) -> int:
    """Train, and print what it took."""
    root, steps, batch_size = Path(argv[0]), int(argv[1]), int(argv[2])
    keep_freed_memory()  # as `ris train` does
    config = load_config(
        recipe="tiny",
        overrides=[f"train.steps={steps}", f"train.batch_size={batch_size}", "data.val=refcoco:train"],
    )
    setup = prepare(root, config, Ranks(0, 1, torch.device("cpu")), random_seed=0)
    trainee = Trainee(setup)
    memory = {0: own_memory()}
    seconds = []
    with closing(setup.batches(0, 1)) as batches:
        started = time.perf_counter()
        for batch in batches:
            trainee.step(batch)
            memory[batch.step] = own_memory()
            seconds.append(time.perf_counter() - started)
            started = time.perf_counter()
    found = {
        "expressions": len(setup.training_set.samples),
        "images": len(setup.cache),
        "steps_per_s": 1 / statistics.median(seconds[WARM_UP:] or seconds),
        "memory": {step: memory[step] for step in (0, (steps + 1) // 2, steps)},
    }
    print(json.dumps(found))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

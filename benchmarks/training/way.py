"""Steps of one way to train: run in a process of its own, so that the peak of memory is that way's.

    cd benchmarks; python -m training.way WAY

WAY is a `Way` as JSON. Prints JSON: what was measured and, where the way asks for it, the work of a step and
the device's ceilings.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from contextlib import closing
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from ris_cache.errors import RisError
from ris_cache.memory import keep_freed_memory
from ris_train.ranks import Ranks
from ris_train.training.setup import prepare
from ris_train.training.step import DTYPES
from training.bench import LoopedMaskDecoder, Way, live_features
from training.ceilings import Work, count_work, measure_ceilings
from training.clock import Spans
from training.steps import REST, Trainee, measure


def main(argv: Sequence[str]) -> int:
    """Train, and print what it took."""
    keep_freed_memory()  # as `ris train` does
    try:
        found = _run(Way(**json.loads(argv[0])))
    except RisError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    print(json.dumps(found))
    return 0


def _run(way: Way) -> dict[str, Any]:
    device = torch.device(way.device)
    setup = prepare(Path(way.cache), way.config(), Ranks(0, 1, device), random_seed=0)
    trainee = Trainee(setup)
    if way.kind == "looped":
        trainee.model.mask_decoder = LoopedMaskDecoder(trainee.model.mask_decoder)
    before = live_features(way.preset, device) if way.kind == "live" else None
    measured = measure(way.name, trainee, steps=way.steps, warm_up=way.warm_up, before=before)
    found: dict[str, Any] = {"measured": asdict(measured)}
    if way.is_counted:
        found["work"] = asdict(_work(trainee))
        ceilings = measure_ceilings(device, DTYPES.get(way.precision, torch.float32))
        found["ceilings"] = asdict(ceilings)
    return found


def _work(trainee: Trainee) -> Work:
    with closing(trainee.setup.batches(0, 1)) as batches:
        batch = next(batches)

    def step(spans: Spans) -> None:
        with trainee.within(spans), spans.span(REST):
            trainee.step(batch)

    return count_work(step, trainee.model, batch, is_half=trainee.setup.config.train.precision in DTYPES)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

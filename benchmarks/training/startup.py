"""From nothing to the first step of `ris train`, and what a step then costs: run in a process of its own.

    cd benchmarks; python -m training.startup CACHE STEPS

STEPS is at least 2. This is the whole of `ris train` but its command line; its run goes beside the cache.
Prints JSON: seconds, seconds of computing and resident memory after each stage, and milliseconds per step
after the first. Others on the machine lengthen the seconds, and hardly those of computing.
"""

from __future__ import annotations

import time

_START = time.perf_counter()

import json  # noqa: E402
import statistics  # noqa: E402
import sys  # noqa: E402
from collections.abc import Callable, Iterator, Sequence  # noqa: E402
from contextlib import ExitStack, contextmanager, suppress  # noqa: E402
from itertools import pairwise  # noqa: E402
from pathlib import Path  # noqa: E402
from typing import Any  # noqa: E402
from unittest.mock import patch  # noqa: E402

import torch  # noqa: E402

import ris_train.training.setup  # noqa: E402
from ris_cache import FeatureCache  # noqa: E402
from ris_cache.errors import RisError, StoppedError  # noqa: E402
from ris_cache.memory import keep_freed_memory, own_memory  # noqa: E402
from ris_train.config import load_config  # noqa: E402
from ris_train.training.progress import Silent  # noqa: E402
from ris_train.training.start import train  # noqa: E402
from ris_train.training.step import StepComputer  # noqa: E402

_STAGES = {
    (FeatureCache, "open"): "open the cache",
    (ris_train.training.setup, "load_usable"): "training samples",
    (ris_train.training.setup, "Validation"): "validation samples and truth",
    (ris_train.training.setup, "build_model"): "model",
    (ris_train.training.setup, "return_freed_memory"): "freed memory returned",
}
"""What `ris train` calls as it starts, in that order."""


class Stages(Silent):
    """Notes when each stage of starting up is done, and each step.

    Args:
        num_steps: after which training is stopped, at least 2.

    Attributes:
        done: stage, seconds since the start, seconds of computing, resident bytes.
        steps: seconds since the start after each step.
        expressions: that are trained on.
    """

    def __init__(self, num_steps: int) -> None:
        self._num_steps = num_steps
        self.done: list[tuple[str, float, float, int]] = []
        self.steps: list[float] = []
        self.expressions = 0

    def end(self, stage: str) -> None:
        """Note that a stage is done."""
        self.done.append((stage, time.perf_counter() - _START, time.process_time(), own_memory()))

    def advance(self, **of_step: float) -> None:
        """Note that a step is done."""
        self.steps.append(time.perf_counter() - _START)
        if len(self.steps) in (1, self._num_steps):
            self.end("first step" if len(self.steps) == 1 else f"{self._num_steps} steps")

    @contextmanager
    def noted(self) -> Iterator[None]:
        """Note the stages of a training that starts meanwhile."""
        gradients = StepComputer.gradients

        def first_gradients(computer: StepComputer, batch: Any) -> dict[str, float]:
            if not self.steps:
                self.end("state of step 0, first batch")
            return gradients(computer, batch)

        with ExitStack() as undone:
            for (owner, name), stage in _STAGES.items():
                undone.enter_context(patch.object(owner, name, self._ending(stage, getattr(owner, name))))
            undone.enter_context(patch.object(StepComputer, "gradients", first_gradients))
            yield

    def start(self, *, total: int, done: int) -> None:
        """Note that the loop begins; it saves the state of step 0 first."""
        self.end("run directory and optimiser")

    def _ending(self, stage: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **named: Any) -> Any:
            result = function(*arguments, **named)
            if stage == "training samples":
                self.expressions = len(result.samples)
            self.end(stage)
            return result

        return call


def main(argv: Sequence[str]) -> int:
    """Start, train, and print what it took."""
    root, steps = Path(argv[0]), int(argv[1])
    keep_freed_memory()  # as `ris train` does
    stages = Stages(steps)
    stages.end("import")
    # One step more than are taken, so that the last does not evaluate.
    config = load_config(
        recipe="tiny", overrides=[f"train.steps={steps + 1}", f"train.eval_every={steps + 1}"]
    )
    try:
        with stages.noted(), suppress(StoppedError):
            train(
                root,
                config,
                root.with_name(f"{root.name}-run"),
                device=torch.device("cpu"),
                random_seed=0,
                progress=stages,
                should_stop=lambda: len(stages.steps) == steps,
            )
    except RisError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    durations = [1000 * (after - before) for before, after in pairwise(stages.steps)]
    found = {
        "expressions": stages.expressions,
        "stages": stages.done,
        "step_ms": statistics.median(durations),
        "step_range_ms": (min(durations), max(durations)),
    }
    print(json.dumps(found))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

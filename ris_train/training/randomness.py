"""Random numbers of a training step, as a function of the run's seed and the step.

Every step begins by seeding all generators anew. What a step draws therefore depends on no earlier one, and a
resumed run has no generator to restore.

Each generator has a stream of its own. To numpy [seed, step] is the same as [seed, step, 0].
"""

from __future__ import annotations

import os
import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch


def seed_step(seed: int, step: int) -> None:
    """Seed the generators of torch (every device), numpy and Python.

    Args:
        seed: the run's.
        step: counted from 1.
    """
    drawn = np.random.SeedSequence([seed, step, 2]).generate_state(2, np.uint64)
    torch.manual_seed(int(drawn[0] >> np.uint64(1)))
    np.random.seed(int(drawn[1] & np.uint64(2**32 - 1)))
    random.seed(int(drawn[1]))


def points_generator(seed: int, step: int, device: torch.device) -> torch.Generator:
    """Generator of the losses' random points, the same for all processes and all parts of a step's batch."""
    return _generator([seed, step], device)


def dropout_generator(seed: int, step: int, device: torch.device) -> torch.Generator:
    """Generator of a step's dropout, the same for all processes."""
    return _generator([seed, step, 1], device)


def _generator(entropy: list[int], device: torch.device) -> torch.Generator:
    drawn = np.random.SeedSequence(entropy).generate_state(1, np.uint64)
    return torch.Generator(device).manual_seed(int(drawn[0] >> np.uint64(1)))


@contextmanager
def deterministic(device: torch.device, *, is_wanted: bool) -> Iterator[None]:
    """Have torch use deterministic algorithms while entered, if that is wanted.

    On the CPU an operation that has none is an error. On CUDA the gradients of bilinear reading
    (`grid_sample`, `interpolate`) have none, and the losses need them; there it is a warning of torch's.
    """
    if not is_wanted:
        yield
        return
    was_enabled = torch.are_deterministic_algorithms_enabled()
    was_warning = torch.is_deterministic_algorithms_warn_only_enabled()
    # cuBLAS reads this when it is first used; without it torch refuses its products.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True, warn_only=device.type != "cpu")
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(was_enabled, warn_only=was_warning)

"""Random numbers of a step follow from the seed and the step, each generator's for itself."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch

from ris_train.training.randomness import dropout_generator, points_generator, seed_step

CPU = torch.device("cpu")
KINDS = {
    "points": lambda seed, step: points_generator(seed, step, CPU),
    "dropout": lambda seed, step: dropout_generator(seed, step, CPU),
    "all": lambda seed, step: seed_step(seed, step) or torch.default_generator,
}


def states(kind: str) -> list[bytes]:
    """States of a kind's generator at a few steps of a few runs."""
    return [KINDS[kind](seed, step).get_state().numpy().tobytes() for seed in (0, 1, 7) for step in (1, 2, 3)]


def test_every_generator_has_a_stream_of_its_own_at_every_step_of_every_run():
    found = [state for kind in KINDS for state in states(kind)]
    assert len(set(found)) == len(found)


@pytest.mark.parametrize("kind", KINDS)
def test_a_step_draws_the_same_whatever_was_drawn_before(kind):
    before = states(kind)
    torch.rand(3)
    assert states(kind) == before


def test_numpy_and_python_are_seeded_as_well():
    drawn = []
    for step in (1, 2, 1):
        seed_step(5, step)
        drawn.append((np.random.rand(), random.random(), torch.rand(1).item()))
    assert drawn[0] == drawn[2]
    assert all(one != other for one, other in zip(*drawn[:2], strict=True))

"""Constants are made once, and can be trained with wherever they were first asked for."""

from __future__ import annotations

import torch
from torch import nn

from ris_cache.encoders.kept import kept


def test_a_constant_is_made_once_for_the_same_arguments() -> None:
    asked: list[int] = []

    @kept
    def ones(count: int, *, device: torch.device) -> torch.Tensor:
        """Ones."""
        asked.append(count)
        return torch.ones(count, device=device)

    device = torch.device("cpu")
    assert ones(3, device=device) is ones(3, device=device)
    assert len(ones(4, device=device)) == 4
    assert asked == [3, 4]
    assert (ones.__name__, ones.__doc__) == ("ones", "Ones.")


def test_a_constant_first_asked_for_in_inference_mode_can_be_trained_with() -> None:
    @kept
    def two(*, device: torch.device) -> torch.Tensor:
        return torch.full((1,), 2.0, device=device)

    weight = nn.Parameter(torch.ones(1))
    with torch.inference_mode():
        two(device=torch.device("cpu"))
    (weight * two(device=torch.device("cpu"))).sum().backward()  # type: ignore[no-untyped-call]
    assert weight.grad is not None
    assert weight.grad.item() == 2

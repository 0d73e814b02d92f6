"""Constant tensors that are made once."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Final, ParamSpec

import torch
from torch import Tensor

P = ParamSpec("P")
_MOST: Final = 32


def kept(make: Callable[P, Tensor]) -> Callable[P, Tensor]:
    """Keep what a function makes, by its arguments; whoever gets it must not write to it.

    A training step asks for the same few positions each time, which take some twenty small operations each.

    Args:
        make: a pure function of hashable arguments, among them the device.
    """
    made = functools.lru_cache(maxsize=_MOST)(make)

    @functools.wraps(make)
    def get(*args: P.args, **kwargs: P.kwargs) -> Tensor:
        # The compiler warns of the cache and traces past it; what it traces, it folds or fuses itself.
        if torch.compiler.is_compiling():
            return make(*args, **kwargs)
        # Otherwise what is first asked for in inference mode could not be trained with ever after.
        with torch.inference_mode(False), torch.no_grad():
            return made(*args, **kwargs)  # type: ignore[arg-type]

    return get

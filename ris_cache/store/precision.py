"""Precision of stored features: from what the encoders compute to what a cache keeps, and back.

Axes: B images, C channels and P side of SAM's embedding grid, N tokens and D channels of CLIP, E its joint
space; `sam` [C, P, P], `clip` [N, D], `clip_pooled` [E] for one image.

float16 and float32 keep a feature in an array of its own name and type. bfloat16 does too, as the uint16
that holds its bits. int8 keeps `sam` and `clip` as codes q in -127…127 with float32 scales s beside them
(`sam_scale`, `clip_scale`), a value being q · s; `clip_pooled`, a thousandth of the bytes, stays float16.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import numpy.typing as npt

from ris_cache.errors import ConfigError, ShapeError
from ris_cache.store.layout import ElementType, StoredArray

if TYPE_CHECKING:
    import torch

DTYPES: Final[tuple[str, ...]] = ("float16", "bfloat16", "float32", "int8")
"""Every precision that a cache can have."""

DEFAULT_DTYPE: Final = "float16"

FEATURES: Final = ("sam", "clip", "clip_pooled")

SCALED_AXES: Final[Mapping[str, tuple[int, ...]]] = {"sam": (-2, -1), "clip": (-2,)}
"""The axes, from the last, that share one int8 scale: one scale per channel, of each image.

Relative errors per channel, per token and per tensor (`benchmarks/quantisation.py`): `sam` 0.0050, 0.0069,
0.0095 and `clip` 0.0039, 0.0081, 0.0095 from full-size encoders with random weights; no trained ones were at
hand. Those have outliers, here drawn into a Gaussian `clip`: channels fifty times as large give 0.007, 0.057,
0.125, tokens thirty times as large 0.040, 0.008, 0.093. So per channel errs least on the encoders and in the
worse of the two cases. `sam` has no such tokens: its last layer norm gives every position the same size.
"""

QUANTISERS: Final[Mapping[str, str]] = {"int8": "symmetric, one scale per channel"}
"""How a dtype's codes come about, where its name does not say; part of the fingerprint."""

_SCALE_SUFFIX = "_scale"
_LARGEST_CODE = 127
# The smallest normal float32. Smaller scales lose digits, and max / 127 of a denormal may even round to 0.
_SMALLEST_SCALE = float(np.finfo(np.float32).tiny)
_ELEMENT_TYPES: Mapping[str, ElementType] = {
    "float16": "float16",
    "bfloat16": "uint16",
    "float32": "float32",
    "int8": "int8",
}


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Encoded:
    """Features of B images as a cache stores them.

    Attributes:
        arrays: [B, ...] by the names and in the dtypes of `stored_arrays`, C-contiguous, on the device of
            the features. Rows with problems hold anything.
        problems: by row, why it cannot be stored.
    """

    arrays: dict[str, torch.Tensor]
    problems: dict[int, str]


def stored_arrays(dtype: str, shapes: Mapping[str, tuple[int, ...]]) -> tuple[StoredArray, ...]:
    """Return the arrays that a cache of some precision holds, always in the same order.

    Args:
        shapes: of one image, by feature. Scales have the feature's shape with ones in `SCALED_AXES`, so that
            they broadcast against it.

    Raises:
        ConfigError: unknown precision.
        ShapeError: unknown feature.
    """
    arrays = []
    for name in _ordered(dtype, shapes):
        precision, shape = _precision_of(dtype, name), shapes[name]
        arrays.append(StoredArray(name=name, shape=shape, dtype=_ELEMENT_TYPES[precision]))
        if precision == "int8":
            scale_shape = list(shape)
            for axis in SCALED_AXES[name]:
                scale_shape[axis] = 1
            arrays.append(StoredArray(name=name + _SCALE_SUFFIX, shape=tuple(scale_shape), dtype="float32"))
    return tuple(arrays)


def encode(dtype: str, features: Mapping[str, torch.Tensor]) -> Encoded:
    """Turn features into what a cache stores, on the device where they lie, waiting for it once.

    Rounding is to nearest, ties to even. Rows do not influence each other.

    Args:
        features: float32[B, ...] by name, all on one device. What needs no change is not copied.

    Raises:
        ConfigError: unknown precision.
        ShapeError: unknown feature, another dtype, or batches that differ.
    """
    import torch

    names = _ordered(dtype, features)
    _check_batch(features)
    arrays: dict[str, torch.Tensor] = {}
    row_largest = []
    with torch.no_grad():
        for name in names:
            values, precision = features[name].contiguous(), _precision_of(dtype, name)
            if precision == "int8":
                largest = largest_magnitude(values, SCALED_AXES[name])
                scale = int8_scale(largest)
                arrays[name], arrays[name + _SCALE_SUFFIX] = quantise(values, scale), scale
                row_largest.append(largest.flatten(1).amax(1))
            else:
                rounded = values.to(getattr(torch, precision))
                arrays[name] = rounded.view(torch.uint16) if precision == "bfloat16" else rounded
                row_largest.append(largest_magnitude(values.flatten(1), (1,)).squeeze(1))
        largest_on_host = torch.stack(row_largest).cpu()
    problems: dict[int, list[str]] = {}
    for name, largest in zip(names, largest_on_host, strict=True):
        for row, problem in _find_problems(name, _precision_of(dtype, name), largest).items():
            problems.setdefault(row, []).append(problem)
    return Encoded(arrays=arrays, problems={row: "; ".join(problems[row]) for row in sorted(problems)})


def decode(dtype: str, stored: Mapping[str, npt.NDArray[Any]]) -> dict[str, npt.NDArray[np.float32]]:
    """Turn stored arrays into features, with numpy alone.

    Args:
        stored: [B, ...], or one row [...], in the dtypes of `stored_arrays`; features may be left out, but
            not their scales.

    Returns:
        float32 by feature, of the same shapes. The arrays of a float32 cache are returned, not copied.

    Raises:
        ConfigError: unknown precision.
        ShapeError: unknown array, missing scales, or another dtype.
    """
    features: dict[str, npt.NDArray[np.float32]] = {}
    for name in _stored_features(dtype, {name: array.dtype.name for name, array in stored.items()}):
        array = stored[name]
        match _precision_of(dtype, name):
            case "int8":
                features[name] = array * stored[name + _SCALE_SUFFIX]
            case "bfloat16":
                # bfloat16 is the upper half of a float32.
                features[name] = (array.astype(np.uint32) << 16).view(np.float32)
            case _:
                features[name] = array.astype(np.float32, copy=False)
    return features


def decode_tensors(
    dtype: str, stored: Mapping[str, torch.Tensor], *, to: torch.dtype
) -> dict[str, torch.Tensor]:
    """Turn stored tensors into features on the device where they lie, so that int8 crosses the bus as int8.

    Args:
        stored: as for `decode`; bfloat16 as torch.uint16.
        to: floating dtype. Its range is the caller's business: float16 turns values from 65520 into infinity.

    Returns:
        Features in `to`; float32 equals `decode` bit for bit, others are that rounded to nearest even. What
        is stored as `to` is returned, not copied.

    Raises:
        ConfigError: unknown precision.
        ShapeError: unknown array, missing scales, or another dtype.
    """
    import torch

    found = {name: str(tensor.dtype).removeprefix("torch.") for name, tensor in stored.items()}
    features: dict[str, torch.Tensor] = {}
    for name in _stored_features(dtype, found):
        tensor = stored[name]
        match _precision_of(dtype, name):
            case "int8":
                # With `out` the product is computed in float32 and rounded in the same kernel.
                product = torch.empty(tensor.shape, dtype=to, device=tensor.device)
                features[name] = torch.mul(tensor, stored[name + _SCALE_SUFFIX], out=product)
            case "bfloat16":
                features[name] = tensor.view(torch.bfloat16).to(to)
            case _:
                features[name] = tensor.to(to)
    return features


def largest_magnitude(values: torch.Tensor, axes: Sequence[int]) -> torch.Tensor:
    """Return max|x| over some axes, which become 1; NaN where any value is NaN."""
    import torch

    # Two reductions that only read. On a CPU, torch's single aminmax and its infinity norm take ten times as
    # long, and abs first writes a copy of everything.
    axes = tuple(axes)
    return torch.maximum(values.amax(axes, keepdim=True), -values.amin(axes, keepdim=True))


def int8_scale(largest: torch.Tensor) -> torch.Tensor:
    """Return the step that brings `largest` to code 127, never 0: a normal number even for tiny groups."""
    return (largest / _LARGEST_CODE).clamp(min=_SMALLEST_SCALE)


def quantise(values: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """Return round(values / scale) as int8.

    Args:
        scale: `int8_scale` of the largest magnitudes of the same values, broadcast against them.
    """
    import torch

    # No clamp to ±127: a normal scale is max|x| / 127 to the last digit, so no quotient reaches 127.5.
    return (values / scale).round_().to(torch.int8)


def _find_problems(name: str, precision: str, largest: torch.Tensor) -> dict[int, str]:
    """Say of the rows of one feature what keeps them from being stored, given float32[B] largest magnitudes.

    Rounding keeps the order of magnitudes, so a row overflows exactly if its largest value does.
    """
    import torch

    if precision == "int8":
        restored = int8_scale(largest) * _LARGEST_CODE
        limit = torch.finfo(torch.float32).max
    else:
        restored = largest.to(getattr(torch, precision))
        limit = torch.finfo(restored.dtype).max
    problems = {}
    for row in torch.nonzero(~restored.isfinite()).flatten().tolist():
        value = float(largest[row])
        if np.isnan(value):
            problem = "holds NaN; check the encoder and its weights"
        elif np.isinf(value):
            problem = "holds infinite values; check the encoder and its weights"
        else:
            wider = "bfloat16 or float32" if precision == "float16" else "float32"
            problem = (
                f"reaches {value:.8g} in magnitude, but {precision} holds at most {limit:.8g}; "
                f"store the features as {wider}"
            )
        problems[row] = f"{name} {problem}"
    return problems


def _precision_of(dtype: str, name: str) -> str:
    """Return how one feature is kept in a cache of some precision."""
    return "float16" if dtype == "int8" and name not in SCALED_AXES else dtype


def _ordered(dtype: str, names: Collection[str]) -> list[str]:
    """Return features in the order of `FEATURES`, checking both arguments."""
    if dtype not in DTYPES:
        raise ConfigError(
            f"Features cannot be stored as {dtype!r}; choose one of {', '.join(DTYPES)}.",
            dtype=dtype,
            known=DTYPES,
        )
    unknown = sorted(set(names) - set(FEATURES))
    if unknown:
        raise ShapeError(
            f"No features are called {', '.join(unknown)} in a {dtype} cache; known: {', '.join(FEATURES)}.",
            unknown=tuple(unknown),
            known=FEATURES,
        )
    return [name for name in FEATURES if name in names]


def _check_batch(features: Mapping[str, torch.Tensor]) -> None:
    import torch

    if not features or any(tensor.dtype != torch.float32 for tensor in features.values()):
        found = ", ".join(f"{name} {tensor.dtype}" for name, tensor in features.items())
        raise ShapeError(
            f"encode takes features in float32, at least one; got {found or 'none'}.", found=found
        )
    sizes = {name: len(tensor) for name, tensor in features.items()}
    if len(set(sizes.values())) > 1:
        raise ShapeError(
            f"Row i of every feature must be the same image, but the batches differ: {sizes}.", sizes=sizes
        )


def _stored_features(dtype: str, found: Mapping[str, str]) -> list[str]:
    """Return the features among stored arrays, in order, given the arrays' element types by name."""
    scales = {name + _SCALE_SUFFIX for name in SCALED_AXES} if dtype == "int8" else set()
    names = _ordered(dtype, [name for name in found if name not in scales])
    expected: dict[str, str] = {}
    for name in names:
        expected[name] = _ELEMENT_TYPES[_precision_of(dtype, name)]
        if name + _SCALE_SUFFIX in scales:
            expected[name + _SCALE_SUFFIX] = "float32"
    for name, element_type in expected.items():
        if found.get(name) != element_type:
            raise ShapeError(
                f"A {dtype} cache keeps {name} as {element_type}; got {found.get(name, 'nothing')} instead.",
                name=name,
                expected=element_type,
                found=found.get(name),
            )
    return names

"""What a cache keeps of features, against numpy's own arithmetic and against what must be refused."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from torch.overrides import TorchFunctionMode

from ris_cache.encoders.spec import PAPER
from ris_cache.errors import ConfigError, ShapeError
from ris_cache.store.layout import StoredArray
from ris_cache.store.precision import DEFAULT_DTYPE, DTYPES, decode, decode_tensors, encode, stored_arrays

SHAPES = {"sam": (3, 2, 2), "clip": (4, 5), "clip_pooled": (6,)}
FLOAT32 = np.finfo(np.float32)
LARGEST_BFLOAT16 = float.fromhex("0x1.fep127")
unhurried = settings(deadline=None)  # a pause of the machine is no failure


def random_features(num_rows: int = 3, seed: int = 0, **replaced: torch.Tensor) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    drawn = {name: torch.randn((num_rows, *shape), generator=generator) for name, shape in SHAPES.items()}
    return drawn | replaced


def as_numpy(tensors: dict[str, torch.Tensor]) -> dict[str, npt.NDArray[Any]]:
    return {name: tensor.numpy() for name, tensor in tensors.items()}


def round_trip(dtype: str, features: dict[str, torch.Tensor]) -> dict[str, npt.NDArray[np.float32]]:
    encoded = encode(dtype, features)
    assert not encoded.problems
    return decode(dtype, as_numpy(encoded.arrays))


def bfloat16_bits(values: npt.NDArray[np.float32]) -> npt.NDArray[np.uint16]:
    """Round to nearest even by hand: add just under half of the last kept bit, or half where that is odd."""
    bits = values.view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)


def bits(array: npt.NDArray[np.float32]) -> bytes:
    return np.ascontiguousarray(array).tobytes()


def features_within(limit: float) -> st.SearchStrategy[dict[str, torch.Tensor]]:
    """Batches of two images with elements of every size, zeros and denormals included."""
    elements = st.floats(-limit, limit, width=32)
    return st.fixed_dictionaries(
        {name: arrays(np.float32, (2, *shape), elements=elements) for name, shape in SHAPES.items()}
    ).map(lambda batch: {name: torch.from_numpy(array) for name, array in batch.items()})


@pytest.mark.parametrize("dtype", DTYPES)
@unhurried
@given(features=features_within(60_000))
def test_numpy_and_torch_decode_to_the_same_bits(dtype: str, features: dict[str, torch.Tensor]) -> None:
    stored = as_numpy(encode(dtype, features).arrays)
    by_numpy = decode(dtype, stored)
    by_torch = decode_tensors(
        dtype, {name: torch.from_numpy(array) for name, array in stored.items()}, to=torch.float32
    )
    assert list(by_numpy) == list(by_torch) == list(SHAPES)
    for name, array in by_numpy.items():
        assert array.dtype == np.float32
        assert array.shape == (2, *SHAPES[name])
        assert bits(array) == bits(by_torch[name].numpy())


@unhurried
@given(features=features_within(65_504))
def test_float16_is_what_numpy_rounds_to(features: dict[str, torch.Tensor]) -> None:
    stored = as_numpy(encode("float16", features).arrays)
    for name, values in as_numpy(features).items():
        assert stored[name].dtype == np.float16
        assert stored[name].tobytes() == values.astype(np.float16).tobytes()


@unhurried
@given(features=features_within(LARGEST_BFLOAT16))
def test_bfloat16_is_the_upper_half_of_a_float32_rounded_to_nearest_even(
    features: dict[str, torch.Tensor],
) -> None:
    encoded = encode("bfloat16", features)
    assert not encoded.problems
    stored = as_numpy(encoded.arrays)
    for name, values in as_numpy(features).items():
        np.testing.assert_array_equal(stored[name], bfloat16_bits(values), strict=True)


@unhurried
@given(features=features_within(float(FLOAT32.max)))
def test_float32_keeps_every_bit(features: dict[str, torch.Tensor]) -> None:
    for name, array in round_trip("float32", features).items():
        assert bits(array) == bits(features[name].numpy())


@unhurried
@given(features=features_within(60_000))
def test_int8_errs_by_at_most_half_a_step(features: dict[str, torch.Tensor]) -> None:
    stored = as_numpy(encode("int8", features).arrays)
    decoded = decode("int8", stored)
    for name in ("sam", "clip"):
        values, scale = features[name].numpy().astype(np.float64), stored[f"{name}_scale"]
        assert np.isfinite(scale).all()
        assert (scale >= FLOAT32.tiny).all()
        assert stored[name].min() >= -127
        assert stored[name].max() <= 127
        # The quotient and the product each round once, by at most 2⁻²⁴ of 127 steps.
        assert (np.abs(decoded[name] - values) <= scale.astype(np.float64) * (0.5 + 2 * 127 * 2.0**-24)).all()
    np.testing.assert_array_equal(
        decoded["clip_pooled"], features["clip_pooled"].numpy().astype(np.float16).astype(np.float32)
    )


@unhurried
@given(features=features_within(60_000))
def test_int8_codes_are_the_rounded_quotients_of_float64(features: dict[str, torch.Tensor]) -> None:
    stored = as_numpy(encode("int8", features).arrays)
    for name, axes in (("sam", (2, 3)), ("clip", (1,))):
        values = features[name].numpy().astype(np.float64)
        scale = np.maximum(np.abs(values).max(axes, keepdims=True) / 127, FLOAT32.tiny)
        np.testing.assert_allclose(stored[f"{name}_scale"], scale, rtol=2.0**-23)
        # Where the quotient lies halfway up to rounding, either neighbour is right.
        assert (np.abs(values / scale - stored[name]) <= 0.5 + 2.0**-15).all()


@pytest.mark.parametrize("dtype", DTYPES)
@unhurried
@given(features=features_within(60_000))
def test_encoding_what_was_decoded_changes_nothing(dtype: str, features: dict[str, torch.Tensor]) -> None:
    first = encode(dtype, features).arrays
    decoded = decode(dtype, as_numpy(first))
    again = encode(dtype, {name: torch.from_numpy(array) for name, array in decoded.items()}).arrays
    for name, tensor in first.items():
        if name.endswith("_scale"):
            torch.testing.assert_close(again[name], tensor, rtol=2.0**-22, atol=0)
        else:
            assert torch.equal(again[name].view(torch.int8), tensor.view(torch.int8)), name


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_are_encoded_alike_alone_and_in_a_batch(dtype: str) -> None:
    features = random_features()
    together = encode(dtype, features).arrays
    for row in range(3):
        alone = encode(dtype, {name: tensor[row : row + 1] for name, tensor in features.items()}).arrays
        for name, tensor in alone.items():
            np.testing.assert_array_equal(tensor.numpy(), together[name][row : row + 1].numpy())


@pytest.mark.parametrize("dtype", DTYPES)
def test_one_row_decodes_without_its_batch_axis(dtype: str) -> None:
    stored = as_numpy(encode(dtype, random_features()).arrays)
    whole = decode(dtype, stored)
    row = decode(dtype, {name: array[1] for name, array in stored.items()})
    for name, array in row.items():
        assert bits(array) == bits(whole[name][1])


@pytest.mark.parametrize("dtype", DTYPES)
def test_what_is_encoded_fits_the_arrays_of_the_cache(dtype: str) -> None:
    encoded = as_numpy(encode(dtype, random_features()).arrays)
    expected = stored_arrays(dtype, SHAPES)
    assert list(encoded) == [array.name for array in expected]
    for array in expected:
        assert encoded[array.name].dtype == array.numpy_dtype
        assert encoded[array.name].shape == (3, *array.shape)
        assert encoded[array.name].flags.c_contiguous


@pytest.mark.parametrize("dtype", DTYPES)
def test_channels_last_features_are_stored_like_contiguous_ones(dtype: str) -> None:
    features = random_features()
    channels_last = features["sam"].to(memory_format=torch.channels_last)
    assert not channels_last.is_contiguous()
    stored = as_numpy(encode(dtype, features | {"sam": channels_last}).arrays)
    assert stored["sam"].flags.c_contiguous
    np.testing.assert_array_equal(stored["sam"], encode(dtype, features).arrays["sam"].numpy())


def test_int8_keeps_a_scale_per_channel_beside_each_feature_but_the_pooled_one() -> None:
    assert stored_arrays("int8", {name: SHAPES[name] for name in reversed(SHAPES)}) == (
        StoredArray(name="sam", shape=(3, 2, 2), dtype="int8"),
        StoredArray(name="sam_scale", shape=(3, 1, 1), dtype="float32"),
        StoredArray(name="clip", shape=(4, 5), dtype="int8"),
        StoredArray(name="clip_scale", shape=(1, 5), dtype="float32"),
        StoredArray(name="clip_pooled", shape=(6,), dtype="float16"),
    )


@pytest.mark.parametrize(
    ("dtype", "element_type"), [("float16", "float16"), ("bfloat16", "uint16"), ("float32", "float32")]
)
def test_floating_precisions_keep_one_array_per_feature(dtype: str, element_type: Any) -> None:
    assert stored_arrays(dtype, SHAPES) == tuple(
        StoredArray(name=name, shape=shape, dtype=element_type) for name, shape in SHAPES.items()
    )


def test_int8_takes_half_of_what_float16_takes() -> None:
    def row_bytes(dtype: str) -> int:
        return sum(array.row_bytes for array in stored_arrays(dtype, PAPER.feature_shapes()))

    assert row_bytes("int8") / row_bytes(DEFAULT_DTYPE) == pytest.approx(0.5, abs=0.002)


@pytest.mark.parametrize("tiny", [0.0, 1e-45, -1e-45, 3e-43, float(FLOAT32.tiny), 1e-36])
def test_int8_takes_groups_of_zeros_and_of_denormals(tiny: float) -> None:
    features = random_features(clip=torch.full((3, *SHAPES["clip"]), tiny))
    stored = as_numpy(encode("int8", features).arrays)
    scale = stored["clip_scale"]
    assert np.isfinite(scale).all()
    assert (scale > 0).all()
    values = np.float64(np.float32(tiny))
    assert (np.abs(decode("int8", stored)["clip"] - values) <= scale.astype(np.float64) * 0.50001).all()
    if tiny == 0.0:
        assert not decode("int8", stored)["clip"].any()


def test_an_outlier_costs_its_own_channel_alone() -> None:
    features = random_features()
    with_outlier = {name: tensor.clone() for name, tensor in features.items()}
    with_outlier["sam"][0, 1, 0, 0] = 1000.0
    with_outlier["clip"][0, 2, 3] = 1000.0
    plain, disturbed = encode("int8", features).arrays, encode("int8", with_outlier).arrays
    changed = [(plain[name] != disturbed[name]).nonzero() for name in ("sam_scale", "clip_scale")]
    assert [indices.tolist() for indices in changed] == [[[0, 1, 0, 0]], [[0, 0, 3]]]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", list(SHAPES))
@pytest.mark.parametrize(
    ("value", "problem"),
    [
        (float("nan"), "holds NaN"),
        (float("inf"), "holds infinite values"),
        (float("-inf"), "holds infinite values"),
    ],
)
def test_values_that_are_not_finite_are_refused_in_their_row_alone(
    dtype: str, name: str, value: float, problem: str
) -> None:
    features = random_features()
    features[name][1].view(-1)[-1] = value
    encoded = encode(dtype, features)
    assert encoded.problems == {1: f"{name} {problem}; check the encoder and its weights"}
    intact = encode(dtype, random_features()).arrays
    for array, tensor in encoded.arrays.items():
        for row in (0, 2):
            np.testing.assert_array_equal(tensor[row].numpy(), intact[array][row].numpy())


@pytest.mark.parametrize("dtype", DTYPES)
def test_nan_is_found_wherever_it_hides_in_a_long_row(dtype: str) -> None:
    """Vectorised maxima have lost a NaN in a lane or in the remainder before."""
    for position in (0, 1, 63, 500, 1021, 1022):
        clip = torch.ones(1, 1023, 1)
        clip[0, position] = float("nan")
        problems = encode(dtype, {"clip": clip, "clip_pooled": torch.ones(1, 2)}).problems
        assert problems == {0: "clip holds NaN; check the encoder and its weights"}


def test_every_feature_with_a_problem_is_named() -> None:
    features = random_features()
    features["clip"][2, 0, 0] = float("inf")
    features["sam"][2, 0, 0, 0] = -70_000.0
    assert encode("float16", features).problems == {
        2: "sam reaches 70000 in magnitude, but float16 holds at most 65504; store the features as bfloat16 "
        "or float32; clip holds infinite values; check the encoder and its weights"
    }


@pytest.mark.parametrize("sign", [1.0, -1.0])
@pytest.mark.parametrize(
    ("value", "overflows"),
    [(65504.0, False), (65519.996, False), (65520.0, True), (70_000.0, True), (3e38, True)],
)
def test_float16_overflow_is_caught_where_rounding_makes_it_infinite(
    sign: float, value: float, overflows: bool
) -> None:
    features = random_features()
    features["sam"][0, 2, 1, 1] = sign * value
    encoded = encode("float16", features)
    assert (0 in encoded.problems) == overflows
    assert bool(encoded.arrays["sam"][0].isinf().any()) == overflows
    assert not encode("bfloat16", features).problems
    assert not encode("float32", features).problems


def test_the_pooled_embedding_of_int8_can_overflow_float16() -> None:
    features = random_features()
    features["clip_pooled"][1, 0] = 65520.0
    assert encode("int8", features).problems == {
        1: "clip_pooled reaches 65520 in magnitude, but float16 holds at most 65504; store the features as "
        "bfloat16 or float32"
    }
    features["clip_pooled"][1, 0] = 0.0
    features["clip"][1, 0, 0] = 65520.0
    assert not encode("int8", features).problems


@pytest.mark.parametrize(
    ("value", "overflows"),
    [
        (LARGEST_BFLOAT16, False),
        (float.fromhex("0x1.fefffep127"), False),
        (float.fromhex("0x1.ffp127"), True),
    ],
)
def test_bfloat16_overflow_is_caught_too(value: float, overflows: bool) -> None:
    features = random_features()
    features["clip"][1, 0, 0] = value
    encoded = encode("bfloat16", features)
    if overflows:
        assert encoded.problems[1].startswith("clip reaches 3.3961775e+38 in magnitude, but bfloat16 holds")
        assert encoded.problems[1].endswith("store the features as float32")
    else:
        assert not encoded.problems


def test_int8_never_decodes_to_infinity_what_it_took_as_finite() -> None:
    """127 · (max / 127) rounds up past float32's largest value for some values next to it."""
    largest = torch.tensor(float(FLOAT32.max)).view(torch.int32)
    clip = (largest - torch.arange(64, dtype=torch.int32)).view(torch.float32).view(64, 1, 1)
    encoded = encode("int8", {"clip": clip})
    with np.errstate(over="ignore"):
        decoded = decode("int8", as_numpy(encoded.arrays))["clip"]
    assert list(encoded.problems) == np.flatnonzero(np.isinf(decoded)).tolist()
    assert 0 < len(encoded.problems) < 64
    assert all("store the features as float32" in problem for problem in encoded.problems.values())


@pytest.mark.parametrize("dtype", DTYPES)
def test_an_empty_batch_works(dtype: str) -> None:
    encoded = encode(dtype, random_features(0))
    assert encoded.problems == {}
    decoded = decode(dtype, as_numpy(encoded.arrays))
    tensors = decode_tensors(dtype, encoded.arrays, to=torch.float16)
    for name, shape in SHAPES.items():
        assert decoded[name].shape == tuple(tensors[name].shape) == (0, *shape)


@pytest.mark.parametrize("to", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("dtype", DTYPES)
def test_tensors_decode_to_any_floating_type_with_one_rounding(dtype: str, to: torch.dtype) -> None:
    encoded = encode(dtype, random_features())
    exact = decode(dtype, as_numpy(encoded.arrays))
    for name, tensor in decode_tensors(dtype, encoded.arrays, to=to).items():
        assert tensor.dtype == to
        assert torch.equal(tensor, torch.from_numpy(exact[name]).to(to))


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_single_feature_can_be_decoded(dtype: str) -> None:
    stored = as_numpy(encode(dtype, random_features()).arrays)
    some = {name: array for name, array in stored.items() if name in ("clip", "clip_scale")}
    decoded = decode(dtype, some)
    assert list(decoded) == ["clip"]
    assert bits(decoded["clip"]) == bits(decode(dtype, stored)["clip"])


def test_decoding_does_not_change_what_is_stored() -> None:
    for dtype in DTYPES:
        encoded = encode(dtype, random_features())
        before = {name: tensor.clone() for name, tensor in encoded.arrays.items()}
        decode(dtype, as_numpy(encoded.arrays))
        decode_tensors(dtype, encoded.arrays, to=torch.float32)
        for name, tensor in before.items():
            np.testing.assert_array_equal(encoded.arrays[name].numpy(), tensor.numpy())


@pytest.mark.parametrize("dtype", DTYPES)
def test_encoding_waits_for_the_device_once(dtype: str) -> None:
    """Every call that would read a tensor's values on the host, up to the one copy of the maxima."""
    waiting = {"cpu", "item", "tolist", "numpy", "nonzero", "__bool__", "__float__", "__int__", "all", "any"}
    calls: list[str] = []

    class Recorder(TorchFunctionMode):
        def __torch_function__(
            self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
        ) -> Any:
            calls.append(function.__name__)
            return function(*args, **(kwargs or {}))

    with Recorder():
        encode(dtype, random_features())
    copy = calls.index("cpu")
    assert not waiting & set(calls[:copy])
    assert calls.count("cpu") == 1


def test_unknown_precisions_are_refused_with_the_known_ones() -> None:
    stored = encode("float16", random_features()).arrays
    for call in (
        lambda: stored_arrays("float8", SHAPES),
        lambda: encode("float8", random_features()),
        lambda: decode("float8", as_numpy(stored)),
        lambda: decode_tensors("float8", stored, to=torch.float32),
    ):
        with pytest.raises(
            ConfigError, match="'float8'; choose one of float16, bfloat16, float32, int8"
        ) as error:
            call()
        assert error.value.facts == {"dtype": "float8", "known": DTYPES}


def test_features_that_do_not_belong_together_are_refused() -> None:
    with pytest.raises(ShapeError, match=r"batches differ: \{'sam': 3, 'clip': 2, 'clip_pooled': 3\}"):
        encode("float16", random_features(clip=torch.zeros(2, 4, 5)))
    with pytest.raises(ShapeError, match=r"clip torch\.float16"):
        encode("float16", random_features(clip=torch.zeros(3, 4, 5, dtype=torch.float16)))
    with pytest.raises(ShapeError, match="got none"):
        encode("float16", {})
    with pytest.raises(ShapeError, match="No features are called dino in a float16 cache"):
        encode("float16", random_features(dino=torch.zeros(3, 1)))


def test_stored_arrays_of_another_precision_are_refused() -> None:
    stored = encode("float16", random_features()).arrays
    with pytest.raises(ShapeError, match="bfloat16 cache keeps sam as uint16; got float16") as error:
        decode("bfloat16", as_numpy(stored))
    assert error.value.facts == {"name": "sam", "expected": "uint16", "found": "float16"}
    with pytest.raises(ShapeError, match="int8 cache keeps sam as int8; got float16"):
        decode_tensors("int8", stored, to=torch.float32)
    quantised = encode("int8", random_features()).arrays
    del quantised["clip_scale"]
    with pytest.raises(ShapeError, match="keeps clip_scale as float32; got nothing"):
        decode("int8", as_numpy(quantised))
    with pytest.raises(ShapeError, match="No features are called sam_scale in a float32 cache"):
        decode("float32", {"sam_scale": np.zeros((1, 3, 1, 1), np.float32)})


def test_reading_needs_no_torch() -> None:
    """A reader that has numpy alone can name the arrays and decode them."""
    script = (
        "import sys, numpy as np\n"
        "from ris_cache.store.precision import decode, stored_arrays\n"
        "arrays = stored_arrays('int8', {'sam': (3, 2, 2), 'clip': (4, 5), 'clip_pooled': (6,)})\n"
        "stored = {a.name: np.ones((2, *a.shape), a.dtype) for a in arrays}\n"
        "assert all((v == 1).all() for v in decode('int8', stored).values())\n"
        "assert 'torch' not in sys.modules\n"
    )
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr

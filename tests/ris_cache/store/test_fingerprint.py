"""The fingerprint: canonical, sensitive to every value, and clear about differences."""

from __future__ import annotations

import hashlib
import json
import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ris_cache.encoders.spec import PAPER, TINY
from ris_cache.errors import ConfigError, FingerprintMismatchError
from ris_cache.store.fingerprint import (
    MISSING,
    Fingerprint,
    cache_fingerprint,
    differences,
    require_match,
)

LEAVES = (
    st.none()
    | st.booleans()
    | st.integers(-(10**20), 10**20)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=5)
)
VALUES = st.recursive(
    LEAVES,
    lambda children: (
        st.lists(children, max_size=3) | st.dictionaries(st.text(max_size=3), children, max_size=3)
    ),
    max_leaves=8,
)
FIELDS = st.dictionaries(st.text(max_size=3), VALUES, max_size=4)


def reordered(value: Any) -> Any:
    """The same value with keys the other way round and lists as tuples."""
    if isinstance(value, dict):
        return {key: reordered(value[key]) for key in reversed(value)}
    if isinstance(value, list):
        return tuple(reordered(child) for child in value)
    return value


@given(FIELDS)
def test_order_of_keys_and_kind_of_sequence_do_not_matter(fields: dict[str, Any]) -> None:
    assert Fingerprint.of(reordered(fields)) == Fingerprint.of(fields)


@given(FIELDS)
def test_a_trip_through_json_keeps_the_digest(fields: dict[str, Any]) -> None:
    fingerprint = Fingerprint.of(fields)
    assert Fingerprint.of(json.loads(json.dumps(fingerprint.fields))).digest == fingerprint.digest


@given(FIELDS, FIELDS)
def test_differences_are_empty_exactly_when_digests_are_equal(a: dict[str, Any], b: dict[str, Any]) -> None:
    first, second = Fingerprint.of(a), Fingerprint.of(b)
    assert (differences(first, second) == []) == (first.digest == second.digest)
    assert differences(first, first) == []


def test_the_digest_is_that_of_the_text_the_format_describes() -> None:
    fields = {"b": (1.0, 0.5, None), "a": {"é": True, "z": -0.0}}
    text = '{"a":{"z":0,"\\u00e9":true},"b":[1,0.5,null]}'
    assert Fingerprint.of(fields).digest == hashlib.sha256(text.encode("ascii")).hexdigest()


@pytest.mark.parametrize(
    "pair", [(True, 1), (False, 0), ("1", 1), (None, "null"), ([], {}), ([1], 1), (0.1, 0.2)]
)
def test_unlike_values_digest_unlike(pair: tuple[object, object]) -> None:
    first, second = (Fingerprint.of({"field": value}) for value in pair)
    assert first.digest != second.digest
    assert [difference.path for difference in differences(first, second)] == ["field"]


def test_keys_with_dots_are_not_taken_for_nested_ones() -> None:
    assert differences(Fingerprint.of({"a.b": 1}), Fingerprint.of({"a": {"b": 1}}))


@pytest.mark.parametrize("value", [math.nan, math.inf, b"bytes", {1: 2}, {1, 2}, object()])
def test_a_value_that_json_cannot_hold_is_refused_by_path(value: object) -> None:
    with pytest.raises(ConfigError, match=r"sam\.normalisation\.mean\[1\]"):
        Fingerprint.of({"sam": {"normalisation": {"mean": [1.0, value]}}})


def test_a_mismatch_names_each_field_with_both_values_and_what_to_do() -> None:
    weights = {"sam": {"sha256": "aa"}}
    expected = cache_fingerprint(PAPER, weights, arithmetic="float32", dtype="float16")
    found = cache_fingerprint(
        TINY, {"sam": {"sha256": "aa", "seed": 0}}, arithmetic="bfloat16", dtype="float32"
    )
    with pytest.raises(FingerprintMismatchError) as caught:
        require_match(expected, found, where="./feats")
    message = str(caught.value)
    assert "./feats" in message
    assert "ris extract" in message
    assert "weights.sam.seed: cache has 0, asked for (missing)" in message
    by_path = {difference.path: difference for difference in differences(expected, found)}
    assert (by_path["encoders.sam.image_size"].expected, by_path["encoders.sam.image_size"].found) == (
        1024,
        128,
    )
    assert (by_path["arithmetic"].expected, by_path["arithmetic"].found) == ("float32", "bfloat16")
    assert by_path["weights.sam.seed"].expected is MISSING
    assert by_path["encoders.sam.global_attn_indexes"].expected == [2, 5, 8, 11]
    assert "weights.sam.sha256" not in by_path
    assert caught.value.facts["expected"] == expected.digest


def make(**changes: Any) -> Fingerprint:
    values: dict[str, Any] = {
        "spec": TINY,
        "weights": {"sam": {"seed": 0}},
        "arithmetic": "float32",
        "dtype": "float16",
        "rounded_through": (),
    }
    values |= changes
    return cache_fingerprint(values.pop("spec"), values.pop("weights"), **values)


def test_equal_settings_match() -> None:
    require_match(make(), make(), where="x")


@pytest.mark.parametrize(
    ("changes", "path"),
    [
        ({"weights": {"sam": {"seed": 1}}}, "weights.sam.seed"),
        ({"arithmetic": "float16"}, "arithmetic"),
        ({"dtype": "float32"}, "dtype"),
        ({"rounded_through": ["int8"]}, "rounded_through"),
    ],
)
def test_whatever_changes_the_numbers_changes_the_digest(changes: dict[str, Any], path: str) -> None:
    assert make(**changes).digest != make().digest
    assert [difference.path for difference in differences(make(), make(**changes))] == [path]


def test_how_int8_codes_come_about_is_part_of_the_fingerprint() -> None:
    assert make(dtype="int8").fields["quantiser"] != make(dtype="float16").fields["quantiser"] == "none"


@pytest.mark.parametrize("dtype", ["float16", "int8"])
def test_a_converted_cache_is_added_to_by_converting_again(dtype: str) -> None:
    found = make(dtype=dtype, rounded_through=["bfloat16", "int8"])
    with pytest.raises(FingerprintMismatchError) as caught:
        require_match(make(), found, where="./feats")
    message = str(caught.value)
    assert 'rounded_through: cache has ["bfloat16","int8"], asked for []' in message
    assert "`ris extract --dtype bfloat16`" in message
    assert "`ris cache convert` from there into this one again" in message


@pytest.mark.parametrize(
    "found",
    [
        make(dtype="int8"),
        make(rounded_through=["int8"], weights={"sam": {"seed": 1}}),
        make(dtype="float32", rounded_through=()),
    ],
)
def test_other_differences_are_not_blamed_on_a_conversion(found: Fingerprint) -> None:
    with pytest.raises(FingerprintMismatchError) as caught:
        require_match(make(), found, where="./feats")
    assert "cache convert" not in str(caught.value)
    assert "Ask for the settings the cache was made with" in str(caught.value)

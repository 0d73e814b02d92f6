"""The fingerprint: one digest of everything that changes the cached numbers, with the values behind it.

The digest is SHA-256 over canonical JSON: keys sorted by code point, no whitespace, ASCII with `\\u` escapes,
finite numbers only, tuples as arrays, and a float of integral value (up to 2**53) as that integer, so that
1 and 1.0, (1, 2) and [1, 2], and any order of keys digest alike. Other floats are Python's shortest repr.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from ris_cache.encoders.spec import EncoderSpec
from ris_cache.errors import ConfigError, FingerprintMismatchError
from ris_cache.store.precision import QUANTISERS

FORMAT_VERSION: Final = 1
"""Version of the cache format; part of the fingerprint, because a new format may round differently."""

MISSING: Final = "(missing)"
"""Stands in a `FieldDifference` for a side that does not have the field."""

_MAX_EXACT_INTEGER = 2**53
_MAX_LISTED = 40


@dataclass(frozen=True, slots=True, kw_only=True)
class Fingerprint:
    """Digest (lower-case hex) and the plain values that it digests; make it with `Fingerprint.of`."""

    digest: str
    fields: dict[str, Any]

    @classmethod
    def of(cls, fields: Mapping[str, object]) -> Fingerprint:
        """Digest nested plain values.

        Raises:
            ConfigError: a value that JSON cannot hold exactly, named by its dotted path.
        """
        plain = {key: _plain(value, key) for key, value in _items(fields, "")}
        return cls(digest=hashlib.sha256(_canonical(plain).encode("ascii")).hexdigest(), fields=plain)

    @property
    def short(self) -> str:
        """The first characters of the digest, for messages and file names."""
        return self.digest[:12]


@dataclass(frozen=True, slots=True, kw_only=True)
class FieldDifference:
    """One field that two fingerprints disagree on; a list counts as one value.

    Attributes:
        path: dotted path of the field.
        expected: value, or `MISSING`.
        found: value, or `MISSING`.
    """

    path: str
    expected: object
    found: object

    def __str__(self) -> str:
        return f"{self.path}: expected {_shown(self.expected)}, found {_shown(self.found)}"


def cache_fingerprint(
    spec: EncoderSpec,
    weights: Mapping[str, Mapping[str, object]],
    *,
    arithmetic: str,
    dtype: str,
    rounded_through: Sequence[str] = (),
) -> Fingerprint:
    """Fingerprint a cache from what makes its features.

    Args:
        weights: what identifies each set of weights, by its role, e.g. {"sam": {"sha256": "…"}}.
        arithmetic: element type of the image encoders' matrix products, e.g. float32.
        dtype: how features are stored.
        rounded_through: dtypes that features were stored in before, where that lost something.
    """
    return Fingerprint.of(
        {
            "format_version": FORMAT_VERSION,
            "encoders": spec.as_dict(),
            "weights": weights,
            "arithmetic": arithmetic,
            "dtype": dtype,
            "quantiser": QUANTISERS.get(dtype, "none"),
            "rounded_through": list(rounded_through),
        }
    )


def converted_fingerprint(found: Fingerprint, dtype: str) -> Fingerprint:
    """Return the fingerprint of a cache converted to a precision."""
    before = str(found.fields["dtype"])
    if dtype == before:
        return found
    through = [*rounded_through(found), *lossy(before)]
    # Rounding again what was rounded to the same floats changes nothing. An int8 scale may change in its last
    # digit when it is computed again.
    if through[-1:] == [dtype] and dtype not in QUANTISERS:
        through.pop()
    return Fingerprint.of(
        {
            **found.fields,
            "dtype": dtype,
            "quantiser": QUANTISERS.get(dtype, "none"),
            "rounded_through": through,
        }
    )


def rounded_through(fingerprint: Fingerprint) -> tuple[str, ...]:
    return tuple(fingerprint.fields.get("rounded_through", ()))


def lossy(dtype: str) -> tuple[str, ...]:
    """A precision as an entry of `rounded_through`: features are computed in float32, which loses nothing."""
    return () if dtype == "float32" else (dtype,)


def differences(expected: Fingerprint, found: Fingerprint) -> list[FieldDifference]:
    """List the fields that differ, by path; empty exactly when the digests are equal."""
    return sorted(_compare((), expected.fields, found.fields), key=lambda difference: difference.path)


def require_match(expected: Fingerprint, found: Fingerprint, *, where: str) -> None:
    """Refuse a cache that was made by something else than asked for.

    Args:
        where: names the cache in the message, usually its path.

    Raises:
        FingerprintMismatchError: naming every field that differs.
    """
    if expected.digest == found.digest:
        return
    fields = differences(expected, found)
    listed = [
        f"  {field.path}: cache has {_shown(field.found)}, asked for {_shown(field.expected)}"
        for field in fields[:_MAX_LISTED]
    ]
    if len(fields) > _MAX_LISTED:
        listed.append(f"  and {len(fields) - _MAX_LISTED} more")
    raise FingerprintMismatchError(
        f"The cache {where} was made with other settings (fingerprint {found.short}) than asked for "
        f"({expected.short}):\n" + "\n".join(listed) + "\n" + _way_out(fields, found),
        where=where,
        expected=expected.digest,
        found=found.digest,
        differences=fields,
    )


def _way_out(fields: Sequence[FieldDifference], found: Fingerprint) -> str:
    through = found.fields.get("rounded_through")
    paths = {field.path for field in fields}
    if through and "rounded_through" in paths and paths <= {"dtype", "quantiser", "rounded_through"}:
        # No extraction gives what a conversion gave, but one into its source, converted again, does.
        return (
            f"The cache is a conversion of one whose features were stored as {through[0]}. To add to it, "
            "extract into the cache that it was converted from, or into one like it (`ris extract --dtype "
            f"{through[0]}`), and run `ris cache convert` from there into this one again. Or name another "
            "directory for a cache of its own."
        )
    return (
        "Ask for the settings the cache was made with, point --cache at a matching cache, or make a new "
        "one in another directory with `ris extract`."
    )


def _canonical(plain: object) -> str:
    return json.dumps(plain, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False)


def _shown(value: object) -> str:
    return MISSING if value is MISSING else _canonical(value)


def _items(mapping: Mapping[Any, object], path: str) -> Iterator[tuple[str, object]]:
    for key, value in mapping.items():
        if not isinstance(key, str):
            raise ConfigError(
                f"The fingerprint field {path or '(top)'!r} has the key {key!r}; keys must be text.",
                path=path,
            )
        yield key, value


def _plain(value: object, path: str) -> Any:
    match value:
        case None | bool() | str():
            return value
        case int():
            return int(value)
        case float() if math.isfinite(value):
            is_whole = value.is_integer() and abs(value) <= _MAX_EXACT_INTEGER
            return int(value) if is_whole else float(value)
        case Mapping():
            return {key: _plain(child, f"{path}.{key}") for key, child in _items(value, path)}
        case list() | tuple():
            return [_plain(child, f"{path}[{position}]") for position, child in enumerate(value)]
    raise ConfigError(
        f"The fingerprint field {path!r} holds {value!r}; only text, finite numbers, booleans, null, lists "
        "and mappings of these can enter a fingerprint.",
        path=path,
        value=value,
    )


def _compare(path: tuple[str, ...], expected: object, found: object) -> Iterator[FieldDifference]:
    if isinstance(expected, dict) and isinstance(found, dict):
        for key in expected.keys() | found.keys():
            yield from _compare((*path, key), expected.get(key, MISSING), found.get(key, MISSING))
    elif expected is MISSING and isinstance(found, dict) and found:
        for key, value in found.items():
            yield from _compare((*path, key), MISSING, value)
    elif found is MISSING and isinstance(expected, dict) and expected:
        for key, value in expected.items():
            yield from _compare((*path, key), value, MISSING)
    elif (expected is MISSING) != (found is MISSING) or _canonical(expected) != _canonical(found):
        yield FieldDifference(path=".".join(path), expected=expected, found=found)

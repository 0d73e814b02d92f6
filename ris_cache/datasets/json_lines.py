"""The lines of a custom dataset's file, checked for form: which keys, which types, which of them together.

Nothing here looks at images or masks.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from ris_cache.datasets.fields import Record, described, json_problem, shown
from ris_cache.datasets.selection import require_free_name
from ris_cache.errors import ConfigError, DataError

MAX_LINE_BYTES: Final = 16 << 20
"""Far beyond any outline or run-length mask; whoever reads a longer line may run out of memory."""

SHAPES: Final[dict[str, type[object]]] = {"polygons": list, "rle": dict, "mask": str}
"""The keys by which a target gives its pixels, with the types of their values."""

_LINE_KEYS: Final = (
    *("image", "expression", "split", *SHAPES, "targets", "category", "ref_id", "sent_id", "sent"),
)
_TARGET_KEYS: Final = (*SHAPES, "category")
_ADVICE: Final = "Correct the line."


@dataclass(frozen=True, slots=True, kw_only=True)
class StatedTarget:
    """One object as a line gives it.

    Attributes:
        place: where in the line it stands, for messages: `polygons` or `targets[1].polygons`.
        shape: one of `SHAPES`.
        value: of that key.
    """

    place: str
    shape: str
    value: Any
    category: str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Line:
    """One expression as its line gives it; `ref_id` and `sent_id` are None where it gives none."""

    record: Record
    number: int
    image: str
    split: str
    raw: str
    sent: str
    targets: tuple[StatedTarget, ...]
    ref_id: int | None
    sent_id: int | None


def read_lines(path: Path) -> Iterator[Line]:
    """Read the lines in order; blank ones are skipped.

    Raises:
        DataError: the file cannot be read, or a line is longer than `MAX_LINE_BYTES`, not UTF-8, not a JSON
            object, nested too deeply, or not of the documented form; the message names the line.
    """
    try:
        with path.open("rb") as file:
            number = 0
            while encoded := file.readline(MAX_LINE_BYTES + 1):
                number += 1
                line = _parse(encoded, path, number)
                if line is not None:
                    yield line
    except OSError as error:
        raise DataError(f"Cannot read {path}: {error.strerror or error}.", path=path) from error


def _parse(encoded: bytes, path: Path, number: int) -> Line | None:
    if len(encoded) > MAX_LINE_BYTES:
        raise _bad_line(path, number, f"is longer than {MAX_LINE_BYTES} bytes")
    try:
        text = encoded.decode("utf-8-sig" if number == 1 else "utf-8")
        if not text.strip():
            return None
        value = json.loads(text, object_pairs_hook=_without_repeats)
        if not isinstance(value, dict):
            raise _bad_line(path, number, f"should be a JSON object, not {described(value)}")
        return _checked(Record(value, path, "line", number, _ADVICE), number)
    except DataError:
        raise
    except UnicodeDecodeError as error:
        raise _bad_line(path, number, f"is not UTF-8 ({error.reason} at byte {error.start})") from error
    except (ValueError, RecursionError, MemoryError) as error:
        raise _bad_line(path, number, f"is not JSON ({json_problem(error)})") from error


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Of two `polygons` in one object, JSON keeps the last in silence."""
    found = dict(pairs)
    if len(found) < len(pairs):
        keys = [key for key, _ in pairs]
        repeated = next(key for key in keys if keys.count(key) > 1)
        raise ValueError(f"the key {shown(repeated)} stands twice in one object")
    return found


def _bad_line(path: Path, number: int, problem: str) -> DataError:
    return DataError(
        f"{path}, line {number} {problem}. Each line is one JSON object, one expression.",
        path=path,
        line=number,
    )


def _checked(record: Record, number: int) -> Line:
    _refuse_unknown_keys(record, record.fields, _LINE_KEYS, "")
    raw = record.get("expression", str)
    split = record.get("split", str)
    try:
        require_free_name("the name of a split", split)
    except ConfigError as error:
        raise record.error("split", f"is malformed: {error}", found=split) from error
    return Line(
        record=record,
        number=number,
        image=record.get("image", str),
        split=split,
        raw=raw,
        sent=record.get("sent", str) if "sent" in record.fields else " ".join(raw.lower().split()),
        targets=_targets(record),
        ref_id=record.get("ref_id", int) if "ref_id" in record.fields else None,
        sent_id=record.get("sent_id", int) if "sent_id" in record.fields else None,
    )


def _targets(record: Record) -> tuple[StatedTarget, ...]:
    fields = record.fields
    given = [key for key in (*SHAPES, "targets") if key in fields]
    if len(given) > 1:
        raise record.error(given[1], f"stands beside `{given[0]}`; give one of them", found=given)
    if "category" in fields and given in ([], ["targets"]):
        place = "inside each of `targets`" if given else f"beside one of {', '.join(SHAPES)}"
        raise record.error("category", f"belongs {place}", found=fields["category"])
    if not given:
        return ()
    if given != ["targets"]:
        return (_target(record, fields, ""),)
    targets = []
    for position, value in enumerate(record.get("targets", list)):
        place = f"targets[{position}]"
        if not isinstance(value, dict):
            raise record.error(place, f"should be an object, not {shown(value)}", found=value)
        _refuse_unknown_keys(record, value, _TARGET_KEYS, f"{place}.")
        if sum(key in value for key in SHAPES) != 1:
            raise record.error(place, f"should have one of {', '.join(SHAPES)}", found=sorted(value))
        targets.append(_target(record, value, f"{place}."))
    return tuple(targets)


def _target(record: Record, fields: dict[str, Any], prefix: str) -> StatedTarget:
    shape = next(key for key in SHAPES if key in fields)
    value = fields[shape]
    if type(value) is not SHAPES[shape]:
        problem = f"should be of type {SHAPES[shape].__name__}, not {shown(value)}"
        raise record.error(f"{prefix}{shape}", problem, found=value)
    category = None
    if "category" in fields:
        category = Record(fields, record.path, "line", record.identity, _ADVICE).get("category", str)
        if category != category.strip() or not category:
            raise record.error(f"{prefix}category", f"is blank or padded: {shown(category)}", found=category)
    return StatedTarget(place=f"{prefix}{shape}", shape=shape, value=value, category=category)


def _refuse_unknown_keys(record: Record, fields: dict[str, Any], known: tuple[str, ...], prefix: str) -> None:
    """A misspelt `polygons` must not become an expression without a target."""
    for key in fields:
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1)
            hint = f"; did you mean `{near[0]}`?" if near else f"; known: {', '.join(known)}"
            raise record.error(
                f"{prefix}{shown(key)[1:-1]:.40}", f"is no key of this format{hint}", found=key
            )

"""Read records of an annotation file field by field, with errors that say which record and which field."""

from __future__ import annotations

import json
import reprlib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, TypeVar

from ris_cache.errors import DataError

_T = TypeVar("_T")


@dataclass(frozen=True, slots=True)
class Record:
    """One dict of a file.

    Attributes:
        id_fact: what the project calls the record's id: ref_id, ann_id, image_id, category_id or line.
        identity: that id, or the record's position in the file while the id is not known.
        advice: what to do about an error.
    """

    fields: dict[str, Any]
    path: Path
    id_fact: str
    identity: int | str
    advice: str = "Correct the record, or download the file again."

    def get(self, name: str, kind: type[_T]) -> _T:
        """Return a field that must be there, of exactly this type, since True is no id.

        Raises:
            DataError: it is not, or the cache's tables could not hold it.
        """
        value = self.fields.get(name)
        if type(value) is not kind:
            raise self.error(name, f"should be of type {kind.__name__}, not {shown(value)}", found=value)
        if not is_storable(value):
            raise self.error(name, f"is beyond 64 bits or no valid Unicode: {shown(value)}", found=value)
        return value

    def ids(self, name: str) -> tuple[int, ...]:
        """Return a field that is one id or a list of them.

        Raises:
            DataError: it is neither, or an id has more than 64 bits.
        """
        value = self.fields.get(name)
        found: list[Any] = value if isinstance(value, list) else [value]
        if not all(type(item) is int and is_storable(item) for item in found):
            raise self.error(name, f"should be an id or a list of ids, not {shown(value)}", found=value)
        return tuple(found)

    def error(self, name: str, problem: str, **facts: object) -> DataError:
        """Return the error that says what is wrong with a field; `problem` may end in a full stop."""
        facts = {"path": self.path, self.id_fact: self.identity, "field": name} | facts
        problem = problem.removesuffix(".")
        return DataError(
            f"{self.path}, {self.id_fact} {self.identity}: `{name}` {problem}. {self.advice}", **facts
        )


def index_records(values: Iterable[object], path: Path, id_field: str, id_fact: str) -> dict[int, Record]:
    """Index dicts by their id, in file order.

    Raises:
        DataError: a value is no dict, has no id of 64 bits, or has the id of another.
    """
    records: dict[int, Record] = {}
    for position, value in enumerate(values):
        if not isinstance(value, dict):
            raise DataError(
                f"{path}: record {position} of those with {id_fact} should be a dict, not "
                f"{described(value)}. Download the file again.",
                path=path,
                position=position,
            )
        identity = Record(value, path, id_fact, f"of record {position}").get(id_field, int)
        record = Record(value, path, id_fact, identity)
        if identity in records:
            raise record.error(id_field, "occurs twice in the file")
        records[identity] = record
    return records


def read_json(path: Path, *, max_bytes: int = 1 << 30) -> Any:
    """Read a JSON file.

    Raises:
        DataError: the file is missing, larger than `max_bytes`, truncated or not JSON, nests too deeply, or
            holds a number too long to be one.
    """
    try:
        size = path.stat().st_size
        if size > max_bytes:
            raise DataError(
                f"{path} has {size} bytes, more than the {max_bytes} accepted for an annotation file. Check "
                "that it is the right file.",
                path=path,
                expected=max_bytes,
                found=size,
            )
        content = path.read_bytes()
    except OSError as error:
        raise DataError(f"Cannot read {path}: {error.strerror or error}.", path=path) from error
    try:
        return json.loads(content)
    except (ValueError, RecursionError, MemoryError) as error:
        raise DataError(
            f"{path} is truncated or not JSON ({json_problem(error)}). Download it again.",
            path=path,
            reason=json_problem(error),
        ) from error


def json_problem(error: Exception) -> str:
    """Say what is wrong with a JSON text that could not be parsed."""
    if isinstance(error, RecursionError):
        return "it nests too deeply"
    if isinstance(error, MemoryError):
        return "it asks for more memory than there is"
    if isinstance(error, ValueError) and "integer string conversion" in str(error):
        return "it holds a number of thousands of digits"
    return str(error)


def described(value: object) -> str:
    """Say what a value is, without showing it."""
    return "an empty list" if value == [] else f"a value of type {type(value).__name__}"


class _Brief(reprlib.Repr):
    """`repr` for values of a hostile file.

    A few nested lists that share their items have a `repr` of terabytes, and a number of thousands of digits
    has none.
    """

    def __init__(self) -> None:
        super().__init__()
        self.maxlevel = 2
        self.maxstring = self.maxother = 80

    def repr_int(self, x: int, level: int) -> str:
        return repr(x) if x.bit_length() <= 128 else f"a number of {x.bit_length()} bits"


_BRIEF: Final = _Brief()


def shown(value: object) -> str:
    """Show a value of a file in an error: at most 80 characters of it, on one line."""
    return _BRIEF.repr(value)[:80]


def is_storable(value: object) -> bool:
    """Whether the cache's tables can hold it, if it is an integer or text.

    They hold integers of 64 bits, and text without lone surrogates.
    """
    if isinstance(value, int):
        return -(2**63) <= value < 2**63
    if isinstance(value, str):
        try:
            value.encode("utf-8")
        except UnicodeEncodeError:
            return False
    return True

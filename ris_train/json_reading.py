"""JSON that others may have written or damaged: what cannot be shown or written again is an error, too."""

from __future__ import annotations

import json
from typing import Any, Final

MAX_DEPTH: Final = 64
"""Of lists and objects within each other; the deepest that ris writes has seven."""


def parse_json(text: str | bytes) -> Any:
    """Read a JSON document.

    Raises:
        ValueError: it is not JSON, or nested more deeply than what reads it can follow.
    """
    try:
        value = json.loads(text)
    except RecursionError as error:
        raise ValueError("nested too deeply") from error
    inner, depth = [value], 0
    while inner := [item for one in inner for item in _items(one)]:
        depth += 1
        if depth > MAX_DEPTH:
            raise ValueError("nested too deeply")
    return value


def parse_object(text: str | bytes) -> dict[str, Any]:
    """Read a JSON document that is an object.

    Raises:
        ValueError: as `parse_json`, or it is something else.
    """
    value = parse_json(text)
    if not isinstance(value, dict):
        raise ValueError(f"holds {type(value).__name__} where keys and values belong")
    return value


def _items(value: Any) -> list[Any]:
    if isinstance(value, dict):
        return list(value.values())
    return value if isinstance(value, list) else []

"""Read a pickle of plain values without running anything in it.

The refs files of RefCOCO, RefCOCO+ and RefCOCOg come from mirrors of a dead server, and a pickle is a
program. They hold lists, dicts, strings and numbers only, so `pickle_machine` interprets the opcodes that
build those and refuses every other one. It does not go through `pickle.Unpickler`, because overriding
`find_class` there leaves three holes: extension codes are served from a process-wide cache without asking, a
five-byte memo index makes it allocate tens of gigabytes, and a deeply nested tuple used as a key overflows
the C stack while it is hashed.
"""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any, Final

from ris_cache.datasets.pickle_machine import SCALARS, PickleMachine, damaged
from ris_cache.errors import DataError, UnsafePickleError

MAX_DEPTH: Final = 64
"""Containers inside containers. Refs files reach 5; far beyond, whoever walks the value recursively fails."""

_CONTAINERS: Final = frozenset({list, dict, tuple, set})

_FOREIGN_FORMATS: Final = {
    b"PK\x03\x04": "a zip archive; unpack it first",
    b"\x1f\x8b": "a gzip archive; unpack it first",
    b"<": "a web page, so the download failed; fetch the file again",
    b"version https://git-lfs": "a Git LFS pointer; fetch the file itself with `git lfs pull`",
}


def load(path: Path, *, max_bytes: int = 1 << 30) -> object:
    """Read the one value that a pickle of any protocol holds.

    Byte strings of Python 2 become text as latin1, which maps every byte. Sharing between values is kept.

    Args:
        max_bytes: largest file to accept.
    Returns:
        A value made of list, dict, tuple, set, str, bytes, int, float, bool and None, at most `MAX_DEPTH`
        deep; dict keys and set members are scalars or tuples of scalars.
    Raises:
        UnsafePickleError: the file names a global (`facts["dotted_name"]`), uses a persistent id, an
            extension code or any other opcode that makes more than plain values, or exceeds `max_bytes`.
        DataError: the file is missing, truncated, damaged, nested too deeply, or not a pickle.
    """
    content = _read_bytes(path, max_bytes)
    for prefix, what in _FOREIGN_FORMATS.items():
        if content.startswith(prefix):
            raise DataError(f"{path} is not a pickle but {what}.", path=path)
    machine = PickleMachine(content, path)
    try:
        value = machine.run()
        _check_plain(value, path)
    except (IndexError, KeyError, ValueError, struct.error) as error:
        # What the handlers meet when the stack runs dry, a memo entry is absent, a number does not parse or
        # the bytes end early: all of them mean that the file is not what the writer wrote.
        if isinstance(error, DataError):
            raise
        raise damaged(path, machine.opcode_at, str(error) or type(error).__name__) from error
    except (MemoryError, RecursionError) as error:
        raise damaged(path, machine.opcode_at, "it asks for more memory than there is") from error
    return value


def _read_bytes(path: Path, max_bytes: int) -> bytes:
    try:
        size = path.stat().st_size
        if size > max_bytes:
            raise UnsafePickleError(
                f"{path} has {size} bytes, more than the {max_bytes} accepted for a refs file; nothing in it "
                "was run. Check that it is the right file.",
                path=path,
                expected=max_bytes,
                found=size,
            )
        return path.read_bytes()
    except OSError as error:
        raise DataError(f"Cannot read {path}: {error.strerror or error}.", path=path) from error
    except MemoryError as error:
        raise DataError(f"{path} does not fit into memory.", path=path) from error


def _check_plain(value: object, path: Path) -> None:
    """Visit every container once, level by level, so that neither depth nor sharing can hurt the visitor."""
    seen: set[int] = set()
    level: list[Any] = [[value]]
    depth = 0
    while level:
        if depth > MAX_DEPTH:
            raise DataError(
                f"{path} nests values deeper than {MAX_DEPTH} levels, which no refs file does. "
                "Download it again from a source you trust.",
                path=path,
                expected=MAX_DEPTH,
            )
        deeper: list[Any] = []
        for container in level:
            if id(container) in seen:
                continue
            seen.add(id(container))
            for child in (*container, *container.values()) if type(container) is dict else container:
                kind = type(child)
                if kind in _CONTAINERS:
                    deeper.append(child)
                else:
                    assert kind in SCALARS, f"the interpreter built a {kind}"
        level = deeper
        depth += 1

"""The opcodes of pickles that build plain values; every other one is refused."""

from __future__ import annotations

import codecs
import pickle
import struct
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, NoReturn

from ris_cache.errors import DataError, UnsafePickleError

SCALARS: Final = frozenset({str, bytes, int, float, bool, type(None)})
"""The types of values that contain no others."""


def damaged(path: Path, offset: int, reason: str) -> DataError:
    """Say that a pickle cannot be read, and at which byte."""
    return DataError(
        f"{path} is truncated, damaged, or not a pickle (byte {offset}: {reason}). Download it again.",
        path=path,
        offset=offset,
        reason=reason,
    )


@dataclass(slots=True)
class PickleMachine:
    """The pickle machine, reduced to opcodes that build plain values: a stack, its marks, and a memo.

    The memo is a dict, so a huge index costs nothing. Byte strings of Python 2 become text as latin1.
    """

    content: bytes
    path: Path
    position: int = 0
    opcode_at: int = 0
    stack: list[Any] = field(default_factory=list)
    marks: list[int] = field(default_factory=list)
    memo: dict[int, Any] = field(default_factory=dict)

    def run(self) -> object:
        """Interpret the whole pickle and return its value.

        Raises:
            UnsafePickleError: an opcode makes more than plain values.
            DataError: an opcode is none.
            IndexError, KeyError, ValueError, struct.error: the bytes are not what a pickle's writer writes.
        """
        content, handlers = self.content, _HANDLERS
        while True:
            self.opcode_at = self.position
            code = content[self.position]
            self.position += 1
            handler = handlers.get(code)
            if handler is not None:
                handler(self)
            elif code == pickle.STOP[0]:
                return self.stack.pop()
            else:
                self.refuse(bytes([code]))

    def refuse(self, opcode: bytes) -> NoReturn:
        """Raise the error that says what an opcode asks for."""
        dotted_name = None
        if opcode in (pickle.GLOBAL, pickle.INST):
            dotted_name = f"{_latin1(self.line())}.{_latin1(self.line())}"
        elif opcode == pickle.STACK_GLOBAL:
            dotted_name = ".".join(part for part in self.stack[-2:] if type(part) is str)
        if dotted_name is not None:
            wish = f"asks for the global {dotted_name!r:.200}"
        elif opcode in _REFUSED:
            wish = f"uses the opcode {_REFUSED[opcode]}"
        else:
            raise damaged(self.path, self.opcode_at, f"0x{opcode.hex()} is no opcode")
        raise UnsafePickleError(
            f"{self.path} {wish} (byte {self.opcode_at}). A refs file holds plain values only, so nothing in "
            "it was run. Get the file from a source you trust.",
            path=self.path,
            dotted_name=dotted_name,
            offset=self.opcode_at,
        )

    def take(self, count: int) -> bytes:
        """Read so many bytes."""
        end = self.position + count
        if count < 0 or end > len(self.content):
            raise ValueError("the file ends early")
        taken = self.content[self.position : end]
        self.position = end
        return taken

    def unpack(self, layout: struct.Struct) -> Any:
        """Read one number."""
        value = layout.unpack_from(self.content, self.position)[0]
        self.position += layout.size
        return value

    def line(self) -> bytes:
        """Read up to the end of the line."""
        end = self.content.find(b"\n", self.position)
        if end < 0:
            raise ValueError("the file ends early")
        taken = self.content[self.position : end]
        self.position = end + 1
        return taken

    def pop_to_mark(self) -> list[Any]:
        """Take what lies above the last mark."""
        start = self.marks.pop()
        items = self.stack[start:]
        del self.stack[start:]
        return items

    def top(self, kind: type) -> Any:
        """Return the uppermost value, which must be of this type."""
        container = self.stack[-1]
        if type(container) is not kind:
            raise ValueError(f"a {kind.__name__} was expected, not a {type(container).__name__}")
        return container

    def mark(self) -> None:
        self.marks.append(len(self.stack))

    def pop(self) -> None:
        if self.marks and self.marks[-1] == len(self.stack):
            self.marks.pop()
        else:
            self.stack.pop()

    def duplicate(self) -> None:
        self.stack.append(self.stack[-1])

    def memoize(self) -> None:
        self.memo[len(self.memo)] = self.stack[-1]

    def append(self) -> None:
        item = self.stack.pop()
        self.top(list).append(item)

    def appends(self) -> None:
        items = self.pop_to_mark()
        self.top(list).extend(items)

    def set_item(self) -> None:
        value, key = self.stack.pop(), self.stack.pop()
        self.top(dict)[_checked_key(key)] = value

    def set_items(self) -> None:
        items = self.pop_to_mark()
        self.top(dict).update(_pairs(items))

    def add_items(self) -> None:
        items = self.pop_to_mark()
        self.top(set).update(map(_checked_key, items))


def _checked_key(key: Any) -> Any:
    """Refuse what cannot be hashed, and nested tuples, whose hash recurses on the C stack."""
    if type(key) in SCALARS or (type(key) is tuple and all(type(item) in SCALARS for item in key)):
        return key
    raise ValueError(f"a {type(key).__name__} is used as a key")


def _pairs(items: list[Any]) -> dict[Any, Any]:
    return dict(zip(map(_checked_key, items[::2]), items[1::2], strict=True))


def _int_or_bool(line: bytes) -> int:
    """Protocols 0 and 1 write False and True as the integers 00 and 01."""
    return {b"00": False, b"01": True}[line] if line in (b"00", b"01") else int(line)


def _signed(encoded: bytes) -> int:
    return int.from_bytes(encoded, "little", signed=True)


def _unquoted(line: bytes) -> str:
    if len(line) < 2 or line[:1] != line[-1:] or line[:1] not in (b"'", b'"'):
        raise ValueError("a string lacks its quotes")
    text = line[1:-1]
    return _latin1(codecs.escape_decode(text)[0] if b"\\" in text else text)


def _latin1(encoded: bytes) -> str:
    return encoded.decode("latin1")


def _utf8(encoded: bytes) -> str:
    return encoded.decode("utf-8", "surrogatepass")


_Handler = Callable[[PickleMachine], None]

_UINT8, _UINT16, _UINT32, _UINT64 = (struct.Struct(layout) for layout in ("<B", "<H", "<I", "<Q"))
_INT32, _FLOAT64 = struct.Struct("<i"), struct.Struct(">d")


def _push(make: Callable[[], object]) -> _Handler:
    return lambda machine: machine.stack.append(make())


def _push_number(layout: struct.Struct) -> _Handler:
    return lambda machine: machine.stack.append(machine.unpack(layout))


def _push_line(decode: Callable[[bytes], object]) -> _Handler:
    return lambda machine: machine.stack.append(decode(machine.line()))


def _push_sized(length: struct.Struct, decode: Callable[[bytes], object]) -> _Handler:
    """For values stored as a length and that many bytes."""
    return lambda machine: machine.stack.append(decode(machine.take(machine.unpack(length))))


def _push_marked(make: Callable[[list[Any]], object]) -> _Handler:
    return lambda machine: machine.stack.append(make(machine.pop_to_mark()))


def _push_tuple(size: int) -> _Handler:
    return lambda machine: machine.stack.append(tuple(reversed([machine.stack.pop() for _ in range(size)])))


def _remember(index: Callable[[PickleMachine], int]) -> _Handler:
    return lambda machine: machine.memo.__setitem__(index(machine), machine.stack[-1])


def _recall(index: Callable[[PickleMachine], int]) -> _Handler:
    return lambda machine: machine.stack.append(machine.memo[index(machine)])


def _skip(count: int) -> _Handler:
    """For the protocol number and the frame length, which change nothing in what the opcodes mean."""

    def handler(machine: PickleMachine) -> None:
        machine.take(count)

    return handler


_HANDLERS: Final[dict[int, _Handler]] = {
    pickle.PROTO[0]: _skip(1),
    pickle.FRAME[0]: _skip(8),
    pickle.MARK[0]: PickleMachine.mark,
    pickle.POP[0]: PickleMachine.pop,
    pickle.POP_MARK[0]: lambda machine: machine.stack.__delitem__(slice(machine.marks.pop(), None)),
    pickle.DUP[0]: PickleMachine.duplicate,
    pickle.PUT[0]: _remember(lambda machine: int(machine.line())),
    pickle.BINPUT[0]: _remember(lambda machine: machine.unpack(_UINT8)),
    pickle.LONG_BINPUT[0]: _remember(lambda machine: machine.unpack(_UINT32)),
    pickle.MEMOIZE[0]: PickleMachine.memoize,
    pickle.GET[0]: _recall(lambda machine: int(machine.line())),
    pickle.BINGET[0]: _recall(lambda machine: machine.unpack(_UINT8)),
    pickle.LONG_BINGET[0]: _recall(lambda machine: machine.unpack(_UINT32)),
    pickle.NONE[0]: _push(lambda: None),
    pickle.NEWTRUE[0]: _push(lambda: True),
    pickle.NEWFALSE[0]: _push(lambda: False),
    pickle.INT[0]: _push_line(_int_or_bool),
    pickle.LONG[0]: _push_line(lambda line: int(line.removesuffix(b"L"))),
    pickle.FLOAT[0]: _push_line(float),
    pickle.BININT[0]: _push_number(_INT32),
    pickle.BININT1[0]: _push_number(_UINT8),
    pickle.BININT2[0]: _push_number(_UINT16),
    pickle.BINFLOAT[0]: _push_number(_FLOAT64),
    pickle.LONG1[0]: _push_sized(_UINT8, _signed),
    pickle.LONG4[0]: _push_sized(_INT32, _signed),
    pickle.STRING[0]: _push_line(_unquoted),
    pickle.BINSTRING[0]: _push_sized(_INT32, _latin1),
    pickle.SHORT_BINSTRING[0]: _push_sized(_UINT8, _latin1),
    pickle.UNICODE[0]: _push_line(lambda line: line.decode("raw-unicode-escape")),
    pickle.SHORT_BINUNICODE[0]: _push_sized(_UINT8, _utf8),
    pickle.BINUNICODE[0]: _push_sized(_UINT32, _utf8),
    pickle.BINUNICODE8[0]: _push_sized(_UINT64, _utf8),
    pickle.SHORT_BINBYTES[0]: _push_sized(_UINT8, bytes),
    pickle.BINBYTES[0]: _push_sized(_UINT32, bytes),
    pickle.BINBYTES8[0]: _push_sized(_UINT64, bytes),
    pickle.EMPTY_LIST[0]: _push(list),
    pickle.EMPTY_DICT[0]: _push(dict),
    pickle.EMPTY_TUPLE[0]: _push(tuple),
    pickle.EMPTY_SET[0]: _push(set),
    pickle.APPEND[0]: PickleMachine.append,
    pickle.APPENDS[0]: PickleMachine.appends,
    pickle.SETITEM[0]: PickleMachine.set_item,
    pickle.SETITEMS[0]: PickleMachine.set_items,
    pickle.ADDITEMS[0]: PickleMachine.add_items,
    pickle.LIST[0]: _push_marked(list),
    pickle.TUPLE[0]: _push_marked(tuple),
    pickle.TUPLE1[0]: _push_tuple(1),
    pickle.TUPLE2[0]: _push_tuple(2),
    pickle.TUPLE3[0]: _push_tuple(3),
    pickle.DICT[0]: _push_marked(_pairs),
}

_REFUSED: Final[dict[bytes, str]] = {
    getattr(pickle, name): name
    for name in (
        *("PERSID", "BINPERSID", "EXT1", "EXT2", "EXT4", "REDUCE", "BUILD", "OBJ", "NEWOBJ", "NEWOBJ_EX"),
        *("FROZENSET", "BYTEARRAY8", "NEXT_BUFFER", "READONLY_BUFFER"),
    )
}

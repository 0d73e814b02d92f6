"""Hostile pickles run nothing; honest ones give what `pickle.loads` gives."""

from __future__ import annotations

import contextlib
import copyreg
import math
import os
import pickle
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ris_cache.datasets import safe_pickle
from ris_cache.datasets.pickle_machine import PickleMachine
from ris_cache.errors import DataError, UnsafePickleError

EXTENSION_CODE = 0xF1

Write = Callable[[bytes], Path]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    def _write(content: bytes) -> Path:
        path = tmp_path / "refs(unc).p"
        path.write_bytes(content)
        return path

    return _write


class Calls:
    """Pickles to a call of `function(*arguments)`."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.call = (function, arguments)

    def __reduce__(self) -> tuple[Any, ...]:
        return self.call


SCALARS = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.integers(-(2**2100), 2**2100)
    | st.floats(allow_nan=False)
    | st.text()
    | st.text(alphabet="\\'\"\n\r\x00\x1a é€\U0001f600")
)
VALUES = st.recursive(
    SCALARS | st.binary(),
    lambda children: (
        st.lists(children, max_size=5)
        | st.dictionaries(SCALARS, children, max_size=5)
        | st.lists(children, max_size=5).map(tuple)
        | st.sets(st.text(max_size=3), max_size=3)
    ),
    max_leaves=20,
)


@settings(max_examples=150, deadline=None)
@given(value=VALUES, protocol=st.sampled_from([4, 5]))
def test_plain_values_load_as_the_standard_library_loads_them(
    tmp_path_factory: pytest.TempPathFactory, value: object, protocol: int
) -> None:
    path = tmp_path_factory.getbasetemp() / "values.p"
    path.write_bytes(pickle.dumps(value, protocol))
    loaded = safe_pickle.load(path)
    assert loaded == value
    assert repr(loaded) == repr(pickle.loads(path.read_bytes()))  # tells 1, 1.0 and True apart


TEXT_AND_NUMBERS = st.recursive(
    SCALARS, lambda children: st.lists(children, max_size=5) | st.dictionaries(SCALARS, children, max_size=5)
)


@settings(max_examples=150, deadline=None)
@given(value=TEXT_AND_NUMBERS, protocol=st.sampled_from([0, 1, 2, 3]))
def test_old_protocols_load_as_the_standard_library_loads_them(
    tmp_path_factory: pytest.TempPathFactory, value: object, protocol: int
) -> None:
    path = tmp_path_factory.getbasetemp() / "old_values.p"
    path.write_bytes(pickle.dumps(value, protocol))
    assert repr(safe_pickle.load(path)) == repr(value)


@pytest.mark.parametrize(
    "content",
    [
        rb"(lp0" b"\n" rb"S'it\'s \xe9\n \\'" b"\np1\nag1\na.",  # Python 2 byte strings, protocol 0
        b"(dp0\nS\"it's\"\np1\nI01\nsS'b'\nL12L\ns.",
        b"\x80\x02]q\x00(U\x03a\xe9bq\x01T\x03\x00\x00\x00xyzh\x01K\x07M\x00\x01J\xff\xff\xff\xffe.",
        b"\x80\x02]q\x00(X\x03\x00\x00\x00abcq\x01\x8a\x00\x8a\x02\x00\x80G?\xf8\x00\x00\x00\x00\x00\x00e.",
        b"(I1\nI2\nt.",
        b"(K\x01K\x020K\x0321.",
        b"N(K\x01K\x021.",
    ],
)
def test_handmade_opcodes_load_as_the_standard_library_loads_them(write: Write, content: bytes) -> None:
    try:
        expected = pickle.loads(content, encoding="latin1")
    except (pickle.UnpicklingError, IndexError):
        with pytest.raises(DataError):
            safe_pickle.load(write(content))
    else:
        assert repr(safe_pickle.load(write(content))) == repr(expected)


def test_python_2_byte_strings_become_latin1_text(write: Write) -> None:
    assert safe_pickle.load(write(b"U\x04caf\xe9.")) == "café"


def test_shared_values_stay_shared(write: Write) -> None:
    shared = ["blue"]
    loaded: Any = safe_pickle.load(write(pickle.dumps([shared, shared], 2)))
    assert loaded[0] is loaded[1]


def test_a_list_that_holds_itself_does_not_trap_the_reader(write: Write) -> None:
    loop: list[Any] = []
    loop.append(loop)
    loaded = safe_pickle.load(write(pickle.dumps(loop)))
    assert isinstance(loaded, list)
    assert loaded[0] is loaded


def _hostile(target: Path) -> dict[str, tuple[bytes, str | None]]:
    """Pickles that would create `target`, with the dotted name the error should give."""
    command = f"touch {target}"
    python = f"open({str(target)!r}, 'w').close()".encode()
    short = b"\x8c" + bytes([len(python)]) + python
    line = python + b"\n"
    system = f"{os.system.__module__}.system"
    return {
        "os.system by reduce, protocol 0": (pickle.dumps(Calls(os.system, command), 0), system),
        "os.system by reduce, protocol 2": (pickle.dumps(Calls(os.system, command), 2), system),
        "os.system by reduce, protocol 4": (pickle.dumps(Calls(os.system, command), 4), system),
        "builtins.eval": (pickle.dumps(Calls(exec, python.decode())), "builtins.exec"),
        "inside a refs list": (
            pickle.dumps([{"ref_id": 0, "sentences": [Calls(exec, python.decode())]}]),
            "builtins.exec",
        ),
        "GLOBAL": (b"cbuiltins\nexec\n(V" + line + b"tR.", "builtins.exec"),
        "GLOBAL of Python 2": (b"c__builtin__\neval\n(V" + line + b"tR.", "__builtin__.eval"),
        "STACK_GLOBAL": (b"\x80\x04\x8c\x08builtins\x8c\x04exec\x93" + short + b"\x85R.", "builtins.exec"),
        "INST": (b"(V" + line + b"ibuiltins\nexec\n.", "builtins.exec"),
        "OBJ": (b"(cbuiltins\nexec\nV" + line + b"o.", "builtins.exec"),
        "NEWOBJ": (b"\x80\x02cbuiltins\nexec\n(V" + line + b"t\x81.", "builtins.exec"),
        "NEWOBJ_EX": (b"\x80\x04cbuiltins\nexec\n(V" + line + b"t}\x92.", "builtins.exec"),
        "EXT1": (b"\x80\x02\x82" + bytes([EXTENSION_CODE]) + b"(V" + line + b"tR.", None),
        "EXT2": (b"\x80\x02\x83" + struct.pack("<H", EXTENSION_CODE) + b"(V" + line + b"tR.", None),
        "EXT4": (b"\x80\x02\x84" + struct.pack("<i", EXTENSION_CODE) + b"(V" + line + b"tR.", None),
    }


@pytest.mark.parametrize("kind", sorted(_hostile(Path("x"))))
def test_a_hostile_pickle_runs_nothing(write: Write, tmp_path: Path, kind: str) -> None:
    target = tmp_path / "ran"
    content, dotted_name = _hostile(target)[kind]
    path = write(content)
    copyreg.add_extension("builtins", "exec", EXTENSION_CODE)
    try:
        # The standard library keeps what an extension code named and hands it out again without find_class.
        pickle.loads(b"\x80\x02\x82" + bytes([EXTENSION_CODE]) + b".")
        with pytest.raises(UnsafePickleError) as caught:
            safe_pickle.load(path)
    finally:
        copyreg.remove_extension("builtins", "exec", EXTENSION_CODE)
    assert not target.exists()
    assert str(path) in str(caught.value)
    assert caught.value.facts["dotted_name"] == dotted_name
    assert (dotted_name or "EXT") in str(caught.value)
    assert caught.value.exit_code == 4


def test_the_hostile_pickles_would_really_run(write: Write, tmp_path: Path) -> None:
    target = tmp_path / "ran"
    for kind in ("os.system by reduce, protocol 0", "GLOBAL", "STACK_GLOBAL", "INST", "OBJ"):
        pickle.loads(_hostile(target)[kind][0])
        assert target.exists(), kind
        target.unlink()


@pytest.mark.parametrize(
    ("content", "opcode"),
    [
        (b"Pelsewhere\n.", "PERSID"),
        (b"\x80\x02U\x09elsewhereQ.", "BINPERSID"),
        (b"(NNR.", "REDUCE"),
        (b"]}b.", "BUILD"),
        (b"(No.", "OBJ"),
        (b"N)\x81.", "NEWOBJ"),
        (pickle.dumps(frozenset({1}), 4), "FROZENSET"),
        (pickle.dumps(bytearray(b"a"), 5), "BYTEARRAY8"),
        (b"\x80\x05\x97.", "NEXT_BUFFER"),
    ],
)
def test_opcodes_beyond_plain_values_are_refused(write: Write, content: bytes, opcode: str) -> None:
    with pytest.raises(UnsafePickleError, match=rf"opcode {opcode} .*nothing in it was run"):
        safe_pickle.load(write(content))


@pytest.mark.parametrize("value", [1 + 2j, range(3), Path("x"), Calls(print, "x")])
def test_objects_of_any_class_are_refused(write: Write, value: object) -> None:
    for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
        with pytest.raises(UnsafePickleError, match="asks for the global"):
            safe_pickle.load(write(pickle.dumps(value, protocol)))


def test_every_truncation_of_a_refs_file_is_an_error(write: Write) -> None:
    refs = [{"ref_id": 0, "sent_ids": [0], "sentences": [{"sent_id": 0, "raw": "w", "tokens": ["with"]}]}]
    for protocol in (0, 2, 4):
        content = pickle.dumps(refs, protocol)
        for length in range(len(content)):
            with pytest.raises(DataError):
                safe_pickle.load(write(content[:length]))


@settings(max_examples=200, deadline=None)
@given(content=st.binary(max_size=60))
def test_random_bytes_give_a_value_or_a_data_error(
    tmp_path_factory: pytest.TempPathFactory, content: bytes
) -> None:
    path = tmp_path_factory.getbasetemp() / "noise.p"
    path.write_bytes(content)
    with contextlib.suppress(DataError):
        safe_pickle.load(path)


@settings(max_examples=150, deadline=None)
@given(position=st.integers(0, 400), byte=st.integers(0, 255), protocol=st.sampled_from([0, 2, 4]))
def test_one_wrong_byte_gives_a_value_or_a_data_error(
    tmp_path_factory: pytest.TempPathFactory, position: int, byte: int, protocol: int
) -> None:
    refs = [{"ref_id": i, "area": 0.5, "sentences": [{"sent_id": i, "raw": f"w {i}"}]} for i in range(4)]
    content = bytearray(pickle.dumps(refs, protocol))
    content[position % len(content)] = byte
    path = tmp_path_factory.getbasetemp() / "flipped.p"
    path.write_bytes(content)
    with contextlib.suppress(DataError):
        safe_pickle.load(path)


@pytest.mark.parametrize(
    ("content", "text"),
    [
        (b"", "not a pickle"),
        (b"hello\n", "not a pickle"),
        (b"]", "byte 1"),
        (b"0.", "not a pickle"),
        (b"g7\n.", "not a pickle"),
        (b"]]K\x01s.", "a dict was expected, not a list"),
        (b"}K\x01a.", "a list was expected, not a dict"),
        (b"}]K\x01s.", "a list is used as a key"),
        (b"(K\x01d.", "not a pickle"),
        (b"S'open\n.", "a string lacks its quotes"),
        (b"Icat\n.", "invalid literal"),
        (b"T\xff\xff\xff\xff.", "ends early"),
        (b"PK\x03\x04rest", "zip archive; unpack"),
        (b"\x1f\x8brest", "gzip archive"),
        (b"<!DOCTYPE html>", "web page"),
        (b"version https://git-lfs.github.com/spec/v1\n", "git lfs pull"),
    ],
)
def test_what_is_no_pickle_is_a_data_error_that_helps(write: Write, content: bytes, text: str) -> None:
    path = write(content)
    with pytest.raises(DataError, match=text) as caught:
        safe_pickle.load(path)
    assert not isinstance(caught.value, UnsafePickleError)
    assert str(path) in str(caught.value)


def test_a_missing_file_is_a_data_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"Cannot read .*No such file"):
        safe_pickle.load(tmp_path / "refs(unc).p")


def test_an_oversized_file_is_refused_unread(write: Write) -> None:
    path = write(pickle.dumps(list(range(100))))
    size = path.stat().st_size
    assert safe_pickle.load(path, max_bytes=size) == list(range(100))
    with pytest.raises(UnsafePickleError, match=f"{size} bytes, more than the {size - 1}") as caught:
        safe_pickle.load(path, max_bytes=size - 1)
    assert caught.value.facts["found"] == size


@pytest.mark.parametrize(
    "content",
    [
        b"]r\xff\xff\xff\xff.",  # a memo index of 2³²
        b"]p9999999999999999999\n.",
        b"]" * 5 + b"0" * 4 + b".",
    ],
)
def test_a_huge_memo_index_costs_nothing(write: Write, content: bytes) -> None:
    assert safe_pickle.load(write(content)) == []


@pytest.mark.parametrize(
    "content",
    [
        b"\x8d" + struct.pack("<Q", 2**63 - 1) + b"abc.",
        b"\x8e" + struct.pack("<Q", 2**64 - 1) + b"abc.",
        b"\x8b" + struct.pack("<i", 2**31 - 1) + b"abc.",
        b"I" + b"9" * 100_000 + b"\n.",
    ],
)
def test_a_value_that_claims_to_be_huge_is_an_error(write: Write, content: bytes) -> None:
    with pytest.raises(DataError):
        safe_pickle.load(write(content))


def test_shared_lists_that_would_expand_without_end_are_visited_once(write: Write) -> None:
    doubled: list[Any] = []
    for _ in range(60):
        doubled = [doubled, doubled]  # 2⁶⁰ paths, 61 lists
    safe_pickle.load(write(pickle.dumps(doubled, 2)))


@pytest.mark.parametrize(
    "content",
    [
        b"]" * 200_000 + b"a" * 199_999 + b".",
        b"(" * 200_000 + b"l" * 200_000 + b".",
        b"}" + b")" + b"\x85" * 200_000 + b"K\x01s.",  # a key whose hash would recurse 200,000 deep
        b"\x8f(" + b")" + b"\x85" * 200_000 + b"\x90.",
        b"]" * 200_000 + b"a" * 199_999 + b"Q.",
    ],
)
def test_deep_nesting_is_a_data_error(write: Write, content: bytes) -> None:
    with pytest.raises(DataError):
        safe_pickle.load(write(content))


def test_the_depth_limit_is_where_it_is_said_to_be(write: Write) -> None:
    def nested(depth: int) -> bytes:
        return b"]" * depth + b"a" * (depth - 1) + b"."

    safe_pickle.load(write(nested(safe_pickle.MAX_DEPTH)))
    with pytest.raises(DataError, match=f"deeper than {safe_pickle.MAX_DEPTH} levels"):
        safe_pickle.load(write(nested(safe_pickle.MAX_DEPTH + 1)))


def test_memory_that_runs_out_is_a_data_error(write: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    def exhausted(machine: object) -> object:
        raise MemoryError

    monkeypatch.setattr(PickleMachine, "run", exhausted)
    with pytest.raises(DataError, match="more memory"):
        safe_pickle.load(write(b"]."))


def test_floats_keep_every_bit(write: Write) -> None:
    values = [0.1, -0.0, math.inf, 5e-324, 1.7976931348623157e308]
    for protocol in (0, 2):
        assert repr(safe_pickle.load(write(pickle.dumps(values, protocol)))) == repr(values)

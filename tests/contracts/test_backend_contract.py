"""What every backend owes its readers; a store in memory is the oracle, and keeps the tests honest.

Content is random bits, so NaN, infinities and negative zeros are in it, and comparisons are of bytes.
"""

from __future__ import annotations

import errno
import multiprocessing
import os
import pickle
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st

from ris_cache.errors import CacheMissError, ConfigError, CorruptShardError, ShapeError
from ris_cache.store.backends import BACKENDS, make_backend
from ris_cache.store.files import sha256_file, write_atomically
from ris_cache.store.layout import Array, Backend, FeatureStore, StoredArray
from ris_cache.store.mapped import MappedReader

S = 8
ARRAYS = (
    StoredArray(name="sam", shape=(3, 2, 2), dtype="float16"),
    StoredArray(name="clip", shape=(4, 5), dtype="uint16"),
    StoredArray(name="codes", shape=(5,), dtype="int8"),
    StoredArray(name="scale", shape=(), dtype="float32"),
)
FORMATS = sorted(BACKENDS)
Shard = dict[str, Array]


class MemoryStore:
    """The oracle: what a `FeatureStore` does, in a dictionary."""

    def __init__(self) -> None:
        self.shards: dict[int, dict[int, dict[str, Array]]] = {}

    def write(self, shard: int, positions: Sequence[int], content: Shard) -> None:
        self.shards[shard] = {
            position: {name: array[i].copy() for name, array in content.items()}
            for i, position in enumerate(positions)
        }

    def read_rows(self, rows: Any, out: Mapping[str, Array], *, seen: Any = None, way: Any = "map") -> Any:
        known = {array.name: array for array in ARRAYS}
        for name, buffer in out.items():
            if name not in known:
                raise CacheMissError(f"no array {name!r}; known: {sorted(known)}")
            array = known[name]
            fits = buffer.shape == (len(rows), *array.shape) and buffer.dtype == array.numpy_dtype
            if not (fits and buffer.flags.c_contiguous and buffer.flags.writeable):
                raise ShapeError(f"{name}: the buffer must be otherwise")
        for i, row in enumerate(rows):
            if row < 0:
                raise CacheMissError(f"no row {row}")
            shard, position = divmod(int(row), S)
            if shard not in self.shards:
                raise CorruptShardError(f"no shard {shard}")
            if position not in self.shards[shard]:
                raise CacheMissError(f"Row {row} of memory holds no image", row=row)
            for name, buffer in out.items():
                buffer[i] = self.shards[shard][position][name]
        is_read = np.array([array.name in out for array in ARRAYS], np.int64)
        return np.tile(is_read, (len(rows), 1))  # memory is open from the first moment to the last

    def advise(self, rows: Any, names: Sequence[str]) -> None:
        pass


class Subject:
    """Something to write shards to and read them from."""

    def __init__(self, kind: str, root: Path) -> None:
        self.memory = MemoryStore()
        self.backend = None if kind == "memory" else make_backend(kind, root, ARRAYS, S)

    def write(self, shard: int, positions: Sequence[int], content: Shard) -> None:
        if self.backend is None:
            self.memory.write(shard, positions, content)
        else:
            write(self.backend, shard, positions, content)

    def open(self, max_open: int | None = None) -> FeatureStore:
        return self.memory if self.backend is None else MappedReader(self.backend, max_open)


@pytest.fixture(scope="module", autouse=True)
def no_waiting_for_the_disk() -> Iterator[None]:
    """Power cuts are the business of test_files.py; here fsync would take most of the time."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("os.fsync", lambda descriptor: None)
        yield


def random_content(num_rows: int, seed: int) -> Shard:
    generator = np.random.default_rng(seed)
    content = {}
    for array in ARRAYS:
        bits = np.frombuffer(generator.bytes(num_rows * array.row_bytes), array.numpy_dtype)
        content[array.name] = bits.reshape(num_rows, *array.shape)
    return content


def write(backend: Backend, shard: int, positions: Sequence[int], content: Shard) -> dict[str, Any]:
    """Write a shard, and beside the first one the metadata of a cache that ends with shard 7."""
    if not any(backend.root.glob("*")):
        for relative, metadata in backend.metadata_files(8 * S).items():
            write_atomically(backend.root / relative, metadata)
    return backend.write_shard(shard, np.array(positions, np.int64), content)


def buffers(num_rows: int, names: Sequence[str] = tuple(array.name for array in ARRAYS)) -> Shard:
    return {
        array.name: np.zeros((num_rows, *array.shape), array.dtype) for array in ARRAYS if array.name in names
    }


def read(store: FeatureStore, rows: Sequence[int]) -> dict[str, bytes]:
    """Read in both ways, which must agree."""
    out, again = buffers(len(rows)), buffers(len(rows))
    openings = store.read_rows(rows, out)
    again_openings = store.read_rows(rows, again, seen=np.zeros_like(openings))
    for numbers in (openings, again_openings):
        assert (numbers.dtype, numbers.shape) == (np.int64, (len(rows), len(ARRAYS)))
        assert (numbers > 0).all()
    found = {name: values.tobytes() for name, values in out.items()}
    assert found == {name: values.tobytes() for name, values in again.items()}
    return found


def bytes_of(content: Shard, picked: Sequence[int] | slice = slice(None)) -> dict[str, bytes]:
    return {name: array[picked].tobytes() for name, array in content.items()}


@pytest.fixture(params=["memory", *FORMATS])
def subject(request: pytest.FixtureRequest, tmp_path: Path) -> Subject:
    """Shard 0 without rows 3 and 6, shard 2 whole; shards 1 and 3 do not exist."""
    subject = Subject(request.param, tmp_path)
    subject.write(0, [0, 1, 2, 4, 5, 7], random_content(6, seed=0))
    subject.write(2, range(S), random_content(S, seed=2))
    return subject


@pytest.fixture(params=FORMATS)
def backend(request: pytest.FixtureRequest, tmp_path: Path) -> Backend:
    """The same two shards, as files."""
    backend = make_backend(request.param, tmp_path, ARRAYS, S)
    write(backend, 0, [0, 1, 2, 4, 5, 7], random_content(6, seed=0))
    write(backend, 2, range(S), random_content(S, seed=2))
    return backend


SHARDS = st.dictionaries(st.integers(0, 7), st.sets(st.integers(0, S - 1)), min_size=1, max_size=4)


@pytest.mark.parametrize("kind", ["memory", *FORMATS])
@settings(max_examples=25, deadline=None)
@given(shards=SHARDS, seed=st.integers(0, 99), max_open=st.integers(1, 5), picker=st.randoms())
def test_what_is_written_is_read_back(
    kind: str, shards: dict[int, set[int]], seed: int, max_open: int, picker: Any
) -> None:
    expected = {}
    with tempfile.TemporaryDirectory() as root:
        subject = Subject(kind, Path(root))
        for shard, present in shards.items():
            content = random_content(len(present), seed + shard)
            subject.write(shard, sorted(present), content)
            for i, position in enumerate(sorted(present)):
                expected[shard * S + position] = bytes_of(content, i)
        rows = picker.choices(sorted(expected), k=picker.randrange(12)) if expected else []
        store = subject.open(max_open)
        store.advise(rows, ["sam", "scale"])
        found = read(store, np.array(rows, np.int64))
        for name, values in found.items():
            assert values == b"".join(expected[row][name] for row in rows)
        for shard, present in shards.items():
            for row in (shard * S + position for position in set(range(S)) - present):
                with pytest.raises(CacheMissError, match=f"Row {row} "):
                    read(store, [row])
        if subject.backend is not None:
            for name, row in {(name, row) for name in found for row in rows[:2]}:
                alone = subject.backend.read_row(name, row)
                assert alone is not None
                assert alone.tobytes() == expected[row][name]


def test_one_array_may_be_read_without_the_others(subject: Subject) -> None:
    out = buffers(2, ["codes"])
    subject.open().read_rows([23, 16], out)
    np.testing.assert_array_equal(out["codes"], random_content(S, seed=2)["codes"][[7, 0]])


@pytest.mark.parametrize("row", [3, 6])
def test_an_absent_row_is_missed_not_invented(subject: Subject, row: int) -> None:
    with pytest.raises(CacheMissError, match=f"Row {row} .* holds no image") as caught:
        read(subject.open(), [0, row])
    assert caught.value.facts["row"] == row
    if subject.backend is not None:
        assert subject.backend.read_row("sam", row) is None


def test_a_negative_row_and_an_unknown_array_are_missed(subject: Subject) -> None:
    with pytest.raises(CacheMissError, match="no row -1"):
        read(subject.open(), [-1])
    with pytest.raises(CacheMissError, match=r"no array 'dino'; known: \['clip', 'codes', 'sam', 'scale'\]"):
        subject.open().read_rows([0], {"dino": np.zeros((1, 6), np.float16)})


@pytest.mark.parametrize("row", [8, 24, 10**9])
def test_a_shard_that_does_not_exist_is_damage(subject: Subject, row: int) -> None:
    with pytest.raises(CorruptShardError):
        read(subject.open(), [0, row])
    subject.open().advise([row], ["sam"])


@pytest.mark.parametrize(
    "buffer",
    [
        np.zeros((2, 5), np.int8),
        np.zeros((1, 4), np.int8),
        np.zeros((1, 5), np.uint8),
        np.zeros((1, 5), ">f2"),
        np.zeros((1, 10), np.int8)[:, ::2],
        np.frombuffer(bytes(5), np.int8).reshape(1, 5),
    ],
)
def test_a_buffer_that_does_not_fit_is_refused(subject: Subject, buffer: Array) -> None:
    with pytest.raises(ShapeError, match="codes: the buffer must be"):
        subject.open().read_rows([0], {"codes": buffer})


def test_reading_nothing_reads_nothing(subject: Subject) -> None:
    assert set(read(subject.open(), []).values()) == {b""}


def test_a_shard_without_any_row_is_whole(subject: Subject) -> None:
    subject.write(5, [], random_content(0, seed=0))
    with pytest.raises(CacheMissError, match="Row 40 "):
        read(subject.open(), [40])


def test_rows_of_one_opening_have_its_number_and_arrays_left_out_have_none(subject: Subject) -> None:
    store = subject.open()
    first = store.read_rows([0, 16, 1], buffers(3, ("sam", "codes")))
    assert (first > 0).tolist() == [[True, False, True, False]] * 3
    assert first[0].tolist() == first[2].tolist()
    assert store.read_rows([0, 16, 1], buffers(3, ("sam", "codes")), seen=first).tolist() == first.tolist()
    both = store.read_rows([16], buffers(1))
    assert both[0, [0, 2]].tolist() == first[1, [0, 2]].tolist()


def test_what_is_opened_anew_has_a_new_number(backend: Backend) -> None:
    reader, names = MappedReader(backend, max_open=1), ("sam",)
    found = [reader.read_rows([row], buffers(1, names)).max() for row in (0, 1, 16, 0, 0)]
    assert found[0] == found[1]
    assert found[3] == found[4]
    assert len(set(found)) == 3


def test_threads_share_a_reader_with_fewer_maps_than_shards(subject: Subject) -> None:
    store, written = subject.open(max_open=1), random_content(S, seed=2)
    for shard in range(3, 6):
        subject.write(shard, range(S), written)

    def check(seed: int) -> bool:
        order = np.random.default_rng(seed).permutation(np.arange(16, 48))
        return read(store, order) == bytes_of(written, order % S)

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(check, range(40)))


def test_a_forked_child_opens_its_own_maps(backend: Backend) -> None:
    reader = MappedReader(backend)
    expected = read(reader, [16, 23])
    assert backend.read_row("sam", 16) is not None  # the format's library is in use before the fork, too
    receiver, sender = multiprocessing.Pipe(duplex=False)
    child = os.fork()
    if child == 0:
        try:
            opened_by_parent = reader.num_open
            sender.send((opened_by_parent, read(reader, [16, 23]), backend.read_row("sam", 16)))
        finally:
            os._exit(0)
    sender.close()
    try:
        opened_by_parent, found, alone = receiver.recv()
    finally:
        receiver.close()
        os.waitpid(child, 0)
    assert (opened_by_parent, found) == (0, expected)
    assert alone.tobytes() == expected["sam"][: alone.nbytes]


def test_a_spawned_process_and_a_pickled_reader_read_the_same(
    backend: Backend, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    relative = type(backend)(Path(), ARRAYS, S)  # type: ignore[call-arg]
    reader = MappedReader(relative, max_open=2)
    expected = read(reader, [23, 0])
    copy = pickle.loads(pickle.dumps(reader))
    assert copy.num_open == 0
    monkeypatch.chdir("/")
    assert read(copy, [23, 0]) == expected
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        alone = pool.apply(relative.read_row, ("clip", 23))
    assert alone.tobytes() == expected["clip"][: alone.nbytes]


def test_the_same_content_gives_the_same_bytes_whenever_it_is_written(
    backend: Backend, tmp_path: Path
) -> None:
    time.sleep(1.1)  # formats that keep times keep seconds
    again: Backend = type(backend)(tmp_path / "again", ARRAYS, S)  # type: ignore[call-arg]
    digests = write(again, 2, range(S), random_content(S, seed=2))
    assert tuple(digests) == backend.shard_files(2)
    for relative, digest in digests.items():
        assert sha256_file(backend.root / relative) == digest
        assert sha256_file(again.root / relative) == digest
    assert again.metadata_files(16) == backend.metadata_files(16)


def test_a_replaced_shard_keeps_its_old_bytes_under_its_old_map(backend: Backend) -> None:
    old, new = random_content(S, seed=2), random_content(3, seed=9)
    reader, small = MappedReader(backend), MappedReader(backend, max_open=1)
    assert read(reader, [19]) == read(small, [19]) == bytes_of(old, [3])
    write(backend, 2, [1, 3, 6], new)
    assert read(reader, [19, 16]) == bytes_of(old, [3, 0])
    read(small, [0])  # drops its map of the old file
    for store in (small, MappedReader(backend)):
        assert read(store, [19, 22]) == bytes_of(new, [1, 2])
        with pytest.raises(CacheMissError, match="Row 16 "):
            read(store, [16])


@pytest.mark.parametrize("damage", ["missing", "empty", "garbage", "directory", "cut"])
def test_a_damaged_file_is_reported_by_name_and_disturbs_no_other_shard(
    backend: Backend, damage: str
) -> None:
    for relative in backend.shard_files(2):
        path = backend.root / relative
        content = path.read_bytes()
        lengths = range(0, len(content), max(1, len(content) // 60)) if damage == "cut" else [0]
        for length in lengths:
            path.unlink()
            if damage == "directory":
                path.mkdir()
            elif damage != "missing":
                garbage = np.random.default_rng(0).bytes(len(content))
                path.write_bytes(garbage if damage == "garbage" else content[:length])
            reader = MappedReader(backend)
            reader.advise([0, 16], ["sam", "clip", "codes", "scale"])
            with pytest.raises(
                CorruptShardError, match=r"Recompute it with `ris cache verify --repair"
            ) as caught:
                read(reader, [0, 16])
            assert caught.value.facts["path"] == path
            assert read(reader, [0]) == bytes_of(random_content(6, seed=0), [0])
            for name in {
                array.name
                for array in ARRAYS
                if backend.shard_files(2) == (relative,) or array.name in relative
            }:
                with pytest.raises(CorruptShardError):
                    backend.read_row(name, 16)
            path.rmdir() if damage == "directory" else path.unlink(missing_ok=True)
            path.write_bytes(content)


def test_a_flipped_bit_is_noticed_unless_it_lies_in_a_row(backend: Backend) -> None:
    expected = bytes_of(random_content(S, seed=2))
    generator = np.random.default_rng(5)
    for relative in backend.shard_files(2):
        path = backend.root / relative
        content = path.read_bytes()
        used = np.flatnonzero(np.frombuffer(content, np.uint8))  # most zeros are padding
        for position in generator.choice(used, 120):
            changed = bytearray(content)
            changed[position] ^= 1 << int(generator.integers(8))
            path.write_bytes(changed)
            try:
                found = read(MappedReader(backend), range(16, 24))
            except CorruptShardError:
                continue
            num_wrong = sum(
                a != b for name in found for a, b in zip(found[name], expected[name], strict=True)
            )
            assert num_wrong == 1, f"byte {position} of {relative} goes unnoticed"
        path.write_bytes(content)


@pytest.mark.parametrize(
    ("positions", "change", "problem"),
    [
        ([1, 0], {}, "must ascend"),
        ([1, 1], {}, "must ascend"),
        ([-1, 1], {}, "must ascend"),
        ([0, S], {}, "at most 7"),
        ([[0, 1]], {}, "must ascend"),
        ([0], {}, "sam: the buffer must be a C-contiguous"),
        ([0, 1], {"sam": None}, "needs the arrays"),
        ([0, 1], {"dino": np.zeros((2, 1))}, "needs the arrays"),
        ([0, 1], {"codes": np.zeros((2, 5), np.int16)}, r"codes: .* int8\[2, 5\]; got int16\[2, 5\]"),
        ([0, 1], {"codes": np.zeros((2, 10), np.int8)[:, ::2]}, "not contiguous"),
        ([0, 1], {"scale": np.zeros(2, ">f4")}, "scale: .* got >f4"),
    ],
)
def test_what_does_not_fit_is_not_written(
    backend: Backend, positions: list[int], change: dict[str, Any], problem: str
) -> None:
    content = {
        name: array for name, array in (random_content(2, seed=1) | change).items() if array is not None
    }
    with pytest.raises(ShapeError, match=problem):
        backend.write_shard(1, np.array(positions), content)
    assert not any((backend.root / relative).exists() for relative in backend.shard_files(1))


def test_a_full_disk_is_an_os_error_that_leaves_what_was_there(
    backend: Backend, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = {path: path.read_bytes() for path in backend.root.rglob("*") if path.is_file()}

    def is_full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("os.fsync", is_full)
    with pytest.raises(OSError, match="No space left") as caught:
        backend.write_shard(2, np.arange(S), random_content(S, seed=3))
    assert caught.value.errno == errno.ENOSPC
    monkeypatch.undo()
    monkeypatch.setattr("os.fsync", lambda descriptor: None)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (200, hard))  # a write that fails half way, for real
    try:
        with pytest.raises(OSError, match="File too large"):
            backend.write_shard(2, np.arange(S), random_content(S, seed=3))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert {path: path.read_bytes() for path in backend.root.rglob("*") if path.is_file()} == before
    write(backend, 2, range(S), random_content(S, seed=3))
    assert read(MappedReader(backend), range(16, 24)) == bytes_of(random_content(S, seed=3))


def read_with_zarr_python(root: Path, shard: int) -> dict[int, dict[str, bytes]]:
    """The rows that a Zarr reader sees, by number; the fill value means there is none."""
    group: Any = zarr.open_group(root / "features.zarr", mode="r")
    rows = range(shard * S, shard * S + S)
    return {row: {name: np.asarray(array[row]).tobytes() for name, array in group.arrays()} for row in rows}


def read_with_h5py(root: Path, shard: int) -> dict[int, dict[str, bytes]]:
    """The rows that an HDF5 reader sees, by number."""
    with h5py.File(root / "features" / f"{shard:05d}.h5") as file:
        names = set(file) - {"rows"}
        return {
            int(row): {name: np.asarray(file[name][i]).tobytes() for name in names}
            for i, row in enumerate(file["rows"])
        }


def test_the_formats_own_library_reads_the_same(backend: Backend, tmp_path: Path) -> None:
    alone = {"ZarrBackend": read_with_zarr_python, "Hdf5Backend": read_with_h5py}[type(backend).__name__]
    for shard, positions, seed in ((0, [0, 1, 2, 4, 5, 7], 0), (2, list(range(S)), 2)):
        found, content = alone(tmp_path, shard), random_content(len(positions), seed)
        for i, position in enumerate(positions):
            assert found.pop(shard * S + position) == bytes_of(content, i)
        assert all(np.isnan(np.frombuffer(row["sam"], np.float16)).all() for row in found.values())


@pytest.mark.parametrize("kind", FORMATS)
def test_reading_by_offset_loads_no_library_it_does_not_need(kind: str, tmp_path: Path) -> None:
    backend = make_backend(kind, tmp_path, ARRAYS, S)
    write(backend, 0, range(S), random_content(S, seed=0))
    script = (
        "import pickle, sys, numpy as np\n"
        "reader = pickle.loads(sys.stdin.buffer.read())\n"
        "reader.read_rows([0, 7], {'scale': np.zeros(2, np.float32)})\n"
        "assert reader.num_open == 1\n"
        "print(sorted({'h5py', 'zarr', 'torch'} & set(sys.modules)))"
    )
    ran = subprocess.run(
        [sys.executable, "-c", script],
        input=pickle.dumps(MappedReader(backend)),
        capture_output=True,
        check=True,
    )
    assert ran.stdout.decode().strip() == {"zarr": "[]", "hdf5": "['h5py']"}[kind]


def test_an_unknown_backend_is_refused_with_the_known_ones(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no backend 'lmdb'; choose from zarr, hdf5"):
        make_backend("lmdb", tmp_path, ARRAYS, S)


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize(
    ("names", "shape", "shard_rows", "problem"),
    [
        (["a"], (1,), 0, "at least 1 row"),
        ([], (1,), 8, "arrays with names of their own"),
        (["a", "a"], (1,), 8, "arrays with names of their own"),
        (["../a"], (1,), 8, "cannot be the name"),
        (["a/b"], (1,), 8, "cannot be the name"),
        (["a"], (2, 0), 8, "hold nothing"),
    ],
)
def test_arrays_that_cannot_be_laid_out_are_refused(
    kind: str, names: list[str], shape: tuple[int, ...], shard_rows: int, problem: str, tmp_path: Path
) -> None:
    arrays = [StoredArray(name=name, shape=shape, dtype="float16") for name in names]
    with pytest.raises(ConfigError, match=problem):
        make_backend(kind, tmp_path, arrays, shard_rows)

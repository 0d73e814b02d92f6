"""What the mapped reader adds to its backend: few maps, no waiting for each other, files that change."""

from __future__ import annotations

import mmap
import os
import pickle
import resource
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, get_args

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ris_cache.errors import CacheError, CacheMissError, CorruptShardError
from ris_cache.store import maps
from ris_cache.store.backends import make_backend
from ris_cache.store.layout import Backend, StoredArray, Way
from ris_cache.store.mapped import MappedReader

Array = npt.NDArray[Any]
S = 4
ARRAYS = (
    StoredArray(name="sam", shape=(3000,), dtype="float16"),
    StoredArray(name="pooled", shape=(6,), dtype="float32"),
)
PAGE = mmap.PAGESIZE


@pytest.fixture(scope="module", autouse=True)
def no_waiting_for_the_disk() -> Iterator[None]:
    """Power cuts are the business of test_files.py; here fsync would take most of the time."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("os.fsync", lambda descriptor: None)
        yield


def features(shard: int) -> dict[str, Array]:
    generator = np.random.default_rng(shard)
    return {array.name: generator.random((S, *array.shape)).astype(array.dtype) for array in ARRAYS}


@pytest.fixture
def make(tmp_path: Path) -> Callable[[str], Backend]:
    """Make a cache of three whole shards."""

    def make(kind: str) -> Backend:
        backend = make_backend(kind, tmp_path, ARRAYS, S)
        for relative, content in backend.metadata_files(3 * S).items():
            (tmp_path / relative).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / relative).write_bytes(content)
        for shard in range(3):
            backend.write_shard(shard, np.arange(S), features(shard))
        return backend

    return make


def read(reader: MappedReader, row: int, name: str = "pooled", way: Way = "map") -> Array:
    (array,) = (array for array in ARRAYS if array.name == name)
    out = np.zeros((1, *array.shape), array.dtype)
    reader.read_rows([row], {name: out}, way=way)
    return out[0]


def read_all(reader: MappedReader, rows: list[int]) -> None:
    reader.read_rows(rows, {a.name: np.zeros((len(rows), *a.shape), a.dtype) for a in ARRAYS})


def test_nothing_is_opened_before_it_is_read(make: Callable[[str], Backend]) -> None:
    reader = MappedReader(make("zarr"))
    assert reader.num_open == 0
    read(reader, 0)
    assert reader.num_open == 1
    read_all(reader, [0])
    assert reader.num_open == 2


def test_one_file_of_several_arrays_is_mapped_once(make: Callable[[str], Backend]) -> None:
    reader = MappedReader(make("hdf5"))
    read_all(reader, [0, 5, 1])
    assert reader.num_open == 2


def test_the_least_recently_used_maps_go_first(make: Callable[[str], Backend]) -> None:
    reader = MappedReader(make("hdf5"), max_open=2)
    for row in (0, 4, 0, 8):
        read(reader, row)
    assert reader.num_open == 2
    for shard in range(3):
        (reader.backend.root / reader.backend.shard_files(shard)[0]).unlink()
    read(reader, 0)
    read(reader, 8)
    with pytest.raises(CorruptShardError, match=r"00001\.h5 cannot be opened"):
        read(reader, 4)


def test_a_batch_larger_than_the_maps_is_read_whole(make: Callable[[str], Backend]) -> None:
    reader = MappedReader(make("zarr"), max_open=1)
    read_all(reader, list(range(3 * S)) * 2)
    assert reader.num_open == 1


def test_as_many_files_as_the_process_may_open_leave_room_for_others(monkeypatch: pytest.MonkeyPatch) -> None:
    for limit, expected in ((1024, 512), (1, 1), (10**9, 4096), (resource.RLIM_INFINITY, 4096)):
        monkeypatch.setattr(resource, "getrlimit", lambda kind, limit=limit: (limit, limit))
        assert maps.default_max_open() == expected


FEW_FILES = """
import pickle, resource, sys
import numpy as np
resource.setrlimit(resource.RLIMIT_NOFILE, (40, 40))
readers = pickle.loads(sys.stdin.buffer.read())
rows = list(range(0, 120 * 4, 4))
expected = np.repeat(np.arange(120), 5).reshape(120, 5)
def check(reader, rows, **options):
    out = {"sam": np.zeros((len(rows), 5), np.float16), "pooled": np.zeros((len(rows), 5), np.float32)}
    reader.read_rows(rows, out, **options)
    for values in out.values():
        assert (values == expected[np.array(rows) // 4]).all()
"""
BIT_BY_BIT = """
for row in rows:
    for reader in readers:
        check(reader, [row])
        reader.advise([row], ["sam"])
assert 0 < sum(reader.num_open for reader in readers) <= 20
assert all(reader.num_open for reader in readers)
"""
IN_ONE_BATCH = """
for reader in readers:
    check(reader, rows)
    check(reader, rows[::-1], seen=np.zeros((len(rows), 2), np.int64))
"""
WITH_OTHER_FILES_OPEN = """
import itertools, os
check(readers[0], rows[:30])
others = []
try:
    for _ in itertools.count():
        others.append(os.open(os.devnull, os.O_RDONLY))
except OSError:
    pass
for reader in readers:
    check(reader, rows[30:])
"""
IN_A_FORKED_CHILD = """
import os
for reader in readers:
    check(reader, rows)
child = os.fork()
if child == 0:
    try:
        fds = len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else 0
        assert fds < 20, fds
        for reader in readers:
            check(reader, rows)
        os._exit(0)
    finally:
        os._exit(1)
assert os.waitpid(child, 0)[1] == 0
for reader in readers:
    check(reader, rows)
"""


@pytest.fixture(scope="module", params=["zarr", "hdf5"])
def two_of_many_shards(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """Pickled readers of two caches of 120 shards; each value is the number of the shard."""
    readers = []
    for name in ("one", "other"):
        arrays = (
            StoredArray(name="sam", shape=(5,), dtype="float16"),
            StoredArray(name="pooled", shape=(5,), dtype="float32"),
        )
        backend = make_backend(request.param, tmp_path_factory.mktemp(name), arrays, S)
        for relative, content in backend.metadata_files(120 * S).items():
            (backend.root / relative).parent.mkdir(parents=True, exist_ok=True)
            (backend.root / relative).write_bytes(content)
        for shard in range(120):
            rows = {array.name: np.full((1, 5), shard, array.dtype) for array in arrays}
            backend.write_shard(shard, np.array([0]), rows)
        readers.append(MappedReader(backend))
    return pickle.dumps(readers)


@pytest.mark.parametrize(
    "use",
    [BIT_BY_BIT, IN_ONE_BATCH, WITH_OTHER_FILES_OPEN, IN_A_FORKED_CHILD],
    ids=["bit by bit", "in one batch", "with other files open", "in a forked child"],
)
def test_two_caches_of_more_shards_than_files_may_be_open_are_read(
    two_of_many_shards: bytes, use: str
) -> None:
    ran = subprocess.run(
        [sys.executable, "-c", FEW_FILES + use], input=two_of_many_shards, capture_output=True, timeout=60
    )
    assert ran.returncode == 0, ran.stderr.decode()


def test_the_first_reader_raises_the_limit_of_open_files_as_far_as_allowed(
    two_of_many_shards: bytes,
) -> None:
    code = """
import pickle, resource, sys
resource.setrlimit(resource.RLIMIT_NOFILE, (40, 300))
readers = pickle.loads(sys.stdin.buffer.read())
assert resource.getrlimit(resource.RLIMIT_NOFILE) == (300, 300)
resource.setrlimit(resource.RLIMIT_NOFILE, (50, 300))
type(readers[0])(readers[0].backend)
assert resource.getrlimit(resource.RLIMIT_NOFILE) == (50, 300)  # once is enough: someone wants it so
"""
    subprocess.run([sys.executable, "-c", code], input=two_of_many_shards, check=True, timeout=60)


def test_all_readers_share_what_may_be_open_and_the_least_recently_used_goes_first(
    make: Callable[[str], Backend], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(maps, "_MAX_OPEN", 3)
    backend = make("hdf5")
    first, second = MappedReader(backend), MappedReader(backend)
    for reader, row in ((first, 0), (second, 0), (first, 4), (first, 0), (second, 4)):
        read(reader, row)
    assert (first.num_open, second.num_open) == (2, 1)
    read(second, 8)
    assert (first.num_open, second.num_open) == (1, 2)
    del first
    read(second, 0)
    assert second.num_open == 3


def test_a_thread_that_opens_a_file_keeps_no_other_from_reading(
    make: Callable[[str], Backend], monkeypatch: pytest.MonkeyPatch
) -> None:
    reader = MappedReader(make("hdf5"))
    read(reader, 0)
    is_opening, may_go_on = threading.Event(), threading.Event()
    really_open = maps._open_mapped

    def open_slowly(path: Path, shard: int) -> Any:
        if shard == 1:
            is_opening.set()
            assert may_go_on.wait(30)
        return really_open(path, shard)

    monkeypatch.setattr(maps, "_open_mapped", open_slowly)
    slow = threading.Thread(target=read, args=(reader, 4))
    slow.start()
    try:
        assert is_opening.wait(30)
        np.testing.assert_array_equal(read(reader, 1), features(0)["pooled"][1])
        np.testing.assert_array_equal(read(reader, 9), features(2)["pooled"][1])
        assert slow.is_alive()
    finally:
        may_go_on.set()
        slow.join(30)
    assert reader.num_open == 3


@pytest.mark.parametrize("way", get_args(Way))
@pytest.mark.parametrize("kind", ["zarr", "hdf5"])
def test_a_file_cut_short_under_its_map_is_an_error_and_not_the_end_of_the_process(
    make: Callable[[str], Backend], kind: str, way: Way
) -> None:
    reader = MappedReader(make(kind))
    read_all(reader, [0, 4])
    (path, *_) = (reader.backend.root / relative for relative in reader.backend.shard_files(1))
    content = path.read_bytes()
    os.truncate(path, 100)
    with pytest.raises(CorruptShardError):
        read(reader, 4, "sam", way)
    np.testing.assert_array_equal(read(reader, 0, "sam"), features(0)["sam"][0])
    path.write_bytes(content)
    np.testing.assert_array_equal(read(reader, 4, "sam"), features(1)["sam"][0])


@pytest.mark.parametrize("kind", ["zarr", "hdf5"])
def test_a_shard_replaced_between_locating_and_mapping_is_located_again(
    make: Callable[[str], Backend], kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    backend = make(kind)
    backend.write_shard(1, np.array([0, 1]), {name: values[:2] for name, values in features(1).items()})
    replacement = {name: values[2:] for name, values in features(1).items()}  # the file's size stays the same
    really_locate = backend.locate
    located = []

    def locate_then_replace(shard: int) -> Any:
        places = really_locate(shard)
        if not located:
            backend.write_shard(1, np.array([0, 3]), replacement)
        located.append(shard)
        return places

    monkeypatch.setattr(backend, "locate", locate_then_replace)
    reader = MappedReader(backend)
    np.testing.assert_array_equal(read(reader, 7, "sam"), replacement["sam"][1])
    assert located == [1, 1]
    with pytest.raises(CacheMissError, match="Row 5 "):
        read(reader, 5)


def test_a_file_that_never_stays_the_same_is_given_up(
    make: Callable[[str], Backend], monkeypatch: pytest.MonkeyPatch
) -> None:
    backend = make("hdf5")
    really_locate = backend.locate

    def locate_then_replace(shard: int) -> Any:
        places = really_locate(shard)
        backend.write_shard(shard, np.arange(S), features(shard))
        return places

    monkeypatch.setattr(backend, "locate", locate_then_replace)
    with pytest.raises(CorruptShardError, match="keeps changing while it is read"):
        read(MappedReader(backend), 0)


@pytest.mark.parametrize("kind", ["zarr", "hdf5"])
@pytest.mark.parametrize(
    ("error", "problem"),
    [
        (PermissionError(13, "Permission denied"), "may not be read .* Ask its owner"),
        (OSError(24, "Too many open files"), "cannot be opened .* `ulimit -n`"),
    ],
)
def test_a_file_that_the_process_may_not_open_is_not_called_damaged(
    make: Callable[[str], Backend], kind: str, error: OSError, problem: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    reader = MappedReader(make(kind))

    def refuse(path: Path, *arguments: object) -> Any:
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(Path, "open", refuse)
        reader.advise([0], ["sam"])
        with pytest.raises(CacheError, match=problem) as caught:
            read(reader, 0)
    assert not isinstance(caught.value, CorruptShardError)
    assert isinstance(caught.value.facts["path"], Path)
    read(reader, 0)


SPANS = st.lists(st.tuples(st.integers(0, 1 << 21), st.integers(1, 1 << 19)), max_size=8)


@given(spans=SPANS)
def test_advised_pieces_cover_each_page_of_the_rows_once(spans: list[tuple[int, int]]) -> None:
    pieces = list(maps._advised_pieces([(first, first + length) for first, length in spans]))
    pages = [page for start, stop in pieces for page in range(start // PAGE, stop // PAGE)]
    wanted = {
        page for first, length in spans for page in range(first // PAGE, (first + length - 1) // PAGE + 1)
    }
    assert all(
        start % PAGE == 0 and stop % PAGE == 0 and 0 < stop - start <= 1 << 17 for start, stop in pieces
    )
    assert len(pages) == len(set(pages))
    assert set(pages) == wanted


class _RecordingMmap(mmap.mmap):
    advised: list[tuple[int, int, int]] = []  # noqa: RUF012 - one list for all maps is the purpose

    def madvise(self, option: int, start: int = 0, length: int | None = None) -> None:
        assert length is not None
        self.advised.append((option, start, length))
        super().madvise(option, start, length)


def test_advice_reaches_the_system_for_present_rows_of_sound_shards(
    make: Callable[[str], Backend], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mmap, "mmap", _RecordingMmap)
    monkeypatch.setattr(_RecordingMmap, "advised", [])
    backend = make("hdf5")
    backend.write_shard(2, np.array([0, 2]), {name: values[:2] for name, values in features(2).items()})
    (backend.root / backend.shard_files(1)[0]).write_bytes(b"")
    reader = MappedReader(backend)
    reader.advise([4, 9, 0, 1, 0], ["sam"])  # 4 is in the empty file, 9 is absent
    places = backend.locate(0)
    assert places is not None
    start = int(places["sam"].offsets[0])
    assert start % PAGE == 0
    assert _RecordingMmap.advised == [(mmap.MADV_WILLNEED, start, -(-2 * 6000 // PAGE) * PAGE)]
    with pytest.raises(CacheMissError, match="no array 'dino'"):
        reader.advise([0], ["dino"])
    with pytest.raises(CacheMissError, match="no row -2"):
        reader.advise([-2], ["sam"])

"""The three ways to read give the same rows; past the page cache, they leave nothing there."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import mmap
import os
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, get_args

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ris_cache.errors import CorruptShardError
from ris_cache.store import maps, page_cache
from ris_cache.store.backends import BACKENDS, make_backend
from ris_cache.store.cache import FeatureCache
from ris_cache.store.layout import StoredArray, Way
from ris_cache.store.mapped import MappedReader

pytestmark = pytest.mark.skipif(not page_cache._O_DIRECT, reason="this system has no O_DIRECT")

Array = npt.NDArray[Any]
S, SHARDS = 4, 3
ARRAYS = (
    StoredArray(name="sam", shape=(8, 32, 64), dtype="float16"),  # 8 pages
    StoredArray(name="clip", shape=(64, 96), dtype="float16"),  # 3 pages
    StoredArray(name="pooled", shape=(6,), dtype="float32"),
)
PAGED = ("sam", "clip")
WAYS: tuple[Way, ...] = get_args(Way)
ROWS = [5, 0, 11, 5, 4]


def features() -> dict[str, Array]:
    generator = np.random.default_rng(0)
    return {array.name: generator.random((S * SHARDS, *array.shape)).astype(array.dtype) for array in ARRAYS}


def aligned(name: str, num_rows: int, shift: int = 0) -> Array:
    """A buffer of zeros that begins `shift` elements after a page does."""
    (array,) = (array for array in ARRAYS if array.name == name)
    num_bytes = num_rows * array.row_bytes
    memory = np.zeros(num_bytes + 2 * 4096, np.uint8)
    start = -memory.ctypes.data % 4096 + shift * array.numpy_dtype.itemsize
    return memory[start : start + num_bytes].view(array.numpy_dtype).reshape(num_rows, *array.shape)


@dataclass(frozen=True)
class Rows:
    """A cache of three whole shards, located and mapped, with no page of the maps touched."""

    reader: MappedReader

    def read(self, rows: list[int], way: Way, names: tuple[str, ...] = PAGED, shift: int = 0) -> None:
        """Read rows and compare them with what was written."""
        out = {name: aligned(name, len(rows), shift) for name in names}
        self.reader.read_rows(rows, out, way=way)
        for name, found in out.items():
            np.testing.assert_array_equal(found, features()[name][rows])

    @property
    def files(self) -> list[Path]:
        backend = self.reader.backend
        return [backend.root / relative for shard in range(SHARDS) for relative in backend.shard_files(shard)]

    def place(self, row: int, name: str) -> tuple[Path, int, int]:
        """File, first byte and end of a row."""
        located = self.reader.backend.locate(row // S)
        assert located is not None
        offset = int(located[name].offsets[row % S])
        (array,) = (array for array in ARRAYS if array.name == name)
        return located[name].path, offset, offset + array.row_bytes

    def drop(self) -> None:
        """Empty the page cache of the files, or skip where the file system keeps them."""
        for path in self.files:
            drop(path)
        if self.num_in_memory():
            pytest.skip("this file system keeps files in memory")

    def num_in_memory(self) -> int:
        return sum(int(pages_in_memory(path).sum()) for path in self.files)


def drop(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(descriptor)


def pages_in_memory(path: Path) -> npt.NDArray[np.bool_]:
    """Ask the kernel through a map of its own."""
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
        content = np.frombuffer(mapped, np.uint8)
        flags = np.zeros(-(-len(content) // mmap.PAGESIZE), np.uint8)
        failed = ctypes.CDLL(None).mincore(
            ctypes.c_void_p(content.ctypes.data), ctypes.c_size_t(len(content)), flags.ctypes
        )
        del content  # the map cannot close under a view of it
    assert not failed
    return (flags & 1).astype(np.bool_)


def make_rows(root: Path, kind: str) -> Rows:
    backend = make_backend(kind, root, ARRAYS, S)
    for relative, content in backend.metadata_files(SHARDS * S).items():
        (root / relative).parent.mkdir(parents=True, exist_ok=True)
        (root / relative).write_bytes(content)
    written = features()
    for shard in range(SHARDS):
        rows = slice(shard * S, (shard + 1) * S)
        backend.write_shard(shard, np.arange(S), {name: values[rows] for name, values in written.items()})
    made = Rows(MappedReader(backend))
    made.read(list(range(S * SHARDS)), "file", (*PAGED, "pooled"))
    return made


@pytest.fixture(scope="module", params=sorted(BACKENDS))
def rows(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Rows:
    return make_rows(tmp_path_factory.mktemp("rows"), request.param)


@pytest.fixture
def made_direct(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Grows by one whenever a file is about to be read past the page cache."""
    seen: list[int] = []
    real = fcntl.fcntl

    def watched(descriptor: int, command: int, argument: int = 0) -> int:
        if command == fcntl.F_SETFL and argument & os.O_DIRECT:
            seen.append(descriptor)
        return real(descriptor, command, argument)

    monkeypatch.setattr(fcntl, "fcntl", watched)
    return seen


# The same rows, whatever the way.


@given(
    wanted=st.lists(st.integers(0, S * SHARDS - 1), max_size=6),
    names=st.lists(st.sampled_from([*PAGED, "pooled"]), unique=True),
    shift=st.sampled_from([0, 0, 1, 7]),
    way=st.sampled_from(WAYS),
    is_dropped=st.booleans(),
)
@settings(max_examples=60, deadline=None)
def test_every_way_gives_what_was_written(
    rows: Rows, wanted: list[int], names: list[str], shift: int, way: Way, is_dropped: bool
) -> None:
    if is_dropped:
        for path in rows.files:
            drop(path)
    rows.read(wanted, way, tuple(names), shift)


def test_rows_seen_before_are_read_past_the_page_cache_too(rows: Rows, made_direct: list[int]) -> None:
    seen = rows.reader.read_rows([3], {"sam": aligned("sam", 1)})
    rows = make_again(rows)
    rows.drop()
    rows.reader.read_rows([3], {"sam": aligned("sam", 1)}, seen=seen, way="disk")
    assert len(made_direct) == 1


def make_again(rows: Rows) -> Rows:
    """The same files, mapped anew: pages that a map was read through stay in memory as long as the map."""
    for state in list(maps._open_maps.states):
        state.maps.clear()
    again = Rows(MappedReader(rows.reader.backend))
    again.read([0, 4, 8], "file", (*PAGED, "pooled"))
    return again


@pytest.fixture(params=["cachestat", "mincore"])
def fresh(rows: Rows, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Rows:
    """Nothing of the files is in memory, and one way to ask what is."""
    if request.param == "mincore":
        _lack_cachestat(monkeypatch)
    elif not _has_cachestat(rows.files[0]):
        pytest.skip("this kernel has no cachestat")
    again = make_again(rows)
    again.drop()
    return again


def _has_cachestat(path: Path) -> bool:
    with path.open("rb") as file:
        return page_cache.count_cached_pages(file.fileno(), 0, 4096) is not None


def _lack_cachestat(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(page_cache, "_system_call", lambda: lambda number, descriptor, asked, found, flags: -1)


@pytest.mark.parametrize(
    ("start", "stop", "expected"), [(0, 9, 3), (0, 2, 1), (2, 4, 1), (3, 6, 0), (5, 8, 1)]
)
def test_pages_in_memory_are_counted(tmp_path: Path, start: int, stop: int, expected: int) -> None:
    path = tmp_path / "pages"
    path.write_bytes(bytes(9 * 4096))
    if not _has_cachestat(path):
        pytest.skip("this kernel has no cachestat")
    drop(path)
    if pages_in_memory(path).any():
        pytest.skip("this file system keeps files in memory")
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_RANDOM)  # no page beside those asked for
        for page in (1, 2, 6):
            os.pread(descriptor, 1, page * 4096)
        assert page_cache.count_cached_pages(descriptor, start * 4096, stop * 4096) == expected
    finally:
        os.close(descriptor)


def test_what_is_read_past_the_page_cache_is_not_in_it_afterwards(
    fresh: Rows, made_direct: list[int]
) -> None:
    fresh.read(ROWS, "disk")
    assert len(made_direct) == len(ROWS) * len(PAGED)
    assert fresh.num_in_memory() == 0
    fresh.read(ROWS, "file")
    assert fresh.num_in_memory() >= len(set(ROWS)) * (8 + 3)


def test_rows_in_memory_are_taken_from_there(fresh: Rows, made_direct: list[int]) -> None:
    fresh.read(ROWS, "file")
    before = fresh.num_in_memory()
    fresh.read(ROWS, "disk")
    assert made_direct == []
    assert fresh.num_in_memory() >= before


@pytest.mark.parametrize("pages", [[0], [7], [2, 3, 5]])
def test_a_row_that_is_partly_in_memory_is_read_whole_from_the_disk(
    fresh: Rows, made_direct: list[int], pages: list[int]
) -> None:
    path, start, _ = fresh.place(5, "sam")
    drop(path)
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_RANDOM)  # no page beside those asked for
        for page in pages:
            os.pread(descriptor, 1, start + page * 4096)
    finally:
        os.close(descriptor)
    before = pages_in_memory(path)
    assert before.sum() == len(pages)
    fresh.read([5], "disk", ("sam",))
    assert len(made_direct) == 1
    np.testing.assert_array_equal(pages_in_memory(path), before)


def test_changes_that_have_not_reached_the_disk_are_seen(
    fresh: Rows, made_direct: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(maps.MappedFile, "_is_in_memory", lambda *arguments: False)
    path, start, _ = fresh.place(5, "sam")
    with path.open("r+b") as file:
        file.seek(start)
        original = file.read(2)
        file.seek(start)
        file.write(bytes(byte ^ 1 for byte in original))
    found = aligned("sam", 1)
    try:
        again = make_again(fresh)
        again.reader.read_rows([5], {"sam": found}, way="disk")
        assert found.tobytes()[:2] == bytes(byte ^ 1 for byte in original)
        assert len(made_direct) == 1
    finally:
        with path.open("r+b") as file:
            file.seek(start)
            file.write(original)


def test_whoever_may_not_ask_what_is_in_memory_reads_past_it(
    fresh: Rows, made_direct: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """mincore tells a stranger that all is there; nothing would ever be read past the page cache."""
    _lack_cachestat(monkeypatch)
    monkeypatch.setattr(os, "geteuid", lambda: 12345)
    monkeypatch.setattr(os, "access", lambda *arguments, **options: False)
    monkeypatch.setattr(page_cache, "_mincore", lambda: pytest.fail("asked in vain"))
    fresh.read([5], "disk", ("sam",))
    assert len(made_direct) == 1
    assert fresh.num_in_memory() == 0


# Where it is not possible.


@pytest.mark.parametrize(("names", "shift"), [(("pooled",), 0), (PAGED, 1)], ids=["row", "buffer"])
def test_what_is_not_aligned_is_read_through_the_page_cache(
    fresh: Rows, made_direct: list[int], names: tuple[str, ...], shift: int
) -> None:
    fresh.read(ROWS, "disk", names, shift)
    assert made_direct == []
    assert fresh.num_in_memory() > 0


def _refuse_the_flag(patch: pytest.MonkeyPatch) -> None:
    real = fcntl.fcntl

    def refuse(descriptor: int, command: int, argument: int = 0) -> int:
        if command == fcntl.F_SETFL and argument & os.O_DIRECT:
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        return real(descriptor, command, argument)

    patch.setattr(fcntl, "fcntl", refuse)


def _refuse_the_read(patch: pytest.MonkeyPatch) -> None:
    """As file systems do that look at the flag only then."""
    real = os.preadv

    def refuse(descriptor: int, buffers: Any, offset: int) -> int:
        if fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_DIRECT:
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        return real(descriptor, buffers, offset)

    patch.setattr(os, "preadv", refuse)


def _end_reads_early(patch: pytest.MonkeyPatch) -> None:
    """After an odd number of bytes, from where nothing is aligned any more."""
    real = os.preadv
    patch.setattr(
        os, "preadv", lambda descriptor, buffers, offset: real(descriptor, [buffers[0][:1500]], offset)
    )


def _lack_the_flag(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(page_cache, "_O_DIRECT", 0)


def _lack_both_ways_to_ask(patch: pytest.MonkeyPatch) -> None:
    _lack_cachestat(patch)
    patch.setattr(page_cache, "_mincore", lambda: lambda address, length, flags: -1)


@pytest.mark.parametrize(
    "change", [_refuse_the_flag, _refuse_the_read, _end_reads_early, _lack_the_flag, _lack_both_ways_to_ask]
)
def test_a_system_that_cannot_gives_the_same_rows(
    fresh: Rows, monkeypatch: pytest.MonkeyPatch, change: Callable[[pytest.MonkeyPatch], None]
) -> None:
    change(monkeypatch)
    fresh.read(ROWS, "disk", (*PAGED, "pooled"))


@pytest.mark.parametrize("kind", sorted(BACKENDS))
def test_files_that_live_in_memory_are_read(kind: str) -> None:
    memory = Path("/dev/shm")
    if not os.access(memory, os.W_OK):
        pytest.skip("no /dev/shm")
    with tempfile.TemporaryDirectory(dir=memory) as root:
        made = make_rows(Path(root), kind)
        made.read(ROWS, "disk", (*PAGED, "pooled"))


@pytest.mark.parametrize("past_page_cache", [True, False])
def test_a_file_that_ends_too_early_is_noticed(tmp_path: Path, past_page_cache: bool) -> None:
    path = tmp_path / "file"
    path.write_bytes(bytes(4096 + 100))
    target = aligned("sam", 1).reshape(-1).view(np.uint8)
    for length, expected in ((4096, True), (8192, False)):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            found = page_cache.read_whole(descriptor, target[:length], 0, past_page_cache=past_page_cache)
        finally:
            os.close(descriptor)
        assert found is expected


def test_a_disk_that_fails_is_reported(fresh: Rows, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(descriptor: int, buffers: Any, offset: int) -> int:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "preadv", fail)
    with pytest.raises(CorruptShardError, match="Input/output error"):
        fresh.read([5], "disk")


# Caches.


@pytest.fixture
def paged_drawing(either_drawing: Any) -> Any:
    """Writes caches whose SAM and CLIP features consist of whole pages."""

    class PagedDrawing(type(either_drawing)):  # type: ignore[misc]
        @property
        def recipe(self) -> Any:
            return replace(super().recipe, shapes={"sam": (8, 16, 32), "clip": (32, 64), "clip_pooled": (5,)})

    return PagedDrawing(backend=either_drawing.backend)


@pytest.mark.usefixtures("threads_end")
def test_prefetching_past_the_page_cache_checks_what_it_reads(
    paged_drawing: Any, made_direct: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Looking up where rows lie brings all of such small files into memory.
    monkeypatch.setattr(maps.MappedFile, "_is_in_memory", lambda *arguments: False)
    paged_drawing.extract(tmp_path, range(8))
    cache = FeatureCache.open(tmp_path)
    for batch in cache.prefetch([[3, 0, 3], [7]], page_cache=False):
        for name, expected in paged_drawing.stored(batch.image_ids.tolist()).items():
            assert batch.stored[name].tobytes() == expected.tobytes()
    assert len(made_direct) == 4 * 2
    manifest = cache.manifest
    backend = make_backend(manifest.backend, tmp_path, manifest.stored_arrays(), manifest.shard_rows)
    located = backend.locate(1)
    assert located is not None
    with located["clip"].path.open("r+b") as file:
        file.seek(int(located["clip"].offsets[2]) + 4095)
        (byte,) = file.read(1)
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte ^ 1]))
    batches = FeatureCache.open(tmp_path).prefetch([[5], [6]], page_cache=False)
    assert next(batches).image_ids.tolist() == [5]
    with pytest.raises(CorruptShardError, match=r"Image 6 of .* row 6 of clip contradicts"):
        next(batches)

"""The Zarr backend against zarr-python, and against damage."""

from __future__ import annotations

import math
import multiprocessing
import pickle
import struct
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np
import numpy.typing as npt
import pytest
import zarr
from hypothesis import given
from hypothesis import strategies as st
from zarr.codecs import BytesCodec, Crc32cCodec, ShardingCodec

from ris_cache.errors import CacheMissError, ConfigError, CorruptShardError, NonFiniteError, ShapeError
from ris_cache.store.files import sha256_file
from ris_cache.store.zarr_shards import ZarrShardReader, ZarrShardWriter

Array = npt.NDArray[Any]
SHAPES = {"sam": (3, 2, 2), "clip": (4, 5), "clip_pooled": (6,)}
SHARD_ROWS = 8
ABSENT_ROWS = (3, 13)  # 13 lies in the partial second shard
NUM_IMAGES = 14


@pytest.fixture(scope="module", autouse=True)
def no_waiting_for_the_disk() -> Iterator[None]:
    """Power cuts are the business of test_files.py; here fsync would take most of the time."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("os.fsync", lambda descriptor: None)
        yield


def features(num_rows: int, dtype: str = "float16", seed: int = 0) -> dict[str, Array]:
    generator = np.random.default_rng(seed)
    return {
        name: generator.standard_normal((num_rows, *shape)).astype(dtype) for name, shape in SHAPES.items()
    }


def write_store(path: Path, dtype: str = "float16") -> dict[str, Array]:
    """Two shards of 8 rows, the second partial, two rows without an image; returns what was written."""
    arrays = features(NUM_IMAGES, dtype)
    valid = np.array([row not in ABSENT_ROWS for row in range(NUM_IMAGES)])
    writer = ZarrShardWriter.create(path, SHAPES, dtype, SHARD_ROWS)
    for shard_index in range(2):
        rows = slice(shard_index * SHARD_ROWS, (shard_index + 1) * SHARD_ROWS)
        writer.write_shard(shard_index, {name: array[rows] for name, array in arrays.items()}, valid[rows])
    writer.resize(2 * SHARD_ROWS)
    return arrays


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Array]]:
    path = tmp_path_factory.mktemp("store") / "features.zarr"
    return path, write_store(path)


def buffers(num_rows: int, dtype: str = "float16") -> dict[str, Array]:
    return {name: np.zeros((num_rows, *shape), dtype) for name, shape in SHAPES.items()}


def read(reader: ZarrShardReader, rows: Sequence[int]) -> dict[str, Array]:
    out = buffers(len(rows), reader.dtype.name)
    reader.read_rows(rows, out)
    return out


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_zarr_python_reads_the_same_and_nan_where_no_image_is(tmp_path: Path, dtype: str) -> None:
    path = tmp_path / "features.zarr"
    written = write_store(path, dtype)
    group = zarr.open_group(path, mode="r")
    assert sorted(name for name, _ in group.arrays()) == sorted(SHAPES)
    for name, array in written.items():
        stored = group[name]
        assert isinstance(stored, zarr.Array)
        found = np.asarray(stored[:])
        assert found.shape == (16, *SHAPES[name])
        assert found.dtype == dtype
        for row in range(16):
            if row in ABSENT_ROWS or row >= NUM_IMAGES:
                assert np.isnan(found[row]).all()
            else:
                assert found[row].tobytes() == array[row].tobytes()


PRESENT = st.sampled_from([row for row in range(NUM_IMAGES) if row not in ABSENT_ROWS])


@given(rows=st.lists(PRESENT, max_size=20), max_open=st.integers(1, 6))
def test_reading_equals_zarr_python_bytewise_in_any_order_with_repeats(
    store: tuple[Path, dict[str, Array]], rows: list[int], max_open: int
) -> None:
    path, _ = store
    reader = ZarrShardReader(path, max_open=max_open)
    found = read(reader, rows)
    for name in SHAPES:
        array = zarr.open_array(path / name, mode="r")
        expected = [np.asarray(array[row]).tobytes() for row in rows]
        assert [values.tobytes() for values in found[name]] == expected
    assert reader.num_open <= max_open


def test_opening_reads_no_shard(tmp_path: Path) -> None:
    write_store(tmp_path / "f.zarr")
    for shard in (tmp_path / "f.zarr").glob("*/c/**/0"):
        if shard.is_file():
            shard.unlink()
    reader = ZarrShardReader(tmp_path / "f.zarr")
    assert (reader.rows, reader.shapes, reader.num_open) == (16, dict(sorted(SHAPES.items())), 0)


def test_only_the_arrays_asked_for_are_read(store: tuple[Path, dict[str, Array]]) -> None:
    path, written = store
    reader = ZarrShardReader(path)
    out = np.zeros((1, 6), np.float16)
    reader.read_rows([0], {"clip_pooled": out})
    np.testing.assert_array_equal(out, written["clip_pooled"][:1])
    assert reader.num_open == 1


def test_threads_share_a_reader_with_fewer_maps_than_shards(store: tuple[Path, dict[str, Array]]) -> None:
    path, written = store
    reader = ZarrShardReader(path, max_open=1)
    rows = [row for row in range(NUM_IMAGES) if row not in ABSENT_ROWS]

    def check(seed: int) -> bool:
        order = np.random.default_rng(seed).permutation(rows).tolist()
        found = read(reader, order)
        return all(np.array_equal(found[name], written[name][order]) for name in SHAPES)

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(check, range(64)))
    assert reader.num_open <= 1


def _read_in_child(reader: ZarrShardReader, pipe: Any) -> None:
    opened_by_parent = reader.num_open
    out = np.zeros((2, 6), np.float16)
    reader.read_rows([9, 0], {"clip_pooled": out})
    pipe.send((opened_by_parent, out))
    pipe.close()


def test_a_forked_child_opens_its_own_maps(store: tuple[Path, dict[str, Array]]) -> None:
    path, written = store
    reader = ZarrShardReader(path)
    read(reader, [0, 9])
    context = multiprocessing.get_context("fork")
    parent_end, child_end = context.Pipe()
    child = context.Process(target=_read_in_child, args=(reader, child_end))
    child.start()
    child_end.close()
    try:
        opened_by_parent, found = parent_end.recv()
    finally:
        child.join(30)
        parent_end.close()
    assert opened_by_parent == 0
    assert child.exitcode == 0
    np.testing.assert_array_equal(found, written["clip_pooled"][[9, 0]])


def test_a_reader_survives_pickling(store: tuple[Path, dict[str, Array]]) -> None:
    path, written = store
    reader = ZarrShardReader(path)
    read(reader, [0])
    copy = pickle.loads(pickle.dumps(reader))
    assert copy.num_open == 0
    np.testing.assert_array_equal(read(copy, [5])["sam"], written["sam"][[5]])


@pytest.mark.parametrize("row", [3, 13, 14, 15])
def test_an_absent_row_is_missed_not_invented(store: tuple[Path, dict[str, Array]], row: int) -> None:
    with pytest.raises(CacheMissError, match=f"Row {row} .* holds no image") as caught:
        read(ZarrShardReader(store[0]), [0, row])
    assert caught.value.facts["row"] == row


@pytest.mark.parametrize("row", [-1, 16, 10**9])
def test_a_row_outside_the_arrays_is_missed(store: tuple[Path, dict[str, Array]], row: int) -> None:
    with pytest.raises(CacheMissError, match=f"no row {row}; it has 16"):
        read(ZarrShardReader(store[0]), [row])


@pytest.mark.parametrize(
    "buffer",
    [
        np.zeros((2, 6), np.float16),
        np.zeros((1, 5), np.float16),
        np.zeros((1, 6), np.float32),
        np.zeros((1, 6), ">f2"),
        np.zeros((1, 12), np.float16)[:, ::2],
    ],
)
def test_a_buffer_that_does_not_fit_is_refused(store: tuple[Path, dict[str, Array]], buffer: Array) -> None:
    with pytest.raises(ShapeError, match=r"clip_pooled must be a C-contiguous float16\[1, 6\]"):
        ZarrShardReader(store[0]).read_rows([0], {"clip_pooled": buffer})


SHARD = Path("clip", "c", "1", "0", "0")
INDEX_BYTES = SHARD_ROWS * 16 + 4


def patch(path: Path, position: int, content: bytes) -> None:
    shard = bytearray(path.read_bytes())
    position %= len(shard)
    shard[position : position + len(content)] = content
    path.write_bytes(bytes(shard))


def test_any_flipped_byte_of_an_index_is_noticed(tmp_path: Path) -> None:
    write_store(tmp_path / "f.zarr")
    path = tmp_path / "f.zarr" / SHARD
    original = path.read_bytes()
    for position in range(-INDEX_BYTES, 0):
        patch(path, position, bytes([original[position] ^ 0x10]))
        with pytest.raises(CorruptShardError, match="clip/c/1/0/0") as caught:
            read(ZarrShardReader(tmp_path / "f.zarr"), [8])
        assert caught.value.facts["path"] == path
        path.write_bytes(original)
    read(ZarrShardReader(tmp_path / "f.zarr"), [8])


@pytest.mark.parametrize("missing_bytes", [1, 40, INDEX_BYTES, 1000])
def test_a_truncated_shard_is_noticed(tmp_path: Path, missing_bytes: int) -> None:
    write_store(tmp_path / "f.zarr")
    path = tmp_path / "f.zarr" / SHARD
    content = path.read_bytes()
    path.write_bytes(content[: max(0, len(content) - missing_bytes)])
    with pytest.raises(CorruptShardError, match="clip/c/1/0/0"):
        read(ZarrShardReader(tmp_path / "f.zarr"), [8])


def test_a_shard_that_lost_rows_but_kept_its_index_is_noticed(tmp_path: Path) -> None:
    write_store(tmp_path / "f.zarr")
    path = tmp_path / "f.zarr" / SHARD
    path.write_bytes(path.read_bytes()[40:])
    with pytest.raises(CorruptShardError, match="points outside its rows"):
        read(ZarrShardReader(tmp_path / "f.zarr"), [8])


@pytest.mark.parametrize("entry", [(2**64 - 1, 40), (0, 39), (2**63, 40), (1 << 20, 40)])
def test_an_index_with_a_good_checksum_must_still_make_sense(tmp_path: Path, entry: tuple[int, int]) -> None:
    write_store(tmp_path / "f.zarr")
    path = tmp_path / "f.zarr" / SHARD
    index = bytearray(path.read_bytes()[-INDEX_BYTES:-4])
    index[:16] = struct.pack("<QQ", *entry)
    patch(path, -INDEX_BYTES, bytes(index) + struct.pack("<I", google_crc32c.value(bytes(index))))
    with pytest.raises(CorruptShardError, match="points outside its rows"):
        read(ZarrShardReader(tmp_path / "f.zarr"), [9])


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    write_store(tmp_path / "f.zarr")
    (tmp_path / "f.zarr" / SHARD).unlink()
    reader = ZarrShardReader(tmp_path / "f.zarr")
    read(reader, [0])
    with pytest.raises(CorruptShardError, match=r"clip/c/1/0/0 cannot be opened"):
        read(reader, [8])


@pytest.mark.parametrize(
    "content",
    [
        None,
        b"",
        b"{}",
        b"[]",
        b'{"shape": [8], "data_type": "none", "chunk_grid": {"configuration": {"chunk_shape": [8]}}}',
        b'{"shape": [8], "data_type": "int16", "chunk_grid": {"configuration": {"chunk_shape": [8]}}}',
    ],
)
def test_damaged_metadata_is_named(tmp_path: Path, content: bytes | None) -> None:
    write_store(tmp_path / "f.zarr")
    path = tmp_path / "f.zarr" / "sam" / "zarr.json"
    if content is None:
        for metadata in (tmp_path / "f.zarr").glob("*/zarr.json"):
            metadata.unlink()
    else:
        path.write_bytes(content)
    with pytest.raises(CorruptShardError, match=r"f\.zarr"):
        ZarrShardReader(tmp_path / "f.zarr")


@pytest.fixture
def compressed(tmp_path: Path) -> tuple[Path, dict[str, Array]]:
    """The features as another tool may store them: zstd in the shards, rows 3 and 13 to 15 absent."""
    written = features(NUM_IMAGES)
    group = zarr.create_group(tmp_path / "c.zarr", zarr_format=3)
    for name, shape in SHAPES.items():
        array = group.create_array(
            name,
            shape=(16, *shape),
            chunks=(1, *shape),
            shards=(8, *shape),
            dtype="float16",
            compressors=[zarr.codecs.ZstdCodec()],
            fill_value=math.nan,
        )
        array[:3] = written[name][:3]
        array[4:13] = written[name][4:13]
    return tmp_path / "c.zarr", written


def test_a_compressed_store_is_read_through_zarr_python(compressed: tuple[Path, dict[str, Array]]) -> None:
    path, written = compressed
    reader = ZarrShardReader(path)
    rows = [12, 0, 12, 5]
    found = read(reader, rows)
    for name in SHAPES:
        np.testing.assert_array_equal(found[name], written[name][rows])
    assert reader.num_open == 0
    with pytest.raises(CacheMissError, match="Row 13"):
        read(reader, [13])


def test_a_damaged_compressed_store_is_noticed(compressed: tuple[Path, dict[str, Array]]) -> None:
    path, _ = compressed
    patch(path / "clip" / "c" / "1" / "0" / "0", -3, b"\0\0\0")
    with pytest.raises(CorruptShardError, match="row 9"):
        read(ZarrShardReader(path), [9])


def test_nothing_is_added_to_a_layout_that_is_not_ours(compressed: tuple[Path, dict[str, Array]]) -> None:
    with pytest.raises(ConfigError, match="not laid out as ris writes it"):
        ZarrShardWriter(compressed[0])


BIG_ENDIAN = BytesCodec(endian="big")
LITTLE_ENDIAN = BytesCodec(endian="little")
OTHER_LAYOUTS: dict[str, dict[str, Any]] = {
    "index at the start": {"serializer": ShardingCodec(chunk_shape=(1, 6), index_location="start")},
    "several rows a chunk": {"serializer": ShardingCodec(chunk_shape=(2, 6))},
    "big-endian": {"serializer": ShardingCodec(chunk_shape=(1, 6), codecs=[BIG_ENDIAN])},
    "no checksum": {"serializer": ShardingCodec(chunk_shape=(1, 6), index_codecs=[LITTLE_ENDIAN])},
    "big-endian index": {
        "serializer": ShardingCodec(chunk_shape=(1, 6), index_codecs=[BIG_ENDIAN, Crc32cCodec()])
    },
    "checksums of chunks": {
        "serializer": ShardingCodec(chunk_shape=(1, 6), codecs=[LITTLE_ENDIAN, Crc32cCodec()])
    },
    "no shards": {"serializer": LITTLE_ENDIAN},
    "other keys": {
        "serializer": ShardingCodec(chunk_shape=(1, 6)),
        "chunk_key_encoding": {"name": "v2", "separator": "."},
    },
}


@pytest.mark.parametrize("layout", OTHER_LAYOUTS)
def test_every_other_layout_is_read_through_zarr_python(tmp_path: Path, layout: str) -> None:
    written = features(16)["clip_pooled"]
    array = zarr.create_array(
        tmp_path / "f.zarr" / "clip_pooled",
        shape=written.shape,
        chunks=(SHARD_ROWS, 6),
        dtype="float16",
        compressors=None,
        fill_value=math.nan,
        **OTHER_LAYOUTS[layout],
    )
    array[:] = written
    reader = ZarrShardReader(tmp_path / "f.zarr")
    found = np.zeros((3, 6), np.float16)
    reader.read_rows([9, 0, 9], {"clip_pooled": found})
    np.testing.assert_array_equal(found, written[[9, 0, 9]])
    assert reader.num_open == 0


@pytest.mark.parametrize(
    ("value", "is_overflow"), [(np.inf, False), (-np.inf, False), (np.nan, False), (70000.0, True)]
)
def test_values_that_cannot_be_stored_are_refused_by_row(
    tmp_path: Path, value: float, is_overflow: bool
) -> None:
    writer = ZarrShardWriter.create(tmp_path / "f.zarr", SHAPES, "float16", SHARD_ROWS)
    arrays = features(4, "float32")
    arrays["clip"][2, 3, 4] = value
    with pytest.raises(NonFiniteError, match="clip: row 10") as caught:
        writer.write_shard(1, arrays)
    assert caught.value.facts == {"name": "clip", "row": 10, "is_overflow": is_overflow}
    assert not list((tmp_path / "f.zarr").glob("*/c"))
    writer.write_shard(1, arrays, np.array([True, True, False, True]))  # no image there: not looked at


def test_the_largest_half_is_stored_and_large_values_fit_float32(tmp_path: Path) -> None:
    arrays = features(1, "float32")
    arrays["clip"][0, 0, 0] = 65504
    ZarrShardWriter.create(tmp_path / "a.zarr", SHAPES, "float16", SHARD_ROWS).write_shard(0, arrays)
    arrays["clip"][0, 0, 0] = 1e6
    ZarrShardWriter.create(tmp_path / "b.zarr", SHAPES, "float32", SHARD_ROWS).write_shard(0, arrays)


def test_arrays_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    writer = ZarrShardWriter.create(tmp_path / "f.zarr", SHAPES, "float16", SHARD_ROWS)
    with pytest.raises(ShapeError, match="needs the arrays"):
        writer.write_shard(0, {"sam": features(1)["sam"]})
    with pytest.raises(ShapeError, match="n ≤ 8"):
        writer.write_shard(0, features(9))
    with pytest.raises(ShapeError, match="n equal for all"):
        writer.write_shard(0, features(2) | {"sam": features(3)["sam"]})
    with pytest.raises(ShapeError, match="n equal for all"):
        writer.write_shard(0, features(2), np.ones(3, np.bool_))


def test_an_unknown_dtype_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="choose float16 or float32"):
        ZarrShardWriter.create(tmp_path / "f.zarr", SHAPES, "int8", SHARD_ROWS)


def test_the_digests_are_those_of_the_files(tmp_path: Path) -> None:
    writer = ZarrShardWriter.create(tmp_path / "f.zarr", SHAPES, "float16", SHARD_ROWS)
    digests = writer.write_shard(3, features(8))
    assert sorted(digests) == ["clip/c/3/0/0", "clip_pooled/c/3/0", "sam/c/3/0/0/0"]
    for relative, digest in digests.items():
        assert sha256_file(tmp_path / "f.zarr" / relative) == digest


def test_the_same_rows_give_the_same_bytes(tmp_path: Path) -> None:
    first, second = (
        ZarrShardWriter.create(tmp_path / name, SHAPES, "float16", SHARD_ROWS).write_shard(0, features(5))
        for name in ("a.zarr", "b.zarr")
    )
    assert first == second


def test_a_shard_without_any_image_is_still_a_file_and_reads_as_nan(tmp_path: Path) -> None:
    writer = ZarrShardWriter.create(tmp_path / "f.zarr", SHAPES, "float16", SHARD_ROWS)
    writer.write_shard(0, features(2), np.zeros(2, np.bool_))
    writer.resize(SHARD_ROWS)
    assert np.isnan(np.asarray(zarr.open_array(tmp_path / "f.zarr" / "sam", mode="r")[:])).all()
    with pytest.raises(CacheMissError):
        read(ZarrShardReader(tmp_path / "f.zarr"), [0])


def test_rows_grow_by_whole_shards_and_never_shrink(tmp_path: Path) -> None:
    write_store(tmp_path / "f.zarr")
    writer = ZarrShardWriter(tmp_path / "f.zarr")
    assert (writer.rows, writer.shard_rows) == (16, 8)
    for rows in (8, 17):
        with pytest.raises(ConfigError, match="grows by whole shards of 8"):
            writer.resize(rows)
    writer.write_shard(2, features(1, seed=1))
    assert ZarrShardReader(tmp_path / "f.zarr").rows == 16
    writer.resize(24)
    found = read(ZarrShardReader(tmp_path / "f.zarr"), [16])
    np.testing.assert_array_equal(found["sam"], features(1, seed=1)["sam"])
    assert zarr.open_array(tmp_path / "f.zarr" / "sam", mode="r").shape == (24, 3, 2, 2)


def test_shards_of_an_update_that_never_finished_are_dropped(tmp_path: Path) -> None:
    write_store(tmp_path / "f.zarr")
    writer = ZarrShardWriter(tmp_path / "f.zarr")
    writer.write_shard(2, features(1))
    writer.discard_beyond(16)
    assert sorted(path.name for path in (tmp_path / "f.zarr" / "sam" / "c").iterdir()) == ["0", "1"]

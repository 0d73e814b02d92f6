"""The Zarr backend's own bytes, other layouts of the same arrays, and damage to metadata and indexes."""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np
import numpy.typing as npt
import pytest
import zarr
from zarr.codecs import BytesCodec, Crc32cCodec, ShardingCodec, ZstdCodec

from ris_cache.errors import CacheMissError, ConfigError, CorruptShardError
from ris_cache.store.layout import ABSENT, StoredArray
from ris_cache.store.mapped import MappedReader
from ris_cache.store.zarr_backend import ZarrBackend

Array = npt.NDArray[Any]
S = 8
CLIP = StoredArray(name="clip", shape=(4, 5), dtype="float16")
POOLED = StoredArray(name="pooled", shape=(6,), dtype="float32")
BITS = StoredArray(name="bits", shape=(3,), dtype="uint16")
CODES = StoredArray(name="codes", shape=(), dtype="int8")
ARRAYS = (CLIP, POOLED, BITS, CODES)
POSITIONS = np.array([1, 2, 5])
SHARD = Path("features.zarr", "clip", "c", "1", "0", "0")
INDEX_BYTES = S * 16 + 4


@pytest.fixture(scope="module", autouse=True)
def no_waiting_for_the_disk() -> Iterator[None]:
    """Power cuts are the business of test_files.py; here fsync would take most of the time."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("os.fsync", lambda descriptor: None)
        yield


def features(num_rows: int, arrays: tuple[StoredArray, ...] = ARRAYS) -> dict[str, Array]:
    """Values from 1 up, so no row is any array's fill value."""
    return {
        array.name: (np.arange(num_rows * math.prod(array.shape)) % 90 + 1)
        .reshape(num_rows, *array.shape)
        .astype(array.dtype)
        for array in arrays
    }


def write_metadata(backend: ZarrBackend, rows: int = 2 * S) -> None:
    for relative, content in backend.metadata_files(rows).items():
        (backend.root / relative).parent.mkdir(parents=True, exist_ok=True)
        (backend.root / relative).write_bytes(content)


@pytest.fixture
def backend(tmp_path: Path) -> ZarrBackend:
    """Two shards; the second holds the rows 9, 10 and 13."""
    backend = ZarrBackend(tmp_path, ARRAYS, S)
    backend.write_shard(0, np.arange(S), features(S))
    backend.write_shard(1, POSITIONS, features(3))
    write_metadata(backend)
    return backend


def read_pooled(backend: ZarrBackend, row: int) -> Array:
    out = np.zeros((1, 6), np.float32)
    MappedReader(backend).read_rows([row], {"pooled": out})
    return out[0]


def test_a_shard_is_its_rows_an_index_and_a_checksum(backend: ZarrBackend) -> None:
    content = (backend.root / SHARD).read_bytes()
    rows = features(3)["clip"].tobytes()
    index = b""
    for position in range(S):
        place = POSITIONS.tolist().index(position) if position in POSITIONS else None
        index += b"\xff" * 16 if place is None else struct.pack("<QQ", place * 40, 40)
    assert content == rows + index + struct.pack("<I", google_crc32c.value(index))
    assert backend.shard_files(1) == (
        "features.zarr/clip/c/1/0/0",
        "features.zarr/pooled/c/1/0",
        "features.zarr/bits/c/1/0",
        "features.zarr/codes/c/1",
    )


def test_the_places_are_those_of_the_index(backend: ZarrBackend) -> None:
    places = backend.locate(1)
    assert places is not None
    assert list(places) == ["clip", "pooled", "bits", "codes"]
    assert places["clip"].path == backend.root / SHARD
    expected = [ABSENT, 0, 40, ABSENT, ABSENT, 80, ABSENT, ABSENT]
    assert (places["clip"].offsets.tolist(), places["clip"].offsets.dtype) == (expected, np.int64)


def test_the_metadata_says_what_the_format_promises(backend: ZarrBackend) -> None:
    files = backend.metadata_files(3 * S)
    group = json.loads(files.pop("features.zarr/zarr.json"))
    assert (group["zarr_format"], group["node_type"]) == (3, "group")
    fills = {"clip": "NaN", "pooled": "NaN", "bits": 0x7FC0, "codes": 0}
    assert {path.split("/")[1] for path in files} == set(fills)
    for array in ARRAYS:
        document = json.loads(files[f"features.zarr/{array.name}/zarr.json"])
        assert document["shape"] == [3 * S, *array.shape]
        assert document["data_type"] == array.dtype
        assert document["fill_value"] == fills[array.name]
        assert document["attributes"] == ({"ris:dtype": "bfloat16"} if array is BITS else {})
        assert document["chunk_grid"]["configuration"]["chunk_shape"] == [S, *array.shape]
        (sharding,) = document["codecs"]
        assert sharding["name"] == "sharding_indexed"
        assert sharding["configuration"]["chunk_shape"] == [1, *array.shape]
        assert sharding["configuration"]["index_location"] == "end"


def test_zarr_python_sees_fill_values_where_no_image_is(backend: ZarrBackend) -> None:
    group: Any = zarr.open_group(backend.root / "features.zarr", mode="r")
    assert np.isnan(group["clip"][8]).all()
    assert np.isnan(group["bits"][8].astype(np.uint32).__lshift__(16).view(np.float32)).all()
    np.testing.assert_array_equal(group["pooled"][13], features(3)["pooled"][2])


def test_rows_may_be_read_before_the_metadata_grows_over_them(backend: ZarrBackend) -> None:
    backend.write_shard(2, np.arange(1), features(1))
    np.testing.assert_array_equal(read_pooled(backend, 16), features(1)["pooled"][0])
    with pytest.raises(CorruptShardError, match=r"zarr\.json declares 16 rows"):
        backend.read_row("pooled", 16)
    write_metadata(backend, 3 * S)
    np.testing.assert_array_equal(backend.read_row("pooled", 16), features(1)["pooled"][0])


def test_any_flipped_byte_of_an_index_is_noticed(backend: ZarrBackend) -> None:
    path = backend.root / SHARD
    original = path.read_bytes()
    for position in range(len(original) - INDEX_BYTES, len(original)):
        changed = bytearray(original)
        changed[position] ^= 0x10
        path.write_bytes(changed)
        with pytest.raises(CorruptShardError, match="clip/c/1/0/0 has an index that contradicts") as caught:
            backend.locate(1)
        assert caught.value.facts.items() >= {"path": path, "shard": 1}.items()


def test_a_shard_that_lost_rows_but_kept_its_index_is_noticed(backend: ZarrBackend) -> None:
    path = backend.root / SHARD
    path.write_bytes(path.read_bytes()[40:])
    with pytest.raises(CorruptShardError, match="points outside its rows"):
        backend.locate(1)


@pytest.mark.parametrize(
    "entry", [(2**64 - 1, 40), (40, 2**64 - 1), (0, 39), (2**63, 40), (81, 40), (1 << 20, 40)]
)
def test_an_index_with_a_good_checksum_must_still_make_sense(
    backend: ZarrBackend, entry: tuple[int, int]
) -> None:
    path = backend.root / SHARD
    content = path.read_bytes()
    index = struct.pack("<QQ", *entry) + content[-INDEX_BYTES + 16 : -4]
    path.write_bytes(content[:-INDEX_BYTES] + index + struct.pack("<I", google_crc32c.value(index)))
    with pytest.raises(CorruptShardError, match="points outside its rows"):
        backend.locate(1)


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (None, "cannot be opened"),
        (b"", "does not describe an array"),
        (b"\xff\xfe", "does not describe an array"),
        (b"{}", "does not describe an array"),
        (b"[]", "does not describe an array"),
        (b"[" * 100_000, "does not describe an array"),
        (b'{"shape": 8, "data_type": "float16"}', "does not describe an array"),
        (
            b'{"shape": [8, 4, 5], "data_type": "float32"}',
            r"rows of float32\[4, 5\]; the cache holds float16",
        ),
        (
            b'{"shape": [8, 5, 4], "data_type": "float16"}',
            r"rows of float16\[5, 4\]; the cache holds float16",
        ),
    ],
)
def test_damaged_metadata_is_named(backend: ZarrBackend, content: bytes | None, problem: str) -> None:
    path = backend.root / "features.zarr" / "clip" / "zarr.json"
    path.unlink()
    if content is not None:
        path.write_bytes(content)
    for read in (lambda: backend.locate(0), lambda: backend.read_row("clip", 0)):
        with pytest.raises(CorruptShardError, match=rf"clip/zarr\.json .*{problem}") as caught:
            read()
        assert caught.value.facts["path"] == path


def test_metadata_is_looked_at_once(backend: ZarrBackend) -> None:
    backend.locate(0)
    for array in ARRAYS:
        (backend.root / "features.zarr" / array.name / "zarr.json").unlink()
    assert backend.locate(1) is not None


BIG_ENDIAN = BytesCodec(endian="big")
LITTLE_ENDIAN = BytesCodec(endian="little")
OTHER_LAYOUTS: dict[str, dict[str, Any]] = {
    "compressed": {"shards": (S, 6), "chunks": (1, 6), "compressors": [ZstdCodec()]},
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
    "shards of another size": {"chunks": (4, 6), "serializer": ShardingCodec(chunk_shape=(1, 6))},
}


def store_otherwise(root: Path, array: StoredArray, values: Array, **layout: Any) -> ZarrBackend:
    """An array as another tool may store it: row 3 and the rows from 9 on were never written."""
    fill = {"float32": math.nan, "uint16": 0x7FC0, "int8": 0}[array.dtype]
    stored = zarr.create_array(
        root / "features.zarr" / array.name,
        **{
            "shape": (2 * S, *array.shape),
            "chunks": (S, *array.shape),
            "dtype": array.dtype,
            "compressors": None,
            "fill_value": fill,
            **layout,
        },
    )
    stored[:3] = values[:3]
    stored[4:9] = values[4:9]
    return ZarrBackend(root, (array,), S)


@pytest.mark.parametrize("layout", OTHER_LAYOUTS)
def test_every_other_layout_is_read_through_zarr_python_and_never_written(
    tmp_path: Path, layout: str
) -> None:
    written = features(2 * S, (POOLED,))["pooled"]
    backend = store_otherwise(tmp_path, POOLED, written, **OTHER_LAYOUTS[layout])
    assert backend.locate(0) is None
    reader = MappedReader(backend)
    found = np.zeros((3, 6), np.float32)
    reader.read_rows([8, 0, 8], {"pooled": found})
    np.testing.assert_array_equal(found, written[[8, 0, 8]])
    reader.advise([8, 0], ["pooled"])
    assert reader.num_open == 0
    for row in (3, 9, 15, 16, 10**6):
        with pytest.raises(CacheMissError, match=f"Row {row} .* holds no image"):
            reader.read_rows([row], {"pooled": found[:1]})
    with pytest.raises(ConfigError, match="not laid out as ris writes it"):
        backend.write_shard(0, np.arange(S), {"pooled": written[:S]})


@pytest.mark.parametrize("array", [BITS, CODES, StoredArray(name="wide", shape=(4, 4), dtype="int8")])
def test_absent_rows_of_whole_numbers_are_missed_in_other_layouts_too(
    tmp_path: Path, array: StoredArray
) -> None:
    written = features(2 * S, (array,))[array.name]
    backend = store_otherwise(
        tmp_path, array, written, serializer=ShardingCodec(chunk_shape=(2, *array.shape))
    )
    np.testing.assert_array_equal(backend.read_row(array.name, 5), written[5])
    assert backend.read_row(array.name, 3) is None
    assert backend.read_row(array.name, 12) is None


def test_rows_of_the_fill_value_are_kept_in_the_plain_layout(tmp_path: Path) -> None:
    backend = ZarrBackend(tmp_path, (CODES, BITS), S)
    zeros = {"codes": np.zeros(1, np.int8), "bits": np.full((1, 3), 0x7FC0, np.uint16)}
    backend.write_shard(0, np.array([2]), zeros)
    write_metadata(backend, S)
    assert backend.read_row("codes", 2) == 0
    np.testing.assert_array_equal(backend.read_row("bits", 2), [0x7FC0] * 3)
    assert backend.read_row("codes", 3) is None


def test_a_damaged_compressed_shard_is_noticed(tmp_path: Path) -> None:
    backend = store_otherwise(
        tmp_path, POOLED, features(S + 1, (POOLED,))["pooled"], **OTHER_LAYOUTS["compressed"]
    )
    path = tmp_path / "features.zarr" / "pooled" / "c" / "1" / "0"
    path.write_bytes(path.read_bytes()[:-3] + b"\0\0\0")
    with pytest.raises(CorruptShardError, match="pooled cannot be read at row 8") as caught:
        read_pooled(backend, 8)
    assert caught.value.facts["row"] == 8

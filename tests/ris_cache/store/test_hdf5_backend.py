"""The HDF5 backend's own bytes, files that other tools rewrote, and files that contradict themselves."""

from __future__ import annotations

import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import numpy.typing as npt
import pytest
from h5py import h5d, h5p, h5s, h5t

from ris_cache.errors import CacheMissError, ConfigError, CorruptShardError
from ris_cache.store.hdf5_backend import Hdf5Backend
from ris_cache.store.layout import ABSENT, StoredArray
from ris_cache.store.mapped import MappedReader

Array = npt.NDArray[Any]
S = 8
CLIP = StoredArray(name="clip", shape=(40, 50), dtype="float16")
BITS = StoredArray(name="bits", shape=(3,), dtype="uint16")
SCALE = StoredArray(name="scale", shape=(), dtype="float32")
ARRAYS = (CLIP, BITS, SCALE)
POSITIONS = np.array([1, 2, 5])
SHARD = Path("features", "00001.h5")


@pytest.fixture(scope="module", autouse=True)
def no_waiting_for_the_disk() -> Iterator[None]:
    """Power cuts are the business of test_files.py; here fsync would take most of the time."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("os.fsync", lambda descriptor: None)
        yield


def features(num_rows: int, seed: int = 0) -> dict[str, Array]:
    generator = np.random.default_rng(seed)
    return {
        array.name: (generator.random((num_rows, *array.shape)) * 100).astype(array.dtype) for array in ARRAYS
    }


@pytest.fixture
def backend(tmp_path: Path) -> Hdf5Backend:
    """Shard 1, which holds the rows 9, 10 and 13."""
    backend = Hdf5Backend(tmp_path, ARRAYS, S)
    backend.write_shard(1, POSITIONS, features(3))
    return backend


def test_a_shard_is_a_plain_hdf5_file(backend: Hdf5Backend) -> None:
    with h5py.File(backend.root / SHARD) as file:
        assert dict(file.attrs) == {"format": b"ris-features", "shard": 1, "shard_rows": S}
        assert set(file) == {"rows", "clip", "bits", "scale"}
        assert file["rows"].dtype == "<i8"
        assert file["rows"][...].tolist() == [9, 10, 13]
        assert dict(file["bits"].attrs) == {"ris:dtype": b"bfloat16"}
        assert not file["clip"].attrs
        for name, written in features(3).items():
            data_set = file[name]
            np.testing.assert_array_equal(data_set[...], written)
            assert data_set.dtype.byteorder in "=<"
            assert data_set.id.get_create_plist().get_layout() == h5d.CONTIGUOUS
            assert data_set.id.get_create_plist().get_nfilters() == 0
            assert data_set.id.get_offset() % 4096 == 0


def test_the_metadata_is_of_the_kind_that_carries_checksums_and_no_times(backend: Hdf5Backend) -> None:
    with h5py.File(backend.root / SHARD) as file:
        assert file.id.get_create_plist().get_version()[0] == 2
        for name in ("/", "rows", "clip", "bits", "scale"):
            assert h5py.h5o.get_info(file[name].id).hdr.version == 2
            assert not file[name].id.get_create_plist().get_obj_track_times()
        assert file["rows"].id.get_create_plist().get_layout() == h5d.COMPACT


def test_the_places_are_those_of_the_data_sets(backend: Hdf5Backend) -> None:
    places = backend.locate(1)
    assert places is not None
    content = (backend.root / SHARD).read_bytes()
    for name, written in features(3).items():
        assert places[name].path == backend.root / SHARD
        assert np.flatnonzero(places[name].offsets != ABSENT).tolist() == POSITIONS.tolist()
        for position, row in zip(POSITIONS, written, strict=True):
            offset = int(places[name].offsets[position])
            assert content[offset : offset + row.nbytes] == row.tobytes()


def test_the_data_sets_of_an_empty_shard_are_empty(backend: Hdf5Backend) -> None:
    backend.write_shard(0, np.zeros(0, np.int64), features(0))
    with h5py.File(backend.root / "features" / "00000.h5") as file:
        assert {name: file[name].shape for name in file} == {
            "rows": (0,), "clip": (0, 40, 50), "bits": (0, 3), "scale": (0,)
        }  # fmt: skip
    places = backend.locate(0)
    assert places is not None
    assert (places["clip"].offsets == ABSENT).all()


def test_more_rows_than_fit_into_the_metadata_are_kept_beside_it(tmp_path: Path) -> None:
    backend = Hdf5Backend(tmp_path, (SCALE,), 6000)
    written = np.arange(5999, dtype=np.float32)
    backend.write_shard(1, np.arange(1, 6000), {"scale": written})
    out = np.zeros(5999, np.float32)
    MappedReader(backend).read_rows(range(6001, 12000), {"scale": out})
    np.testing.assert_array_equal(out, written)


def test_writing_makes_no_copy_of_the_rows(tmp_path: Path) -> None:
    array = StoredArray(name="sam", shape=(1 << 20,), dtype="float16")
    content = np.ones((8, 1 << 20), np.float16)
    tracemalloc.start()
    try:
        Hdf5Backend(tmp_path, (array,), S).write_shard(0, np.arange(8), {"sam": content})
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < content.nbytes / 8


def test_an_array_may_not_take_the_name_of_the_rows(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="'rows' cannot be the name of an array"):
        Hdf5Backend(tmp_path, (StoredArray(name="rows", shape=(1,), dtype="int8"),), S)


@pytest.mark.parametrize("options", [{"chunks": (1, 40, 50)}, {"chunks": (1, 40, 50), "compression": "gzip"}])
def test_a_repacked_shard_is_read_through_h5py(backend: Hdf5Backend, options: dict[str, Any]) -> None:
    with h5py.File(backend.root / SHARD, "a") as file:
        del file["clip"]
        file.create_dataset("clip", data=features(3)["clip"], **options)
    assert backend.locate(1) is None
    reader = MappedReader(backend)
    out = {"clip": np.zeros((2, 40, 50), np.float16), "scale": np.zeros(2, np.float32)}
    reader.read_rows([13, 9], out)
    for name, found in out.items():
        np.testing.assert_array_equal(found, features(3)[name][[2, 0]])
    reader.advise([9, 13], ["clip"])
    assert reader.num_open == 0
    with pytest.raises(CacheMissError, match="Row 8 "):
        reader.read_rows([8], {"scale": out["scale"][:1]})


def test_a_damaged_compressed_shard_is_noticed(backend: Hdf5Backend) -> None:
    path = backend.root / SHARD
    with h5py.File(path, "a") as file:
        del file["clip"]
        clip = file.create_dataset("clip", data=features(3)["clip"], chunks=(1, 40, 50), compression="gzip")
        place = clip.id.get_chunk_info(0).byte_offset
    content = bytearray(path.read_bytes())
    content[place : place + 100] = bytes(100)
    path.write_bytes(content)
    with pytest.raises(CorruptShardError, match=r"00001\.h5 cannot be read"):
        backend.read_row("clip", 9)
    np.testing.assert_array_equal(backend.read_row("clip", 10), features(3)["clip"][1])


def _replace(name: str, **options: Any) -> Callable[[Any], None]:
    def change(file: Any) -> None:
        del file[name]
        file.create_dataset(name, **options)

    return change


def _link_elsewhere(file: Any) -> None:
    file.move("clip", "elsewhere")
    file["clip"] = h5py.SoftLink("/elsewhere")


def _link_outside(file: Any) -> None:
    del file["clip"]
    file["clip"] = h5py.ExternalLink("00000.h5", "/clip")


def _values_outside(file: Any) -> None:
    del file["clip"]
    file.create_dataset("clip", (3, 40, 50), "f2", external=[("/etc/hostname", 0, 12000)])


def _values_virtual(file: Any) -> None:
    del file["clip"]
    layout = h5py.VirtualLayout((3, 40, 50), "f2")
    layout[:] = h5py.VirtualSource("00000.h5", "clip", (3, 40, 50))
    file.create_virtual_dataset("clip", layout)


def _never_written(file: Any) -> None:
    del file["clip"]
    creation = h5p.create(h5p.DATASET_CREATE)
    creation.set_alloc_time(h5d.ALLOC_TIME_LATE)
    h5d.create(file.id, b"clip", h5t.IEEE_F16LE, h5s.create_simple((3, 40, 50)), creation)


CONTRADICTIONS: dict[str, tuple[Callable[[Any], None], str]] = {
    "another format": (lambda file: file.attrs.modify("format", b"other"), "shard 1 of 8 rows in the format"),
    "another shard": (lambda file: file.attrs.modify("shard", 7), "it is shard 7 of 8 rows"),
    "another shard size": (lambda file: file.attrs.modify("shard_rows", 64), "it is shard 1 of 64 rows"),
    "no attributes": (lambda file: file.attrs.clear(), "attribute"),
    "an array missing": (lambda file: file.pop("bits"), "bits is missing"),
    "rows missing": (lambda file: file.pop("rows"), "rows is missing"),
    "a group": (lambda file: (file.pop("bits"), file.create_group("bits")), "bits is no data set"),
    "a link": (_link_elsewhere, "clip is only a link"),
    "a link to another file": (_link_outside, "clip is only a link"),
    "values in another file": (_values_outside, "the values of clip lie in other files"),
    "values of another file": (_values_virtual, "the values of clip lie in other files"),
    "values never written": (_never_written, "the rows of clip lie outside the file"),
    "another dtype": (_replace("scale", data=np.zeros(3, "f8")), "scale is float64.*holds float32"),
    "big-endian": (_replace("scale", data=np.zeros(3, ">f4")), "scale is >f4"),
    "another shape": (
        _replace("bits", data=np.zeros((3, 4), "u2")),
        r"bits is uint16\[3, 4\].*uint16\[3, 3\]",
    ),
    "too few rows": (_replace("scale", data=np.zeros(2, "f4")), r"scale is float32\[2\]"),
    "rows of floats": (_replace("rows", data=np.zeros(3)), r"rows is float64\[3\]"),
    "rows without end": (_replace("rows", shape=(1 << 40,), dtype="i8", chunks=(8,)), r"rows is int64\["),
    "rows of another shard": (_replace("rows", data=np.array([1, 2, 5])), "rows does not ascend within"),
    "rows past the shard": (_replace("rows", data=np.array([9, 10, 16])), "rows does not ascend within"),
    "rows out of order": (_replace("rows", data=np.array([9, 13, 10])), "rows does not ascend within"),
    "a row twice": (_replace("rows", data=np.array([9, 9, 13])), "rows does not ascend within"),
}


@pytest.mark.parametrize("contradiction", CONTRADICTIONS)
def test_a_file_that_contradicts_itself_is_refused(backend: Hdf5Backend, contradiction: str) -> None:
    change, problem = CONTRADICTIONS[contradiction]
    backend.write_shard(0, np.arange(3), features(3, seed=1))
    with h5py.File(backend.root / SHARD, "a") as file:
        change(file)
    with pytest.raises(CorruptShardError, match=rf"00001\.h5 cannot be read \(.*{problem}") as caught:
        backend.locate(1)
    assert caught.value.facts.items() >= {"path": backend.root / SHARD, "shard": 1}.items()
    if contradiction != "values never written":  # h5py reads fill values there
        with pytest.raises(CorruptShardError):
            backend.read_row("clip", 9)
    assert backend.locate(0) is not None


def test_a_shard_in_the_place_of_another_is_refused(backend: Hdf5Backend) -> None:
    (backend.root / SHARD).rename(backend.root / "features" / "00004.h5")
    with pytest.raises(CorruptShardError, match=r"00004\.h5 cannot be read \(it is shard 1 of 8 rows"):
        backend.locate(4)

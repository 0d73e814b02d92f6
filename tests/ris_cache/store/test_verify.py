"""What `verify` finds, what it says about it, and what it leaves in peace."""

from __future__ import annotations

import errno
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import google_crc32c
import h5py
import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ris_cache.errors import CacheError, CacheMissError, IncompleteCacheError
from ris_cache.store import files, tables, verify_shards
from ris_cache.store.draft import CacheDraft
from ris_cache.store.findings import error_finding
from ris_cache.store.manifest import FileEntry, Manifest, load_manifest
from ris_cache.store.verify import VerifyReport, verify
from ris_cache.store.verify_shards import has_non_finite
from ris_cache.store.writer import Outcome

pytestmark = pytest.mark.usefixtures("no_waiting_for_the_disk")

TABLE = "refcoco.unc"


@pytest.fixture
def cache(tmp_path, either_drawing) -> Path:
    """Images 0 to 9 in three shards, image 5 quarantined; to be damaged."""
    root = tmp_path / "feats"
    either_drawing.extract(root, range(10), bad=(5,))
    return root


def reseal(root: Path, **changes: Any) -> Manifest:
    """Write a manifest that says something else, with the digest that belongs to it."""
    changed = load_manifest(root).model_copy(update=changes).sealed()
    (root / files.MANIFEST_NAME).write_bytes(changed.to_json())
    return load_manifest(root)


def relist(root: Path, path: str) -> None:
    """Write a manifest that takes a file for what it is now."""
    entry = FileEntry.of(files.sha256_file(root / path))
    reseal(root, files={**load_manifest(root).files, path: entry})


def flip(path: Path, place: int) -> None:
    content = bytearray(path.read_bytes())
    content[place] ^= 0x10
    path.write_bytes(content)


def shard_file(root: Path, shard: int) -> str:
    """A file that holds `sam` of a shard."""
    return (
        f"features.zarr/sam/c/{shard}/0/0/0"
        if (root / "features.zarr").exists()
        else f"features/{shard:05d}.h5"
    )


def place_of(root: Path, path: str, content: bytes) -> int:
    """Where some bytes lie in a file."""
    place = (root / path).read_bytes().find(content)
    assert place >= 0
    return place


def problems(report: VerifyReport) -> list[tuple[str, str]]:
    return [(finding.path, finding.problem) for finding in report.findings]


# --- sound caches --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fast", [False, True])
def test_a_whole_cache_is_sound(drawn_cache, fast):
    report = verify(drawn_cache, fast=fast)
    assert report.is_sound
    assert report.findings == report.notes == report.bad_shards == ()
    manifest = load_manifest(drawn_cache)
    read = set(manifest.files) - (set(manifest.shard_files()) if fast else set())
    assert report.num_bytes == sum(manifest.files[path].bytes for path in read)
    assert (report.num_shards, report.num_files) == (3, len(manifest.files))
    assert (report.manifest, report.is_fast) == (manifest, fast)


def test_a_cache_that_grew_is_sound(cache, either_drawing):
    either_drawing.extract(cache, range(8, 20), bad=(12,), table="refcocog.umd")
    report = verify(cache)
    assert report.is_sound
    assert report.num_shards == 6


def test_a_cache_is_sound_that_was_moved_or_is_reached_through_a_link(cache, tmp_path):
    shutil.move(cache, tmp_path / "elsewhere")
    (tmp_path / "link").symlink_to(tmp_path / "elsewhere")
    assert verify(tmp_path / "elsewhere").is_sound
    assert verify(tmp_path / "link").is_sound


def test_progress_counts_the_shards(cache, threads_end):
    seen: list[tuple[int, int]] = []
    verify(cache, progress=lambda done, total: seen.append((done, total)), workers=3)
    assert seen == [(1, 3), (2, 3), (3, 3)]


# --- files ---------------------------------------------------------------------------------------------------


def test_a_changed_byte_is_found_in_every_file(cache):
    for path, entry in load_manifest(cache).files.items():
        for place in {0, entry.bytes // 2, entry.bytes - 1}:
            flip(cache / path, place)
            report = verify(cache)
            assert {finding.path for finding in report.findings} == {path}
            can_be_mended = not path.startswith("images")
            assert {finding.is_repairable for finding in report.findings} == {can_be_mended}
            assert bool(report.bad_shards) is path.startswith("features")
            flip(cache / path, place)
    assert verify(cache).is_sound


def test_a_changed_row_is_named_with_its_image(cache, either_drawing):
    path = shard_file(cache, 1)
    row = either_drawing.stored([6])["sam"].tobytes()
    flip(cache / path, place_of(cache, path, row) + 7)
    (finding,) = verify(cache).findings
    assert (finding.kind, finding.path, finding.shard, finding.image_ids) == ("features", path, 1, (6,))
    assert finding.problem == "contradicts its SHA-256; contradicts the checksum of sam of the images 6"
    assert str(finding).startswith(path)
    assert "--repair" in finding.remedy


def test_fast_reads_no_features(cache, either_drawing):
    path = shard_file(cache, 1)
    flip(cache / path, place_of(cache, path, either_drawing.stored([6])["sam"].tobytes()))
    assert verify(cache, fast=True).is_sound


CHANGED_SIZES: dict[str, tuple[Callable[[Path], Any], str]] = {
    "deleted": (lambda path: path.unlink(), "is missing"),
    "emptied": (lambda path: path.write_bytes(b""), "has 0 bytes instead of"),
    "cut short": (lambda path: path.write_bytes(path.read_bytes()[:-1]), "bytes instead of"),
    "longer": (lambda path: path.write_bytes(path.read_bytes() + b"\0"), "bytes instead of"),
}


@pytest.mark.parametrize("change", CHANGED_SIZES)
@pytest.mark.parametrize("fast", [False, True])
def test_a_file_of_another_size_is_found(cache, change, fast):
    act, problem = CHANGED_SIZES[change]
    paths = [shard_file(cache, 2), load_manifest(cache).datasets[TABLE].instances_file, files.SAM_HEADS_NAME]
    for path in paths:
        act(cache / path)
    report = verify(cache, fast=fast)
    assert sorted(finding.path for finding in report.findings) == sorted(paths)
    assert all(problem in finding.problem for finding in report.findings)
    assert {finding.kind for finding in report.findings} == {"features", "table", "heads"}
    assert report.bad_shards == (2,)


def test_a_directory_in_the_place_of_a_file_is_to_be_removed_first(cache):
    paths = [shard_file(cache, 2), load_manifest(cache).datasets[TABLE].instances_file, files.SAM_HEADS_NAME]
    if (cache / "features.zarr").exists():
        paths.append("features.zarr/zarr.json")
    for path in paths:
        (cache / path).unlink()
        (cache / path).mkdir()
    report = verify(cache)
    assert sorted(problems(report)) == sorted((path, "is not a file") for path in paths)
    assert {(finding.kind, finding.is_repairable) for finding in report.findings} == {("access", False)}
    assert all(finding.remedy.startswith("Remove what is there") for finding in report.findings)
    assert report.bad_shards == ()


def test_every_problem_is_named_not_the_first_alone(cache):
    entry = load_manifest(cache).datasets[TABLE]
    (cache / shard_file(cache, 0)).unlink()
    flip(cache / shard_file(cache, 1), 40)
    (cache / shard_file(cache, 2)).write_bytes(b"")
    (cache / "categories/coco.json").write_bytes(b"")
    flip(cache / entry.expressions_file, 100)
    report = verify(cache)
    assert len({finding.path for finding in report.findings}) == 5
    assert report.bad_shards == (0, 1, 2)


def test_shards_in_each_others_place_are_found(cache):
    one, other = cache / shard_file(cache, 0), cache / shard_file(cache, 1)
    content = one.read_bytes()
    one.write_bytes(other.read_bytes())
    other.write_bytes(content)
    assert verify(cache).bad_shards == (0, 1)


def test_a_file_outside_of_the_cache_is_not_looked_at(cache, tmp_path):
    path = shard_file(cache, 0)
    shutil.move(cache / path, tmp_path / "outside")
    (cache / path).symlink_to(tmp_path / "outside")
    (finding,) = verify(cache).findings
    assert (finding.kind, finding.path) == ("access", path)
    assert "leads out of the cache" in finding.problem
    assert not finding.is_repairable


def test_a_disk_that_cannot_give_back_a_block_is_a_finding(cache, monkeypatch):
    def fail(*arguments: Any) -> str:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(verify_shards, "_scan", fail)
    report = verify(cache)
    assert report.bad_shards == (0, 1, 2)
    assert all("Input/output error" in finding.problem for finding in report.findings)


def test_a_file_that_may_not_be_read_is_not_called_damaged():
    finding = error_finding("features/00000.h5", PermissionError(errno.EACCES, "Permission denied"), shard=0)
    assert (finding.kind, finding.is_repairable) == ("access", False)
    assert "Permission denied" in finding.problem
    assert "owner" in finding.remedy


def test_chosen_shards_are_looked_at_alone(cache):
    for shard in range(3):
        (cache / shard_file(cache, shard)).unlink()
    report = verify(cache, shards={1})
    assert report.bad_shards == (1,)
    assert report.num_shards == 1


# --- what rows hold ------------------------------------------------------------------------------------------


def test_values_that_are_no_numbers_are_found_though_their_checksums_agree(tmp_path, any_drawing):
    writer = any_drawing.open(tmp_path / "feats", range(4))
    (claim,) = writer.free_claims()
    arrays = any_drawing.stored(range(4))
    name = "sam_scale" if any_drawing.dtype == "int8" else "sam"
    arrays[name][2].reshape(-1)[-1] = 0x7F80 if any_drawing.dtype == "bfloat16" else np.inf
    arrays["clip_pooled"][3, 0] = 0xFFC0 if any_drawing.dtype == "bfloat16" else np.nan
    claim.commit(arrays, [Outcome(sha256="0" * 64)] * 4)
    writer.finish(any_drawing.edit(range(4), "val"))
    report = verify(tmp_path / "feats")
    said = "; ".join(finding.problem for finding in report.findings)
    assert f"has NaN or infinity in {name} of the images 2" in said
    assert "has NaN or infinity in clip_pooled of the images 3" in said
    assert report.bad_shards == (0,)
    assert verify(tmp_path / "feats", fast=True).is_sound


@given(st.binary(min_size=4, max_size=64).map(lambda content: content[: len(content) // 4 * 4]))
def test_non_finite_bits_are_those_that_numpy_knows(content):
    stored = np.frombuffer(content, np.uint8)
    widened = (stored.view("<u2").astype("<u4") << 16).view("<f4")
    for dtype, values in (
        ("float16", stored.view("<f2")),
        ("float32", stored.view("<f4")),
        ("uint16", widened),
    ):
        assert has_non_finite(stored, dtype) is not bool(np.isfinite(values).all())
    assert not has_non_finite(stored, "int8")


def test_an_image_without_its_row_is_found_even_fast(tmp_path, either_drawing):
    """A quarantined image's row is absent; here the table says that it is there."""
    root = tmp_path / "feats"
    either_drawing.extract(root, range(4), bad=(2,))
    draft = CacheDraft.of(root)
    image = draft.images[2]
    draft.replace_images([type(image)(**{**_fields(image), "reason": None, "crc32c": (1, 2, 3)})])
    draft.commit()
    report = verify(root, fast=True)
    assert {finding.image_ids for finding in report.findings} == {(2,)}
    assert all("of the images 2" in finding.problem for finding in report.findings)
    assert report.bad_shards == (0,)


def _fields(image: Any) -> dict[str, Any]:
    return {name: getattr(image, name) for name in image.__dataclass_fields__}


def test_a_checksum_in_the_table_that_is_not_the_rows_is_found(cache):
    draft = CacheDraft.of(cache)
    image = draft.images[7]
    draft.replace_images([type(image)(**{**_fields(image), "crc32c": (1, *image.crc32c[1:])})])
    draft.commit()
    (finding,) = verify(cache).findings
    assert finding.image_ids == (7,)
    assert finding.problem == "contradicts the checksum of sam of the images 7"


def test_rows_that_nobody_refers_to_any_more_are_only_noted(cache):
    draft = CacheDraft.of(cache)
    draft.drop_dataset(TABLE)
    draft.drop_images([3, 4])
    draft.commit()
    report = verify(cache)
    assert report.is_sound
    assert any(note.startswith("2 rows hold features that no image refers to") for note in report.notes)


def test_an_index_that_gives_two_images_the_same_bytes_is_found(tmp_path, drawing):
    root = tmp_path / "feats"
    drawing.extract(root, range(4))
    path = root / shard_file(root, 0)
    content = bytearray(path.read_bytes())
    index = len(content) - 4 - 16 * 4
    content[index + 16 : index + 32] = content[index : index + 16]
    content[-4:] = google_crc32c.value(bytes(content[index:-4])).to_bytes(4, "little")
    path.write_bytes(content)
    (finding,) = verify(root).findings
    assert finding.problem == "contradicts its SHA-256; misplaces sam of the images 1"
    assert finding.image_ids == (1,)


@pytest.mark.parametrize("is_damaged", [False, True])
def test_shards_in_another_storage_layout_are_read_through_the_library(tmp_path, drawing, is_damaged):
    root = tmp_path / "feats"
    type(drawing)(backend="hdf5").extract(root, range(4))
    path = "features/00000.h5"
    with h5py.File(root / path, "r") as old, h5py.File(root / "packed", "w") as new:
        new.attrs.update(old.attrs)
        for name, data_set in old.items():
            values = data_set[...]
            if is_damaged and name == "clip":
                values[1] += 1
            new.create_dataset(name, data=values, chunks=True, compression="gzip")
    (root / "packed").replace(root / path)
    relist(root, path)
    report = verify(root)
    assert [finding.image_ids for finding in report.findings] == ([(1,)] if is_damaged else [])


# --- Zarr's own metadata -------------------------------------------------------------------------------------

METADATA = "features.zarr/clip/zarr.json"
ZARR_CHANGES: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "fewer rows": (lambda document: document["shape"].__setitem__(0, 8), "contradicts the manifest in shape"),
    "other rows": (lambda document: document["shape"].__setitem__(1, 3), "contradicts the manifest in shape"),
    "other elements": (lambda document: document.update(data_type="int16"), "in data_type"),
    "other codecs": (lambda document: document.update(codecs=[]), "in codecs"),
    "no fill value": (lambda document: document.pop("fill_value"), "in fill_value"),
    "nothing": (lambda document: document.clear(), "in chunk_grid, chunk_key_encoding"),
}


@pytest.fixture
def zarr_cache(tmp_path, drawing) -> Path:
    root = tmp_path / "feats"
    drawing.extract(root, range(10))
    return root


@pytest.mark.parametrize("change", ZARR_CHANGES)
def test_metadata_that_contradicts_the_manifest_is_found_and_no_shard_is_blamed(zarr_cache, change):
    act, problem = ZARR_CHANGES[change]
    document = json.loads((zarr_cache / METADATA).read_text())
    act(document)
    (zarr_cache / METADATA).write_text(json.dumps(document))
    (finding,) = verify(zarr_cache).findings
    assert (finding.kind, finding.path, finding.shard) == ("metadata", METADATA, None)
    assert problem in finding.problem
    assert finding.is_repairable


@pytest.mark.parametrize("content", [None, b"", b"[]", b"\xff", b"{"])
def test_metadata_that_is_gone_or_broken_is_found(zarr_cache, content):
    if content is None:
        (zarr_cache / METADATA).unlink()
    else:
        (zarr_cache / METADATA).write_bytes(content)
    flip(zarr_cache / "features.zarr/sam/c/1/0/0/0", 3)
    report = verify(zarr_cache)
    assert [finding.kind for finding in report.findings] == ["metadata", "features"]
    assert report.bad_shards == (1,)


def test_metadata_may_know_of_more_rows_and_carry_attributes_of_others(zarr_cache):
    document = json.loads((zarr_cache / METADATA).read_text())
    document["shape"][0] += 4
    document["attributes"] = {"about": "ours"}
    (zarr_cache / METADATA).write_text(json.dumps(document, indent=7))
    assert verify(zarr_cache).is_sound


# --- manifest and tables against each other ------------------------------------------------------------------


def test_a_damaged_manifest_is_the_one_finding(cache):
    flip(cache / files.MANIFEST_NAME, 300)
    report = verify(cache)
    assert report.manifest is None
    (finding,) = report.findings
    assert (finding.kind, finding.path, finding.is_repairable) == ("manifest", "manifest.json", False)
    assert finding.problem.startswith("is damaged: it")


def test_counts_that_the_tables_contradict_are_found(cache):
    manifest = load_manifest(cache)
    entry = manifest.datasets[TABLE]
    splits = {"val": entry.splits["val"].model_copy(update={"refs": 7}), "test": entry.splits["val"]}
    reseal(
        cache,
        images=manifest.images.model_copy(update={"ok": 8, "quarantined": 2}),
        datasets={TABLE: entry.model_copy(update={"splits": splits})},
    )
    found = problems(verify(cache, fast=True))
    assert (manifest.images.file, "has 9 images with features; the manifest says 8") in found
    assert (manifest.images.file, "has 1 images in quarantine; the manifest says 2") in found
    assert (entry.expressions_file, "has 5 refs of refcoco.unc:val; the manifest says 7") in found
    assert (entry.expressions_file, "has 0 images of refcoco.unc:test; the manifest says 10") in found


def test_references_to_what_is_not_there_are_found(cache, either_drawing):
    manifest = load_manifest(cache)
    entry = manifest.datasets[TABLE]
    draft = CacheDraft.of(cache)
    draft.drop_images([8, 9])
    draft.commit()
    instances = tables.table_bytes(tables.instances_table(either_drawing.instance(i) for i in range(1, 10)))
    (cache / entry.instances_file).write_bytes(instances)
    relist(cache, entry.instances_file)
    assert problems(verify(cache)) == [
        (entry.expressions_file, "refers to images that the table of images lacks: 8, 9"),
        (entry.expressions_file, f"refers to instances that {entry.instances_file} lacks: 1000"),
    ]


IMAGE_CHANGES: dict[str, tuple[dict[str, list[Any]], str]] = {
    "an image twice": ({"image_id": [0, 0, 2, 3]}, "names an image or a row twice"),
    "a row twice": ({"row": [0, 1, 1, 3]}, "names an image or a row twice"),
    "a row too far": ({"row": [0, 1, 2, 4]}, "names rows outside 0 to 3"),
    "a checksum missing": (
        {"crc32c": [[1, 2, 3], [1, 2, 3], [1, 2], [1, 2, 3]]},
        "does not give 3 checksums",
    ),
    "a reason for nothing": ({"reason": [None, "dark", None, None]}, "status and reason contradict"),
    "an unknown status": ({"status": ["ok", "ok", "new", "ok"]}, "status and reason contradict"),
}


@pytest.mark.parametrize("change", IMAGE_CHANGES)
def test_a_table_of_images_that_makes_no_sense_is_found(tmp_path, either_drawing, change):
    root = tmp_path / "feats"
    path = either_drawing.extract(root, range(4)).images.file
    columns, problem = IMAGE_CHANGES[change]
    table = tables.read_table(root / path, tables.IMAGES).to_pydict() | columns
    (root / path).write_bytes(tables.table_bytes(pa.table(table, schema=tables.IMAGES)))
    relist(root, path)
    report = verify(root)
    assert any(finding.path == path and problem in finding.problem for finding in report.findings)


def test_files_that_the_manifest_should_list_or_should_not_are_found(cache, either_drawing):
    manifest = load_manifest(cache)
    path, entry = shard_file(cache, 1), manifest.datasets[TABLE]
    left_out = {path, entry.instances_file, "categories/coco.json"}
    stray = shard_file(cache, 7)
    kept = {name: listed for name, listed in manifest.files.items() if name not in left_out}
    (cache / stray).parent.mkdir(parents=True, exist_ok=True)
    (cache / stray).write_bytes((cache / path).read_bytes())
    reseal(cache, files={**kept, stray: manifest.files[path]})
    found = problems(verify(cache))
    assert (path, "is not listed in the manifest") in found
    assert ("manifest.json", f"refers to {entry.instances_file} and does not list it") in found
    assert ("manifest.json", "refers to categories/coco.json and does not list it") in found
    assert ("manifest.json", f"lists {stray}, which belongs to no shard of 12 rows") in found


def test_a_shard_that_was_removed_with_its_images_is_not_missed(cache):
    manifest = load_manifest(cache)
    gone = [name for name in manifest.shard_files() if name == shard_file(cache, 1) or "/c/1/" in name]
    draft = CacheDraft.of(cache)
    draft.drop_dataset(TABLE)
    draft.drop_images(range(4, 8))
    draft.drop_files(gone)
    draft.commit()
    files.remove_files(cache, gone)
    assert verify(cache).is_sound


def test_tables_with_other_columns_and_unreadable_sets_are_found(cache):
    entry = load_manifest(cache).datasets[TABLE]
    for path in (entry.instances_file, "categories/coco.safetensors", files.SAM_HEADS_NAME):
        (cache / path).write_bytes((cache / load_manifest(cache).images.file).read_bytes())
        relist(cache, path)
    report = verify(cache)
    assert [finding.kind for finding in report.findings] == ["table", "categories", "heads"]
    assert "has other columns" in report.findings[0].problem


# --- what is no cache, and what is only noted ----------------------------------------------------------------


def test_what_is_no_finished_cache_is_refused(tmp_path, drawing):
    with pytest.raises(CacheMissError, match="There is no cache"):
        verify(tmp_path / "none")
    drawing.open(tmp_path / "begun", range(4)).close()
    with pytest.raises(IncompleteCacheError, match="Run `ris extract` again"):
        verify(tmp_path / "begun")
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "a.jpg").touch()
    with pytest.raises(CacheError, match="is not a cache"):
        verify(tmp_path / "photos")


def test_a_newer_format_is_refused_and_not_called_damaged(cache):
    document = json.loads((cache / files.MANIFEST_NAME).read_text())
    (cache / files.MANIFEST_NAME).write_text(json.dumps(document | {"format_version": 2}))
    with pytest.raises(CacheError, match="Update ris"):
        verify(cache)


def test_files_that_belong_to_nothing_are_noted(cache):
    stray = (cache / shard_file(cache, 0)).with_name(".0.17.tmp")
    stray.write_bytes(b"half")
    (cache / "images" / "pool.0123.parquet").write_bytes(b"old")
    where = stray.relative_to(cache)
    one = (
        "1 table (3 bytes) is of earlier states of the cache; `ris cache gc` removes it.",
        f"1 file (4 bytes) belongs to nothing, for example {where}; `ris cache gc` removes it.",
    )
    report = verify(cache)
    assert (report.is_sound, report.notes) == (True, one)
    (cache / "expressions" / "a.0123.parquet").write_bytes(b"old")
    stray.with_name(".1.17.tmp").write_bytes(b"half")
    assert verify(cache).notes == (
        "2 tables (6 bytes) are of earlier states of the cache; `ris cache gc` removes them.",
        f"2 files (8 bytes) belong to nothing, for example {where}; `ris cache gc` removes them.",
    )


def test_an_extraction_under_way_is_noted_and_its_files_are_left_alone(cache, either_drawing):
    writer = either_drawing.open(cache, range(10, 20), {"--split": "test"})
    either_drawing.commit(next(iter(writer.free_claims())))
    report = verify(cache)
    assert report.is_sound
    (note,) = report.notes
    assert "under way or was cut off" in note
    writer.close()
    (cache / "extraction" / "plan.json").write_text("{")
    assert verify(cache).is_sound
    assert any("plan.json is damaged" in note for note in verify(cache).notes)

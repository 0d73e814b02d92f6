"""Damage is noticed when it is read: every byte of every row, and every file beside them."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import google_crc32c
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ris_cache.errors import ConfigError, CorruptShardError
from ris_cache.store import checking, maps, tables
from ris_cache.store.backends import make_backend
from ris_cache.store.cache import FeatureCache
from ris_cache.store.checking import INTEGRITY, Integrity, RowChecker, require_integrity
from ris_cache.store.rows import row_checksum, row_checksums

pytestmark = pytest.mark.usefixtures("no_waiting_for_the_disk")

TABLE = "refcoco.unc"
IMAGE_IDS = [0, 1, 2, 3, 4, 6, 7, 8, 9]


@pytest.fixture
def root(drawn_cache: Path, tmp_path: Path) -> Path:
    """Images 0 to 9 without 5, in shards of 4; a copy to damage."""
    return shutil.copytree(drawn_cache, tmp_path / "feats")


def places_of(root: Path, image_id: int) -> Iterator[tuple[str, Path, range]]:
    """Where the bytes of an image lie: array, file, and place in the file."""
    cache = FeatureCache.open(root)
    manifest = cache.manifest
    shard, position = divmod(cache.images[image_id].row, manifest.shard_rows)
    backend = make_backend(manifest.backend, root, manifest.stored_arrays(), manifest.shard_rows)
    located = backend.locate(shard)
    assert located is not None
    for array in backend.arrays:
        offset = int(located[array.name].offsets[position])
        yield array.name, located[array.name].path, range(offset, offset + array.row_bytes)


def flip(path: Path, position: int, bits: int = 1) -> None:
    """Change one byte in place: same file, same length, and memory maps of it see the change."""
    with path.open("r+b") as file:
        file.seek(position)
        (byte,) = file.read(1)
        file.seek(position)
        file.write(bytes([byte ^ bits]))


# Features.


def test_every_byte_of_a_row_is_guarded(any_drawing: Any, root: Path) -> None:
    places = [(name, path, position) for name, path, span in places_of(root, 2) for position in span]
    assert len(places) == any_drawing.recipe.image_bytes
    for name, path, position in places:
        flip(path, position)
        with pytest.raises(CorruptShardError) as caught:
            FeatureCache.open(root).read([2])
        facts = caught.value.facts
        assert (facts["image_id"], facts["array"], facts["shard_index"], facts["row"]) == (2, name, 0, 2)
        flip(path, position)
    FeatureCache.open(root).read([2])


def test_damage_is_named_with_what_to_do(root: Path) -> None:
    name, path, span = next(places_of(root, 7))
    flip(path, span[0])
    with pytest.raises(CorruptShardError) as caught:
        FeatureCache.open(root).read([0, 7])
    assert str(caught.value) == (
        f"Image 7 of {root} is damaged: row 7 of {name} contradicts its checksum. Find all that is damaged "
        "with `ris cache verify`, and restore it from a copy or with `ris cache verify --repair`."
    )
    assert caught.value.exit_code == 4


def test_damage_to_one_image_leaves_the_others_readable(any_drawing: Any, root: Path) -> None:
    _, path, span = next(places_of(root, 2))
    flip(path, span[-1])
    cache = FeatureCache.open(root)
    any_drawing.require_features(cache, [image_id for image_id in IMAGE_IDS if image_id != 2])
    for _ in range(2):  # a failed check must not count as a check
        with pytest.raises(CorruptShardError, match="Image 2 of"):
            cache.read([1, 2, 3])
    any_drawing.require_features(cache, [1, 3])


@pytest.mark.parametrize("integrity", get_args(Integrity))
def test_damage_after_the_first_read_is_noticed_by_checking_every_read_alone(
    any_drawing: Any, root: Path, integrity: Integrity
) -> None:
    cache = FeatureCache.open(root, integrity=integrity)
    any_drawing.require_features(cache, IMAGE_IDS)
    name, path, span = next(places_of(root, 2))
    flip(path, span[0])
    if integrity == "every-read":
        with pytest.raises(CorruptShardError, match="Image 2 of"):
            cache.read([2])
    else:
        # The damage is in what was read, so this shows a check left out, not a map that missed the change.
        found = cache.read([2]).stored[name]
        assert found.tobytes() != any_drawing.stored([2])[name].tobytes()


@pytest.mark.parametrize("integrity", get_args(Integrity))
def test_damage_before_the_first_read_passes_unchecked_only_when_checks_are_off(
    any_drawing: Any, root: Path, integrity: Integrity
) -> None:
    name, path, span = next(places_of(root, 2))
    flip(path, span[0])
    cache = FeatureCache.open(root, integrity=integrity)
    if integrity == "off":
        assert cache.read([2]).stored[name].tobytes() != any_drawing.stored([2])[name].tobytes()
    else:
        with pytest.raises(CorruptShardError, match="Image 2 of"):
            cache.read([2])


def test_each_process_checks_for_itself(any_drawing: Any, root: Path) -> None:
    """A cache that travels by pickle takes the policy along, but not what was found sound elsewhere."""
    cache = FeatureCache.open(root)
    cache.read([2])
    _, path, span = next(places_of(root, 2))
    flip(path, span[0])
    cache.read([2])
    with pytest.raises(CorruptShardError):
        pickle.loads(pickle.dumps(cache)).read([2])


def replace_damaged(root: Path, image_id: int) -> Path:
    """Put a file with one byte changed in the place of one that holds the image, under its name."""
    _, path, span = next(places_of(root, image_id))
    copy = shutil.copy(path, path.with_name("damaged"))
    flip(copy, span[0])
    copy.replace(path)
    return path


def test_a_shard_that_was_damaged_while_others_were_open_is_noticed(
    any_drawing: Any, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(maps, "_MAX_OPEN", 1)
    cache = FeatureCache.open(root)
    for _ in range(2):
        any_drawing.require_features(cache, [0, 1, 2, 3])
    replace_damaged(root, 2)
    any_drawing.require_features(cache, [4, 6, 7])
    with pytest.raises(CorruptShardError, match="Image 2 of"):
        cache.read([1, 2])
    any_drawing.require_features(cache, [0, 1, 3])


def test_a_damaged_shard_is_noticed_when_its_map_is_of_no_more_use(
    any_drawing: Any, root: Path, tmp_path: Path
) -> None:
    cache = FeatureCache.open(root)
    any_drawing.require_features(cache, IMAGE_IDS)
    _, path, _ = next(places_of(root, 2))
    (tmp_path / "mapped").hardlink_to(path)
    replace_damaged(root, 2)
    any_drawing.require_features(cache, IMAGE_IDS)
    os.truncate(tmp_path / "mapped", 10)
    with pytest.raises(CorruptShardError, match="Image 2 of"):
        cache.read([2])


def test_rows_read_through_the_library_are_checked_each_time(
    either_drawing: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The library opens the file for each row, so each time may be the first for that file."""
    root = tmp_path / "feats"
    either_drawing.extract(root, range(4))
    damaged = shutil.copytree(root, tmp_path / "damaged")
    path = replace_damaged(damaged, 2)
    cache = FeatureCache.open(root)
    monkeypatch.setattr(type(cache._store.backend), "locate", lambda backend, shard: None)
    either_drawing.require_features(cache, [0, 1, 2, 3])
    path.replace(root / path.relative_to(damaged))
    with pytest.raises(CorruptShardError, match="Image 2 of"):
        cache.read([2])


@pytest.mark.parametrize("ways", ["read", "prefetch"])
def test_a_forked_child_checks_what_its_parent_has_checked(any_drawing: Any, root: Path, ways: str) -> None:
    cache = FeatureCache.open(root)
    any_drawing.require_features(cache, IMAGE_IDS)
    replace_damaged(root, 2)
    any_drawing.require_features(cache, IMAGE_IDS)  # the parent has the old file open

    def work() -> None:
        with pytest.raises(CorruptShardError, match="Image 2 of"):
            list(cache.prefetch([[1, 2]])) if ways == "prefetch" else cache.read([1, 2])
        any_drawing.require_features(cache, [0, 1, 3, 4])

    child = multiprocessing.get_context("fork").Process(target=work)
    child.start()
    child.join(60)
    assert child.exitcode == 0


def test_nothing_is_checked_again_while_its_shard_stays_open(
    any_drawing: Any, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = FeatureCache.open(root)
    checked: list[int] = []
    monkeypatch.setattr(checking, "row_checksum", lambda row: checked.append(row.nbytes) or row_checksum(row))
    for image_ids in ([0, 1, 2], [2, 0, 7], IMAGE_IDS, IMAGE_IDS):
        any_drawing.require_features(cache, image_ids)
    assert sum(checked) == any_drawing.recipe.image_bytes * len(IMAGE_IDS)


def test_rows_swapped_within_a_shard_are_noticed(root: Path) -> None:
    """Both rows are sound in themselves, so only a checksum that belongs to the image can tell."""
    for (_, path, one), (_, _, other) in zip(places_of(root, 2), places_of(root, 3), strict=True):
        content = bytearray(path.read_bytes())
        content[one.start : one.stop], content[other.start : other.stop] = (
            content[other.start : other.stop],
            content[one.start : one.stop],
        )
        path.write_bytes(content)
    with pytest.raises(CorruptShardError, match="Image 2 of"):
        FeatureCache.open(root).read([2])


def test_an_unknown_policy_is_refused_by_name(root: Path) -> None:
    with pytest.raises(ConfigError, match="'always'; there are off, first-open, every-read"):
        FeatureCache.open(root, integrity="always")  # type: ignore[arg-type]
    for integrity in INTEGRITY:
        require_integrity(integrity)


# Files other than features.


FILES = ["images", "expressions", "instances", "categories.json", "categories.safetensors", "heads"]


def read_file_of(cache: FeatureCache, kind: str) -> object:
    match kind:
        case "images":
            return cache.images
        case "expressions":
            return cache.expressions(TABLE)
        case "instances":
            return cache.instances(TABLE)
        case "heads":
            return cache.sam_heads()
        case _:
            return cache.categories("coco")


def path_of(root: Path, kind: str) -> Path:
    manifest = FeatureCache.open(root).manifest
    entry = manifest.datasets[TABLE]
    relatives = {
        "images": manifest.images.file,
        "expressions": entry.expressions_file,
        "instances": entry.instances_file,
        "categories.json": "categories/coco.json",
        "categories.safetensors": "categories/coco.safetensors",
        "heads": "sam_heads.safetensors",
    }
    return root / relatives[kind]


@pytest.mark.parametrize("kind", FILES)
def test_damage_to_any_other_file_is_noticed_and_named(
    either_drawing: Any, tmp_path: Path, kind: str
) -> None:
    either_drawing.extract(tmp_path, range(3))
    path = path_of(tmp_path, kind)
    cache = FeatureCache.open(tmp_path)
    if kind != "images":  # which is read once, when the cache is opened
        read_file_of(cache, kind)
    positions = np.linspace(0, path.stat().st_size - 1, 25).astype(int).tolist()
    for position in positions:
        flip(path, position)
        with pytest.raises(CorruptShardError, match=r"is damaged: its SHA-256") as caught:
            read_file_of(FeatureCache.open(tmp_path) if kind == "images" else cache, kind)
        assert caught.value.facts["path"] == path
        flip(path, position)
    read_file_of(FeatureCache.open(tmp_path), kind)


@pytest.mark.parametrize("kind", FILES[1:])
def test_a_damaged_file_keeps_nobody_from_the_rest(drawing: Any, tmp_path: Path, kind: str) -> None:
    drawing.extract(tmp_path, range(3))
    flip(path_of(tmp_path, kind), 10)
    cache = FeatureCache.open(tmp_path)
    drawing.require_features(cache, [0, 1, 2])
    for other in FILES:
        if other.partition(".")[0] != kind.partition(".")[0]:
            read_file_of(cache, other)


def test_without_checks_a_file_that_still_makes_sense_is_read(drawing: Any, tmp_path: Path) -> None:
    drawing.extract(tmp_path, range(3))
    path = path_of(tmp_path, "categories.json")
    content = path.read_bytes()
    path.write_bytes(content.replace(b"person", b"parson"))
    assert "parson" in FeatureCache.open(tmp_path, integrity="off").categories("coco").names
    path.write_bytes(content[:-3] + b"   ")
    with pytest.raises(CorruptShardError, match=r"coco\.json"):
        FeatureCache.open(tmp_path, integrity="off").categories("coco")


def test_a_file_that_goes_after_opening_is_missing_not_damaged(drawing: Any, tmp_path: Path) -> None:
    drawing.extract(tmp_path, range(3))
    cache = FeatureCache.open(tmp_path)
    path_of(tmp_path, "expressions").unlink()
    with pytest.raises(CorruptShardError, match=r"is missing\. If `ris cache gc` ran"):
        cache.expressions(TABLE)


# Checksums.


@given(st.binary(min_size=1, max_size=200))
def test_a_checksum_is_the_crc32c_of_the_bytes(content: bytes) -> None:
    assert row_checksum(np.frombuffer(bytearray(content), np.uint8)) == _crc32c(content)
    assert row_checksum(np.frombuffer(content, np.uint8)) == google_crc32c.value(content)


def _crc32c(content: bytes) -> int:
    """Bit by bit, as RFC 3720 defines it."""
    crc = 0xFFFFFFFF
    for byte in content:
        crc ^= byte
        for _ in range(8):
            crc = (crc >> 1) ^ (0x82F63B78 if crc & 1 else 0)
    return crc ^ 0xFFFFFFFF


def test_rows_get_one_checksum_for_each_array() -> None:
    arrays = [np.arange(12, dtype="<f4").reshape(3, 2, 2), np.arange(3, dtype=np.int8)]
    found = row_checksums(arrays)
    assert found == [tuple(_crc32c(array[row].tobytes()) for array in arrays) for row in range(3)]
    assert row_checksums([array[:0] for array in arrays]) == []


def test_a_checker_looks_at_the_arrays_it_is_given_where_they_are_not_known_as_sound() -> None:
    images = [
        tables.CachedImage(
            image_id=row,
            namespace="coco",
            row=row,
            file_name="a.jpg",
            height=1,
            width=1,
            sha256=None,
            reason="bad" if row == 1 else None,
            crc32c=() if row == 1 else (_crc32c(bytes([row] * 4)), _crc32c(bytes([10 + row]))),
        )
        for row in range(4)
    ]
    checker = RowChecker(tables.images_table(images), ["sam", "clip"], "first-open")
    sam = np.array([[0] * 4, [2] * 4, [3] * 4], np.uint8)
    clip = np.array([[10], [12], [99]], np.uint8)
    both, nothing_known = {"sam": sam, "clip": clip}, np.zeros(3, np.bool_)
    assert checker.first_wrong([0, 2, 3], {"sam": sam}, nothing_known) is None
    assert checker.first_wrong([0, 2, 3], both, nothing_known) == (2, "clip")
    assert checker.first_wrong([0, 2, 3], both, np.array([False, False, True])) is None  # known as sound
    assert checker.first_wrong([0, 2, 3], both, np.array([True, True, False])) == (2, "clip")
    assert checker.first_wrong([], {"sam": sam[:0], "clip": clip[:0]}, nothing_known[:0]) is None
    always, never = (
        RowChecker(tables.images_table(images), ["sam", "clip"], policy) for policy in ("every-read", "off")
    )
    assert always.first_wrong([0, 2, 3], both, ~nothing_known) == (2, "clip")
    assert never.first_wrong([0, 2, 3], both, nothing_known) is None

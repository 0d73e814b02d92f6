"""Forgetting datasets and reclaiming space: what goes, what stays, and what stands in the way."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ris_cache.errors import CacheError, CacheMissError, ConfigError, CorruptShardError, StoppedError
from ris_cache.store import files
from ris_cache.store.cache import FeatureCache
from ris_cache.store.collect import collect, find_garbage, remove
from ris_cache.store.transfer import transfer
from ris_cache.store.verify import verify

pytestmark = pytest.mark.usefixtures("no_waiting_for_the_disk")

PLUS = "refcoco+.unc"


def files_of(root: Path) -> dict[str, bytes]:
    return {
        path.relative_to(root).as_posix(): path.read_bytes()
        for path in root.rglob("*")
        if path.is_file() and path.name != ".lock"
    }


def size_of(root: Path) -> int:
    return sum(path.stat().st_size for path in files.all_files(root).values())


def require_sound(drawing: Any, root: Path) -> FeatureCache:
    """Everything reads, nothing lies around, and verifying finds nothing."""
    cache = drawing.require_whole(root)
    assert not verify(root).findings
    listed = {*cache.manifest.files, *(name for name in files.all_files(root) if name.endswith("zarr.json"))}
    assert set(files.all_files(root)) == listed
    return cache


@pytest.fixture
def root(either_drawing: Any, tmp_path: Path) -> Path:
    """Images 0 to 9 for refcoco.unc, image 5 quarantined; 8 to 15 for refcoco+.unc: five shards of four rows.

    Rows: 0-3, 4-7, 8-9, then 12-15 (images 10 to 13) and 16-17 (images 14 and 15).
    """
    either_drawing.extract(tmp_path / "feats", range(10), bad=(5,))
    either_drawing.extract(tmp_path / "feats", range(8, 16), table=PLUS)
    return tmp_path / "feats"


# Forgetting.


@pytest.mark.parametrize("name", ["refcoco+.unc", "refcoco+/unc", "refcoco+"])
def test_a_dataset_is_forgotten_by_any_of_its_names(root: Path, either_drawing: Any, name: str) -> None:
    features = {name: content for name, content in files_of(root).items() if name.startswith("features")}
    found = remove(root, [name])
    assert (found.datasets, found.category_sets, found.num_images) == ((PLUS,), (), 6)
    assert found.num_bytes == 6 * either_drawing.recipe.image_bytes
    cache = FeatureCache.open(root)
    assert list(cache.manifest.datasets) == ["refcoco.unc"]
    assert len(cache) == 15  # features stay
    assert features.items() <= files_of(root).items()


def test_a_category_set_goes_with_its_last_dataset(root: Path) -> None:
    assert remove(root, ["refcoco"]).category_sets == ()
    assert remove(root, [PLUS]).category_sets == ("coco",)
    manifest = FeatureCache.open(root).manifest
    assert (manifest.datasets, manifest.category_sets) == ({}, ())


def test_several_at_once_and_one_named_twice(root: Path) -> None:
    assert remove(root, ["refcoco", "refcoco+", "refcoco/unc"]).datasets == ("refcoco.unc", PLUS)


def test_trying_out_a_removal_changes_nothing(root: Path) -> None:
    before = files_of(root)
    assert remove(root, ["refcoco"], dry_run=True).num_images == 8
    assert files_of(root) == before


def test_unknown_and_ambiguous_names_are_refused(root: Path, either_drawing: Any) -> None:
    with pytest.raises(CacheMissError, match=r"refcoco\.unc, refcoco\+\.unc.*Did you mean 'refcoco\.unc'"):
        remove(root, ["refcoc.unc"])
    either_drawing.extract(root, [0], table="refcoco.google")
    with pytest.raises(ConfigError, match=r"refcoco\.unc and refcoco\.google"):
        remove(root, ["refcoco"])
    before = files_of(root)
    with pytest.raises(CacheMissError):
        remove(root, [PLUS, "nonsense"])
    assert files_of(root) == before


def test_readers_of_the_old_state_keep_their_tables(root: Path, either_drawing: Any) -> None:
    reader = FeatureCache.open(root)
    remove(root, [PLUS])
    assert len(reader.expressions(PLUS)) == 8
    either_drawing.require_features(reader, [8, 15])


def test_a_dataset_comes_back_without_computing_anything(root: Path, either_drawing: Any) -> None:
    remove(root, [PLUS])
    writer = either_drawing.open(root, range(8, 16), {"again": 1})
    assert writer.shards == {}
    writer.finish(either_drawing.edit(range(8, 16), "val", PLUS))
    assert len(either_drawing.require_whole(root).expressions(PLUS)) == 8


@pytest.mark.parametrize("is_lost", [False, True])
def test_a_dataset_goes_though_its_tables_are_damaged_or_lost(
    root: Path, either_drawing: Any, is_lost: bool
) -> None:
    entry = FeatureCache.open(root).manifest.datasets[PLUS]
    for path in (root / entry.expressions_file, root / entry.instances_file):
        path.unlink() if is_lost else path.write_bytes(path.read_bytes()[::-1])
    assert remove(root, [PLUS], dry_run=True) == remove(root, [PLUS])
    collect(root)
    assert set(require_sound(either_drawing, root).images) == set(range(10))


def test_damaged_tables_of_what_stays_are_not_passed_over(root: Path) -> None:
    (root / FeatureCache.open(root).manifest.datasets[PLUS].expressions_file).unlink()
    before = files_of(root)
    with pytest.raises(CorruptShardError, match="is missing"):
        remove(root, ["refcoco"])
    assert files_of(root) == before
    assert remove(root, ["refcoco", "refcoco+"]).num_images == 16


# Collecting.


def test_a_cache_in_use_loses_nothing(root: Path, either_drawing: Any) -> None:
    collect(root)  # superseded tables
    before = files_of(root)
    garbage, num_bytes = collect(root)
    assert (garbage.dropped, garbage.moved, garbage.leftover, num_bytes) == ((), (), {}, 0)
    assert files_of(root) == before
    require_sound(either_drawing, root)


def test_images_without_expressions_go_with_their_shards(root: Path, either_drawing: Any) -> None:
    remove(root, [PLUS])
    promised, before = find_garbage(root), size_of(root)
    assert promised.dropped == tuple(range(10, 16))
    assert (promised.num_unused_shards, promised.num_sparse_shards) == (2, 0)
    garbage, num_bytes = collect(root)
    assert garbage == promised
    assert num_bytes == before - size_of(root)
    # What the table of images loses is not foretold.
    assert promised.num_bytes <= num_bytes <= promised.num_bytes + 8192
    cache = require_sound(either_drawing, root)
    assert set(cache.images) == set(range(10))
    assert cache.manifest.rows == 20  # rows are never given to other images


def test_sparse_shards_are_copied_together_at_the_end(root: Path, either_drawing: Any) -> None:
    remove(root, ["refcoco.unc"])
    either_drawing.extract(root, [1, 2, 4, 5, 9], table="refcocog.umd")
    # Alive: half of shard 0; of shard 1 one of three, and 5, which is quarantined; all others.
    garbage, _ = collect(root)
    assert [image.image_id for image in garbage.moved] == [1, 2, 4, 5]
    assert (garbage.num_unused_shards, garbage.num_sparse_shards) == (0, 2)
    cache = require_sound(either_drawing, root)
    assert set(cache.images) == {1, 2, 4, 5, *range(8, 16)}
    assert [cache.images[i].row for i in (1, 2, 4, 5)] == [20, 21, 22, 23]
    assert cache.images[8].row == 8
    assert list(cache.quarantined) == [5]
    assert cache.images[5].sha256 is None
    assert find_garbage(root).num_bytes == 0


def test_shards_with_more_than_half_alive_stay_as_they_are(root: Path, either_drawing: Any) -> None:
    remove(root, ["refcoco.unc"])
    either_drawing.extract(root, [0, 1, 3], table="refcocog.umd")
    garbage, _ = collect(root)
    assert garbage.moved == ()
    assert garbage.num_unused_shards == 1
    cache = require_sound(either_drawing, root)
    assert set(cache.images) == {0, 1, 3, *range(8, 16)}
    either_drawing.extract(root, [2, 6], table="refcocog.google")
    assert set(require_sound_after_growth(either_drawing, root).images) == {0, 1, 2, 3, 6, *range(8, 16)}


def require_sound_after_growth(drawing: Any, root: Path) -> FeatureCache:
    collect(root)  # tables that the growth superseded
    return require_sound(drawing, root)


def test_a_shard_that_was_never_full_is_not_moved_again_and_again(
    either_drawing: Any, tmp_path: Path
) -> None:
    either_drawing.extract(tmp_path / "feats", range(1))
    for _ in range(2):
        assert collect(tmp_path / "feats")[0].moved == ()


def test_a_cache_without_datasets_is_emptied_and_can_be_filled_again(root: Path, either_drawing: Any) -> None:
    remove(root, ["refcoco", PLUS])
    collect(root)
    cache = require_sound(either_drawing, root)
    assert len(cache.images) == 0
    assert not cache.manifest.shard_files()
    either_drawing.extract(root, range(3))
    assert len(require_sound_after_growth(either_drawing, root)) == 3


def test_files_that_belong_to_nothing_go(root: Path, either_drawing: Any) -> None:
    collect(root)
    left = ["images/pool.0123456789ab.parquet", "expressions/old.parquet", ".manifest.json.77.tmp"]
    for name in left:
        (root / name).write_bytes(b"x" * 100)
    (root / "notes.txt").write_text("not ours")
    garbage = find_garbage(root)
    assert dict(garbage.leftover) == dict.fromkeys(left, 100)
    assert garbage.num_bytes == 300
    assert collect(root)[1] == 300
    assert (root / "notes.txt").exists()
    require_sound(either_drawing, root)


def test_trying_out_a_collection_changes_nothing(root: Path) -> None:
    remove(root, ["refcoco"])
    before = files_of(root)
    find_garbage(root)
    assert files_of(root) == before


def test_a_reader_from_before_keeps_what_stays(root: Path, either_drawing: Any) -> None:
    reader = FeatureCache.open(root)
    either_drawing.require_features(reader, [12])  # mapped before its file goes
    remove(root, [PLUS])
    collect(root)
    either_drawing.require_features(reader, [0, 4, 9, 12])
    with pytest.raises(CorruptShardError, match=r"cannot be opened|is missing"):
        reader.read([15])


@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    parts=st.lists(st.sets(st.integers(0, 17), min_size=1), min_size=1, max_size=4),
    kept=st.sets(st.integers(0, 3)),
    bad=st.sets(st.integers(0, 17), max_size=5),
)
def test_exactly_the_images_of_the_remaining_datasets_are_left(
    tmp_path_factory: pytest.TempPathFactory,
    drawing: Any,
    parts: list[set[int]],
    kept: set[int],
    bad: set[int],
) -> None:
    root = tmp_path_factory.mktemp("any") / "feats"
    for position, part in enumerate(parts):
        drawing.extract(root, sorted(part), table=f"part{position}.unc", bad=sorted(bad))
    doomed = [f"part{position}.unc" for position in range(len(parts)) if position not in kept]
    if doomed:
        remove(root, doomed)
    promised = find_garbage(root)
    garbage, _ = collect(root)
    assert garbage == promised
    cache = require_sound(drawing, root)
    expected = {i for position, part in enumerate(parts) if position in kept for i in part}
    assert set(cache.images) == expected
    assert set(cache.quarantined) == expected & bad
    again = find_garbage(root)
    assert (again.dropped, again.moved, again.num_bytes) == ((), (), 0)


# What stands in the way.


@pytest.mark.parametrize("is_active", [False, True])
def test_an_unfinished_extraction_is_not_collected_from(
    root: Path, either_drawing: Any, is_active: bool
) -> None:
    writer = either_drawing.open(root, range(30, 38), {"--split": "refcocog/umd"})
    either_drawing.commit(next(writer.free_claims()))
    if not is_active:
        writer.close()
    before = files_of(root)
    for refused in (collect, find_garbage):
        with pytest.raises(CacheError, match=r"unfinished `ris extract`.*ris extract --split refcocog/umd"):
            refused(root)
    assert files_of(root) == before
    remove(root, [PLUS])  # changes only what the manifest says
    either_drawing.commit_all(writer)
    writer.finish(either_drawing.edit(range(30, 38), "val", "refcocog.umd"))
    collect(root)
    assert set(require_sound(either_drawing, root).images) == {*range(10), *range(30, 38)}


def test_an_extraction_that_begins_meanwhile_is_left_alone(root: Path, either_drawing: Any) -> None:
    """There is nothing to copy here, so the collection holds no plan, and the other one may plan."""
    remove(root, [PLUS])
    started: list[Any] = []

    class Starts:
        """Starts an extraction when the collection has looked at the cache."""

        def start(self, *, total: int, done: int) -> None:
            started.append(either_drawing.open(root, range(30, 32), {"--split": "other"}))

        def advance(self, reason: str | None) -> None: ...

        def say(self, message: str) -> None: ...

        def stop(self) -> None: ...

    with pytest.raises(CacheError, match="unfinished `ris extract`"):
        collect(root, progress=Starts())
    (writer,) = started
    either_drawing.commit_all(writer)
    writer.finish(either_drawing.edit(range(30, 32), "val", "refcocog.umd"))
    assert len(either_drawing.require_whole(root)) == 17


def test_shards_of_an_extraction_that_begins_right_after_are_left_alone(
    root: Path, either_drawing: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    remove(root, [PLUS])
    started: list[Any] = []

    def transfer_and_be_followed(*arguments: Any, **options: Any) -> Any:
        ended = transfer(*arguments, **options)
        started.append(either_drawing.open(root, range(30, 32), {"--split": "other"}))
        either_drawing.commit_all(started[0])
        return ended

    monkeypatch.setattr("ris_cache.store.collect.transfer", transfer_and_be_followed)
    collect(root)
    started[0].finish(either_drawing.edit(range(30, 32), "val", "refcocog.umd"))
    assert set(either_drawing.require_whole(root).images) == {*range(10), 30, 31}


def test_a_stopped_collection_goes_on_and_keeps_removals_out(root: Path, either_drawing: Any) -> None:
    remove(root, ["refcoco.unc"])
    either_drawing.extract(root, [2], table="refcocog.umd")
    with pytest.raises(StoppedError):
        collect(root, should_stop=lambda: True)
    assert json.loads((root / "extraction/plan.json").read_bytes())["purpose"] == "cache gc"
    assert len(FeatureCache.open(root)) == 15
    with pytest.raises(CacheError, match="unfinished `ris cache gc`"):
        remove(root, ["refcocog.umd"])
    assert find_garbage(root).dropped
    collect(root)
    assert set(require_sound(either_drawing, root).images) == {2, *range(8, 16)}


def test_an_extraction_takes_over_from_a_stopped_collection(root: Path, either_drawing: Any) -> None:
    remove(root, ["refcoco.unc"])
    either_drawing.extract(root, [2, 5], table="refcocog.umd")
    with pytest.raises(StoppedError):
        collect(root, should_stop=lambda: True)
    either_drawing.extract(root, range(6), table="refcocog.google")
    cache = either_drawing.require_whole(root)
    assert set(cache.images) == set(range(16))
    collect(root)
    assert set(require_sound(either_drawing, root).images) == {*range(6), *range(8, 16)}


def test_a_damaged_cache_is_not_collected(root: Path, either_drawing: Any) -> None:
    remove(root, [PLUS])
    entry = FeatureCache.open(root).manifest.datasets["refcoco.unc"]
    path = root / entry.expressions_file
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    before = files_of(root)
    for refused in (collect, find_garbage):
        with pytest.raises(CorruptShardError, match="SHA-256"):
            refused(root)
    assert files_of(root) == before


def test_no_cache_at_all(tmp_path: Path) -> None:
    for refused in (collect, find_garbage):
        with pytest.raises(CacheMissError, match="no cache"):
            refused(tmp_path / "nowhere")
    assert not (tmp_path / "nowhere").exists()

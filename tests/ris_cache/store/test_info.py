"""What `describe` says of a cache, whole, growing, shrunk or damaged."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ris_cache.errors import CacheMissError, CorruptShardError, IncompleteCacheError
from ris_cache.store.draft import CacheDraft
from ris_cache.store.info import describe, find_begun, flat_fields, growth
from ris_cache.store.manifest import load_manifest

pytestmark = pytest.mark.usefixtures("no_waiting_for_the_disk")

TABLE = "refcoco.unc"


@pytest.fixture
def cache(tmp_path, either_drawing) -> Path:
    """Images 0 to 9 in three shards, image 5 quarantined; to be changed."""
    root = tmp_path / "feats"
    either_drawing.extract(root, range(10), bad=(5,))
    return root


def test_a_whole_cache_is_described(drawn_cache, any_drawing):
    found = describe(drawn_cache)
    manifest = load_manifest(drawn_cache)
    assert found.manifest == manifest
    assert found.root == drawn_cache.absolute()
    assert sorted(found.images) == list(range(10))
    assert found.quarantined == {5: "cut off in the middle"}
    assert found.num_shards == 3
    assert found.image_bytes == any_drawing.recipe.image_bytes
    on_disk = {path: (drawn_cache / path).stat().st_size for path in manifest.files}
    assert found.total_bytes == sum(on_disk.values())
    assert found.feature_bytes == sum(size for path, size in on_disk.items() if path.startswith("features"))
    assert (found.unfinished, found.unclear) == (None, "")
    assert found.reclaimable is not None
    assert (found.reclaimable.num_images, found.reclaimable.num_files) == (0, 0)
    assert found.reclaimable.num_bytes == 0


def test_features_are_not_looked_at(cache):
    for path in load_manifest(cache).shard_files():
        content = bytearray((cache / path).read_bytes())
        (cache / path).write_bytes(content[:1] * len(content))
    assert describe(cache).num_shards == 3


def test_an_unfinished_extraction_is_described_and_leaves_open_what_can_be_freed(cache, either_drawing):
    writer = either_drawing.open(cache, range(10, 20), {"--split": "test"})
    either_drawing.commit(next(iter(writer.free_claims())))
    found = describe(cache)
    assert found.unfinished is not None
    assert (found.unfinished.purpose, found.unfinished.request) == ("extract", {"--split": "test"})
    assert (found.unfinished.num_images, found.unfinished.num_shards) == (10, 3)
    assert found.unfinished.num_shards_done == 1
    assert found.reclaimable is None
    assert "Finish it first" in found.unclear
    writer.close()


def test_what_a_collection_would_free_is_counted(cache):
    draft = CacheDraft.of(cache)
    draft.drop_dataset(TABLE)
    draft.commit()
    (cache / "images" / "pool.0123.parquet").write_bytes(b"old")
    found = describe(cache)
    assert found.reclaimable is not None
    assert found.reclaimable.num_images == 10
    assert found.reclaimable.num_files >= 1
    assert found.reclaimable.num_bytes >= found.feature_bytes


def test_a_damaged_shard_leaves_open_what_can_be_freed_and_nothing_else(cache):
    path = next(iter(load_manifest(cache).shard_files()))
    (cache / path).unlink()
    found = describe(cache)
    assert found.reclaimable is None
    assert path in found.unclear
    assert found.manifest == load_manifest(cache)


def test_what_cannot_be_described_is_refused(cache, tmp_path, drawing):
    with pytest.raises(CacheMissError, match="There is no cache"):
        describe(tmp_path / "none")
    drawing.open(tmp_path / "begun", range(4)).close()
    with pytest.raises(IncompleteCacheError, match="has not finished"):
        describe(tmp_path / "begun")
    (cache / load_manifest(cache).images.file).unlink()
    with pytest.raises(CorruptShardError, match="is missing"):
        describe(cache)


def test_what_has_been_begun_is_described(tmp_path, any_drawing):
    root = tmp_path / "begun"
    assert find_begun(root) is None
    writer = any_drawing.open(root, range(10), {"--split": "val", "--limit": 10})
    any_drawing.commit(next(iter(writer.free_claims())))
    found = find_begun(root)
    assert found is not None
    assert (found.root, found.dtype, found.backend) == (root, any_drawing.dtype, any_drawing.backend)
    assert found.unfinished.command == "ris extract --split val --limit 10"
    assert (found.unfinished.num_images, found.unfinished.num_images_done) == (10, 4)
    assert (found.unfinished.num_shards, found.unfinished.num_shards_done) == (3, 1)
    assert found.num_bytes >= 4 * any_drawing.recipe.image_bytes
    any_drawing.commit_all(writer)
    writer.finish(any_drawing.edit(range(10), "val"))
    assert find_begun(root) is None


def test_a_damaged_plan_is_not_described(tmp_path, drawing):
    drawing.open(tmp_path / "begun", range(4)).close()
    (tmp_path / "begun" / "extraction" / "plan.json").write_text("{")
    with pytest.raises(CorruptShardError, match=r"plan\.json is damaged.*Remove"):
        find_begun(tmp_path / "begun")


@given(num_images=st.integers(0, 10_000))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_growth_is_whole_shards_and_the_bytes_of_an_image_each(drawn_cache, any_drawing, num_images):
    manifest = load_manifest(drawn_cache)
    found = growth(manifest, num_images=num_images, num_present=3)
    assert (found.num_images, found.num_present) == (num_images, 3)
    assert found.num_bytes == num_images * any_drawing.recipe.image_bytes
    assert 0 <= found.num_shards * manifest.shard_rows - num_images < manifest.shard_rows


def test_fields_of_a_fingerprint_are_named_by_their_path():
    fields = {"a": 1, "b": {"c": [1, 2], "d": {"e": None}}, "f": {}}
    assert list(flat_fields(fields)) == [("a", 1), ("b.c", [1, 2]), ("b.d.e", None), ("f", {})]

"""Reading a cache: what it says and holds, from any thread and process, without a trace."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ris_cache import FeatureCache
from ris_cache.errors import CacheMissError, ShapeError

pytestmark = pytest.mark.usefixtures("no_waiting_for_the_disk")

TABLE = "refcoco.unc"
IMAGE_IDS = [0, 1, 2, 3, 4, 6, 7, 8, 9]
QUARANTINED = 5


@pytest.fixture
def root(either_drawing: Any, tmp_path: Path) -> Path:
    """Images 0 to 9, image 5 quarantined; to damage."""
    either_drawing.extract(tmp_path / "feats", range(10), bad=(QUARANTINED,))
    return tmp_path / "feats"


# What a cache says.


def test_a_cache_says_what_it_holds(any_drawing: Any, drawn_cache: Path) -> None:
    cache = FeatureCache.open(drawn_cache)
    assert cache.fingerprint == any_drawing.recipe.fingerprint
    assert (cache.manifest.preset, cache.manifest.dtype) == ("tiny", any_drawing.dtype)
    assert cache.root == drawn_cache
    assert cache.image_ids.dtype == np.int64
    assert cache.image_ids.tolist() == IMAGE_IDS
    assert cache.sizes == {image_id: (30 + image_id, 40) for image_id in range(10)}
    assert cache.quarantined == {QUARANTINED: "cut off in the middle"}
    assert cache.images[3].sha256 == f"{3:064x}"
    assert list(cache.images) == list(range(10))


def test_length_and_membership_are_those_of_images_with_features(drawn_cache: Path) -> None:
    cache = FeatureCache.open(drawn_cache)
    assert len(cache) == 9
    assert 3 in cache
    assert np.int64(3) in cache
    assert QUARANTINED not in cache
    assert 77 not in cache
    assert "3" not in cache


def test_what_is_given_out_may_be_changed_without_harm(drawn_cache: Path) -> None:
    cache = FeatureCache.open(drawn_cache)
    cache.image_ids[:] = 0
    cache.images.clear()
    cache.sizes.clear()
    assert cache.image_ids.tolist() == IMAGE_IDS
    assert len(cache.images) == len(cache.sizes) == 10


# Reading.


@given(image_ids=st.lists(st.sampled_from(IMAGE_IDS), max_size=12))
@settings(max_examples=25)
def test_features_come_in_the_order_asked_for(
    any_drawing: Any, drawn_cache: Path, image_ids: list[int]
) -> None:
    any_drawing.require_features(FeatureCache.open(str(drawn_cache)), image_ids)


@pytest.mark.parametrize("kind", [list, tuple, np.array])
def test_ids_may_come_in_any_sequence(drawing: Any, tmp_path: Path, kind: Callable[..., Any]) -> None:
    drawing.extract(tmp_path, range(4))
    assert FeatureCache.open(tmp_path).read(kind([2, 0])).image_ids.tolist() == [2, 0]


def test_buffers_are_filled_in_place_and_may_be_larger(any_drawing: Any, drawn_cache: Path) -> None:
    cache = FeatureCache.open(drawn_cache)
    buffers = cache.allocate(3)
    batch = cache.read([1, 6], out=buffers)
    assert (len(batch), len(batch.sam), batch.image_ids.tolist()) == (2, 2, [1, 6])
    assert np.shares_memory(batch.image_ids, buffers.image_ids)
    for name, expected in any_drawing.stored([1, 6]).items():
        assert np.shares_memory(batch.stored[name], buffers.stored[name])
        np.testing.assert_array_equal(buffers.stored[name][:2], expected)
        assert not buffers.stored[name][2].any()
    with pytest.raises(ShapeError, match="hold 3 images; 4 were asked for"):
        cache.read([1, 6, 1, 6], out=buffers)


def test_batches_without_buffers_are_memory_of_their_own(any_drawing: Any, drawn_cache: Path) -> None:
    cache = FeatureCache.open(drawn_cache)
    first = cache.read([1])
    cache.read([2])
    assert first.sam.tobytes() == any_drawing.stored([1])["sam"].tobytes()


def test_no_images_give_an_empty_batch(drawn_cache: Path) -> None:
    batch = FeatureCache.open(drawn_cache).read([])
    assert (len(batch), batch.sam.shape) == (0, (0, 2, 3, 3))
    assert batch.decoded()["clip"].shape == (0, 4, 2)


def test_unknown_images_are_listed(root: Path) -> None:
    cache = FeatureCache.open(root)
    with pytest.raises(CacheMissError, match=r"images 11, 12\. Add them with `ris extract`") as caught:
        cache.read([1, 11, 12, 11])
    assert caught.value.facts["image_ids"] == [11, 12]
    with pytest.raises(CacheMissError, match="and 90 more"):
        cache.read(range(1000, 1100))


def test_a_quarantined_image_is_refused_with_its_reason(root: Path) -> None:
    with pytest.raises(CacheMissError, match="5: cut off in the middle") as caught:
        FeatureCache.open(root).read([1, QUARANTINED])
    assert caught.value.facts["reasons"] == {QUARANTINED: "cut off in the middle"}


def test_advice_changes_nothing_and_passes_over_what_is_not_there(either_drawing: Any, root: Path) -> None:
    cache = FeatureCache.open(root)
    cache.advise([1, 77, QUARANTINED, 9])
    cache.advise([])
    either_drawing.require_features(cache, [1, 9])


def test_tables_categories_and_heads_are_read(root: Path) -> None:
    cache = FeatureCache.open(root)
    expression = cache.expressions(TABLE)[3]
    assert (expression.raw, expression.ann_ids, expression.category_id) == ("A cup", (1003,), 47)
    assert expression.clip_category_id == 1
    assert cache.instances(TABLE)[1003].segmentation == ((0.0, 0.0, 9.5, 0.0, 9.5, 9.5),)
    categories = cache.categories(cache.manifest.datasets[TABLE].category_set)
    assert (categories.ids, categories.names) == ((1, 47), ("person", "cup"))
    assert categories.template == "a photo of a {}."
    assert categories.embeddings.dtype == np.float32
    heads = cache.sam_heads()
    assert (heads["scale"].shape, heads["mask_tokens"].shape) == ((), (3, 2))


def test_a_missing_table_or_category_set_lists_those_there_are(root: Path) -> None:
    cache = FeatureCache.open(root)
    for read in (cache.expressions, cache.instances):
        with pytest.raises(CacheMissError, match=r"no table 'refcoco\+\.unc'; it has refcoco\.unc"):
            read("refcoco+.unc")
    with pytest.raises(CacheMissError, match="no category set 'lvis'; it has coco"):
        cache.categories("lvis")


def test_a_cache_without_heads_says_so(drawing: Any, tmp_path: Path) -> None:
    drawing.open(tmp_path, []).finish(lambda draft: None)
    with pytest.raises(CacheMissError, match=r"sam_heads\.safetensors.*ris extract"):
        FeatureCache.open(tmp_path).sam_heads()


# Reading never writes.


def test_reading_creates_nothing_and_opens_nothing_for_writing(root: Path) -> None:
    """Shown in a process of its own, whose every call to open a file is looked at."""
    before = {path: (path.stat().st_mtime_ns, path.stat().st_ino) for path in root.rglob("*")}
    code = f"""
import os, sys
asked = []
writing = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
changing = ("os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.link", "os.symlink", "os.truncate",
            "os.chmod", "os.utime", "fcntl.flock", "fcntl.lockf")
def look(event, arguments):
    if event == "open" and arguments[2] & writing:
        asked.append((event, arguments))
    elif event in changing:
        asked.append((event, arguments))
sys.dont_write_bytecode = True
sys.addaudithook(look)
from ris_cache import FeatureCache
cache = FeatureCache.open({str(root)!r})
cache.read([1, 4, 9])
cache.advise([1, 2])
list(cache.prefetch([[1], [2]]))
cache.expressions({TABLE!r}), cache.instances({TABLE!r}), cache.categories("coco"), cache.sam_heads()
ours = [one for one in asked if {str(root)!r} in str(one) or one[0].startswith("fcntl")]
assert not ours, ours
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
    assert {path: (path.stat().st_mtime_ns, path.stat().st_ino) for path in root.rglob("*")} == before


# Processes and threads.


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_a_cache_travels_to_worker_processes(either_drawing: Any, root: Path, method: str) -> None:
    cache = FeatureCache.open(root)
    cache.read([0])
    context = multiprocessing.get_context(method)
    with ProcessPoolExecutor(2, mp_context=context) as pool:
        futures = [pool.submit(cache.read, [image_id, 1]) for image_id in IMAGE_IDS]
        for image_id, future in zip(IMAGE_IDS, futures, strict=True):
            batch = future.result(timeout=60)
            for name, expected in either_drawing.stored([image_id, 1]).items():
                np.testing.assert_array_equal(batch.stored[name], expected)


def test_a_cache_open_before_a_fork_is_read_on_both_sides(either_drawing: Any, root: Path) -> None:
    """Inherited, not pickled, as the workers of a data loader have it."""
    cache = FeatureCache.open(root)
    either_drawing.require_features(cache, [0, 9])
    context = multiprocessing.get_context("fork")
    child = context.Process(target=either_drawing.require_features, args=(cache, IMAGE_IDS))
    child.start()
    either_drawing.require_features(cache, IMAGE_IDS)
    child.join(timeout=60)
    assert child.exitcode == 0


def test_threads_read_at_the_same_time(either_drawing: Any, root: Path) -> None:
    cache = FeatureCache.open(root, integrity="every-read")
    with ThreadPoolExecutor(8) as pool:
        futures = [
            pool.submit(either_drawing.require_features, cache, [IMAGE_IDS[number % 9], 3])
            for number in range(200)
        ]
        for future in futures:
            future.result(timeout=60)


@pytest.mark.parametrize("integrity", ["off", "first-open", "every-read"])
def test_a_pickled_cache_keeps_its_policy(root: Path, integrity: Any) -> None:
    cache = pickle.loads(pickle.dumps(FeatureCache.open(root, integrity=integrity)))
    assert cache.__reduce__()[1] == (root, integrity)


def test_importing_errors_or_the_package_loads_nothing_heavy() -> None:
    code = (
        "import sys, ris_cache, ris_cache.errors\n"
        "heavy = {'torch', 'zarr', 'h5py', 'pyarrow', 'pydantic', 'numpy'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
        "assert 'FeatureCache' in dir(ris_cache)\n"
        "from ris_cache import FeatureCache, CacheWriter, FeatureBatch, cache_fingerprint\n"
        "heavy = {'torch', 'zarr', 'h5py'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
        "try:\n"
        "    ris_cache.no_such_name\n"
        "except AttributeError as error:\n"
        "    assert 'no_such_name' in str(error)\n"
        "else:\n"
        "    raise SystemExit('no AttributeError')\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, env=dict(os.environ), timeout=60)


def test_reading_loads_neither_torch_nor_the_libraries_of_the_format(root: Path) -> None:
    code = (
        "import sys\n"
        "from ris_cache import FeatureCache\n"
        f"cache = FeatureCache.open({str(root)!r})\n"
        "cache.read([1, 9]).decoded()\n"
        "assert not {'torch', 'zarr'} & set(sys.modules)\n"
        "assert ('h5py' in sys.modules) == (cache.manifest.backend == 'hdf5')\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)

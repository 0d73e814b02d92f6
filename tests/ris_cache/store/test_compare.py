"""Comparing two caches: hand-made features whose differences are known, and what is said beside them."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ris_cache.encoders.spec import PAPER
from ris_cache.errors import CacheMissError, ConfigError, CorruptShardError, ShapeError
from ris_cache.store.cache import FeatureCache
from ris_cache.store.compare import FeatureDifference, compare
from ris_cache.store.convert import convert, plan_conversion
from ris_cache.store.fingerprint import cache_fingerprint
from ris_cache.store.writer import CacheWriter, Outcome

pytestmark = pytest.mark.usefixtures("no_waiting_for_the_disk")

VECTORS: dict[str, tuple[int, ...]] = {"sam": (2, 1, 1), "clip": (1, 2), "clip_pooled": (2,)}


def write(
    drawing: Any,
    root: Path,
    features: Mapping[int, tuple[float, float]],
    shapes: Mapping[str, tuple[int, ...]] = VECTORS,
    **changes: Any,
) -> FeatureCache:
    """Write a float32 cache in which every feature of an image is the same vector of two numbers."""
    recipe = dataclasses.replace(
        dataclasses.replace(drawing, dtype="float32").recipe, shapes=shapes, **changes
    )
    writer = CacheWriter.open(
        root,
        recipe,
        purpose="extract",
        request={},
        choose=lambda known: [drawing.image(image_id) for image_id in features],
    )
    for claim in writer.free_claims():
        values = np.array([features[image.image_id] for image in claim.images], np.float32)
        claim.commit(
            {name: values.reshape(-1, *shape) for name, shape in shapes.items()},
            [Outcome(sha256=f"{image.image_id:064x}") for image in claim.images],
        )
    writer.finish(lambda draft: None)
    return FeatureCache.open(root)


def test_the_measures_are_those_worked_out_by_hand(drawing: Any, tmp_path: Path) -> None:
    """(3, 4) and (4, 3): cosine 24/25, difference (-1, 1). (0, 5) and (0, 5): the same.

    So the relative error is sqrt(2) / sqrt(50) = 0.2, and the largest difference 1.
    """
    first = write(drawing, tmp_path / "a", {1: (3, 4), 2: (0, 5)})
    second = write(drawing, tmp_path / "b", {1: (4, 3), 2: (0, 5)})
    found = compare(first, second)
    for name in VECTORS:
        measured = found.features[name]
        assert measured.cosine_mean == pytest.approx((24 / 25 + 1) / 2, abs=1e-12)
        assert measured.cosine_min == pytest.approx(24 / 25, abs=1e-12)
        assert measured.worst_image_id == 1
        assert measured.relative_error == pytest.approx(0.2, abs=1e-12)
        assert measured.max_difference == 1.0
    assert (found.fields, found.num_compared, found.num_common) == ((), 2, 2)


@pytest.mark.parametrize(
    ("ours", "theirs", "cosine", "error"),
    [
        ((0, 0), (0, 0), 1.0, 0.0),
        ((0, 0), (1, 0), 0.0, math.inf),
        ((1, 0), (0, 0), 0.0, 1.0),
        ((1, 1), (-1, -1), -1.0, 2.0),
        ((1e-30, 0), (1e-30, 0), 1.0, 0.0),
    ],
)
def test_zero_opposite_and_tiny_vectors(
    drawing: Any,
    tmp_path: Path,
    ours: tuple[float, float],
    theirs: tuple[float, float],
    cosine: float,
    error: float,
) -> None:
    first, second = write(drawing, tmp_path / "a", {1: ours}), write(drawing, tmp_path / "b", {1: theirs})
    measured = compare(first, second).features["sam"]
    assert measured.cosine_min == measured.cosine_mean == pytest.approx(cosine, abs=1e-15)
    assert measured.relative_error == pytest.approx(error, abs=1e-15)


def test_a_cache_is_equal_to_itself_and_to_its_other_backend(any_drawing: Any, tmp_path: Path) -> None:
    any_drawing.extract(tmp_path / "a", range(20), bad=(5,))
    other = "hdf5" if any_drawing.backend == "zarr" else "zarr"
    convert(plan_conversion(tmp_path / "a", tmp_path / "b", backend=other))
    found = compare(FeatureCache.open(tmp_path / "a"), FeatureCache.open(tmp_path / "b"))
    assert found.num_compared == 19
    for measured in found.features.values():
        assert measured.cosine_min == pytest.approx(1.0, abs=1e-12)
        assert (measured.relative_error, measured.max_difference) == (0.0, 0.0)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "int8"])
def test_a_precision_costs_what_the_decoded_values_say(drawing: Any, tmp_path: Path, dtype: str) -> None:
    wide = dataclasses.replace(drawing, dtype="float32")
    wide.extract(tmp_path / "wide", range(20))
    convert(plan_conversion(tmp_path / "wide", tmp_path / "narrow", dtype=dtype))
    narrow = FeatureCache.open(tmp_path / "narrow")
    found = compare(FeatureCache.open(tmp_path / "wide"), narrow)
    exact, stored = wide.stored(range(20)), narrow.read(range(20)).decoded()
    for name, measured in found.features.items():
        difference = stored[name].astype(np.float64) - exact[name]
        expected = np.linalg.norm(difference) / np.linalg.norm(exact[name].astype(np.float64))
        assert 0 < measured.relative_error == pytest.approx(expected, rel=1e-9)
        assert measured.max_difference == pytest.approx(np.abs(difference).max(), rel=1e-9)
    assert str(found.fields[0]) == f'dtype: expected "float32", found "{dtype}"'


def test_what_only_one_holds_and_other_files_are_listed(drawing: Any, tmp_path: Path) -> None:
    drawing.extract(tmp_path / "a", range(6), bad=(1,))
    writer = drawing.open(tmp_path / "b", range(3, 9))
    for claim in writer.free_claims():
        ids = [image.image_id for image in claim.images]
        claim.commit(drawing.stored(ids), [Outcome(sha256="e" * 64 if i == 4 else f"{i:064x}") for i in ids])
    writer.finish(drawing.edit(range(3, 9), "val"))
    found = compare(FeatureCache.open(tmp_path / "a"), FeatureCache.open(tmp_path / "b"))
    assert (found.only_first, found.only_second) == ((0, 2), (6, 7, 8))
    assert (found.num_common, found.other_files) == (3, (4,))


def test_some_images_are_spread_over_the_cache(drawing: Any, tmp_path: Path) -> None:
    vectors = {image_id: (1.0, float(image_id)) for image_id in range(40)}
    first = write(drawing, tmp_path / "a", vectors)
    second = write(drawing, tmp_path / "b", vectors | {30: (1.0, -30.0), 31: (1.0, -31.0)})
    told: list[tuple[int, int]] = []
    found = compare(first, second, num_images=4, on_images=lambda *state: told.append(state))
    assert (found.num_compared, found.num_common) == (4, 40)
    assert found.features["sam"].worst_image_id == 30  # 0, 10, 20, 30
    assert told == [(4, 4)]
    assert compare(first, second, num_images=99).num_compared == 40
    with pytest.raises(ConfigError, match="At least one"):
        compare(first, second, num_images=0)


def test_caches_that_cannot_be_compared_are_refused(drawing: Any, tmp_path: Path) -> None:
    first = write(drawing, tmp_path / "a", {1: (3, 4)})
    with pytest.raises(CacheMissError, match="no image in common"):
        compare(first, write(drawing, tmp_path / "b", {2: (3, 4)}))
    fingerprint = cache_fingerprint(PAPER, {"sam": {"seed": 0}}, arithmetic="float32", dtype="float32")
    turned = write(drawing, tmp_path / "c", {1: (3, 4)}, VECTORS | {"clip": (2, 1)}, fingerprint=fingerprint)
    with pytest.raises(ShapeError, match=r"clip \[1, 2\].*clip \[2, 1\](.|\n)*encoders\.clip") as caught:
        compare(first, turned)
    assert caught.value.facts["differences"]


def test_damage_is_noticed(drawing: Any, tmp_path: Path) -> None:
    for name in ("a", "b"):
        drawing.extract(tmp_path / name, range(3))
    path = tmp_path / "b" / "features.zarr/sam/c/0/0/0/0"
    content = bytearray(path.read_bytes())
    content[0] ^= 1
    path.write_bytes(content)
    with pytest.raises(CorruptShardError, match="Image 0"):
        compare(FeatureCache.open(tmp_path / "a"), FeatureCache.open(tmp_path / "b"))


def test_the_result_is_plain_values(drawing: Any, tmp_path: Path) -> None:
    drawing.extract(tmp_path / "a", range(3))
    cache = FeatureCache.open(tmp_path / "a")
    document = compare(cache, cache).as_dict()
    assert set(document["features"]["sam"]) == {field.name for field in dataclasses.fields(FeatureDifference)}

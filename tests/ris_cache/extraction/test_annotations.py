"""Predicted categories: against comparing every text with every category, and never computed twice."""

from __future__ import annotations

import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ris_cache.datasets import parse_selections
from ris_cache.encoders.frozen import FrozenEncoders
from ris_cache.errors import StoppedError
from ris_cache.extraction import annotations
from ris_cache.extraction.annotations import nearest_categories
from ris_cache.extraction.run import extract
from ris_cache.store.cache import FeatureCache

WORDS = ("red", "circle", "left", "the", "biggest", "star", "blue", "a")
NAMES = ("circle", "star", "square", "heart")


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(texts=st.lists(st.lists(st.sampled_from(WORDS), min_size=1, max_size=4).map(" ".join), max_size=12))
def test_the_nearest_category_is_the_one_of_the_largest_cosine(texts, encoders):
    embeddings = encoders.category_embeddings(NAMES)

    found = nearest_categories(texts, embeddings, encoders)

    assert (found.dtype, found.shape) == (np.int64, (len(texts),))
    for text, index in zip(texts, found.tolist(), strict=True):
        cosines = torch.cosine_similarity(encoders.encode_texts([text]), embeddings)
        assert cosines[index] >= cosines.max() - 1e-5


def test_a_text_that_repeats_is_embedded_once(encoders, monkeypatch):
    embedded: list[str] = []
    plain = FrozenEncoders.encode_texts

    def counted(self: FrozenEncoders, texts: list[str]) -> torch.Tensor:
        embedded.extend(texts)
        return plain(self, texts)

    embeddings = encoders.category_embeddings(NAMES)
    monkeypatch.setattr(FrozenEncoders, "encode_texts", counted)
    found = nearest_categories(["left", "red star", "left", "left"], embeddings, encoders)

    assert sorted(embedded) == ["left", "red star"]
    assert found[0] == found[2] == found[3]


def test_texts_in_several_batches_keep_their_places(encoders, monkeypatch):
    texts = [f"{word} {other}" for word in WORDS for other in WORDS]
    embeddings = encoders.category_embeddings(NAMES)
    at_once = nearest_categories(texts, embeddings, encoders)
    monkeypatch.setattr(annotations, "_TEXT_BATCH", 7)

    np.testing.assert_array_equal(nearest_categories(texts, embeddings, encoders), at_once)


def test_one_long_text_does_not_cost_its_length_for_each(encoders):
    texts = [f"red {number}" for number in range(300)] + ["star " * 20_000]
    embeddings = encoders.category_embeddings(NAMES)
    tracemalloc.start()
    nearest_categories(texts, embeddings, encoders)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 30e6  # 300 texts of 400 kB would be 120 MB


def test_a_request_to_stop_ends_the_embedding(encoders, monkeypatch):
    monkeypatch.setattr(annotations, "_TEXT_BATCH", 2)
    looks = iter([False, True])

    with pytest.raises(StoppedError, match="all features are done"):
        nearest_categories(list(WORDS), encoders.category_embeddings(NAMES), encoders, lambda: next(looks))


@pytest.fixture
def extracted(tmp_path: Path, data: Path, encoders: FrozenEncoders) -> Any:
    def extracted(split: str, **options: Any) -> FeatureCache:
        extract(
            parse_selections(split),
            data_root=data,
            cache_root=tmp_path / "feats",
            encoders=encoders,
            batch_size=4,
            **options,
        )
        return FeatureCache.open(tmp_path / "feats")

    return extracted


def test_the_tables_hold_the_nearest_category_of_every_expression(extracted, encoders):
    cache = extracted("refcoco:val")

    categories = cache.categories(cache.manifest.datasets["refcoco.unc"].category_set)
    expressions = cache.expressions("refcoco.unc")
    assert len({expression.clip_category_id for expression in expressions}) > 1
    embeddings = torch.from_numpy(categories.embeddings)
    for expression in expressions:
        cosines = torch.cosine_similarity(encoders.encode_texts([expression.sent]), embeddings)
        predicted = categories.ids.index(expression.clip_category_id)
        assert cosines[predicted] >= cosines.max() - 1e-5


def test_a_split_that_is_there_keeps_its_predictions_and_embeds_nothing(extracted, monkeypatch):
    before = {e.sent_id: e.clip_category_id for e in extracted("refcoco:val").expressions("refcoco.unc")}
    embedded: list[str] = []
    plain = FrozenEncoders.encode_texts

    def counted(self: FrozenEncoders, texts: list[str]) -> torch.Tensor:
        embedded.extend(texts)
        return plain(self, texts)

    monkeypatch.setattr(FrozenEncoders, "encode_texts", counted)
    cache = extracted("refcoco:val,refcoco:testA")

    found = {e.sent_id: e for e in cache.expressions("refcoco.unc")}
    assert {sent_id: found[sent_id].clip_category_id for sent_id in before} == before
    added = {e.sent for sent_id, e in found.items() if sent_id not in before}
    assert set(embedded) <= added | {e.sent for e in found.values() if e.split == "testA"}
    assert added <= set(embedded)


def test_only_instances_of_the_selected_images_are_kept(extracted):
    cache = extracted("refcoco:val")

    instances = cache.instances("refcoco.unc")

    assert {instance.image_id for instance in instances.values()} == set(cache.image_ids.tolist())
    targets = {ann_id for expression in cache.expressions("refcoco.unc") for ann_id in expression.ann_ids}
    assert targets <= set(instances)


def test_a_stop_between_features_and_tables_loses_nothing(extracted, tmp_path, committed, monkeypatch):
    """The last look at `should_stop` is the one before the texts."""
    monkeypatch.setattr(
        annotations, "nearest_categories", lambda *arguments: (_ for _ in ()).throw(StoppedError("Stopped."))
    )
    with pytest.raises(StoppedError):
        extracted("refcoco:val")
    assert len(committed(tmp_path / "feats")) == 8
    assert not (tmp_path / "feats/manifest.json").exists()
    monkeypatch.undo()
    monkeypatch.setattr(
        FrozenEncoders, "encode", lambda *arguments: pytest.fail("features were computed again")
    )

    assert len(extracted("refcoco:val")) == 8

"""Batches: every row belongs to its sample, whatever the order and the repeats."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ris_cache.datasets.segmentation import union_mask
from ris_cache.datasets.selection import Selection
from ris_cache.errors import ConfigError
from ris_cache.store.cache import CategorySet, FeatureCache
from ris_cache.store.tables import NO_CATEGORY
from ris_train.config import load_config
from ris_train.data.batch import BatchBuilder, CategorySource, _unions
from ris_train.data.masks import TargetMasks
from ris_train.data.samples import Sample, load_samples
from ris_train.data.text import Tokenizer

TABLE = "refcoco.unc"
SIDE = 19


@pytest.fixture(scope="module")
def cache(tiny_cache: Path) -> FeatureCache:
    """The cache of the drawn refcoco."""
    return FeatureCache.open(tiny_cache)


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    """The tokenizer of the tiny recipe."""
    config = load_config(recipe="tiny").model
    return Tokenizer.load(config.bert, config.max_tokens)


@pytest.fixture(scope="module")
def categories(cache: FeatureCache) -> CategorySet:
    """The categories of the drawn refcoco."""
    return cache.categories(cache.manifest.datasets[TABLE].category_set)


@pytest.fixture(scope="module")
def samples(cache: FeatureCache) -> tuple[Sample, ...]:
    """Ten samples of several images, one image several times, not in the order of the cache."""
    selection = Selection(dataset="refcoco", split_by="unc", split="train")
    loaded = load_samples(cache, selection, text="raw").samples
    chosen = (*loaded[40:43], *loaded[:3], *loaded[20:24])
    assert len({sample.image_id for sample in chosen}) < len(chosen)
    return chosen


@pytest.fixture
def masks(cache: FeatureCache) -> TargetMasks:
    """Target masks on a small grid."""
    return TargetMasks({TABLE: cache.instances(TABLE)}, cache.sizes, SIDE)


def build(
    cache: FeatureCache, tokenizer: Tokenizer, categories: CategorySet, source: CategorySource = "none"
) -> BatchBuilder:
    return BatchBuilder(
        cache, tokenizer, categories=categories, category_source=source, device=torch.device("cpu")
    )


def test_every_row_is_the_cached_features_and_word_pieces_of_its_sample(
    cache: FeatureCache, tokenizer: Tokenizer, categories: CategorySet, samples: tuple[Sample, ...]
) -> None:
    batch = build(cache, tokenizer, categories).evaluation_batch(samples)
    assert batch.samples == samples
    assert batch.targets is None
    assert batch.inputs.image_embeddings.dtype == batch.inputs.clip_features.dtype == torch.float32
    length = batch.inputs.token_ids.shape[1]
    for row, sample in enumerate(samples):
        features = cache.read([sample.image_id])
        # float16 to float32 is exact, so bits are compared.
        assert np.array_equal(batch.inputs.image_embeddings[row].numpy(), features.sam[0].astype(np.float32))
        assert np.array_equal(batch.inputs.clip_features[row].numpy(), features.clip[0].astype(np.float32))
        token_ids, text_mask = tokenizer.encode([sample.text])
        own = token_ids.shape[1]
        assert torch.equal(batch.inputs.token_ids[row, :own], token_ids[0])
        assert batch.inputs.text_mask[row].tolist() == text_mask[0].tolist() + [False] * (length - own)


def test_training_and_evaluation_give_the_model_the_same(
    cache: FeatureCache,
    tokenizer: Tokenizer,
    categories: CategorySet,
    samples: tuple[Sample, ...],
    masks: TargetMasks,
) -> None:
    builder = build(cache, tokenizer, categories, "annotated")
    training = builder.training_batch(samples, masks, vl_exclude="referent").inputs
    evaluation = builder.evaluation_batch(samples).inputs
    for name in (
        "image_embeddings",
        "clip_features",
        "token_ids",
        "text_mask",
        "category_embeddings",
    ):
        assert torch.equal(getattr(training, name), getattr(evaluation, name)), name


def test_targets_are_the_union_of_a_samples_instances(
    cache: FeatureCache,
    tokenizer: Tokenizer,
    categories: CategorySet,
    samples: tuple[Sample, ...],
    masks: TargetMasks,
) -> None:
    """A sample of two targets among samples of one."""
    instances = cache.instances(TABLE)
    others = [
        ann_id
        for ann_id, instance in instances.items()
        if instance.image_id == samples[1].image_id and ann_id not in samples[1].ann_ids
    ]
    both = (*samples[1].ann_ids, others[0])
    asked = (samples[0], replace(samples[1], ann_ids=both), samples[2])
    targets = build(cache, tokenizer, categories).training_batch(asked, masks, vl_exclude="referent").targets
    assert targets is not None
    assert targets.masks.dtype == targets.instance_masks.dtype == torch.float32

    def drawn(image_id: int, *ann_ids: int) -> np.ndarray:
        segmentations = [instances[ann_id].segmentation for ann_id in ann_ids]
        return union_mask(segmentations, frame_size=cache.sizes[image_id], grid_size=(SIDE, SIDE))

    for row, sample in enumerate(asked):
        assert np.array_equal(targets.masks[row].numpy(), drawn(sample.image_id, *sample.ann_ids))
    assert targets.instance_samples.tolist() == [0, 1, 1, 2]
    owners = [(asked[0], asked[0].ann_ids[0]), (asked[1], both[0]), (asked[1], both[1])]
    for row, (sample, ann_id) in enumerate([*owners, (asked[2], asked[2].ann_ids[0])]):
        assert np.array_equal(targets.instance_masks[row].numpy(), drawn(sample.image_id, ann_id))
    assert targets.masks[1].sum() > max(targets.instance_masks[1].sum(), targets.instance_masks[2].sum())


@pytest.mark.parametrize("source", ["annotated", "predicted"])
def test_the_category_given_is_the_one_of_the_source(
    cache: FeatureCache,
    tokenizer: Tokenizer,
    categories: CategorySet,
    samples: tuple[Sample, ...],
    source: CategorySource,
) -> None:
    """Annotated and predicted ids are set to differ in every row."""
    count = len(categories.ids)
    asked = tuple(
        replace(
            sample,
            category_id=categories.ids[row % count],
            clip_category_id=categories.ids[(row + 1) % count],
        )
        for row, sample in enumerate(samples)
    )
    found = build(cache, tokenizer, categories, source).inputs(asked).category_embeddings
    assert found is not None
    for row, sample in enumerate(asked):
        category_id = sample.category_id if source == "annotated" else sample.clip_category_id
        expected = categories.embeddings[categories.ids.index(category_id)]
        assert np.array_equal(found[row].numpy(), expected)


def test_a_model_that_reads_no_category_is_given_none(
    cache: FeatureCache, tokenizer: Tokenizer, categories: CategorySet, samples: tuple[Sample, ...]
) -> None:
    assert build(cache, tokenizer, categories).inputs(samples).category_embeddings is None


@pytest.mark.parametrize(
    ("vl_exclude", "expected"),
    [
        ("referent", [[0, 1, 0, 0], [1, 0, 0, 0], [0, 0, 0, 0], [0, 0, 0, 0]]),
        ("category", [[0, 1, 0, 1], [1, 0, 0, 1], [0, 0, 0, 0], [1, 1, 0, 0]]),
    ],
)
def test_pairs_that_are_no_negatives_are_marked(
    cache: FeatureCache,
    tokenizer: Tokenizer,
    categories: CategorySet,
    masks: TargetMasks,
    samples: tuple[Sample, ...],
    vl_exclude: str,
    expected: list[list[int]],
) -> None:
    """0 and 1 speak of the same instance; 2 is another one; 3 is another one of 0's category."""
    first, *strangers = {sample.ann_ids: sample for sample in samples}.values()
    one, other = categories.ids[:2]
    asked = (
        replace(first, category_id=one),
        replace(first, category_id=one, text="the same in other words"),
        replace(strangers[0], category_id=other),
        replace(strangers[1], category_id=one),
    )
    builder = build(cache, tokenizer, categories)
    targets = builder.training_batch(asked, masks, vl_exclude=vl_exclude).targets
    assert targets is not None
    assert targets.is_related.int().tolist() == expected


def test_a_sample_that_refers_to_nothing_has_an_empty_mask_and_no_instance(
    cache: FeatureCache,
    tokenizer: Tokenizer,
    categories: CategorySet,
    samples: tuple[Sample, ...],
    masks: TargetMasks,
) -> None:
    nothing = replace(samples[1], ann_ids=(), category_id=NO_CATEGORY)
    builder = build(cache, tokenizer, categories)
    for asked, owners in (((samples[0], nothing, samples[2]), [0, 2]), ((nothing, nothing), [])):
        targets = builder.training_batch(asked, masks, vl_exclude="referent").targets
        assert targets is not None
        assert targets.instance_samples.dtype == torch.int64
        assert targets.instance_samples.tolist() == owners
        assert targets.instance_masks.shape == (len(owners), SIDE, SIDE)
        assert targets.masks.shape == (len(asked), SIDE, SIDE)
        assert targets.is_no_target.tolist() == [not sample.ann_ids for sample in asked]
        assert [bool(mask.any()) for mask in targets.masks] == [bool(sample.ann_ids) for sample in asked]


def test_masks_come_from_the_table_of_each_sample(
    cache: FeatureCache, tokenizer: Tokenizer, categories: CategorySet, samples: tuple[Sample, ...]
) -> None:
    """The other table gives the same ann_id another segmentation."""
    (ann_id,) = samples[0].ann_ids
    instances = cache.instances(TABLE)
    corner = ((0.0, 0.0, 40.0, 0.0, 40.0, 40.0, 0.0, 40.0),)
    other = {ann_id: replace(instances[ann_id], segmentation=corner)}
    masks = TargetMasks({TABLE: instances, "custom.other": other}, cache.sizes, SIDE)
    asked = (samples[0], replace(samples[0], table_name="custom.other"))
    targets = build(cache, tokenizer, categories).training_batch(asked, masks, vl_exclude="referent").targets
    assert targets is not None
    for row, table_name in enumerate((TABLE, "custom.other")):
        assert np.array_equal(targets.masks[row].numpy(), masks.of(table_name, ann_id))
    assert not torch.equal(targets.masks[0], targets.masks[1])


def test_grouped_inputs_hold_each_image_once_and_expand_to_the_plain_ones(
    cache: FeatureCache,
    tokenizer: Tokenizer,
    categories: CategorySet,
    samples: tuple[Sample, ...],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    builder = build(cache, tokenizer, categories, "annotated")
    plain = builder.inputs(samples)
    read: list[list[int]] = []
    original = FeatureCache.read

    def noting(self: FeatureCache, image_ids: list[int], *args: object) -> object:
        read.append(list(image_ids))
        return original(self, image_ids, *args)

    monkeypatch.setattr(FeatureCache, "read", noting)
    grouped = builder.grouped_inputs(samples)
    assert read == [list(dict.fromkeys(sample.image_id for sample in samples))]
    assert plain.image_index is None
    assert grouped.image_index is not None
    for name in ("image_embeddings", "clip_features"):
        assert torch.equal(getattr(grouped, name)[grouped.image_index], getattr(plain, name))
    for name in ("token_ids", "text_mask", "category_embeddings"):
        assert torch.equal(getattr(grouped, name), getattr(plain, name))


@pytest.mark.parametrize("source", ["annotated", "predicted"])
def test_a_sample_without_the_category_that_the_model_reads_is_named(
    cache: FeatureCache,
    tokenizer: Tokenizer,
    categories: CategorySet,
    samples: tuple[Sample, ...],
    source: CategorySource,
) -> None:
    without = replace(
        samples[1], ann_ids=(), category_id=NO_CATEGORY, clip_category_id=NO_CATEGORY, text="the green heart"
    )
    builder = build(cache, tokenizer, categories, source)
    with pytest.raises(ConfigError, match=f"1 expressions have no {source} category") as caught:
        builder.inputs((samples[0], without))
    assert "'the green heart'" in str(caught.value)
    assert "model.sparse_prompt=cls" in str(caught.value)
    build(cache, tokenizer, categories).require_categories([without])


@given(st.lists(st.integers(0, 3), max_size=6), st.integers(0, 2**32))
def test_a_union_is_where_any_instance_of_the_sample_is(counts: list[int], seed: int) -> None:
    instances = np.random.default_rng(seed).random((sum(counts), 3, 3)) < 0.5
    found = _unions(instances, np.array(counts, dtype=np.int64))
    assert found.shape == (len(counts), 3, 3)
    first = 0
    for count, union in zip(counts, found, strict=True):
        assert np.array_equal(union, instances[first : first + count].any(axis=0))
        first += count


def test_as_many_instances_as_samples_are_not_one_of_each(
    cache: FeatureCache,
    tokenizer: Tokenizer,
    categories: CategorySet,
    samples: tuple[Sample, ...],
    masks: TargetMasks,
) -> None:
    """Two targets of one sample and none of the other: unions are not the instances in their order."""
    image_id = samples[0].image_id
    own = [ann_id for ann_id, one in cache.instances(TABLE).items() if one.image_id == image_id]
    both = tuple(own[:2])
    assert len(both) == 2
    nothing = replace(samples[1], ann_ids=(), category_id=NO_CATEGORY)
    asked = (replace(samples[0], ann_ids=both), nothing)
    targets = build(cache, tokenizer, categories).training_batch(asked, masks, vl_exclude="referent").targets
    assert targets is not None
    assert targets.instance_samples.tolist() == [0, 0]
    assert torch.equal(targets.masks[0], targets.instance_masks.amax(dim=0))
    assert not targets.masks[1].any()


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "int8"])
def test_a_batch_keeps_nothing_of_the_buffers_it_was_read_into(
    cache: FeatureCache,
    tokenizer: Tokenizer,
    categories: CategorySet,
    samples: tuple[Sample, ...],
    dtype: str,
) -> None:
    """Features as a cache of each precision gives them; float32 is what decoding alone would not copy."""
    read = cache.read([sample.image_id for sample in samples])
    as_stored = {
        "float16": lambda array: array,
        "bfloat16": lambda array: (array.astype(np.float32).view(np.uint32) >> 16).astype(np.uint16),
        "float32": lambda array: array.astype(np.float32),
        "int8": lambda array: (array * 9).clip(-127, 127).astype(np.int8),
    }
    stored = {name: as_stored[dtype](array) for name, array in read.stored.items()}
    if dtype == "int8":
        stored["clip_pooled"] = read.stored["clip_pooled"]
        for name in ("sam", "clip"):
            stored[f"{name}_scale"] = np.full((len(samples), *[1] * (stored[name].ndim - 1)), 0.5, np.float32)
    features = replace(read, dtype=dtype, stored=stored)
    inputs = build(cache, tokenizer, categories).inputs(samples, features)
    before = inputs.image_embeddings.clone(), inputs.clip_features.clone()
    for array in features.stored.values():
        array[:] = 0
    assert before[0].any()
    assert torch.equal(inputs.image_embeddings, before[0])
    assert torch.equal(inputs.clip_features, before[1])


def test_features_of_other_samples_are_not_taken(
    cache: FeatureCache, tokenizer: Tokenizer, categories: CategorySet, samples: tuple[Sample, ...]
) -> None:
    features = cache.read([sample.image_id for sample in samples[::-1]])
    with pytest.raises(AssertionError, match="features of other samples"):
        build(cache, tokenizer, categories).inputs(samples, features)


def test_features_go_to_a_gpu_with_that_gpu_as_the_threads_own(
    cache: FeatureCache, tokenizer: Tokenizer, categories: CategorySet, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Copies are waited for on the thread's own GPU, which for a new thread is the first one."""
    own: list[torch.device] = []

    @contextmanager
    def device(chosen: torch.device) -> Iterator[None]:
        own.append(chosen)
        yield
        own.pop()

    class Features:
        """Notes where a copy is made from."""

        def to(self, wanted: torch.device) -> list[torch.device]:
            return [wanted, *own]

    monkeypatch.setattr(torch.cuda, "device", device)
    second = torch.device("cuda", 1)
    builder = BatchBuilder(cache, tokenizer, categories=categories, category_source="none", device=second)
    assert builder._decoded(Features()) == [second, second]  # type: ignore[arg-type,comparison-overlap]
    assert own == []

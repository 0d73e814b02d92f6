"""Samples: which expressions a selection takes, and shuffling that moves the text alone."""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ris_cache.datasets.selection import parse_selections
from ris_cache.errors import CacheMissError
from ris_cache.store.cache import FeatureCache
from ris_cache.store.draft import CacheDraft
from ris_train.data.samples import Sample, Samples, SampleSet, load_samples, shuffle_expressions

TABLE = "refcoco.unc"


@pytest.fixture(scope="module")
def cache(tiny_cache: Path) -> FeatureCache:
    """The cache of the drawn refcoco: train, val, testA and testB."""
    return FeatureCache.open(tiny_cache)


def load(cache: FeatureCache, selection: str, text: str = "raw") -> SampleSet:
    (parsed,) = parse_selections(selection)
    return load_samples(cache, parsed, text=text)


@pytest.mark.parametrize(
    ("selection", "labels"),
    [
        ("refcoco", {"train", "val", "testA", "testB"}),
        ("refcoco:train", {"train"}),
        ("refcoco:val", {"val"}),
        ("refcoco:testA", {"testA"}),
        ("refcoco/unc:testB", {"testB"}),
        ("refcoco:test", {"testA", "testB"}),
    ],
)
def test_a_selection_takes_the_splits_that_the_refer_api_would(
    cache: FeatureCache, selection: str, labels: set[str]
) -> None:
    found = load(cache, selection)
    expected = [expression for expression in cache.expressions(TABLE) if expression.split in labels]
    assert {expression.split for expression in expected} == labels
    assert [sample.sent_id for sample in found.samples] == [expression.sent_id for expression in expected]
    assert {sample.split for sample in found.samples} == labels
    assert (found.table_name, found.quarantined) == (TABLE, 0)


def test_a_sample_is_its_expression(cache: FeatureCache) -> None:
    samples = load(cache, "refcoco:val").samples
    expressions = [expression for expression in cache.expressions(TABLE) if expression.split == "val"]
    for sample, expression in zip(samples, expressions, strict=True):
        assert sample == Sample(
            table_name=TABLE,
            split="val",
            ref_id=expression.ref_id,
            sent_id=expression.sent_id,
            image_id=expression.image_id,
            text=expression.raw,
            ann_ids=expression.ann_ids,
            category_id=expression.category_ids[0],
            clip_category_id=expression.clip_category_id,
            is_degenerate=expression.is_degenerate,
        )


def test_the_text_is_as_typed_or_as_cleaned(cache: FeatureCache, monkeypatch: pytest.MonkeyPatch) -> None:
    stored = FeatureCache.expression_columns

    def columns(self: FeatureCache, name: str, names: Sequence[str], **options: Any) -> Any:
        sent_ids, *found = stored(self, name, ("sent_id", *names), **options)
        texts = {"raw": [f"RAW {one}" for one in sent_ids], "sent": [f"sent {one}" for one in sent_ids]}
        return tuple(texts.get(name, column) for name, column in zip(names, found, strict=True))

    monkeypatch.setattr(FeatureCache, "expression_columns", columns)
    raw, sent = (load(cache, "refcoco:val", text).samples for text in ("raw", "sent"))
    assert [sample.text for sample in raw] == [f"RAW {sample.sent_id}" for sample in raw]
    assert [sample.text for sample in sent] == [f"sent {sample.sent_id}" for sample in sent]


def test_expressions_of_quarantined_images_are_left_out_and_counted(tiny_cache: Path, tmp_path: Path) -> None:
    root = tmp_path / "feats"
    shutil.copytree(tiny_cache, root)
    whole = load(FeatureCache.open(root), "refcoco:val")
    bad = whole.samples[0].image_id
    draft = CacheDraft.of(root)
    draft.replace_images([replace(draft.images[bad], reason="cut off in the middle", crc32c=())])
    draft.commit()

    cache = FeatureCache.open(root)
    found = load(cache, "refcoco:val")
    assert [*found.samples] == [sample for sample in whole.samples if sample.image_id != bad]
    assert found.quarantined == sum(sample.image_id == bad for sample in whole.samples) > 0
    # The image is one of val; what is not asked for is not counted.
    assert load(cache, "refcoco:train").quarantined == 0


@pytest.mark.parametrize(
    ("selection", "holds", "command"),
    [
        ("refcoco+:val", "it holds refcoco.unc", "ris extract --split refcoco+/unc --cache {}"),
        ("refcocog", "it holds refcoco.unc", "ris extract --split refcocog/umd --cache {}"),
        ("refcoco/google:val", "it holds refcoco.unc", "ris extract --split refcoco/google --cache {}"),
        ("refcoco:testC", "train, val, testA, testB", "ris extract --split refcoco/unc:testC --cache {}"),
    ],
)
def test_what_the_cache_lacks_is_named_with_the_command_that_adds_it(
    cache: FeatureCache, selection: str, holds: str, command: str
) -> None:
    with pytest.raises(CacheMissError) as caught:
        load(cache, selection)
    message = str(caught.value)
    assert holds in message
    assert f"`{command.format(cache.root)}`" in message
    # The command says what the user asked for.
    (asked,) = parse_selections(selection)
    (offered,) = parse_selections(command.split()[3])
    assert offered.table_name == asked.table_name
    assert offered.split in (None, asked.split)
    assert caught.value.exit_code == 3


def sample(index: int, image_id: int) -> Sample:
    """A sample in which every value tells which one it was."""
    return Sample(
        table_name=TABLE,
        split="val",
        ref_id=1000 + index,
        sent_id=index,
        image_id=image_id,
        text=f"expression {index}",
        ann_ids=(2000 + index,),
        category_id=3000 + index,
        clip_category_id=4000 + index,
        is_degenerate=index % 2 == 0,
    )


IDS = st.integers(-(2**63), 2**63 - 1)
CATEGORIES = st.integers(-1, 2**31 - 1)
ANY_SAMPLES = st.lists(
    st.builds(
        Sample,
        table_name=st.sampled_from(["refcoco.unc", "custom.birds", "grefcoco.unc"]),
        split=st.sampled_from(["train", "val", "testA"]),
        ref_id=IDS,
        sent_id=IDS,
        image_id=IDS,
        text=st.text(st.characters(), max_size=12),
        ann_ids=st.lists(IDS, max_size=3).map(tuple),
        category_id=CATEGORIES,
        clip_category_id=CATEGORIES,
        is_degenerate=st.booleans(),
    ),
    max_size=8,
)


@given(ANY_SAMPLES, ANY_SAMPLES, st.data())
def test_columns_give_back_the_samples_they_were_made_of(
    first: list[Sample], second: list[Sample], data: st.DataObject
) -> None:
    """One by one, in slices, in selections and put together; lists do the same."""
    one, both = Samples.of(first), Samples.of(first) + Samples.of(second)
    together = first + second
    assert [*one] == first
    assert [*both] == together
    assert (len(both), bool(both)) == (len(together), bool(together))
    assert both == Samples.of(together)
    assert Samples.of(both) is both
    assert [both[index] for index in range(-len(together), 0)] == together
    part = data.draw(st.slices(len(together)))
    assert [*both[part]] == together[part]
    chosen = data.draw(
        st.lists(st.sampled_from(range(len(together))), max_size=6) if together else st.just([])
    )
    assert [*both.select(np.array(chosen, dtype=np.int64))] == [together[index] for index in chosen]
    kept = both.select(~both.column("is_degenerate"))
    assert [*kept] == [sample for sample in together if not sample.is_degenerate]
    # Parts of parts, of texts and ann_ids that both still hold whole.
    assert [*(kept + both[part])] == [*kept, *both[part]]
    for name in ("ref_id", "image_id", "category_id", "is_no_target"):
        assert both.column(name).tolist() == [getattr(sample, name) for sample in together]


def test_samples_of_other_values_or_in_another_order_are_others() -> None:
    samples = [sample(index, image_id=1) for index in range(3)]
    assert Samples.of(samples) != Samples.of(samples[::-1])
    assert Samples.of(samples) != Samples.of([*samples[:2], replace(samples[2], text="another")])
    assert Samples.of(samples) != Samples.of(samples[:2])
    with pytest.raises(IndexError):
        Samples.of(samples)[3]


@given(st.lists(st.integers(0, 4), max_size=30), st.integers(0, 2**32))
def test_shuffling_permutes_text_with_its_prediction_within_each_image(
    image_ids: Sequence[int], seed: int
) -> None:
    samples = tuple(sample(index, image_id) for index, image_id in enumerate(image_ids))
    shuffled = shuffle_expressions(samples, seed=seed)
    assert shuffle_expressions(samples, seed=seed) == shuffled
    assert len(shuffled) == len(samples)
    for before, after in zip(samples, shuffled, strict=True):
        source = int(after.text.removeprefix("expression "))
        assert samples[source].image_id == before.image_id
        assert after.clip_category_id == samples[source].clip_category_id
        assert replace(after, text=before.text, clip_category_id=before.clip_category_id) == before
    for image_id in set(image_ids):
        texts = [
            Counter(one.text for one in ours if one.image_id == image_id) for ours in (samples, shuffled)
        ]
        assert texts[0] == texts[1]


def test_an_image_of_one_sample_keeps_its_expression() -> None:
    samples = tuple(sample(index, image_id=index) for index in range(20))
    assert tuple(shuffle_expressions(samples, seed=0)) == samples


def test_another_seed_shuffles_otherwise_and_both_shuffle() -> None:
    """Of 30! orders, two are the same by chance never."""
    samples = tuple(sample(index, image_id=1) for index in range(30))
    first, second = (tuple(shuffle_expressions(samples, seed=seed)) for seed in (0, 1))
    assert len({samples, first, second}) == 3


def test_every_order_of_three_expressions_comes_about_as_often() -> None:
    """Six orders, 600 seeds: 100 each on average, standard deviation 9; 60 to 140 is beyond four of them."""
    samples = tuple(sample(index, image_id=1) for index in range(3))
    orders = Counter(
        tuple(one.text for one in shuffle_expressions(samples, seed=seed)) for seed in range(600)
    )
    assert len(orders) == 6
    assert all(60 < count < 140 for count in orders.values())

"""Merged training sets: what leaks is left out and counted, and what cannot be known is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from ris_cache.datasets.selection import parse_selections
from ris_cache.errors import CacheMissError, ConfigError, DataError
from ris_cache.store.cache import FeatureCache
from ris_train.config import load_config
from ris_train.data import merge
from ris_train.data.merge import (
    EVALUATION_SPLITS,
    TrainingSet,
    common_categories,
    evaluation_images,
    load_training_set,
    require_one_split,
    split_overrides,
)
from ris_train.data.samples import load_samples
from ris_train.training import train

TABLES = ("refcoco.unc", "refcoco+.unc", "refcocog.umd", "refcocog.google", "grefcoco.unc", "custom.drawn")
THREE = "refcoco:train,refcoco+:train,refcocog:train"


@pytest.fixture(scope="module")
def cache_root(tmp_path_factory: pytest.TempPathFactory, ris: Callable[..., Any]) -> Path:
    """Six tables over one pool of drawn images, which refcocog deals out anew, and custom images of their own."""
    root = tmp_path_factory.mktemp("merge")
    data = root / "data"
    result = ris(
        "data", "synth", "--out", data, "--layout", "refcoco,refcoco+,refcocog,grefcoco,custom",
        "--train", 14, "--val", 4, "--test", 3, "--seed", 5,
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    result = ris(
        "extract", "--split", "refcoco,refcoco+,refcocog,refcocog/google,grefcoco,custom/drawn", "--data", data,
        "--cache", root / "feats", "--preset", "tiny", "--random-weights", "--device", "cpu",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    return root / "feats"


@pytest.fixture
def cache(cache_root: Path) -> FeatureCache:
    """That cache, opened anew for each test."""
    opened = FeatureCache.open(cache_root)
    assert set(opened.manifest.datasets) == set(TABLES)
    return opened


def holding(cache: FeatureCache, *tables: str, **splits: tuple[str, ...]) -> FeatureCache:
    """The same cache as if it held these tables alone, and of a table named with `_` for `.` these splits."""
    datasets = {}
    for name in tables:
        entry = cache.manifest.datasets[name]
        kept = splits.get(name.replace(".", "_").replace("+", "p"), tuple(entry.splits))
        datasets[name] = entry.model_copy(update={"splits": {label: entry.splits[label] for label in kept}})
    cache._manifest = cache.manifest.model_copy(update={"datasets": datasets})
    return cache


def load(cache: FeatureCache, selection: str, **options: Any) -> TrainingSet:
    defaults: dict[str, Any] = {"text": "sent", "leakage": "exclude", "with_no_target": False}
    return load_training_set(cache, selection, **defaults | options)


def images_of(cache: FeatureCache, table_name: str, *, training: bool) -> set[int]:
    return {
        expression.image_id
        for expression in cache.expressions(table_name)
        if (expression.split == "train") == training
    }


def test_one_split_is_taken_whole(cache: FeatureCache) -> None:
    """Other tables of the cache test on its images; that is of no concern to who trains on one dataset."""
    found = load(cache, "refcoco:train")
    (selection,) = parse_selections("refcoco:train")
    assert found.samples == load_samples(cache, selection, text="sent").samples
    (part,) = found.parts
    assert (part.leaking_images, part.leaking_expressions, part.is_filtered) == (0, 0, False)
    assert part.shared == {}
    assert part.images == len(images_of(cache, "refcoco.unc", training=True))
    assert images_of(cache, "refcocog.umd", training=False) & images_of(cache, "refcoco.unc", training=True)


def test_a_google_split_alone_is_taken_whole_and_its_own_leakage_is_counted(cache: FeatureCache) -> None:
    found = load(cache, "refcocog/google:train")
    both = images_of(cache, "refcocog.google", training=True) & images_of(
        cache, "refcocog.google", training=False
    )
    assert both
    (part,) = found.parts
    assert (part.leaking_images, part.is_filtered) == (len(both), False)
    assert part.shared == {"refcocog.google:val": len(both)}
    assert part.leaking_expressions == sum(sample.image_id in both for sample in found.samples)
    assert part.expressions == len(found.samples)


def test_images_of_the_dataset_that_validates_are_counted_too(cache: FeatureCache) -> None:
    """RefCOCOg deals the same images out anew, so a checkpoint chosen on it would have seen some of them."""
    (alone,) = load(cache, "refcoco:train", val="refcoco:val").parts
    (part,) = load(cache, "refcoco:train", val="refcocog:val").parts
    assert alone.leaking_images == 0
    own = {sample.image_id for sample in load(cache, "refcoco:train").samples}
    held = {e.image_id for e in cache.expressions("refcocog.umd") if e.split != "train"}
    assert part.leaking_images == len(own & held) > 0
    assert (part.expressions, part.is_filtered) == (alone.expressions, False)


@pytest.mark.parametrize(
    "selection", [THREE, "refcoco+:train,refcocog:train", "grefcoco:train,refcocog:train"]
)
def test_a_merge_leaves_out_images_of_every_evaluation_split_of_the_cache(
    cache: FeatureCache, selection: str
) -> None:
    evaluated = set().union(*(images_of(cache, name, training=False) for name in TABLES))
    found = load(cache, selection, with_no_target=True)
    selections = parse_selections(selection)
    expected = [
        (one.table_name, expression.sent_id)
        for one in selections
        for expression in cache.expressions(one.table_name)
        if expression.split == "train" and expression.image_id not in evaluated
    ]
    assert [(sample.table_name, sample.sent_id) for sample in found.samples] == expected
    assert found.table_names == tuple(one.table_name for one in selections)
    assert found.left_out_for_leakage > 0
    for part, one in zip(found.parts, selections, strict=True):
        own = [expression for expression in cache.expressions(one.table_name) if expression.split == "train"]
        leaking = [expression for expression in own if expression.image_id in evaluated]
        assert part.selection == f"{one.table_name}:train"
        assert part.leaking_expressions == len(leaking)
        assert part.leaking_images == len({expression.image_id for expression in leaking})
        assert part.expressions == len(own) - len(leaking)
        for name, count in part.shared.items():
            table_name, _, split = name.partition(":")
            held = {one.image_id for one in cache.expressions(table_name) if one.split == split}
            assert count == len(held & {expression.image_id for expression in own}) > 0


def test_kept_leakage_is_counted_all_the_same(cache: FeatureCache) -> None:
    excluded, kept = load(cache, THREE), load(cache, THREE, leakage="keep")
    assert len(kept.samples) == len(excluded.samples) + excluded.left_out_for_leakage
    assert kept.left_out_for_leakage == 0
    assert [part.shared for part in kept.parts] == [part.shared for part in excluded.parts]
    assert [part.leaking_images for part in kept.parts] == [part.leaking_images for part in excluded.parts]


def test_custom_images_leak_from_custom_splits_alone(cache: FeatureCache) -> None:
    found = load(cache, "refcoco:train,custom/drawn:train", with_no_target=True)
    custom = found.parts[1]
    assert (custom.selection, custom.leaking_images, custom.shared) == ("custom.drawn:train", 0, {})


def test_a_split_that_is_trained_on_is_no_evaluation_split_of_its_table(cache: FeatureCache) -> None:
    training = parse_selections("refcoco:train,refcoco:val")
    found = evaluation_images(cache, training, TABLES)
    assert "refcoco.unc:val" not in found
    assert "refcoco.unc:testA" in found
    assert not any(name.endswith(":train") for name in found)


def test_a_google_split_is_refused_in_a_merge_unless_forced(cache: FeatureCache) -> None:
    with pytest.raises(ConfigError, match=r"refcocog/google divides objects.*data\.leakage=keep"):
        load(cache, "refcoco:train,refcocog/google:train")
    assert len(load(cache, "refcoco:train,refcocog/google:train", leakage="keep").parts) == 2


def test_a_merge_without_the_splits_that_decide_is_refused_with_the_way_out(cache: FeatureCache) -> None:
    partial = holding(cache, "refcoco.unc", "refcocog.umd", refcoco_unc=("train", "testA"))
    with pytest.raises(CacheMissError) as caught:
        load(partial, "refcoco:train,refcocog:train")
    message = str(caught.value)
    assert "(refcoco.unc: val, testB)" in message
    assert f"ris extract --split refcoco/unc:val,refcoco/unc:testB --cache {cache.root}" in message
    assert "--set data.leakage=keep" in message
    # What the command names can be parsed, and forcing works with what there is.
    parse_selections("refcoco/unc:val,refcoco/unc:testB")
    assert load(partial, "refcoco:train,refcocog:train", leakage="keep").left_out_for_leakage == 0


def test_a_split_that_was_extracted_in_part_does_not_decide(cache: FeatureCache) -> None:
    """A trial with --limit holds some images of val; the others would leak in silence."""
    entry = cache.manifest.datasets["refcoco+.unc"]
    partial = entry.splits | {"val": entry.splits["val"].model_copy(update={"is_complete": False})}
    datasets = cache.manifest.datasets | {"refcoco+.unc": entry.model_copy(update={"splits": partial})}
    cache._manifest = cache.manifest.model_copy(update={"datasets": datasets})
    with pytest.raises(CacheMissError, match=r"in full \(refcoco\+\.unc: val\)"):
        load(cache, "refcoco:train,refcoco+:train")


def test_a_dataset_that_the_cache_lacks_is_named_first(cache: FeatureCache) -> None:
    with pytest.raises(CacheMissError, match=r"holds no expressions of ref-zom\.final"):
        load(cache, "refcoco:train,ref-zom:train")


@pytest.mark.parametrize("selection", ["refcoco", "refcoco:train,refcocog", "all"])
def test_a_whole_dataset_is_refused(cache: FeatureCache, selection: str) -> None:
    with pytest.raises(ConfigError, match=r"data\.train takes splits, such as refcoco"):
        load(cache, selection)


def test_validation_takes_one_split() -> None:
    assert require_one_split("refcoco:val", "data.val").split == "val"
    with pytest.raises(ConfigError, match=r"data\.val takes one split such as refcoco:val"):
        require_one_split("refcoco:val,refcoco+:val", "data.val")


def test_expressions_for_nothing_are_trained_on_with_a_head_and_counted_without(cache: FeatureCache) -> None:
    with_head = load(cache, "grefcoco:train", with_no_target=True)
    without = load(cache, "grefcoco:train")
    num_none = sum(sample.is_no_target for sample in with_head.samples)
    assert num_none > 0
    assert not any(sample.is_no_target for sample in without.samples)
    assert len(with_head.samples) == len(without.samples) + num_none
    assert (with_head.left_out, without.left_out) == (0, num_none)
    assert without.parts[0].as_dict()["left_out"]["no_target"] == num_none


def test_degenerate_expressions_are_left_out_with_and_without_a_head(
    cache: FeatureCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    def with_degenerate(*args: Any, **kwargs: Any) -> Any:
        loaded = load_samples(*args, **kwargs)
        first, *others = loaded.samples
        return replace(loaded, samples=(replace(first, is_degenerate=True), *others))

    monkeypatch.setattr(merge, "load_samples", with_degenerate)
    for with_no_target in (False, True):
        found = load(cache, "refcoco:train", with_no_target=with_no_target)
        assert found.parts[0].degenerate == found.left_out == 1
        assert not any(sample.is_degenerate for sample in found.samples)


def test_categories_must_agree_for_a_model_that_reads_one(cache: FeatureCache) -> None:
    shared = common_categories(cache, ["refcoco.unc", "refcocog.umd"])
    assert shared.names == cache.categories("refcoco.unc").names
    with pytest.raises(ConfigError) as caught:
        common_categories(cache, ["refcoco.unc", "custom.drawn"])
    assert "refcoco.unc and custom.drawn have different categories" in str(caught.value)
    assert "--set model.sparse_prompt=cls" in str(caught.value)


def test_the_published_splits_are_those_that_the_grammar_knows() -> None:
    for table_name, splits in EVALUATION_SPLITS.items():
        dataset, _, split_by = table_name.rpartition(".")
        for split in splits:
            (selection,) = parse_selections(f"{dataset}/{split_by}:{split}")
            assert selection.table_name == table_name


@pytest.mark.parametrize(
    ("split", "val", "is_val_chosen", "expected"),
    [
        ("refcoco", "refcoco:val", False, ["data.train=refcoco/unc:train"]),
        (
            "refcocog",
            "refcoco:val",
            False,
            ["data.train=refcocog/umd:train", "data.val=refcocog/umd:val"],
        ),
        ("refcocog", "refcoco:val", True, ["data.train=refcocog/umd:train"]),
        (
            "refcoco+,refcoco,refcocog",
            "refcoco:val",
            False,
            ["data.train=refcoco+/unc:train,refcoco/unc:train,refcocog/umd:train"],
        ),
        ("custom/birds:fit", "custom/birds:val", False, ["data.train=custom/birds:fit"]),
        ("ref-zom", "ref-zom:test", False, ["data.train=ref-zom/final:train"]),
        ("ref-zom", "refcoco:val", True, ["data.train=ref-zom/final:train"]),
    ],
)
def test_a_dataset_stands_for_its_train_split_and_brings_its_val(
    split: str, val: str, is_val_chosen: bool, expected: list[str]
) -> None:
    found = split_overrides(split, val=val, is_val_chosen=is_val_chosen)
    assert found == expected
    load_config(recipe="tiny", overrides=found)


def test_ref_zom_has_no_val_split_and_that_is_said() -> None:
    with pytest.raises(ConfigError) as caught:
        split_overrides("ref-zom", val="refcoco:val", is_val_chosen=False)
    message = str(caught.value)
    assert "ref-zom has no val split" in message
    assert "--set data.val=ref-zom:test; scores on ref-zom:test are test-selected" in message


TINY_RUN = (
    "--set", "train.steps=2", "--set", "train.batch_size=4", "--set", "train.eval_every=2",
    "--set", "train.val_samples=6", "--random-weights", "--device", "cpu",
)  # fmt: skip


def test_training_on_a_merge_says_what_was_left_out(
    cache_root: Path, cache: FeatureCache, tmp_path: Path, ris: Callable[..., Any]
) -> None:
    result = ris(
        "train", "--cache", cache_root, "--runs", tmp_path, "--run", "merged",
        "--split", "refcoco,refcoco+,refcocog", *TINY_RUN, "--json",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    expected = load(cache, THREE)
    assert report["left_out_for_leakage"] == expected.left_out_for_leakage > 0
    assert report["training_set"] == [part.as_dict() for part in expected.parts]
    environment = json.loads((tmp_path / "merged" / "env.json").read_text())
    assert environment["training_set"] == report["training_set"]

    shown = ris(
        "train", "--cache", cache_root, "--runs", tmp_path, "--run", "shown",
        "--split", "refcoco,refcoco+,refcocog", *TINY_RUN,
    )  # fmt: skip
    assert shown.exit_code == 0, shown.output
    flat = " ".join(shown.stdout.split())
    assert "were left out" in flat
    for part in expected.parts:
        assert part.selection in flat


def test_a_model_of_the_category_cannot_merge_other_categories(cache_root: Path, tmp_path: Path) -> None:
    config = load_config(
        recipe="tiny",
        overrides=[
            "data.train=refcoco:train,custom/drawn:train",
            "model.sparse_prompt=category",
            "train.steps=1",
        ],
    )
    with pytest.raises(ConfigError, match="have different categories"):
        train(cache_root, config, tmp_path / "run", device=torch.device("cpu"), random_seed=0)
    assert not (tmp_path / "run").exists()


def test_a_split_of_nothing_that_can_be_learned_says_why(
    cache_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def only_none(*args: Any, **kwargs: Any) -> Any:
        loaded = load_samples(*args, **kwargs)
        return replace(loaded, samples=tuple(sample for sample in loaded.samples if sample.is_no_target))

    monkeypatch.setattr(merge, "load_samples", only_none)
    config = load_config(recipe="tiny", overrides=["data.train=grefcoco:train"])
    with pytest.raises(DataError, match=r"no usable expression: \d+ refer to nothing"):
        train(cache_root, config, tmp_path / "run", device=torch.device("cpu"), random_seed=0)

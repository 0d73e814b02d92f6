"""Every layout of the drawn dataset through the commands: synth, extract, train, eval."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import cli.extract
from ris_cache import FeatureCache
from ris_cache.datasets.load import load_dataset

SIZES = ("--train", 8, "--val", 2, "--test", 2)
SHARING = {"refcoco": "unc", "refcoco+": "unc", "refcocog": "umd", "grefcoco": "unc"}
"""Dataset → split_by of those that share their images."""

SHRUNKEN = (
    "train.steps=3", "train.batch_size=6", "train.eval_every=3", "train.log_every=1", "train.val_samples=12",
    "loss.mask_size=32", "loss.num_points=32",
)  # fmt: skip


@pytest.fixture(scope="module")
def data(ris, tmp_path_factory) -> Path:
    """Data root with every layout."""
    root = tmp_path_factory.mktemp("layouts") / "data"
    result = ris("data", "synth", "--out", root, "--layout", "all", "--seed", 5, *SIZES)
    assert result.exit_code == 0, result.output
    return root


@pytest.fixture(scope="module")
def extract(ris, data: Path) -> Any:
    """Run `ris extract` on a selection; the encoders are loaded once."""
    encoders = cli.extract.load_encoders(
        "tiny", sam_weights=None, clip_weights=None, random_seed=0, arithmetic="float32", device="cpu"
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cli.extract, "load_encoders", lambda *arguments, **options: encoders)

        def extract(selection: str, cache: Path) -> FeatureCache:
            result = ris("extract", "--split", selection, "--data", data, "--cache", cache, "--device", "cpu")
            assert result.exit_code == 0, result.output
            return FeatureCache.open(cache)

        yield extract


def trained(ris: Any, cache: Path, runs: Path, *options: object) -> dict[str, Any]:
    """Train three steps; what `ris train --json` reports."""
    overrides = [word for setting in SHRUNKEN for word in ("--set", setting)]
    result = ris(
        "train", "--cache", cache, "--runs", runs, "--run", "run", "--random-weights", "--device", "cpu", "--json",
        *overrides, *options,
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    report: dict[str, Any] = json.loads(result.stdout)
    return report


def evaluated(ris: Any, cache: Path, runs: Path, *options: object) -> dict[str, dict[str, Any]]:
    """What `ris eval --json` reports, by split."""
    result = ris(
        "eval", "--cache", cache, "--runs", runs, "--run", "run", "--device", "cpu", "--json", *options
    )
    assert result.exit_code == 0, result.output
    return {found["split"]: found for found in json.loads(result.stdout)["results"]}


def num_expressions(data: Path, dataset: str, split_by: str) -> dict[str, int]:
    """By split."""
    expressions = load_dataset(data, dataset, split_by).expressions
    return {
        split: sum(each.split == split for each in expressions)
        for split in dict.fromkeys(each.split for each in expressions)
    }


@pytest.mark.parametrize(
    ("dataset", "split_by", "recipe", "val", "rules"),
    [
        ("refcoco", "unc", "tiny", "val", "ris"),
        ("refcoco+", "unc", "tiny", "val", "ris"),
        ("refcocog", "umd", "tiny", "val", "ris"),
        ("refcocog", "google", "tiny", "val", "ris"),
        ("grefcoco", "unc", "tiny-gres", "val", "gres"),
        ("ref-zom", "final", "tiny-gres", "test", "zom"),
        ("custom", "drawn", "tiny-gres", "val", "gres"),
    ],
)
def test_a_layout_is_extracted_trained_and_scored(
    dataset: str, split_by: str, recipe: str, val: str, rules: str, ris, data: Path, extract, tmp_path: Path
) -> None:
    selection, table = (
        f"{dataset}/{split_by}" if dataset != "custom" else "custom/drawn",
        f"{dataset}.{split_by}",
    )
    counted = num_expressions(data, dataset, split_by)

    cache = extract(selection, tmp_path / "feats")
    found = cache.manifest.datasets[table].splits
    assert {split: counts.expressions for split, counts in found.items()} == counted

    report = trained(
        ris, cache.root, tmp_path / "runs", "--recipe", recipe,
        "--set", f"data.train={selection}:train", "--set", f"data.val={selection}:{val}",
    )  # fmt: skip
    (part,) = report["training_set"]
    assert part["expressions"] == counted["train"]
    assert report["rules"] == rules

    results = evaluated(ris, cache.root, tmp_path / "runs")
    assert {split: result["num_samples"] for split, result in results.items()} == {
        f"{table}:{split}": count for split, count in counted.items() if split != "train"
    }
    assert {result["rules"] for result in results.values()} == {rules}


@pytest.mark.parametrize("dataset", ["grefcoco", "ref-zom"])
def test_a_model_without_a_head_leaves_no_target_expressions_out_of_training_and_is_scored_on_them(
    dataset: str, ris, data: Path, extract, tmp_path: Path
) -> None:
    split_by, val = {"grefcoco": ("unc", "val"), "ref-zom": ("final", "test")}[dataset]
    expressions = load_dataset(data, dataset, split_by).expressions
    of_train = [each for each in expressions if each.split == "train"]
    no_target = sum(each.is_no_target for each in of_train)
    assert 0 < no_target < len(of_train)

    cache = extract(dataset, tmp_path / "feats")
    report = trained(
        ris, cache.root, tmp_path / "runs", "--recipe", "tiny",
        "--set", f"data.train={dataset}:train", "--set", f"data.val={dataset}:{val}",
    )  # fmt: skip
    assert report["left_out"] == no_target

    results = evaluated(ris, cache.root, tmp_path / "runs", "--split", f"{dataset}:{val}")
    (result,) = results.values()
    assert result["num_samples"] == sum(each.split == val for each in expressions)


def test_all_layouts_share_a_cache_and_a_merge_leaves_leaking_images_out(
    ris, data: Path, extract, tmp_path: Path
) -> None:
    extract("refcoco,refcoco+,refcocog,grefcoco", tmp_path / "feats")
    cache = extract("ref-zom,custom/drawn", tmp_path / "feats")
    assert set(cache.manifest.datasets) == {
        "refcoco.unc", "refcoco+.unc", "refcocog.umd", "grefcoco.unc", "ref-zom.final", "custom.drawn",
    }  # fmt: skip
    # RefCOCO's 14 images serve four datasets; Ref-ZOM has 10 of its own and the custom dataset 12.
    assert len(cache) == 14 + 10 + 12

    datasets = {name: load_dataset(data, name, by) for name, by in SHARING.items()}
    held_out = {
        each.image_id
        for dataset in datasets.values()
        for each in dataset.expressions
        if each.split != "train"
    }
    leaking = {
        f"{name}.{SHARING[name]}:train": len(
            {each.image_id for each in datasets[name].expressions if each.split == "train"} & held_out
        )
        for name in ("refcoco", "refcoco+", "refcocog")
    }
    assert min(leaking.values()) > 0

    report = trained(
        ris, cache.root, tmp_path / "runs", "--recipe", "tiny", "--split", "refcoco,refcoco+,refcocog"
    )
    assert {part["selection"]: part["leaking_images"] for part in report["training_set"]} == leaking
    assert report["left_out_for_leakage"] > 0

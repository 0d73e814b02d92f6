"""Training with expressions of no and of many targets, and the two sparse prompts of the supplement's Table 1."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from ris_cache import FeatureCache
from ris_cache.errors import ConfigError, DataError
from ris_train import validation
from ris_train.checkpoint import load_checkpoint, read_metadata
from ris_train.config import RunConfig, load_config
from ris_train.data.text import Tokenizer
from ris_train.live import Segmenter
from ris_train.predict import predict
from ris_train.pretrained import RISModel
from ris_train.run import RunDirectory
from ris_train.scoring import Scores
from ris_train.training import train
from ris_train.validation import Validation

CPU = torch.device("cpu")
SMALL = (
    "train.steps=4",
    "train.batch_size=4",
    "train.log_every=1",
    "train.eval_every=2",
    "train.val_samples=9",
)


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def data_root(tmp_path_factory: pytest.TempPathFactory, ris: Callable[..., Any]) -> Path:
    """A drawn gRefCOCO and Ref-ZOM."""
    root = tmp_path_factory.mktemp("gres") / "data"
    result = ris(
        "data", "synth", "--out", root, "--layout", "grefcoco,ref-zom", "--train", 8, "--val", 4, "--test", 2,
        "--seed", 1,
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    return root


@pytest.fixture(scope="module")
def cache_root(data_root: Path, ris: Callable[..., Any]) -> Path:
    """Its cache by the tiny encoders."""
    root = data_root.parent / "feats"
    result = ris(
        "extract", "--split", "grefcoco,ref-zom", "--data", data_root, "--cache", root, "--preset", "tiny",
        "--random-weights", "--device", "cpu",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    return root


@pytest.fixture(scope="module")
def run(cache_root: Path, ris: Callable[..., Any]) -> RunDirectory:
    """Four steps of the recipe tiny-gres, by the command."""
    runs = cache_root.parent / "runs"
    options = [word for override in SMALL for word in ("--set", override)]
    result = ris(
        "train", "--cache", cache_root, "--recipe", "tiny-gres", "--runs", runs, "--run", "gres",
        "--random-weights", "--device", "cpu", *options, "--json",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    assert (report["rules"], report["headline"]) == ("gres", "gIoU")
    assert report["left_out"] == 0
    return RunDirectory(runs / "gres")


def config_of(*overrides: str, recipe: str = "tiny-gres") -> RunConfig:
    return load_config(recipe=recipe, overrides=[*SMALL, *overrides])


def validation_of(cache_root: Path, *overrides: str, recipe: str = "tiny-gres") -> Validation:
    config = config_of(*overrides, recipe=recipe)
    tokenizer = Tokenizer.load(config.model.bert, config.model.max_tokens)
    return Validation(FeatureCache.open(cache_root), tokenizer, config, CPU)


def test_a_run_logs_the_loss_of_the_head_and_the_scores_of_its_rules(run: RunDirectory) -> None:
    records = [json.loads(line) for line in run.metrics_path.read_text().splitlines()]
    losses = [record for record in records if "loss" in record]
    assert [record["step"] for record in losses] == [1, 2, 3, 4]
    assert all(record["no_target"] > 0 for record in losses)
    scored = [record for record in records if "rules" in record]
    assert [record["step"] for record in scored] == [2, 4]
    for record in scored:
        assert record["rules"] == "gres"
        assert {"gIoU", "cIoU", "N-acc", "T-acc"} <= record.keys()
    best = max(scored, key=lambda record: record["gIoU"])
    metadata = read_metadata(run.checkpoint_path("best"))
    assert (metadata.step, metadata.val["gIoU"]) == (best["step"], best["gIoU"])


def test_a_checkpoint_keeps_its_head(run: RunDirectory) -> None:
    model, metadata = load_checkpoint(run.checkpoint_path("best"), device=CPU)
    assert model.has_no_target_head
    assert metadata.config.model.no_target_head


def test_a_model_without_a_head_leaves_no_target_expressions_out_and_counts_them(
    cache_root: Path, tmp_path: Path
) -> None:
    config = config_of("model.no_target_head=false", "train.steps=1")
    report = train(cache_root, config, tmp_path / "run", device=CPU, random_seed=0)
    (part,) = report.training_set.parts
    expressions = FeatureCache.open(cache_root).expressions("grefcoco.unc")
    of_train = [expression for expression in expressions if expression.split == "train"]
    assert part.no_target == report.training_set.left_out == sum(one.is_no_target for one in of_train) > 0
    assert part.expressions == len(of_train) - part.no_target
    assert report.best.rules == "gres"


def test_ref_zom_trains_and_is_scored_by_its_own_rules(cache_root: Path, tmp_path: Path) -> None:
    config = config_of("data.train=ref-zom:train", "data.val=ref-zom:test", "train.steps=1")
    report = train(cache_root, config, tmp_path / "run", device=CPU, random_seed=0)
    assert (report.best.rules, report.headline) == ("zom", "oIoU")
    assert "Acc" in report.best.values


def test_the_rules_of_validation_can_be_chosen(cache_root: Path) -> None:
    assert validation_of(cache_root).rules.name == "gres"
    assert validation_of(cache_root, "data.rules=rela").rules.name == "rela"
    with pytest.raises(ConfigError, match=r"data\.rules takes one rule set, not 'gres,rela'"):
        validation_of(cache_root, "data.rules=gres,rela")
    with pytest.raises(ConfigError, match=r"refer to nothing, for which the rule set ris has no rule"):
        validation_of(cache_root, "data.rules=ris")


def test_a_model_of_the_category_cannot_be_validated_on_expressions_without_one(cache_root: Path) -> None:
    """Said before training, not at the first evaluation."""
    with pytest.raises(ConfigError, match=r"no annotated category.*model\.sparse_prompt=cls"):
        validation_of(cache_root, "model.sparse_prompt=category")


def test_a_validation_split_without_a_readable_image_is_refused(
    cache_root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded = validation.load_samples
    monkeypatch.setattr(validation, "load_samples", lambda *a, **k: replace(loaded(*a, **k), samples=()))
    with pytest.raises(DataError, match="grefcoco:val has no expression whose image could be read"):
        validation_of(cache_root)


def test_the_best_is_by_the_headline_and_anything_beats_nan(cache_root: Path) -> None:
    found = validation_of(cache_root)

    def scores(value: float) -> Scores:
        return Scores(rules="gres", values={"gIoU": value, "cIoU": 1 - value}, num_samples=1)

    assert found.is_better(scores(0.2), scores(0.1))
    assert not found.is_better(scores(0.1), scores(0.1))
    assert found.is_better(scores(0.0), scores(float("nan")))
    assert not found.is_better(scores(float("nan")), scores(0.0))


def test_both_sparse_prompts_of_table_1_run_from_one_cache_and_seed(tiny_cache: Path, tmp_path: Path) -> None:
    """What is common to both starts from the same weights and sees the same samples in the same order."""
    losses, environments, models = {}, {}, {}
    for prompt in ("category", "cls"):
        config = config_of(f"model.sparse_prompt={prompt}", "train.steps=2", recipe="tiny")
        report = train(tiny_cache, config, tmp_path / prompt, device=CPU, random_seed=0)
        assert report.category_source == {"category": "annotated", "cls": "none"}[prompt]
        records = [json.loads(line) for line in report.run.metrics_path.read_text().splitlines()]
        losses[prompt] = [record["loss"] for record in records if "loss" in record]
        environment = json.loads((report.run.path / "env.json").read_text())
        environments[prompt] = {key: environment[key] for key in ("fingerprint", "weights", "training_set")}
        models[prompt] = load_checkpoint(report.run.checkpoint_path("last"), device=CPU)[0]
    assert environments["category"] == environments["cls"]
    assert len(losses["category"]) == len(losses["cls"]) == 2
    assert losses["category"] != losses["cls"]
    assert {name.split(".")[0] for name in models["category"].state_dict()} - {
        name.split(".")[0] for name in models["cls"].state_dict()
    } == {"category_projection"}


@pytest.mark.parametrize("says_no_target", [True, False])
def test_a_prediction_that_refers_to_nothing_has_an_empty_mask(
    run: RunDirectory, data_root: Path, says_no_target: bool
) -> None:
    """The head is made to say the one or the other, and the mask to be full."""
    segmenter = Segmenter.load(RISModel.from_run(run))
    head = segmenter.model.network.no_target
    assert head is not None
    with torch.no_grad():
        head.layers[2].weight.zero_()
        head.layers[2].bias.copy_(torch.tensor([0.0, 1.0] if says_no_target else [1.0, 0.0]))
    image_path = sorted((data_root / "images" / "train2014").iterdir())[0]
    (prediction,) = predict(image_path, ["the red circle"], segmenter)
    assert prediction.says_no_target is says_no_target
    if says_no_target:
        assert not prediction.mask.any()
        assert prediction.mask.shape == prediction.image.shape[:2]


def test_ris_predict_says_what_the_head_says(
    run: RunDirectory, data_root: Path, tmp_path: Path, ris: Callable[..., Any]
) -> None:
    image_path = sorted((data_root / "images" / "train2014").iterdir())[0]
    options = ("--image", image_path, "--text", "all blue things", "--runs", run.path.parent, "--run", "gres")
    result = ris("predict", *options, "--out", tmp_path, "--device", "cpu", "--json")
    assert result.exit_code == 0, result.output
    says_no_target = json.loads(result.stdout)["says_no_target"]
    assert isinstance(says_no_target, bool)
    shown = ris("predict", *options, "--out", tmp_path, "--device", "cpu")
    words = "refers to nothing in the image" if says_no_target else "refers to something"
    assert words in " ".join(shown.stdout.split())

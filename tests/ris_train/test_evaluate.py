"""Evaluation: pixels counted in the original frame, in any batches, and results that name their terms."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from ris_cache.datasets.records import InstanceRecord, Segmentation
from ris_cache.datasets.segmentation import union_mask
from ris_cache.datasets.selection import Selection, parse_selections
from ris_cache.errors import CheckpointError, ConfigError, FingerprintMismatchError
from ris_cache.store.cache import FeatureCache
from ris_train.checkpoint import CheckpointMetadata, load_checkpoint, save_checkpoint
from ris_train.data.batch import Batch, BatchBuilder
from ris_train.data.samples import Sample, load_samples, shuffle_expressions
from ris_train.data.text import Tokenizer
from ris_train.evaluate import EvaluationResult, GroundTruth, count_samples, score
from ris_train.evaluation_run import evaluate_run
from ris_train.model.segmenter import ModelInputs, ModelOutputs, RisModel
from ris_train.run import RunDirectory
from ris_train.scoring import Counts, ris_scores

TABLE = "refcoco.unc"
CPU = torch.device("cpu")


def box(left: float, top: float, right: float, bottom: float) -> tuple[float, ...]:
    return (left, top, right, top, right, bottom, left, bottom)


def instance(ann_id: int, image_id: int, segmentation: Segmentation) -> InstanceRecord:
    return InstanceRecord(
        ann_id=ann_id, image_id=image_id, category_id=1, segmentation=segmentation, is_crowd=False
    )


def sample(sent_id: int, image_id: int, *ann_ids: int) -> Sample:
    return Sample(
        split="val",
        ref_id=sent_id,
        sent_id=sent_id,
        image_id=image_id,
        text="",
        ann_ids=ann_ids,
        category_id=1,
        clip_category_id=1,
        is_degenerate=False,
    )


# A landscape of 8 × 16 pixels and a portrait of 12 × 4, with boxes along pixel edges.
SIZES = {1: (8, 16), 2: (12, 4)}
INSTANCES = {
    10: instance(10, 1, (box(0, 0, 8, 8),)),  # left half: 64 pixels
    11: instance(11, 1, (box(8, 0, 16, 2),)),  # upper quarter of the right half: 16 pixels
    20: instance(20, 2, (box(2, 0, 4, 12),)),  # right half: 24 pixels
    21: instance(21, 2, ()),  # encloses nothing
}
UPPER, RIGHT, ALL, NOTHING = (torch.full((8, 8), value) for value in (-1.0, -1.0, 1.0, -1.0))
UPPER[:4] = 1
RIGHT[:, 4:] = 1

# Sample, logits on the squashed 8 × 8 frame, and (I, P, G) by hand.
WORKED: list[tuple[Sample, Tensor, tuple[int, int, int]]] = [
    # Upper half of the landscape is 4 × 16 = 64 pixels; half of them lie in the left half.
    (sample(0, 1, 10), UPPER, (32, 64, 64)),
    # The right half is 8 × 8 = 64 pixels and shares none with the left.
    (sample(1, 1, 10), RIGHT, (0, 64, 64)),
    # Both instances: 64 + 16. The right half meets the second alone.
    (sample(2, 1, 10, 11), RIGHT, (16, 64, 80)),
    # The right half of the portrait is 12 × 2 = 24 pixels, all of the target.
    (sample(3, 2, 20), RIGHT, (24, 24, 24)),
    # The upper half is 6 × 4 = 24 pixels, half of them in the target.
    (sample(4, 2, 20), UPPER, (12, 24, 24)),
    (sample(5, 2, 20), ALL, (24, 48, 24)),
    (sample(6, 2, 20), NOTHING, (0, 0, 24)),
    (sample(7, 2, 21), UPPER, (0, 24, 0)),
    (sample(8, 2, 21), NOTHING, (0, 0, 0)),
]
LOGITS = {one.sent_id: logits for one, logits, _ in WORKED}
EXPECTED = {one.sent_id: counts for one, _, counts in WORKED}
SAMPLES = [one for one, _, _ in WORKED]


class SentIds:
    """Builds batches that carry nothing but the samples' sent_ids, as their token ids."""

    def evaluation_batch(self, samples: Sequence[Sample]) -> Batch:
        token_ids = torch.tensor([[one.sent_id] for one in samples])
        none = torch.zeros(len(samples), 0)
        inputs = ModelInputs(
            image_embeddings=none,
            clip_features=none,
            token_ids=token_ids,
            text_mask=token_ids >= 0,
            category_embeddings=None,
        )
        return Batch(samples=tuple(samples), inputs=inputs, targets=None)


class KnownLogits(nn.Module):
    """Answers each sent_id with the logits written above; remembers how it was asked."""

    def __init__(self, fails: bool = False) -> None:
        super().__init__()
        self.fails = fails
        self.batch_sizes: list[int] = []

    def forward(self, inputs: ModelInputs, *, with_dfam: bool = True) -> ModelOutputs:
        assert not self.training, "dropout would be on"
        assert not torch.is_grad_enabled()
        assert not with_dfam, "DFAM costs time and changes no mask"
        if self.fails:
            raise ArithmeticError("overflow")
        sent_ids = inputs.token_ids[:, 0].tolist()
        self.batch_sizes.append(len(sent_ids))
        return ModelOutputs(mask_logits=torch.stack([LOGITS[sent_id] for sent_id in sent_ids]), dfam=None)


def count(
    samples: Sequence[Sample], batch_size: int, model: nn.Module | None = None
) -> list[tuple[int, int, int]]:
    """(I, P, G) of each sample."""
    counts = count_samples(
        KnownLogits() if model is None else model,  # type: ignore[arg-type]
        samples,
        SentIds(),  # type: ignore[arg-type]
        GroundTruth(INSTANCES, SIZES),
        batch_size=batch_size,
    )
    return triples(counts)


def triples(counts: Counts) -> list[tuple[int, int, int]]:
    columns = (counts.intersection, counts.predicted, counts.annotated)
    return list(zip(*(column.tolist() for column in columns), strict=True))


def test_pixels_are_counted_in_the_frame_of_each_image() -> None:
    assert count(SAMPLES, batch_size=4) == list(EXPECTED.values())


@pytest.mark.parametrize("batch_size", [1, 2, 5, 9, 100])
def test_counts_do_not_depend_on_batch_size_or_order(batch_size: int) -> None:
    order = np.random.default_rng(batch_size).permutation(len(SAMPLES)).tolist()
    model = KnownLogits()
    found = count([SAMPLES[index] for index in order], batch_size, model)
    assert found == [EXPECTED[index] for index in order]
    assert sum(model.batch_sizes) == len(SAMPLES)
    assert max(model.batch_sizes) == min(batch_size, len(SAMPLES))


def test_no_samples_count_to_nothing() -> None:
    assert count([], batch_size=4) == []


@pytest.mark.parametrize("training", [True, False])
def test_the_model_is_given_back_in_the_mode_it_was_in(training: bool) -> None:
    model = KnownLogits().train(training)
    count(SAMPLES, batch_size=4, model=model)
    assert model.training is training


def test_the_model_is_given_back_in_its_mode_after_a_failure_too() -> None:
    model = KnownLogits(fails=True).train()
    with pytest.raises(ArithmeticError, match="overflow"):
        count(SAMPLES, batch_size=4, model=model)
    assert model.training


def test_only_annotated_absence_is_counted_as_no_target() -> None:
    """An instance that encloses nothing is still a target."""
    asked = [sample(7, 2, 21), sample(8, 2)]
    counts = count_samples(
        KnownLogits(),  # type: ignore[arg-type]
        asked,
        SentIds(),  # type: ignore[arg-type]
        GroundTruth(INSTANCES, SIZES),
        batch_size=2,
    )
    assert counts.is_no_target.tolist() == [False, True]
    assert not counts.says_no_target.any()


def test_the_truth_is_the_union_of_all_parts_of_all_targets_in_the_images_own_frame() -> None:
    parts = (box(0, 0, 2, 3), box(1, 2, 5, 4))
    instances = {1: instance(1, 1, parts), 2: instance(2, 1, (box(4, 3, 6, 8),))}
    expected = np.zeros((8, 16), dtype=bool)
    expected[0:3, 0:2] = expected[2:4, 1:5] = expected[3:8, 4:6] = True
    truth = GroundTruth(instances, SIZES)
    for _ in range(2):  # the second answer is the one remembered
        assert np.array_equal(truth.of(sample(0, 1, 1, 2)), expected)
    assert truth.size(sample(0, 1, 1)) == (8, 16)
    assert not np.array_equal(truth.of(sample(1, 1, 1)), expected)


def test_a_result_says_what_its_numbers_mean() -> None:
    """Three samples: IoU 32/96, 16/128 and 24/24; ΣI = 72, ΣU = 248."""
    columns = np.array([EXPECTED[index] for index in (0, 2, 3)]).T
    flags = np.zeros(3, dtype=bool)
    counts = Counts(
        intersection=columns[0],
        predicted=columns[1],
        annotated=columns[2],
        is_no_target=flags,
        says_no_target=flags,
    )
    result = EvaluationResult(
        split="refcoco.unc:val",
        scores=score(counts),
        rules="ris",
        category_source="predicted",
        expressions="own",
        quarantined=2,
        degenerate=1,
    )
    assert result.as_dict() == {
        "split": "refcoco.unc:val",
        "grid": "original",
        "binarisation": "logit > 0",
        "rules": "ris",
        "category_source": "predicted",
        "expressions": "own",
        "num_samples": 3,
        "quarantined": 2,
        "degenerate": 1,
        "oIoU": pytest.approx(72 / 248),
        "mIoU": pytest.approx((1 / 3 + 1 / 8 + 1) / 3),
        **{f"Pr@{threshold}": pytest.approx(1 / 3) for threshold in (0.5, 0.6, 0.7, 0.8, 0.9)},
    }
    assert json.loads(json.dumps(result.as_dict())) == result.as_dict()


@dataclass(frozen=True, kw_only=True)
class Trained:
    """The trained run with what scores it."""

    cache: FeatureCache
    run: RunDirectory
    model: RisModel
    metadata: CheckpointMetadata
    samples: tuple[Sample, ...]
    builder: BatchBuilder = field(repr=False)


@pytest.fixture(scope="module")
def trained(tiny_cache: Path, tiny_runs: Path) -> Trained:
    """The run of a few steps, its best model and the validation split."""
    cache, run = FeatureCache.open(tiny_cache), RunDirectory(tiny_runs / "first")
    model, metadata = load_checkpoint(run.checkpoint_path("best"), device=CPU)
    tokenizer = Tokenizer.from_folder(run.tokenizer_dir, metadata.config.model.max_tokens)
    categories = cache.categories(cache.manifest.datasets[TABLE].category_set)
    builder = BatchBuilder(cache, tokenizer, categories=categories, category_source="none", device=CPU)
    samples = load_samples(
        cache, Selection(dataset="refcoco", split_by="unc", split="val"), text="sent"
    ).samples
    return Trained(cache=cache, run=run, model=model, metadata=metadata, samples=samples, builder=builder)


def test_a_real_model_scores_the_same_in_any_batches_and_order(trained: Trained) -> None:
    """Sums are rounded differently beside another padding, which may move a pixel at an outline."""
    truth = GroundTruth(trained.cache.instances(TABLE), trained.cache.sizes)
    samples = trained.samples[:6]
    wide = count_samples(trained.model, samples, trained.builder, truth, batch_size=6)
    narrow = count_samples(trained.model, samples[::-1], trained.builder, truth, batch_size=1)
    assert wide.annotated.tolist() == narrow.annotated[::-1].tolist()
    assert np.abs(wide.predicted - narrow.predicted[::-1]).max() <= 3
    assert np.abs(wide.intersection - narrow.intersection[::-1]).max() <= 3
    expected = [
        union_mask(
            [trained.cache.instances(TABLE)[ann_id].segmentation for ann_id in one.ann_ids],
            frame_size=trained.cache.sizes[one.image_id],
            grid_size=trained.cache.sizes[one.image_id],
        ).sum()
        for one in samples
    ]
    assert wide.annotated.tolist() == expected


def evaluate(
    trained: Trained,
    selection: str | None = "refcoco:val",
    *,
    category_source: str | None = None,
    shuffle_seed: int | None = None,
) -> tuple[list[EvaluationResult], dict[str, str]]:
    return evaluate_run(
        trained.cache.root,
        trained.run,
        checkpoint="best",
        selections=parse_selections(selection) if selection is not None else None,
        category_source=category_source,
        shuffle_seed=shuffle_seed,
        batch_size=8,
        device=CPU,
    )


def test_an_evaluation_scores_the_model_and_is_kept_beside_the_run(trained: Trained) -> None:
    ((result,), labels) = evaluate(trained)
    truth = GroundTruth(trained.cache.instances(TABLE), trained.cache.sizes)
    counts = count_samples(trained.model, trained.samples, trained.builder, truth, batch_size=8)
    assert result.scores == ris_scores(counts)
    assert (result.split, result.rules, result.category_source) == (f"{TABLE}:val", "ris", "none")
    assert labels == trained.metadata.weight_labels
    kept = json.loads((trained.run.path / "eval" / "scores-best-none-refcoco.unc.val.json").read_text())
    assert kept["results"] == [result.as_dict()]
    assert (kept["fingerprint"], kept["step"]) == (trained.metadata.fingerprint, trained.metadata.step)


def test_a_shuffled_evaluation_scores_the_shuffled_expressions(trained: Trained) -> None:
    ((result,), _) = evaluate(trained, shuffle_seed=5)
    truth = GroundTruth(trained.cache.instances(TABLE), trained.cache.sizes)
    shuffled = shuffle_expressions(trained.samples, seed=5)
    counts = count_samples(trained.model, shuffled, trained.builder, truth, batch_size=8)
    assert result.expressions == "shuffled(seed=5)"
    assert result.scores == ris_scores(counts)


@pytest.mark.parametrize(
    ("selection", "splits"),
    [
        (None, ["val", "testA", "testB"]),
        ("refcoco", ["val", "testA", "testB"]),
        ("refcoco:testB,refcoco:val", ["testB", "val"]),
        ("refcoco:test", ["test"]),
    ],
)
def test_a_dataset_without_a_split_is_scored_split_by_split_without_train(
    trained: Trained, selection: str | None, splits: list[str]
) -> None:
    results, _ = evaluate(trained, selection)
    assert [result.split for result in results] == [f"{TABLE}:{split}" for split in splits]


@pytest.mark.parametrize("source", ["annotated", "predicted"])
def test_a_category_for_a_model_that_reads_none_is_refused(trained: Trained, source: str) -> None:
    with pytest.raises(ConfigError, match=r"does not fit sparse_prompt=cls; it reads no category: use none"):
        evaluate(trained, category_source=source)


def test_a_run_without_the_checkpoint_is_refused(trained: Trained, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="There is no checkpoint at"):
        evaluate_run(
            trained.cache.root,
            RunDirectory(tmp_path),
            checkpoint="best",
            selections=None,
            category_source=None,
            shuffle_seed=None,
            batch_size=8,
            device=CPU,
        )


def test_a_cache_that_the_model_was_not_trained_on_is_refused(trained: Trained, tmp_path: Path) -> None:
    other = RunDirectory(tmp_path)
    metadata = trained.metadata.model_copy(update={"fingerprint": "a117d2" * 10})
    save_checkpoint(other.checkpoint_path("best"), trained.model, metadata)
    with pytest.raises(FingerprintMismatchError, match="a117d2a117d2"):
        evaluate_run(
            trained.cache.root,
            other,
            checkpoint="best",
            selections=None,
            category_source=None,
            shuffle_seed=None,
            batch_size=8,
            device=CPU,
        )

"""Evaluation: pixels counted in the original frame, in any batches, and results that name their terms."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Generator, Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ris_cache.datasets.records import InstanceRecord, Segmentation
from ris_cache.datasets.segmentation import union_mask
from ris_cache.datasets.selection import Selection, parse_selections
from ris_cache.errors import CheckpointError, ConfigError, FingerprintMismatchError
from ris_cache.store.cache import FeatureCache
from ris_train.checkpoint import CheckpointMetadata, load_checkpoint, save_checkpoint
from ris_train.data.batch import BatchBuilder
from ris_train.data.samples import Sample, load_samples, shuffle_expressions
from ris_train.data.text import Tokenizer
from ris_train.evaluate import (
    GroundTruth,
    KeepMask,
    _unpack_by_shifts,
    count_samples,
    score,
)
from ris_train.evaluation_run import evaluate_run
from ris_train.model.segmenter import ModelInputs, ModelOutputs, RisModel
from ris_train.run import RunDirectory
from ris_train.scoring import RULES, VIEWS, Counts, rules_named, truth_mask
from ris_train.scoring.predictions import mask_name
from ris_train.scoring.results import RunEvaluation, score_split
from ris_train.scoring.samples import SampleTable
from ris_train.sharding import gather, image_batches, shard

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
        table_name=TABLE,
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

    def read_ahead(
        self, parts: Iterable[Sequence[Sample]], *, is_grouped: bool
    ) -> Generator[list[int], None, None]:
        """The sent_ids of each part stand for its features."""
        assert is_grouped
        for part in parts:
            yield [one.sent_id for one in part]

    def grouped_inputs(self, samples: Sequence[Sample], features: list[int]) -> ModelInputs:
        assert features == [one.sent_id for one in samples]
        token_ids = torch.tensor([[one.sent_id] for one in samples])
        none = torch.zeros(len(samples), 0)
        return ModelInputs(
            image_embeddings=none,
            clip_features=none,
            token_ids=token_ids,
            text_mask=token_ids >= 0,
            category_embeddings=None,
        )


class KnownLogits(nn.Module):
    """Answers each sent_id with the logits written above; remembers how it was asked."""

    def __init__(self, *, fails: bool = False, says_no_target: set[int] | None = None) -> None:
        super().__init__()
        self.fails = fails
        self.says_no_target = says_no_target
        self.asked: list[list[int]] = []

    @property
    def has_no_target_head(self) -> bool:
        return self.says_no_target is not None

    def forward(self, inputs: ModelInputs, *, with_dfam: bool = True) -> ModelOutputs:
        assert not self.training, "dropout would be on"
        assert not torch.is_grad_enabled()
        assert with_dfam is self.has_no_target_head, "DFAM costs time, and only a head reads it"
        if self.fails:
            raise ArithmeticError("overflow")
        sent_ids = inputs.token_ids[:, 0].tolist()
        self.asked.append(sent_ids)
        flags = None
        if self.says_no_target is not None:
            says = torch.tensor([float(sent_id in self.says_no_target) for sent_id in sent_ids])
            flags = torch.stack([1 - says, says], dim=1)
        logits = torch.stack([LOGITS[sent_id] for sent_id in sent_ids])
        return ModelOutputs(mask_logits=logits, dfam=None, no_target_logits=flags)


def count_views(
    samples: Sequence[Sample],
    views: Sequence[str],
    batch_size: int = 4,
    model: nn.Module | None = None,
    keep_mask: KeepMask | None = None,
) -> dict[str, Counts]:
    return count_samples(
        KnownLogits() if model is None else model,  # type: ignore[arg-type]
        samples,
        SentIds(),  # type: ignore[arg-type]
        GroundTruth({TABLE: INSTANCES}, SIZES),
        views=[VIEWS[name] for name in views],
        batch_size=batch_size,
        keep_mask=keep_mask,
    )


def count(
    samples: Sequence[Sample], batch_size: int, model: nn.Module | None = None
) -> list[tuple[int, int, int]]:
    """(I, P, G) of each sample in the original frame."""
    return triples(count_views(samples, ["original"], batch_size, model)["original"])


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
    assert sorted(sent_id for batch in model.asked for sent_id in batch) == sorted(EXPECTED)
    assert max(map(len, model.asked)) <= batch_size


def test_all_expressions_of_an_image_are_asked_together() -> None:
    model = KnownLogits()
    mixed = [SAMPLES[index] for index in (3, 0, 4, 1, 5, 2)]
    count(mixed, 4, model)
    assert model.asked == [[3, 4, 5], [0, 1, 2]]


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
    counts = count_views([sample(7, 2, 21), sample(8, 2)], ["original"])["original"]
    assert counts.is_no_target.tolist() == [False, True]
    assert not counts.says_no_target.any()
    assert not counts.has_head


def test_the_decisions_of_a_head_are_kept_beside_masks_that_stay_as_they_are() -> None:
    model = KnownLogits(says_no_target={1, 8})
    counts = count_views(SAMPLES, ["original", "480"], 2, model)
    for found in counts.values():
        assert found.has_head
        assert found.says_no_target.tolist() == [one.sent_id in (1, 8) for one in SAMPLES]
    assert triples(counts["original"]) == list(EXPECTED.values())


@pytest.mark.parametrize("batch_size", [1, 4, 100])
def test_every_view_of_one_pass_counts_what_a_plain_loop_counts(batch_size: int) -> None:
    """The plain loop: one sample at a time, probabilities by sigmoid, numpy."""
    random = np.random.default_rng(0)
    noisy = {one.sent_id: torch.from_numpy(random.normal(size=(8, 8)).astype(np.float32)) for one in SAMPLES}
    model = KnownLogits()
    expected: dict[str, list[tuple[int, int, int]]] = {name: [] for name in VIEWS}
    for one in SAMPLES:
        segmentations = [INSTANCES[ann_id].segmentation for ann_id in one.ann_ids]
        for name, view in VIEWS.items():
            size = view.grid_size(SIZES[one.image_id])
            logits = F.interpolate(noisy[one.sent_id].double()[None, None], size=size, mode="bilinear")
            mask = torch.sigmoid(logits)[0, 0].numpy() > view.threshold
            truth = truth_mask(segmentations, view, frame_size=SIZES[one.image_id])
            expected[name].append((int((mask & truth).sum()), int(mask.sum()), int(truth.sum())))
    original = dict(LOGITS)
    try:
        LOGITS.update(noisy)
        counts = count_views(SAMPLES, list(VIEWS), batch_size, model)
    finally:
        LOGITS.update(original)
    assert {name: triples(found) for name, found in counts.items()} == expected
    assert len(model.asked) == len(list(image_batches([one.image_id for one in SAMPLES], batch_size)))


def test_each_predicted_mask_is_given_away_once_by_its_name() -> None:
    """Views that differ in the ground truth alone share a mask; 0.35 gives one of its own."""
    kept: dict[tuple[int, str], np.ndarray] = {}

    def keep(one: Sample, name: str, mask: np.ndarray) -> None:
        assert (one.sent_id, name) not in kept
        kept[one.sent_id, name] = mask

    counts = count_views(SAMPLES, list(VIEWS), keep_mask=keep)
    assert {name for _, name in kept} == {"original", "original-p35", "1024", "480"}
    assert len(kept) == 4 * len(SAMPLES)
    for view in VIEWS.values():
        found = [int(kept[one.sent_id, mask_name(view)].sum()) for one in SAMPLES]
        assert found == counts[view.name].predicted.tolist()
    assert kept[0, "original"].shape == (8, 16)


def test_bits_are_unpacked_on_any_device_as_numpy_unpacks_them() -> None:
    bits = np.random.default_rng(0).integers(0, 256, (3, 7), dtype=np.uint8)
    assert np.array_equal(_unpack_by_shifts(torch.from_numpy(bits)).numpy(), np.unpackbits(bits, axis=1))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpu_counts_what_the_cpu_counts(trained: Trained) -> None:
    truth = GroundTruth.from_cache(trained.cache, [TABLE])
    device = torch.device("cuda")
    model, metadata = load_checkpoint(trained.run.checkpoint_path("best"), device=device)
    tokenizer = Tokenizer.from_folder(trained.run.tokenizer_dir, metadata.config.model.max_tokens)
    categories = trained.cache.categories(trained.cache.manifest.datasets[TABLE].category_set)
    builder = BatchBuilder(
        trained.cache, tokenizer, categories=categories, category_source="none", device=device
    )
    views = list(VIEWS.values())
    on_gpu = count_samples(model, trained.samples, builder, truth, views=views, batch_size=8)
    on_cpu = count_samples(trained.model, trained.samples, trained.builder, truth, views=views, batch_size=8)
    for view in views:
        one, other = on_gpu[view.name], on_cpu[view.name]
        assert one.annotated.tolist() == other.annotated.tolist()
        pixels = np.maximum(other.predicted, 1000)
        assert (np.abs(one.predicted - other.predicted) <= 0.01 * pixels).all()
        assert (np.abs(one.intersection - other.intersection) <= 0.01 * pixels).all()


def test_shards_counted_apart_and_gathered_are_the_whole() -> None:
    image_ids = [one.image_id for one in SAMPLES]
    whole = count_views(SAMPLES, ["original", "480"])
    for world in (1, 2, 3):
        parts = [
            count_views([SAMPLES[index] for index in shard(image_ids, rank, world)], ["original", "480"])
            for rank in range(world)
        ]
        gathered = gather(image_ids, parts)
        for name, counts in whole.items():
            assert triples(gathered[name]) == triples(counts)
            assert repr(RULES["ris"].score(gathered[name])) == repr(RULES["ris"].score(counts))


def test_a_result_says_what_its_numbers_mean() -> None:
    """Three samples: IoU 32/96, 16/128 and 24/24; ΣI = 72, ΣU = 248."""
    counts = count_views([SAMPLES[index] for index in (0, 2, 3)], ["original", "original-p35"])
    result = score_split(
        "refcoco.unc:val",
        counts,
        rules_named("cris,ris"),
        default_rules="ris",
        category_source="predicted",
        expressions="own",
        quarantined=2,
        degenerate=1,
    )
    ris = {
        "oIoU": pytest.approx(72 / 248),
        "mIoU": pytest.approx((1 / 3 + 1 / 8 + 1) / 3),
        **{f"Pr@{threshold}": pytest.approx(1 / 3) for threshold in (0.5, 0.6, 0.7, 0.8, 0.9)},
    }
    terms = {"grid": "original", "ground_truth": "polygons on the grid", "overlap": "union"}
    found = result.as_dict()
    scores = found.pop("scores")
    assert found == {
        "split": "refcoco.unc:val",
        "rules": "ris",
        **terms,
        "threshold": 0.5,
        "binarisation": "logit > 0",
        "category_source": "predicted",
        "expressions": "own",
        "num_samples": 3,
        "num_no_target": 0,
        "quarantined": 2,
        "degenerate": 1,
        "is_whole": True,
        **ris,
    }
    assert list(scores) == ["cris", "ris"]
    assert scores["ris"] == {**terms, "threshold": 0.5, "binarisation": "logit > 0", "num_samples": 3, **ris}
    assert scores["cris"]["binarisation"] == "probability > 0.35"
    assert json.loads(json.dumps(result.as_dict())) == result.as_dict()


def test_a_rule_set_without_a_rule_for_no_target_samples_gives_a_reason_instead_of_scores() -> None:
    counts = count_views([sample(0, 1, 10), sample(8, 2)], ["original"])
    result = score_split(
        "grefcoco.unc:val", counts, rules_named("ris,gres"), default_rules="gres", category_source="none",
        expressions="own", quarantined=0, degenerate=0,
    )  # fmt: skip
    assert list(result.scores) == ["gres"]
    assert result.headline == result.scores["gres"]
    assert result.refused == {"ris": "no rule for no-target samples, of which there are 1"}
    assert result.as_dict()["scores"]["ris"]["refused"] == result.refused["ris"]


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


def count_one(trained: Trained, samples: Sequence[Sample], truth: GroundTruth, *, batch_size: int) -> Counts:
    views = [VIEWS["original"]]
    counts = count_samples(trained.model, samples, trained.builder, truth, views=views, batch_size=batch_size)
    return counts["original"]


def test_a_real_model_scores_the_same_in_any_batches_and_order(trained: Trained) -> None:
    """Sums are rounded differently beside another padding, which may move a pixel at an outline."""
    truth = GroundTruth.from_cache(trained.cache, [TABLE])
    samples = trained.samples[:6]
    wide = count_one(trained, samples, truth, batch_size=6)
    narrow = count_one(trained, samples[::-1], truth, batch_size=1)
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
) -> RunEvaluation:
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
    found = evaluate(trained)
    (result,) = found.results
    truth = GroundTruth.from_cache(trained.cache, [TABLE])
    counts = count_one(trained, trained.samples, truth, batch_size=8)
    assert result.scores == {"ris": score(counts)}
    assert (result.split, result.rules, result.category_source) == (f"{TABLE}:val", "ris", "none")
    assert found.weight_labels == trained.metadata.weight_labels
    assert (found.run, found.checkpoint, found.step) == ("first", "best", trained.metadata.step)
    content = trained.run.checkpoint_path("best").read_bytes()
    assert found.checkpoint_sha256 == hashlib.sha256(content).hexdigest()
    kept = json.loads((trained.run.path / "eval" / "scores-best-none-refcoco.unc.val.json").read_text())
    assert kept["results"] == [result.as_dict()]
    assert (kept["fingerprint"], kept["step"]) == (trained.metadata.fingerprint, trained.metadata.step)
    assert kept["checkpoint_sha256"] == found.checkpoint_sha256


def test_the_samples_of_an_evaluation_are_kept_with_what_they_mean(trained: Trained) -> None:
    found = evaluate(trained, "refcoco:val,refcoco:testA")
    name = "scores-best-none-refcoco.unc.val+refcoco.unc.testA"
    table = SampleTable.read(trained.run.path / "eval" / f"{name}.parquet")
    kept = json.loads((trained.run.path / "eval" / f"{name}.json").read_text())
    assert [result["split"] for result in kept["results"]] == [f"{TABLE}:val", f"{TABLE}:testA"]
    for result in kept["results"]:
        split = result["split"].partition(":")[2]
        of_split = table.select(np.array([found == split for found in table.columns["split"]]))
        assert RULES["ris"].score(of_split.counts("original")).values["oIoU"] == result["oIoU"]
        assert len(of_split) == result["num_samples"]
    expected = {
        "method": "first", "source": "run", "checkpoint": "best", "category_source": "none", "text": "sent",
        "checkpoint_sha256": found.checkpoint_sha256,
        "expressions": "own", "fingerprint": trained.metadata.fingerprint, "weights": trained.metadata.weight_labels,
    }  # fmt: skip
    assert {key: table.metadata[key] for key in expected} == expected


def test_a_checkpoint_that_training_writes_anew_while_it_is_evaluated_is_not_scored(
    trained: Trained, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = RunDirectory(tmp_path)
    path = other.checkpoint_path("best")
    save_checkpoint(path, trained.model, trained.metadata)

    def load_while_training_goes_on(path: Path, *, device: torch.device) -> Any:
        save_checkpoint(path, trained.model, trained.metadata.model_copy(update={"step": 99}))
        return load_checkpoint(path, device=device)

    monkeypatch.setattr("ris_train.evaluation_run.load_checkpoint", load_while_training_goes_on)
    with pytest.raises(CheckpointError, match=r"was written anew while it was read. Evaluate again"):
        evaluate(replace(trained, run=other))
    assert not (tmp_path / "eval").exists()


def test_a_sample_of_two_selections_is_predicted_once(trained: Trained) -> None:
    results = evaluate(trained, "refcoco:test,refcoco:testA,refcoco:testB").results
    whole, *parts = results
    assert whole.num_samples == sum(part.num_samples for part in parts)
    (path,) = (trained.run.path / "eval").glob("*unc.test+*.parquet")
    assert len(SampleTable.read(path)) == whole.num_samples


def test_all_rule_sets_come_from_one_pass(trained: Trained) -> None:
    (alone,) = evaluate(trained).results
    results = evaluate_run(
        trained.cache.root, trained.run, checkpoint="best", selections=parse_selections("refcoco:val"),
        category_source=None, shuffle_seed=None, batch_size=8, device=CPU, rules="all",
    ).results  # fmt: skip
    assert list(results[0].scores) == list(RULES)
    assert results[0].rules == "ris"
    assert results[0].scores["ris"] == alone.scores["ris"]


def test_a_shuffled_evaluation_scores_the_shuffled_expressions(trained: Trained) -> None:
    (result,) = evaluate(trained, shuffle_seed=5).results
    truth = GroundTruth.from_cache(trained.cache, [TABLE])
    shuffled = shuffle_expressions(trained.samples, seed=5)
    counts = count_one(trained, shuffled, truth, batch_size=8)
    assert result.expressions == "shuffled(seed=5)"
    assert result.scores == {"ris": score(counts)}


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
    results = evaluate(trained, selection).results
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

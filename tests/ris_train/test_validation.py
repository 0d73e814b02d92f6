"""Validation of a run: what each of several processes scores."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

import pytest
import torch

import ris_train.validation
from ris_cache import FeatureCache
from ris_cache.errors import StoppedError
from ris_train.config import load_config
from ris_train.data.samples import Sample
from ris_train.data.text import Tokenizer
from ris_train.ranks import Ranks
from ris_train.sharding import shard
from ris_train.validation import Validation

CPU = torch.device("cpu")


class Untouched(torch.nn.Identity):
    """A model that nothing is asked of."""

    has_no_target_head = False


class CountedError(Exception):
    """A process has counted its part."""


class Alone(Ranks):
    """One of several processes, whose others are not there: one of them is to stop, or none."""

    questions: list[bool]
    stops_at: int | None

    def any(self, flag: bool) -> bool:
        self.questions.append(flag)
        return flag or len(self.questions) == self.stops_at

    def collect(self, value: object) -> NoReturn:
        raise CountedError


def alone(rank: int, world: int, *, stops_at: int | None = None) -> Alone:
    kind = type("_Alone", (Alone,), {"questions": [], "stops_at": stops_at})
    return kind(rank, world, CPU)


@pytest.fixture(scope="module")
def validation(tiny_cache: Path) -> Validation:
    config = load_config(recipe="tiny", overrides=["train.val_samples=29", "train.batch_size=1"])
    tokenizer = Tokenizer.load(config.model.bert, config.model.max_tokens)
    return Validation(FeatureCache.open(tiny_cache), tokenizer, config, CPU)


@pytest.fixture
def given(monkeypatch: pytest.MonkeyPatch) -> list[Sequence[Sample]]:
    """What is counted is noted instead, batch after batch of one sample."""
    parts: list[Sequence[Sample]] = []

    def count(
        model: object, samples: Sequence[Sample], *rest: Any, should_stop: Callable[[], bool], **options: Any
    ) -> None:
        parts.append([])
        for sample in samples:
            if should_stop():
                raise StoppedError("It was stopped.")
            parts[-1].append(sample)

    monkeypatch.setattr(ris_train.validation, "count_samples", count)
    monkeypatch.setattr(ris_train.validation, "BATCHES_PER_QUESTION", 3)
    return parts


def test_an_evaluation_of_one_process_is_stopped_before_the_next_batch(validation: Validation) -> None:
    with pytest.raises(StoppedError, match="evaluation on refcoco:val was stopped"):
        validation.score(Untouched(), Ranks(0, 1, CPU), should_stop=lambda: True)  # type: ignore[arg-type]


def test_an_evaluation_that_another_process_was_asked_to_stop_is_stopped_at_the_same_question(
    validation: Validation, given: list[Sequence[Sample]]
) -> None:
    with pytest.raises(StoppedError, match="evaluation on refcoco:val was stopped"):
        validation.score(Untouched(), alone(0, 2, stops_at=3))  # type: ignore[arg-type]
    assert len(given[0]) == 2 * 3
    shards = [shard(validation.samples.column("image_id").tolist(), rank, 5) for rank in range(5)]
    last_question = math.ceil(max(map(len, shards)) / 3)
    shortest = min(range(5), key=lambda rank: len(shards[rank]))
    assert len(shards[shortest]) <= 3 * (last_question - 1), (
        "it is through with its part before that question"
    )
    with pytest.raises(StoppedError, match="evaluation on refcoco:val was stopped"):
        validation.score(Untouched(), alone(shortest, 5, stops_at=last_question))  # type: ignore[arg-type]
    assert len(given[1]) == len(shards[shortest])


def test_a_process_says_what_it_was_asked_between_two_questions(
    validation: Validation, given: list[Sequence[Sample]]
) -> None:
    ranks, requests = alone(0, 2), iter([False, True, *[False] * 20])
    with pytest.raises(StoppedError):
        validation.score(Untouched(), ranks, should_stop=lambda: next(requests))  # type: ignore[arg-type]
    assert ranks.questions == [False, True]


@pytest.mark.parametrize("world", [2, 5])
def test_each_process_scores_images_of_its_own_and_all_score_every_sample(
    validation: Validation, given: list[Sequence[Sample]], world: int
) -> None:
    """Scores alone would not tell: processes that each score everything come to the same ones.

    All ask as often whether to stop, though some have more batches, or one of them would wait for ever.
    """
    processes = [alone(rank, world) for rank in range(world)]
    for ranks in processes:
        with pytest.raises(CountedError):
            validation.score(Untouched(), ranks)  # type: ignore[arg-type]
    lengths = [len(samples) for samples in given]
    assert min(lengths) < max(lengths)
    assert [len(ranks.questions) for ranks in processes] == [math.ceil(max(lengths) / 3)] * world
    images = [{sample.image_id for sample in samples} for samples in given]
    assert sum(map(len, images)) == len(set().union(*images))
    sent_ids = [sample.sent_id for samples in given for sample in samples]
    assert len(sent_ids) == len(set(sent_ids)) == 29

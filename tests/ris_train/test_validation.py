"""Validation of a run: what each of several processes scores."""

from __future__ import annotations

from collections.abc import Sequence
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
from ris_train.validation import Validation

CPU = torch.device("cpu")


class Untouched(torch.nn.Identity):
    """A model that nothing is asked of."""

    has_no_target_head = False


class CountedError(Exception):
    """A process has counted its part."""


class Alone(Ranks):
    """One of several processes, whose others are not there."""

    def collect(self, value: object) -> NoReturn:
        raise CountedError


class Stopped(Ranks):
    """One of two processes, of which the other was stopped within its part."""

    def collect(self, value: object) -> list[Any]:
        assert value is not None, "this one was not stopped"
        return [value, None]


@pytest.fixture
def validation(tiny_cache: Path) -> Validation:
    config = load_config(recipe="tiny", overrides=["train.val_samples=29"])
    tokenizer = Tokenizer.load(config.model.bert, config.model.max_tokens)
    return Validation(FeatureCache.open(tiny_cache), tokenizer, config, CPU)


def test_an_evaluation_that_one_process_was_asked_to_stop_is_stopped_on_all(
    validation: Validation, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(StoppedError, match="evaluation on refcoco:val was stopped"):
        validation.score(Untouched(), Ranks(0, 1, CPU), should_stop=lambda: True)  # type: ignore[arg-type]
    monkeypatch.setattr(ris_train.validation, "count_samples", lambda *rest, **options: {})
    with pytest.raises(StoppedError, match="evaluation on refcoco:val was stopped"):
        validation.score(Untouched(), Stopped(0, 2, CPU))  # type: ignore[arg-type]


@pytest.mark.parametrize("world", [2, 5])
def test_each_process_scores_images_of_its_own_and_all_score_every_sample(
    validation: Validation, monkeypatch: pytest.MonkeyPatch, world: int
) -> None:
    """Scores alone would not tell: processes that each score everything come to the same ones."""
    given: list[Sequence[Sample]] = []

    def count(model: object, samples: Sequence[Sample], *rest: Any, **options: Any) -> None:
        given.append(samples)

    monkeypatch.setattr(ris_train.validation, "count_samples", count)
    for rank in range(world):
        with pytest.raises(CountedError):
            validation.score(Untouched(), Alone(rank, world, CPU))  # type: ignore[arg-type]
    images = [{sample.image_id for sample in samples} for samples in given]
    assert sum(map(len, images)) == len(set().union(*images))
    sent_ids = [sample.sent_id for samples in given for sample in samples]
    assert len(sent_ids) == len(set(sent_ids)) == 29

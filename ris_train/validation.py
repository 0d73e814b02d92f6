"""The selection that chooses the best checkpoint, ready to be scored again and again while a model trains."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch

from ris_cache.errors import ConfigError, DataError, StoppedError
from ris_cache.store.cache import FeatureCache
from ris_train.config import RunConfig
from ris_train.data.batch import BatchBuilder, default_category_source
from ris_train.data.merge import require_one_split
from ris_train.data.samples import Sample, Samples, load_samples
from ris_train.data.text import Tokenizer
from ris_train.evaluate import count_samples
from ris_train.model.segmenter import RisModel
from ris_train.ranks import Ranks
from ris_train.scoring import RuleSet, Scores, default_rules, rules_named
from ris_train.sharding import gather, image_batches, shard
from ris_train.truth import GroundTruth

BATCHES_PER_QUESTION = 8
"""How often processes that share an evaluation agree on going on, for which all wait for the slowest."""


class Validation:
    """`data.val` with its rule set: `data.rules`, or the one of its dataset.

    `size`, `label`, `rules` and `truth` say what is scored, by what and against what.

    Args:
        cache: holds the selection.
        tokenizer: the run's.
        config: `data`, and of `train` how many expressions are scored and in what batches.
        device: where the model is.
        samples: score these instead of the selection, by its rule set; they are of the training tables.

    Raises:
        CacheMissError: the cache lacks the selection.
        DataError: it has no expression whose image can be read.
        ConfigError: several splits, several rule sets or an unknown one, or one that cannot score the
            selection.
    """

    def __init__(
        self,
        cache: FeatureCache,
        tokenizer: Tokenizer,
        config: RunConfig,
        device: torch.device,
        *,
        samples: Sequence[Sample] | None = None,
    ) -> None:
        selection = require_one_split(config.data.val, "data.val")
        self.label = config.data.val if samples is None else f"{len(samples)} of {config.data.train}"
        if samples is None:
            samples = load_samples(cache, selection, text=config.data.text).samples
        if not samples:
            raise DataError(f"{config.data.val} has no expression whose image could be read; choose another.")
        self.size = len(samples)
        self.rules = _rules(
            config.data.rules, selection.dataset, has_no_target=any(sample.is_no_target for sample in samples)
        )
        limit = config.train.val_samples
        if limit is not None and limit < len(samples):
            samples = [samples[index * len(samples) // limit] for index in range(limit)]
        self._samples = Samples.of(samples)
        self._batch_size = config.train.batch_size
        self._builder = BatchBuilder(
            cache,
            tokenizer,
            categories=cache.categories(cache.manifest.datasets[samples[0].table_name].category_set),
            category_source=default_category_source(config),
            device=device,
        )
        # Without this, a category that is missing would come to light at the first evaluation, hours later.
        self._builder.require_categories(samples)
        self.truth = GroundTruth.from_cache(cache, sorted({sample.table_name for sample in samples}))

    @property
    def samples(self) -> Samples:
        """What is scored: the selection, or `train.val_samples` of it."""
        return self._samples

    def score(
        self, model: RisModel, ranks: Ranks | None = None, *, should_stop: Callable[[], bool] = lambda: False
    ) -> Scores:
        """Score a model on at most `train.val_samples` expressions.

        Args:
            model: the same on all processes.
            ranks: processes that share the work, each its own images; every one returns the scores of all.
            should_stop: asked before each batch; of several processes all hear of it every few batches.

        Raises:
            StoppedError: it said so, on any of the processes; then all raise it.
        """
        ranks = ranks or Ranks(0, 1, torch.device("cpu"))
        image_ids = self._samples.column("image_id").tolist()
        stop = SharedStop(should_stop, ranks, num_batches=self._most_batches(image_ids, ranks.world))
        try:
            own = count_samples(
                model,
                self._samples.select(shard(image_ids, ranks.rank, ranks.world)),
                self._builder,
                self.truth,
                views=[self.rules.view],
                batch_size=self._batch_size,
                should_stop=stop,
            )
            stop.ask_the_rest()
        except StoppedError:
            raise StoppedError(f"The evaluation on {self.label} was stopped.") from None
        return self.rules.score(gather(image_ids, ranks.collect(own))[self.rules.view.name])

    def _most_batches(self, image_ids: Sequence[int], world: int) -> int:
        """Batches of the process that has the most."""
        shards = (shard(image_ids, rank, world) for rank in range(world))
        return max(
            sum(1 for _ in image_batches([image_ids[place] for place in places], self._batch_size))
            for places in shards
        )

    def is_better(self, new: Scores, best: Scores) -> bool:
        """Compare by the headline metric; NaN, from masks that are all empty, is worse than any score."""
        old = best.values[self.rules.headline]
        return math.isnan(old) or new.values[self.rules.headline] > old


class SharedStop:
    """Before a batch of an evaluation: whether one of the processes that share it was asked to stop.

    Processes agree before every `BATCHES_PER_QUESTION`-th batch, and each as often as the others, whose
    batches may be a few more: an answer takes all of them.

    Args:
        should_stop: of this process.
        ranks: all of them.
        num_batches: of the process that has the most.
    """

    def __init__(self, should_stop: Callable[[], bool], ranks: Ranks, *, num_batches: int) -> None:
        self._should_stop = should_stop
        self._ranks = ranks
        self._batches_per_question = 1 if ranks.world == 1 else BATCHES_PER_QUESTION
        self._questions_left = math.ceil(num_batches / self._batches_per_question)
        self._num_batches = 0
        self._is_asked_to = False

    def __call__(self) -> bool:
        """Ask before the next batch."""
        self._is_asked_to = self._is_asked_to or self._should_stop()
        is_due = self._num_batches % self._batches_per_question == 0
        self._num_batches += 1
        return is_due and self._ask()

    def ask_the_rest(self) -> None:
        """Take part in the questions that are left, after the last batch.

        Raises:
            StoppedError: one of the processes was asked to stop.
        """
        while self._questions_left:
            if self._ask():
                raise StoppedError("An evaluation was stopped.")

    def _ask(self) -> bool:
        self._questions_left -= 1
        return self._ranks.any(self._is_asked_to)


def _rules(chosen: str | None, dataset: str, *, has_no_target: bool) -> RuleSet:
    found = rules_named(chosen or default_rules(dataset, has_no_target=has_no_target))
    if len(found) != 1:
        raise ConfigError(f"data.rules takes one rule set, not {chosen!r}.", key="data.rules")
    (rules,) = found
    if has_no_target and not rules.takes_no_target:
        raise ConfigError(
            f"data.val has expressions that refer to nothing, for which the rule set {rules.name} has no "
            "rule. Choose by one that has, such as --set data.rules=gres.",
            key="data.rules",
        )
    return rules

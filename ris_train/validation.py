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
from ris_train.scoring import Counts, RuleSet, Scores, default_rules, rules_named
from ris_train.sharding import gather, shard
from ris_train.truth import GroundTruth


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

    def score(
        self, model: RisModel, ranks: Ranks | None = None, *, should_stop: Callable[[], bool] = lambda: False
    ) -> Scores:
        """Score a model on at most `train.val_samples` expressions.

        Args:
            model: the same on all processes.
            ranks: processes that share the work, each its own images; every one returns the scores of all.
            should_stop: asked before each batch.

        Raises:
            StoppedError: it said so, on any of the processes; then all raise it.
        """
        ranks = ranks or Ranks(0, 1, torch.device("cpu"))
        image_ids = self._samples.column("image_id").tolist()
        try:
            own: dict[str, Counts] | None = count_samples(
                model,
                self._samples.select(shard(image_ids, ranks.rank, ranks.world)),
                self._builder,
                self.truth,
                views=[self.rules.view],
                batch_size=self._batch_size,
                should_stop=should_stop,
            )
        except StoppedError:
            own = None
        parts = [part for part in ranks.collect(own) if part is not None]
        if len(parts) < ranks.world:
            raise StoppedError(f"The evaluation on {self.label} was stopped.")
        return self.rules.score(gather(image_ids, parts)[self.rules.view.name])

    def is_better(self, new: Scores, best: Scores) -> bool:
        """Compare by the headline metric; NaN, from masks that are all empty, is worse than any score."""
        old = best.values[self.rules.headline]
        return math.isnan(old) or new.values[self.rules.headline] > old


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

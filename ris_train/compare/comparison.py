"""Compare methods: score each split by each rule set, with intervals, on what all methods scored."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ris_train.compare.bootstrap import CONFIDENCE, Interval, interval_of, resampled_values
from ris_train.compare.methods import Method, SplitKey
from ris_train.compare.pairing import PairedSplit, pair_splits, require_view
from ris_train.compare.published import AS_PUBLISHED
from ris_train.compare.terms import Ratio, metric_terms
from ris_train.scoring.rules import RULES, RuleSet, default_rules


@dataclass(frozen=True, slots=True, kw_only=True)
class Estimate:
    """A score with what the bootstrap says of it; intervals are None where it says nothing.

    Attributes:
        value: fraction, NaN where undefined.
        difference: to the first method with samples; None for that method, and where it lacks the split.
    """

    value: float
    interval: Interval | None
    difference: float | None = None
    difference_interval: Interval | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class SplitScores:
    """One split by one rule set.

    Attributes:
        estimates: by index of the method, by metric in the rule set's order.
    """

    paired: PairedSplit
    rules: RuleSet
    num_images: int
    estimates: Mapping[int, Mapping[str, Estimate]]

    @property
    def key(self) -> SplitKey:
        """Table name and split."""
        return self.paired.key


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """Everything that tables are laid out from.

    Attributes:
        methods: in the order asked for; the first with samples is what differences are to.
        by_rules: scored splits by rule set, in the order of the splits; empty if all methods are published.
        refused: split and rule set of what was asked for beside others and has no rule for its no-target
            samples.
    """

    methods: tuple[Method, ...]
    by_rules: Mapping[str, tuple[SplitScores, ...]]
    num_resamples: int
    seed: int
    refused: tuple[tuple[SplitKey, str], ...] = ()

    def as_dict(self) -> dict[str, Any]:
        """Everything as plain values, fractions in full precision, for JSON."""
        return {
            "methods": [_method_dict(method) for method in self.methods],
            "bootstrap": {
                "confidence": CONFIDENCE,
                "resamples": self.num_resamples,
                "seed": self.seed,
                "over": "images",
            },
            "splits": [self._split_dict(scored) for splits in self.by_rules.values() for scored in splits],
            "refused": [
                {"table": table, "split": split, "rules": rules} for (table, split), rules in self.refused
            ],
        }

    def _split_dict(self, scored: SplitScores) -> dict[str, Any]:
        return {
            "table": scored.key[0],
            "split": scored.key[1],
            "rules": scored.rules.name,
            "grid": describe_view(scored.rules),
            "num_samples": scored.paired.num_samples,
            "num_images": scored.num_images,
            "scores": {
                self.methods[index].name: {
                    "left_out": scored.paired.left_out[index],
                    "metrics": {name: estimate_dict(estimate) for name, estimate in estimates.items()},
                }
                for index, estimates in scored.estimates.items()
            },
        }


def compare(
    methods: Sequence[Method],
    *,
    rules: Sequence[RuleSet] | None = None,
    num_resamples: int = 2000,
    seed: int = 0,
) -> Comparison:
    """Score methods side by side.

    Args:
        methods: to compare; published ones are carried along.
        rules: rule sets to score by; None for the one that each dataset is scored by. Of several, those
            without a rule for a split's no-target samples leave it to the others.
        num_resamples: of the bootstrap; 0 for none.
        seed: of the bootstrap.

    Raises:
        DataError: samples that cannot be paired, or no-target samples and no rule set with a rule for them.
        ConfigError: a method was not scored on the grid that a rule set needs.
    """
    by_rules: dict[str, list[SplitScores]] = {}
    refused: list[tuple[SplitKey, str]] = []
    splits = pair_splits(methods)
    for paired in splits:
        chosen = rules if rules is not None else (_default_rules(paired.key[0], splits),)
        is_any_fit = not _has_no_target(paired) or any(rule_set.takes_no_target for rule_set in chosen)
        for rule_set in chosen:
            if is_any_fit and _has_no_target(paired) and not rule_set.takes_no_target:
                refused.append((paired.key, rule_set.name))
                continue
            scored = _score_split(methods, paired, rule_set, num_resamples=num_resamples, seed=seed)
            by_rules.setdefault(rule_set.name, []).append(scored)
    return Comparison(
        methods=tuple(methods),
        by_rules={name: tuple(splits) for name, splits in by_rules.items()},
        num_resamples=num_resamples,
        seed=seed,
        refused=tuple(refused),
    )


def describe_view(rules: RuleSet) -> str:
    """Say in words on which pixels a rule set compares."""
    view = rules.view
    if view.grid == "original":
        words = "original frame"
    else:
        drawn = "polygons drawn there" if view.raster == "polygons" else "truth resized by nearest neighbour"
        words = f"{view.grid} × {view.grid} squash, {drawn}"
    words += ", pixels under exactly one polygon" if view.overlap == "one" else ""
    return f"{words}, probability > {view.threshold:g}"


def estimate(
    terms: Mapping[int, Mapping[str, Ratio]],
    paired: PairedSplit,
    *,
    reference: int | None,
    num_resamples: int,
    seed: int,
    values: Mapping[int, Mapping[str, float]] | None = None,
) -> dict[int, dict[str, Estimate]]:
    """Estimate each metric of each method, all from the same resamples.

    Args:
        terms: by index of the method, by metric, over the samples of `paired`.
        reference: index of the method that differences are to; None for no differences.
        values: what the rule set itself returns, where it was asked; else the terms' own.
    """
    drawn = resampled_values(
        [dict(metrics) for metrics in terms.values()],
        paired.images,
        num_resamples=num_resamples,
        seed=seed,
    )
    resampled = dict(zip(terms, drawn, strict=True))

    def one(index: int, metric: str) -> Estimate:
        value = values[index][metric] if values is not None else terms[index][metric].value
        samples = resampled[index][metric]
        interval = None if math.isnan(value) else interval_of(samples)
        if reference is None or index == reference or reference not in terms:
            return Estimate(value=value, interval=interval)
        base = values[reference][metric] if values is not None else terms[reference][metric].value
        is_defined = not math.isnan(value - base)
        return Estimate(
            value=value,
            interval=interval,
            difference=value - base,
            difference_interval=interval_of(samples - resampled[reference][metric]) if is_defined else None,
        )

    return {index: {metric: one(index, metric) for metric in metrics} for index, metrics in terms.items()}


def reference_of(methods: Sequence[Method]) -> int | None:
    """Index of the method that differences are to: the first that has samples."""
    return next((index for index, method in enumerate(methods) if not method.is_published), None)


def estimate_dict(estimated: Estimate) -> dict[str, Any]:
    """An estimate as plain values."""
    return {
        "value": estimated.value,
        "interval": _ends(estimated.interval),
        "difference": estimated.difference,
        "difference_interval": _ends(estimated.difference_interval),
    }


def _default_rules(table_name: str, splits: Sequence[PairedSplit]) -> RuleSet:
    """The rule set of a dataset: one for all its splits, as `ris eval` has it."""
    has_no_target = any(_has_no_target(paired) for paired in splits if paired.key[0] == table_name)
    return RULES[default_rules(table_name.partition(".")[0], has_no_target=has_no_target)]


def _has_no_target(paired: PairedSplit) -> bool:
    return bool(np.any(paired.any_table.columns["is_no_target"]))


def _score_split(
    methods: Sequence[Method], paired: PairedSplit, rules: RuleSet, *, num_resamples: int, seed: int
) -> SplitScores:
    for index, table in paired.tables.items():
        require_view(methods[index], table, rules.view.name, rules=rules.name)
    counts = {index: table.counts(rules.view.name) for index, table in paired.tables.items()}
    return SplitScores(
        paired=paired,
        rules=rules,
        num_images=len(np.unique(paired.images)),
        estimates=estimate(
            {index: metric_terms(rules, counted) for index, counted in counts.items()},
            paired,
            reference=reference_of(methods),
            num_resamples=num_resamples,
            seed=seed,
            values={index: rules.score(counted).values for index, counted in counts.items()},
        ),
    )


def _method_dict(method: Method) -> dict[str, Any]:
    labels = {
        "name": method.name,
        "origin": method.origin,
        "category_source": method.category_source,
        "text": method.text,
        "expressions": method.expressions,
        "size": method.size,
        "weights": method.weights,
    }
    if method.published is None:
        return labels
    return {
        **labels,
        "rules": AS_PUBLISHED,
        "published": [
            {
                "supplement_table": value.table,
                "table": value.table_name,
                "split": value.split,
                "metric": value.metric,
                "value": value.fraction,
                "printed": value.printed,
            }
            for value in method.published.values
        ],
    }


def _ends(interval: Interval | None) -> list[float] | None:
    return None if interval is None else [interval.low, interval.high]

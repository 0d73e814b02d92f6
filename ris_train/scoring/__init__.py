"""Scoring, usable alone: count each sample on the pixels of a view, then apply a rule set."""

from ris_train.scoring.counts import Counts, SampleCount, collect, concatenate, count_pixels, with_min_area
from ris_train.scoring.rules import RULES, RuleSet, Scores, default_rules, rules_named
from ris_train.scoring.views import VIEWS, View, truth_mask

__all__ = [
    "RULES",
    "VIEWS",
    "Counts",
    "RuleSet",
    "SampleCount",
    "Scores",
    "View",
    "collect",
    "concatenate",
    "count_pixels",
    "default_rules",
    "rules_named",
    "truth_mask",
    "with_min_area",
]

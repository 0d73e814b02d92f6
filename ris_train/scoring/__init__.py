"""Scoring, usable alone: count each sample, then apply a rule set."""

from ris_train.scoring.counts import Counts, SampleCount, collect, count_pixels
from ris_train.scoring.protocols import RULES, Scores, ris_scores

__all__ = ["RULES", "Counts", "SampleCount", "Scores", "collect", "count_pixels", "ris_scores"]

"""Compare runs, predictions and published rows: tables, intervals, histograms, breakdowns."""

from ris_train.compare.breakdown import BINNINGS, break_down, breakdown_dict, breakdown_tables
from ris_train.compare.comparison import Comparison, compare
from ris_train.compare.formats import FORMATS, SUFFIXES
from ris_train.compare.histogram import count_histograms, draw_histograms
from ris_train.compare.intervals import interval_tables
from ris_train.compare.layouts import LAYOUTS, lay_out
from ris_train.compare.methods import Method, find_methods
from ris_train.compare.published import published_tables

__all__ = [
    "BINNINGS",
    "FORMATS",
    "LAYOUTS",
    "SUFFIXES",
    "Comparison",
    "Method",
    "break_down",
    "breakdown_dict",
    "breakdown_tables",
    "compare",
    "count_histograms",
    "draw_histograms",
    "find_methods",
    "interval_tables",
    "lay_out",
    "published_tables",
]

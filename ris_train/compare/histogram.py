"""Histograms of the samples' IoU, as Fig. 1 of the supplement: one panel per split, methods side by side."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import numpy.typing as npt

from ris_cache.errors import ConfigError
from ris_cache.store.files import write_atomically
from ris_train.compare.comparison import Comparison, SplitScores, describe_view
from ris_train.compare.methods import split_title

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

SUFFIXES = (".svg", ".png")
NUM_BINS = (10, 20)
_PALETTE = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#F0E442", "#000000")
"""Okabe and Ito's colours, told apart with every common colour blindness."""
_STYLE = MappingProxyType(
    {
        "svg.hashsalt": "ris",  # ids of the SVG's elements, else drawn at random
        "svg.fonttype": "path",  # the same picture where the font is missing
        "font.family": "DejaVu Sans",  # comes with matplotlib
        "font.size": 9.0,
        "text.parse_math": False,  # names are text, whatever they hold
        "axes.titlesize": 10.0,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.edgecolor": "#666666",
        "axes.axisbelow": True,
        "axes.grid": True,
        "axes.grid.axis": "y",
        "grid.color": "#e3e3e3",
        "grid.linewidth": 0.7,
        "hatch.linewidth": 0.6,
    }
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Histogram:
    """One panel.

    Attributes:
        title: of the split.
        edges: float64[B + 1], from 0 to 1.
        counts: int64[B] by method, named with its category source: samples with IoU in [edge, next edge); the
            last bin has its end too.
        num_without: samples that have no IoU by the rule set, such as no-target ones of Ref-ZOM.
    """

    title: str
    rules: str
    grid: str
    edges: npt.NDArray[np.float64]
    counts: dict[str, npt.NDArray[np.int64]]
    num_samples: int
    num_without: int


def count_histograms(comparison: Comparison, *, num_bins: int = 20) -> tuple[Histogram, ...]:
    """Count the samples of each split by their IoU, as the rule set has it.

    Args:
        num_bins: 10 or 20.

    Raises:
        ConfigError: another number of bins, or nothing but published rows.
    """
    if num_bins not in NUM_BINS:
        raise ConfigError(f"A histogram has 10 or 20 bins; got {num_bins}.", found=num_bins)
    if not comparison.by_rules:
        raise ConfigError("Published rows have no samples for a histogram; add a run or a samples table.")
    return tuple(
        _count(comparison, scored, num_bins) for splits in comparison.by_rules.values() for scored in splits
    )


def draw_histograms(histograms: Sequence[Histogram], path: Path) -> None:
    """Write the figure as SVG or PNG, by the suffix; the same histograms give the same bytes.

    Raises:
        ConfigError: another suffix, or matplotlib is not installed.
    """
    if path.suffix not in SUFFIXES:
        raise ConfigError(f"A histogram is written as .svg or .png; got {path}.", path=path)
    try:
        import matplotlib
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ConfigError(
            "Drawing a histogram needs matplotlib, which is not installed: pip install 'ris[plots]'."
        ) from error
    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        cast(Any, matplotlib.rcParams).update(_STYLE)
        figure = Figure(layout="constrained")
        _draw(figure, histograms)
        buffer = BytesIO()
        # Neither the date nor the version of matplotlib goes into the file.
        metadata = {"Date": None, "Creator": None} if path.suffix == ".svg" else {"Software": None}
        figure.savefig(buffer, format=path.suffix[1:], dpi=160, metadata=metadata)
    write_atomically(path, buffer.getvalue())


def _count(comparison: Comparison, scored: SplitScores, num_bins: int) -> Histogram:
    # Quotients, not multiples: 0.1 · 3 would lie above 0.3, and a sample of IoU 0.3 below its edge.
    edges = np.arange(num_bins + 1) / num_bins
    counts = {}
    num_without = 0
    for index, table in scored.paired.tables.items():
        ious = scored.rules.sample_ious(table.counts(scored.rules.view.name))
        num_without = int(np.isnan(ious).sum())
        method = comparison.methods[index]
        label = f"{method.name} (category source: {method.category_source})"
        counts[label] = np.histogram(ious[~np.isnan(ious)], bins=edges)[0].astype(np.int64)
    return Histogram(
        title=split_title(scored.key),
        rules=scored.rules.name,
        grid=describe_view(scored.rules),
        edges=edges,
        counts=counts,
        num_samples=scored.paired.num_samples,
        num_without=num_without,
    )


def _draw(figure: Figure, histograms: Sequence[Histogram]) -> None:
    from matplotlib.patches import Patch

    num_columns = min(3, len(histograms))
    num_rows = -(-len(histograms) // num_columns)
    figure.set_size_inches(max(5.2, 4.4 * num_columns), 3.2 * num_rows + 0.9)
    axes = figure.subplots(num_rows, num_columns, squeeze=False)
    names = list(dict.fromkeys(name for histogram in histograms for name in histogram.counts))
    for place, panel in enumerate(axes.flat):
        if place < len(histograms):
            _draw_panel(panel, histograms[place], names)
        else:
            panel.set_axis_off()
    figure.suptitle("IoU of the samples", x=0.01, ha="left", fontsize=12, fontweight="bold")
    figure.legend(
        [Patch(**_look(number)) for number in range(len(names))],
        names,
        loc="outside lower center",
        ncols=min(4, len(names)),
        frameon=False,
    )


def _look(number: int) -> dict[str, Any]:
    """Colour of a method's bars; past the palette it starts again, hatched."""
    return {
        "facecolor": _PALETTE[number % len(_PALETTE)],
        "hatch": "////" if number >= len(_PALETTE) else None,
        "edgecolor": "white",
        "linewidth": 0.4,
    }


def _draw_panel(panel: Axes, histogram: Histogram, names: Sequence[str]) -> None:
    from matplotlib.ticker import MaxNLocator

    width = float(histogram.edges[1] - histogram.edges[0])
    bar = 0.86 * width / max(1, len(histogram.counts))
    for position, (name, counts) in enumerate(histogram.counts.items()):
        panel.bar(
            histogram.edges[:-1] + 0.07 * width + position * bar,
            counts,
            width=bar,
            align="edge",
            **_look(names.index(name)),
        )
    subtitle = f"{histogram.num_samples:,} samples"
    if histogram.num_without:
        subtitle += f", {histogram.num_without:,} without IoU"
    panel.set_title(f"{histogram.title} · {subtitle}", loc="left", pad=17)
    panel.text(
        0.0, 1.025, f"rules {histogram.rules} · {histogram.grid}", transform=panel.transAxes,
        fontsize=7.5, color="#555555",
    )  # fmt: skip
    panel.set_xlim(0, 1)
    panel.set_xticks([0, 0.2, 0.4, 0.6, 0.8, 1])
    panel.set_xlabel("IoU")
    panel.set_ylabel("samples")
    panel.yaxis.set_major_locator(MaxNLocator(nbins=6, integer=True))
    panel.tick_params(length=3, color="#666666")

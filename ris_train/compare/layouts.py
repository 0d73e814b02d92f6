"""Lay a comparison out as the supplement's Tables 1, 3, 4 and 5 do, or plainly."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import MappingProxyType

import numpy as np

from ris_cache.errors import ConfigError
from ris_train.compare.comparison import Comparison, SplitScores, describe_view, reference_of
from ris_train.compare.footnotes import refusals, row_notes
from ris_train.compare.methods import SplitKey, dataset_title, ordered_splits, split_title
from ris_train.compare.published import AS_PUBLISHED, published_tables
from ris_train.compare.tables import ABSENT, Block, Cell, Column, Notes, Row, Table, count_cell, score_cell
from ris_train.compare.terms import MEAN_NAMES, OVERALL_NAMES
from ris_train.scoring.rules import RuleSet

_FACTS = ("text", "rules", "grid")
_LEAD = ("Methods", "category source")
_SPLIT_TITLES = MappingProxyType({"val": "Val", "testA": "TestA", "testB": "TestB", "test": "Test"})
_PUBLISHED_METRICS = ("oIoU", "mIoU", "Pr@0.5", "Pr@0.6", "Pr@0.7", "Pr@0.8", "Pr@0.9")


@dataclass(frozen=True, slots=True, kw_only=True)
class _Part:
    """What tables of one rule set show.

    Attributes:
        rules: None where every method is published.
        scored: splits that were scored by them.
        layout: which one; auto until it is decided.
        is_first: whether this part shows the splits that only published rows have.
        is_chosen: whether the layout was chosen to fit what there is: splits that nothing was scored on are
            left out then, and so are published rows that another table has.
    """

    comparison: Comparison
    rules: RuleSet | None
    scored: tuple[SplitScores, ...]
    layout: str
    is_first: bool
    is_chosen: bool

    @property
    def rules_name(self) -> str:
        """As tables print it."""
        return AS_PUBLISHED if self.rules is None else self.rules.name

    @property
    def grid(self) -> str:
        """As tables print it."""
        return AS_PUBLISHED if self.rules is None else describe_view(self.rules)

    @property
    def metrics(self) -> tuple[str, ...]:
        """Every metric there is."""
        return _PUBLISHED_METRICS if self.rules is None else self.rules.metrics

    @property
    def table(self) -> str | None:
        """Number of the supplement's table that the layout follows; None for plain."""
        return self.layout.removeprefix("table") if self.layout.startswith("table") else None

    @property
    def indices(self) -> tuple[int, ...]:
        """Methods to show: all, or of published rows alone those that the supplement's table has."""
        return tuple(
            index
            for index, method in enumerate(self.comparison.methods)
            if self.rules is not None
            or not self.is_chosen
            or method.published is None
            or any(value.table == self.table for value in method.published.values)
        )

    @property
    def keys(self) -> tuple[SplitKey, ...]:
        """Splits to show: those scored; for a layout that was asked for also those of its own table."""
        keys = {scored.key for scored in self.scored}
        if self.rules is None or (self.is_first and not self.is_chosen):
            keys |= {
                (value.table_name, value.split)
                for method in self.comparison.methods
                if method.published is not None
                for value in method.published.values
                if value.table == self.table or (self.table is None and self.rules is None)
            }
        return ordered_splits(keys)

    def metric(self, names: Sequence[str]) -> str:
        """The metric that goes by one of several names.

        Raises:
            ConfigError: the rule set has none of them.
        """
        found = next((name for name in names if name in self.metrics), None)
        if found is None:
            raise ConfigError(
                f"The layout {self.layout} shows {' or '.join(names)}, which the rule set {self.rules_name} "
                "does not have. Use --layout plain, or another rule set with --rules.",
                layout=self.layout,
                rules=self.rules_name,
            )
        return found

    def cell(self, index: int, key: SplitKey, metric: str) -> Cell:
        """The score of a method; nothing where it has none."""
        published = self.comparison.methods[index].published
        if published is not None:
            value = published.value(*key, metric, table=self.table)
            return Cell() if value is None else score_cell(value.fraction, printed=value.printed)
        estimates = next((scored.estimates for scored in self.scored if scored.key == key), {})
        return score_cell(estimates[index][metric].value) if index in estimates else Cell()

    def has_value(self, index: int, metric: str) -> bool:
        """Whether a method has this score on any split."""
        return any(self.cell(index, key, metric).value is not None for key in self.keys)

    def num_samples(self, key: SplitKey) -> Cell:
        """How many samples of a split were scored."""
        counts = [scored.paired.num_samples for scored in self.scored if scored.key == key]
        return count_cell(counts[0]) if counts else Cell()


def lay_out(comparison: Comparison, layout: str = "auto") -> tuple[Table, ...]:
    """Make the tables of a comparison.

    Args:
        layout: `auto`, `plain`, or `table1`, `table3`, `table4`, `table5` after the supplement. auto takes
            table1 for one dataset, table3 for several, plain where a rule set has other scores than oIoU,
            mIoU and Pr@X, and for published rows alone every table that has any of them.

    Raises:
        ConfigError: a rule set has no such metric as the layout shows.
    """
    if layout not in LAYOUTS:
        raise ConfigError(f"There is no layout {layout!r}; there are {', '.join(LAYOUTS)}.", found=layout)
    tables: list[Table] = []
    for position, scored in enumerate(list(comparison.by_rules.values()) or [()]):
        rules = scored[0].rules if scored else None
        for name in _choose(comparison, scored) if layout == "auto" else (layout,):
            part = _Part(
                comparison=comparison,
                rules=rules,
                scored=scored,
                layout=name,
                is_first=position == 0,
                is_chosen=layout == "auto",
            )
            tables += _MAKERS[name](part)
    return tuple(tables)


def _choose(comparison: Comparison, scored: Sequence[SplitScores]) -> tuple[str, ...]:
    if not scored:
        numbers = {
            value.table
            for method in comparison.methods
            if method.published is not None
            for value in method.published.values
        }
        return tuple(f"table{number}" for number in sorted(numbers))
    metrics = set(scored[0].rules.metrics)
    if not {"oIoU", "mIoU"} <= metrics or not {"gIoU", "Acc"}.isdisjoint(metrics):
        return ("plain",)
    return ("table1",) if len({split.key[0] for split in scored}) == 1 else ("table3",)


def _table1(part: _Part) -> list[Table]:
    """Splits across, oIoU and mIoU under each; one table per dataset."""
    metrics = (part.metric(OVERALL_NAMES), part.metric(MEAN_NAMES))
    tables = []
    for table_name in dict.fromkeys(key[0] for key in part.keys):
        keys = [key for key in part.keys if key[0] == table_name]
        notes = Notes()
        cells = [(key, metric) for key in keys for metric in metrics]
        rows = [_row(part, index, cells, notes) for index in part.indices]
        tables.append(
            _finish(
                part,
                f"{dataset_title(table_name)}: {metrics[0]} and {metrics[1]} by split",
                [Column(_split_title(key[1]), metric) for key, metric in cells],
                [Block(title="", rows=tuple(rows)), *_samples(part, [key for key, _ in cells])],
                notes,
            )
        )
    return tables


def _table3(part: _Part) -> list[Table]:
    """Datasets and their splits across; a block of oIoU, a block of mIoU."""
    metrics = (part.metric(OVERALL_NAMES), part.metric(MEAN_NAMES))
    notes = Notes()
    blocks = []
    for metric, other in (metrics, metrics[::-1]):
        rows = [
            _row(part, index, [(key, metric) for key in part.keys], notes)
            for index in part.indices
            # As in the supplement, published rows without any number here stand where they have some.
            if not part.comparison.methods[index].is_published
            or part.has_value(index, metric)
            or not part.has_value(index, other)
        ]
        blocks.append(Block(title=metric, rows=tuple(rows)))
    columns = [Column(dataset_title(key[0]), _split_title(key[1])) for key in part.keys]
    blocks += _samples(part, part.keys)
    return [_finish(part, f"{metrics[0]} and {metrics[1]}", columns, blocks, notes)]


def _table4(part: _Part) -> list[Table]:
    """Pr@X across; a block for each split."""
    metrics = [name for name in part.metrics if name.startswith("Pr@")]
    part.metric(metrics or ["Pr@X"])
    return [_by_split(part, "Pr@X: share of samples whose IoU reaches X", metrics)]


def _table5(part: _Part) -> list[Table]:
    """Datasets and their splits across, oIoU alone, with the size of each method."""
    metric = part.metric(OVERALL_NAMES)
    notes = Notes()
    cells = [(key, metric) for key in part.keys]
    rows = [
        _row(part, index, cells, notes, lead=(part.comparison.methods[index].size or ABSENT,))
        for index in part.indices
    ]
    columns = [Column(dataset_title(key[0]), _split_title(key[1])) for key in part.keys]
    blocks = [Block(title="", rows=tuple(rows)), *_samples(part, part.keys, num_lead=2)]
    return [_finish(part, metric, columns, blocks, notes, lead=("Size",))]


def _plain(part: _Part) -> list[Table]:
    """Every metric across; a block for each split."""
    return [_by_split(part, "Scores", part.metrics)]


def _by_split(part: _Part, title: str, metrics: Sequence[str]) -> Table:
    notes = Notes()
    blocks = []
    for key in part.keys:
        rows = []
        for index in part.indices:
            method = part.comparison.methods[index]
            samples = Cell() if method.is_published or key not in method.splits else part.num_samples(key)
            rows.append(
                _row(
                    part, index, [(key, metric) for metric in metrics], notes, keys=part.keys, last=(samples,)
                )
            )
        blocks.append(Block(title=split_title(key), rows=tuple(rows)))
    columns = [*(Column("", metric) for metric in metrics), Column("", "samples")]
    return _finish(part, title, columns, blocks, notes)


_MAKERS: MappingProxyType[str, Callable[[_Part], list[Table]]] = MappingProxyType(
    {"table1": _table1, "table3": _table3, "table4": _table4, "table5": _table5, "plain": _plain}
)
LAYOUTS = ("auto", *_MAKERS)
"""What `--layout` offers."""


def _row(
    part: _Part,
    index: int,
    cells: Sequence[tuple[SplitKey, str]],
    notes: Notes,
    *,
    keys: Sequence[SplitKey] = (),
    lead: tuple[str, ...] = (),
    last: tuple[Cell, ...] = (),
) -> Row:
    """One method's row.

    Args:
        cells: split and metric of each.
        keys: splits that its footnotes are about; those of the cells by default.
        lead: what stands between category source and scores.
        last: what follows the scores.
    """
    method = part.comparison.methods[index]
    marks = notes.mark(
        row_notes(
            part.comparison,
            index,
            keys=keys or tuple(dict.fromkeys(key for key, _ in cells)),
            metrics=tuple(dict.fromkeys(metric for _, metric in cells)),
            scored=part.scored,
            table=part.table,
        )
    )
    rules = (AS_PUBLISHED, AS_PUBLISHED) if method.is_published else (part.rules_name, part.grid)
    return Row(
        label=method.name,
        marks=marks,
        lead=(method.category_source, *lead),
        cells=(*(part.cell(index, key, metric) for key, metric in cells), *last),
        facts=(method.text, *rules),
    )


def _samples(part: _Part, keys: Sequence[SplitKey], *, num_lead: int = 1) -> list[Block]:
    """The last line: how many samples each column is over; none where nothing was scored."""
    if not part.scored:
        return []
    cells = tuple(part.num_samples(key) for key in keys)
    return [Block(title="", rows=(Row(label="samples", lead=("",) * num_lead, cells=cells),))]


def _finish(
    part: _Part,
    title: str,
    columns: Sequence[Column],
    blocks: Sequence[Block],
    notes: Notes,
    *,
    lead: tuple[str, ...] = (),
) -> Table:
    return Table(
        title=title,
        lead_titles=(*_LEAD, *lead),
        columns=tuple(columns),
        blocks=tuple(blocks),
        caption=_caption(part),
        notes=tuple(notes.texts),
        fact_titles=_FACTS,
    )


def _caption(part: _Part) -> str:
    parts = [f"rules: {part.rules_name}", f"grid: {part.grid}", "scores in percent"]
    reference = reference_of(part.comparison.methods)
    if part.scored and reference is not None:
        parts.append(f"weights: {part.comparison.methods[reference].weights}")
        parts += [*_degenerate(part.scored), *refusals(part.comparison)]
    if any(method.is_published for method in part.comparison.methods):
        parts.append(f"published rows: {published_tables().source}")
    return " · ".join(parts)


def _degenerate(scored: Sequence[SplitScores]) -> list[str]:
    """How many samples have an annotation that encloses nothing, where there are any."""
    number = sum(int(np.count_nonzero(split.paired.any_table.columns["is_degenerate"])) for split in scored)
    return [f"{number:,} samples of a degenerate annotation, scored with an empty truth"] if number else []


def _split_title(split: str) -> str:
    return _SPLIT_TITLES.get(split, split)

"""Bring the samples of several methods together: the same expressions, in one order, of the same truth."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ris_cache.errors import ConfigError, DataError
from ris_train.compare.methods import Method, SplitKey, ordered_splits, split_title
from ris_train.scoring.samples import SampleTable


@dataclass(frozen=True, slots=True, kw_only=True)
class PairedSplit:
    """One split as several methods scored it.

    Attributes:
        key: table name and split.
        tables: by index of the method: its rows, the same N expressions in the same order for all.
        left_out: by index of the method: how many of its samples another method lacks.
    """

    key: SplitKey
    tables: Mapping[int, SampleTable]
    left_out: Mapping[int, int]

    @property
    def any_table(self) -> SampleTable:
        """A table to read what does not depend on the method from."""
        return next(iter(self.tables.values()))

    @property
    def num_samples(self) -> int:
        """N, expressions compared."""
        return len(self.images)

    @property
    def images(self) -> npt.NDArray[np.int64]:
        """int64[N], the image of each sample."""
        return np.asarray(self.any_table.columns["image_id"], dtype=np.int64)


def pair_splits(methods: Sequence[Method]) -> tuple[PairedSplit, ...]:
    """Pair each split over the methods that have samples of it.

    Raises:
        DataError: a method scored an expression twice, two methods share no expression of a split, or the
            same expression has another image, truth or no-target flag: other versions of the dataset.
    """
    keys = ordered_splits({key for method in methods for key in method.splits})
    return tuple(_pair(methods, key) for key in keys)


def require_view(method: Method, table: SampleTable, view: str, *, rules: str) -> None:
    """Refuse a table without the counts that a rule set needs.

    Raises:
        ConfigError: it lacks them.
    """
    if view not in table.views:
        raise ConfigError(
            f"{method.name} ({method.origin}) has no counts on the grid {view!r} that the rule set {rules!r} "
            f"needs; it has {', '.join(table.views) or 'none'}. Score it again with --rules {rules}.",
            method=method.name,
            view=view,
            known=tuple(table.views),
        )


def _pair(methods: Sequence[Method], key: SplitKey) -> PairedSplit:
    present = {index: method.splits[key] for index, method in enumerate(methods) if key in method.splits}
    rows = {index: _rows(methods[index], table) for index, table in present.items()}
    first, *others = rows
    common = [sample for sample in rows[first] if all(sample in rows[index] for index in others)]
    if not common:
        named = ", ".join(methods[index].name for index in rows)
        raise DataError(
            f"{named} share no expression of {split_title(key)} by (ref_id, sent_id). They were scored on "
            "different parts or versions of the dataset.",
            split=key,
        )
    tables = {
        index: _take(table, [rows[index][sample] for sample in common]) for index, table in present.items()
    }
    for index in others:
        _require_same_truth(methods[first], tables[first], methods[index], tables[index], common)
    return PairedSplit(
        key=key,
        tables=tables,
        left_out={index: len(rows[index]) - len(common) for index in rows},
    )


def _rows(method: Method, table: SampleTable) -> dict[tuple[int, int], int]:
    """Return the row of each (ref_id, sent_id)."""
    samples = list(zip(_ints(table, "ref_id"), _ints(table, "sent_id"), strict=True))
    rows = {sample: row for row, sample in enumerate(samples)}
    if len(rows) != len(samples):
        twice = next(sample for row, sample in enumerate(samples) if rows[sample] != row)
        raise DataError(
            f"{method.name} ({method.origin}) holds the expression ref_id {twice[0]}, sent_id {twice[1]} "
            "twice; which one counts cannot be told. Score it again.",
            method=method.name,
            ref_id=twice[0],
            sent_id=twice[1],
        )
    return rows


def _ints(table: SampleTable, column: str) -> list[int]:
    values: list[int] = np.asarray(table.columns[column], dtype=np.int64).tolist()
    return values


def _take(table: SampleTable, rows: list[int]) -> SampleTable:
    return table.select(np.array(rows, dtype=np.int64))


def _require_same_truth(
    one: Method,
    one_table: SampleTable,
    other: Method,
    other_table: SampleTable,
    samples: Sequence[tuple[int, int]],
) -> None:
    truths = [f"G:{view}" for view in one_table.views if view in other_table.views]
    for column in ("image_id", "is_no_target", *truths):
        mine, theirs = np.asarray(one_table.columns[column]), np.asarray(other_table.columns[column])
        differ = np.flatnonzero(mine != theirs)
        if len(differ):
            ref_id, sent_id = samples[differ[0]]
            raise DataError(
                f"{one.name} and {other.name} were scored against different annotation: ref_id {ref_id}, "
                f"sent_id {sent_id} has {column} {mine[differ[0]]} there and {theirs[differ[0]]} here, and "
                f"{len(differ)} of {len(samples)} samples differ so. Score both on one version of the data.",
                ref_id=ref_id,
                sent_id=sent_id,
                column=column,
                num_different=len(differ),
            )

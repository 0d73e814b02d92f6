"""Read samples tables of others: what `SampleTable.read` finds well-formed need not be possible.

A damaged or hand-made file may hold more intersection than prediction, negative numbers, or names that move a
terminal's cursor. Such a file is refused here, by name, before anything is computed from it.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from ris_cache.errors import DataError
from ris_train.scoring.samples import SampleTable

_LARGEST = 2**40
"""Pixels that no image has; sums over as many samples as there are still fit into int64."""
_NATURAL = ("num_targets", "num_same_category", "num_words")


def read_table(path: Path) -> SampleTable:
    """Read a samples table and make sure that scores can be taken from it.

    Raises:
        DataError: it is missing, unreadable, no samples table, or holds what no evaluation counts.
    """
    if not path.is_file():
        raise DataError(f"There is no samples table {path}. `ris eval` and `ris score` write one.", path=path)
    table = SampleTable.read(path)
    problem = _problem(table)
    if problem is not None:
        raise DataError(
            f"{path} is damaged or was not made by an evaluation: {problem}. `ris eval` and `ris score` "
            "write samples tables; make it again.",
            path=path,
            problem=problem,
        )
    return table


def printable(text: str) -> str:
    """Replace what could move a terminal's cursor or break a line; names come from files of others."""
    return "".join(
        character if character.isprintable() else "\N{REPLACEMENT CHARACTER}" for character in text
    )


def _problem(table: SampleTable) -> str | None:
    """What is impossible in a table; None if nothing is."""
    names = {*table.columns["table"], *table.columns["split"], *table.views}
    strange = next((name for name in sorted(names) if not name or not name.isprintable()), None)
    if strange is not None:
        return f"the name {strange!r} of a dataset, split or view cannot be printed"
    bare = next((name for name in sorted(set(table.columns["table"])) if not all(name.partition("."))), None)
    if bare is not None:
        return f"the table name {bare!r} is not of the form dataset.split_by, such as refcoco.unc"
    for column in _NATURAL:
        if np.any(np.asarray(table.columns[column]) < 0):
            return f"{column} is negative"
    for view in table.views:
        largest = max(np.max(table.columns[f"{letter}:{view}"], initial=0) for letter in "IPG")
        if largest > _LARGEST:
            return f"{largest} pixels of one image on the view {view}"
        try:
            table.counts(view)
        except ValueError as error:
            return f"on the view {view}: {str(error).rstrip('.')}"
    return None

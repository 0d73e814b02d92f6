"""Which dataset, split_by and split a user means, and which expressions a split holds."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final

from ris_cache.datasets.records import ExpressionRecord, ReferringDataset
from ris_cache.errors import ConfigError

REFER_DATASETS: Final[dict[str, tuple[str, ...]]] = {
    "refcoco": ("unc", "google"),
    "refcoco+": ("unc",),
    "refcocog": ("umd", "google"),
}
"""The split_by that each dataset was published with; the first is the default."""

SPLITS: Final = ("train", "val", "test", "testA", "testB", "testC")
"""Split names that may be asked for. `test` stands for every test split of a dataset together."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Selection:
    """One dataset of one split_by, whole or one split of it (`split` is None for the whole)."""

    dataset: str
    split_by: str
    split: str | None = None

    @property
    def table_name(self) -> str:
        """Name of the dataset's tables in the cache, for example `refcoco.unc`."""
        return f"{self.dataset}.{self.split_by}"


def parse_selections(text: str) -> tuple[Selection, ...]:
    """Parse a comma list of `dataset[/split_by][:split]`.

    `all` stands for every dataset with its default split_by. Selections come in the order written, each once.

    Raises:
        ConfigError: the text is empty or names an unknown dataset, split_by or split.
    """
    selections: list[Selection] = []
    for part in text.split(","):
        item = part.strip()
        if not item:
            raise ConfigError(
                f"An empty entry in the selection {text!r}. Write for example refcoco:val,refcocog.",
                selection=text,
            )
        if item == "all":
            selections += [
                Selection(dataset=name, split_by=REFER_DATASETS[name][0]) for name in REFER_DATASETS
            ]
        else:
            selections.append(_parse_one(item))
    return tuple(dict.fromkeys(selections))


def matching_splits(split: str, present: Iterable[str]) -> tuple[str, ...]:
    """Pick the split labels that a split name asks for, by the rules of the refer API.

    `train` and `val` must equal the label. `test` takes every label that contains "test". `testA`, `testB`
    and `testC` take every label that contains that last letter, so refs labelled `testAB` count for both.

    Returns:
        In the order of `present`; empty for an unknown split name and for one that nothing is labelled with.
    """
    if split not in SPLITS:
        return ()
    if split in ("train", "val"):
        return tuple(label for label in present if label == split)
    part = "test" if split == "test" else split[-1]
    return tuple(label for label in present if part in label)


def select_split(dataset: ReferringDataset, split: str) -> tuple[ExpressionRecord, ...]:
    """Pick the expressions of one split by `matching_splits`, in the order of the dataset.

    Raises:
        ConfigError: the split name is unknown, or the dataset has no such split.
    """
    chosen = matching_splits(split, dataset.splits)
    if not chosen:
        raise ConfigError(
            f"{dataset.name} ({dataset.split_by}) has no split {split!r}; it has {_listed(dataset.splits)}."
            f"{_nearest(split, dataset.splits)}",
            dataset=dataset.name,
            split_by=dataset.split_by,
            found=split,
            expected=dataset.splits,
        )
    return tuple(expression for expression in dataset.expressions if expression.split in chosen)


def _parse_one(item: str) -> Selection:
    rest, has_split, split = item.partition(":")
    dataset, has_split_by, split_by = rest.partition("/")
    _require_known("dataset", dataset, REFER_DATASETS, item)
    known = REFER_DATASETS[dataset]
    if has_split_by:
        _require_known(f"split_by of {dataset}", split_by, known, item)
    if has_split:
        _require_known("split", split, SPLITS, item)
    return Selection(dataset=dataset, split_by=split_by or known[0], split=split or None)


def _require_known(what: str, name: str, known: Iterable[str], item: str) -> None:
    known = tuple(known)
    if name not in known:
        raise ConfigError(
            f"Unknown {what} {name!r} in the selection {item!r}; known: {_listed(known)}."
            f"{_nearest(name, known)}",
            selection=item,
            found=name,
            expected=known,
        )


def _listed(names: Iterable[str]) -> str:
    return ", ".join(names) or "none"


def _nearest(name: str, known: Iterable[str]) -> str:
    by_lower_case = {candidate.lower(): candidate for candidate in known}
    matches = difflib.get_close_matches(name.lower(), by_lower_case, n=1)
    return f" Did you mean {by_lower_case[matches[0]]!r}?" if matches else ""

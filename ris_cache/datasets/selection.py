"""Which dataset, split_by and split a user means, and which expressions a split holds."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final

from ris_cache.datasets.records import ExpressionRecord, ReferringDataset
from ris_cache.errors import ConfigError

CUSTOM: Final = "custom"
"""The dataset whose split_by is the name of a file, `<data>/custom/<split_by>.jsonl`."""

PUBLISHED_DATASETS: Final[dict[str, tuple[str, ...]]] = {
    "refcoco": ("unc", "google"),
    "refcoco+": ("unc",),
    "refcocog": ("umd", "google"),
    "grefcoco": ("unc",),
    "ref-zom": ("final",),
}
"""The split_by that each dataset was published with; the first is the default."""

REFER_SPLITS: Final = ("train", "val", "test", "testA", "testB", "testC")
"""Split names of the refer API. `test` stands for every test split of a dataset together."""

SPLIT_NAMES: Final[dict[str, tuple[str, ...]]] = {
    "refcoco": REFER_SPLITS,
    "refcoco+": REFER_SPLITS,
    "refcocog": REFER_SPLITS,
    "grefcoco": ("train", "val", "testA", "testB"),
    "ref-zom": ("train", "test"),
}
"""Split names that may be asked for, by dataset. A custom dataset's are free."""

_EXACT_SPLITS: Final = frozenset({"grefcoco", CUSTOM})
_FREE_NAME: Final = re.compile(r"[A-Za-z0-9_-]+")


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
    """Parse a comma list of `dataset[/split_by][:split]`, for example `refcoco:val,custom/birds:train`.

    `all` stands for every published dataset with its default split_by. Selections come in the order written,
    each once.

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
                Selection(dataset=name, split_by=split_bys[0])
                for name, split_bys in PUBLISHED_DATASETS.items()
            ]
        else:
            selections.append(_parse_one(item))
    return tuple(dict.fromkeys(selections))


def matching_splits(split: str, present: Iterable[str], dataset: str | None = None) -> tuple[str, ...]:
    """Pick the split labels that a split name asks for.

    For gRefCOCO and custom datasets the label must equal the name. All others follow the refer API: `train`
    and `val` must equal the label; `test` takes every label that contains "test"; `testA`, `testB` and
    `testC` take every label that contains that last letter, so refs labelled `testAB` count for both.

    Args:
        dataset: None for one of the refer API.
    Returns:
        In the order of `present`; empty for an unknown split name and for one that nothing is labelled with.
    """
    if dataset in _EXACT_SPLITS:
        return tuple(label for label in present if label == split)
    if split not in REFER_SPLITS:
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
    chosen = matching_splits(split, dataset.splits, dataset.name)
    if not chosen:
        hint = _nearest(split, dataset.splits)
        if dataset.name == "grefcoco" and split in ("testA", "testB"):
            hint = " It is an old file from before 2023-08-29, without test splits; download gRefCOCO again."
        raise ConfigError(
            f"{dataset.name} ({dataset.split_by}) has no split {split!r}; it has {_listed(dataset.splits)}."
            f"{hint}",
            dataset=dataset.name,
            split_by=dataset.split_by,
            found=split,
            expected=dataset.splits,
        )
    return tuple(expression for expression in dataset.expressions if expression.split in chosen)


def require_free_name(what: str, name: str) -> str:
    """Return a name that a custom dataset or one of its splits may have.

    Raises:
        ConfigError: it has other characters than letters, digits, `_` and `-`, or none.
    """
    if _FREE_NAME.fullmatch(name) is None:
        raise ConfigError(
            f"{name!r:.80} cannot be {what}. Use ASCII letters, digits, `_` and `-`.", found=name
        )
    return name


def require_dataset(name: str, where: str = "") -> None:
    """Refuse what is neither a published dataset nor `custom`.

    Raises:
        ConfigError: naming those that are known.
    """
    _require_known("dataset", name, (*PUBLISHED_DATASETS, CUSTOM), where)


def _parse_one(item: str) -> Selection:
    rest, has_split, split = item.partition(":")
    dataset, has_split_by, split_by = rest.partition("/")
    require_dataset(dataset, item)
    if dataset == CUSTOM:
        if not has_split_by:
            raise ConfigError(
                f"The selection {item!r} names no file. Write custom/<name>[:<split>] for "
                "<data>/custom/<name>.jsonl.",
                selection=item,
            )
        require_free_name(f"the name of a custom dataset (selection {item!r:.80})", split_by)
        if has_split:
            require_free_name(f"the name of a split (selection {item!r:.80})", split)
        return Selection(dataset=dataset, split_by=split_by, split=split or None)
    known = PUBLISHED_DATASETS[dataset]
    if has_split_by:
        _require_known(f"split_by of {dataset}", split_by, known, item)
    if has_split:
        _require_known(f"split of {dataset}", split, SPLIT_NAMES[dataset], item)
    return Selection(dataset=dataset, split_by=split_by or known[0], split=split or None)


def _require_known(what: str, name: str, known: Iterable[str], item: str) -> None:
    known = tuple(known)
    if name not in known:
        where = f" in the selection {item!r}" if item else ""
        raise ConfigError(
            f"Unknown {what} {name!r}{where}; known: {_listed(known)}.{_nearest(name, known)}",
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

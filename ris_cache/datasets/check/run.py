"""Check datasets one after another, then compare them with each other."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from ris_cache.datasets.check.counts import count_groups, judge_words, missing_splits
from ris_cache.datasets.check.found import find_datasets, refs_path
from ris_cache.datasets.check.images import Headers, check_images
from ris_cache.datasets.check.masks import count_dropped, judge_masks
from ris_cache.datasets.check.report import (
    CheckReport,
    DatasetReport,
    DroppedParts,
    Failure,
    MaskFindings,
    MergeReport,
)
from ris_cache.datasets.check.seen import Words, compare_singles, seen_in_files, train_words
from ris_cache.datasets.image_roots import ImageRoots
from ris_cache.datasets.leakage import SplitImages, evaluated_by_both, find_leaks, merge, split_images
from ris_cache.datasets.load import load_dataset
from ris_cache.datasets.published import MERGE, differences
from ris_cache.datasets.records import ExpressionRecord, ReferringDataset
from ris_cache.datasets.selection import CUSTOM, Selection, select_split
from ris_cache.errors import RisError

Progress = Callable[[str, int, int], None]
"""Told what is being done, how much of it is done, and how much there is."""


def check_datasets(
    data_root: Path,
    selections: Sequence[Selection] | None = None,
    *,
    with_masks: bool = True,
    progress: Progress | None = None,
) -> CheckReport:
    """Check what lies below a data root.

    A dataset that cannot be loaded becomes a failure in the report, and the others are still checked. Leakage
    is looked for between all splits of the datasets, also where `selections` name some splits only.

    Args:
        selections: what to check; by default every dataset of every split_by that is found.
        with_masks: draw every target.
    Raises:
        DataError: no dataset is found.
    """
    chosen: dict[Selection, list[str]] = {}
    for selection in find_datasets(data_root) if selections is None else selections:
        splits = chosen.setdefault(replace(selection, split=None), [])
        splits += [selection.split] if selection.split is not None else [""]
    checker = _Checker(data_root, with_masks, progress or _ignore)
    for selection, splits in chosen.items():
        try:
            checker.check(selection, () if "" in splits else tuple(splits))
        except RisError as error:
            checker.failures.append(
                Failure(table_name=selection.table_name, error=str(error), exit_code=error.exit_code)
            )
    return checker.report()


@dataclass(slots=True)
class _Checker:
    """What is known so far."""

    data_root: Path
    with_masks: bool
    progress: Progress
    roots: ImageRoots = field(init=False)
    headers: Headers = field(default_factory=dict)
    reports: list[DatasetReport] = field(default_factory=list)
    failures: list[Failure] = field(default_factory=list)
    splits: list[SplitImages] = field(default_factory=list)
    words: dict[str, Words] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.roots = ImageRoots(self.data_root)

    def check(self, selection: Selection, splits: tuple[str, ...]) -> None:
        """Check one dataset.

        Args:
            splits: names of splits to look at; none for all.
        """
        name = selection.table_name
        self.progress(f"load {name}", 0, 1)
        dataset = load_dataset(self.data_root, selection.dataset, selection.split_by)
        path = refs_path(self.data_root, selection)
        assert path is not None, "the loader found a file that this module does not know"
        expressions = _chosen(dataset, splits)
        counts = count_groups(name, expressions, is_whole=len(expressions) == len(dataset.expressions))
        images = check_images(
            [dataset.images[i] for i in dict.fromkeys(e.image_id for e in expressions)],
            self.roots,
            self.headers,
            partial(self.progress, f"images of {name}"),
        )
        masks, dropped = self._masks(dataset, expressions, path)
        self.reports.append(
            DatasetReport(
                table_name=name,
                splits=tuple(dict.fromkeys(expression.split for expression in expressions)),
                missing_splits=missing_splits(name, dataset.splits),
                counts=counts,
                differences=differences(name, counts),
                images=images,
                words=judge_words(expressions),
                masks=masks,
                dropped=dropped,
                seen=seen_in_files(path, dataset),
                warnings=dataset.warnings,
            )
        )
        self.splits += split_images(name, dataset.expressions)
        words = train_words(dataset)
        if words is not None:
            self.words[name] = words

    def _masks(
        self, dataset: ReferringDataset, expressions: Sequence[ExpressionRecord], path: Path
    ) -> tuple[dict[str, MaskFindings], DroppedParts | None]:
        if not self.with_masks:
            return {}, None
        name = f"{dataset.name}.{dataset.split_by}"
        masks = judge_masks(dataset, expressions, partial(self.progress, f"targets of {name}"))
        if dataset.name == CUSTOM:
            return masks, None
        ann_ids = {ann_id for expression in expressions for ann_id in expression.ann_ids}
        return masks, count_dropped(path.parent / "instances.json", ann_ids)

    def report(self) -> CheckReport:
        """Compare the datasets and put everything together."""
        reports = self.reports
        if {"refcoco.unc", "grefcoco.unc"} <= self.words.keys():
            singles: dict[str, Any] = dict(
                compare_singles(self.words["refcoco.unc"], self.words["grefcoco.unc"])
            )
            reports = [
                replace(one, seen={**one.seen, **singles}) if one.table_name == "grefcoco.unc" else one
                for one in reports
            ]
        return CheckReport(
            data_root=str(self.data_root),
            datasets=tuple(reports),
            failures=tuple(self.failures),
            leaks=find_leaks(self.splits),
            merges=tuple(_merges(self.splits)),
        )


def _chosen(dataset: ReferringDataset, splits: tuple[str, ...]) -> tuple[ExpressionRecord, ...]:
    if not splits:
        return dataset.expressions
    labels = {expression.split for split in splits for expression in select_split(dataset, split)}
    return tuple(expression for expression in dataset.expressions if expression.split in labels)


def _merges(splits: Sequence[SplitImages]) -> list[MergeReport]:
    """Merge the datasets that numbers are published of, and all that divide images among their splits."""
    tables = tuple(dict.fromkeys(split.table_name for split in splits))
    by_image = tuple(name for name in tables if not name.endswith(".google"))
    reports = []
    if set(MERGE.tables) <= set(tables):
        one, other = ([split for split in splits if split.table_name in twins] for twins in MERGE.twins)
        figures = merge([*one, *other]).figures | evaluated_by_both(one, other)
        reports.append(MergeReport(tables=MERGE.tables, figures=figures, published=dict(MERGE.figures)))
    if len(by_image) > 1 and set(by_image) != set(MERGE.tables):
        merged = merge([split for split in splits if split.table_name in by_image])
        reports.append(MergeReport(tables=merged.tables, figures=merged.figures, published={}))
    return reports


def _ignore(what: str, done: int, total: int) -> None:
    """Nobody watches."""

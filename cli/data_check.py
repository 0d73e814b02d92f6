"""`ris data check`: what a dataset on disk is, and whether all of it can be used."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cli.options import DEFAULT_DATA, DataOption, JsonOption
from cli.render import percent, print_json, print_table, printable
from ris_cache.datasets.published import PUBLISHED

if TYPE_CHECKING:
    from ris_cache.datasets.check import CheckReport, DatasetReport, MergeReport
    from ris_cache.datasets.published import Figure, Quantity

_QUANTITIES: dict[Quantity, str] = {
    "refs": "refs",
    "images": "images",
    "sentences": "sentences",
    "objects": "objects",
    "none": "sentences without target",
    "one": "sentences with one target",
    "many": "sentences with many targets",
}
_WORDS = {"blank": "blank", "repeated": "repeated", "contradictory": "contradictory"}
_MASKS = {
    "degenerate": "degenerate",
    "crowd": "of a crowd",
    "overlapping": "of overlapping parts",
    "lost": "pixels under several, %",
    "empty_1024": "empty at 1024",
    "empty_480": "empty at 480",
}


def check(
    data: DataOption = DEFAULT_DATA,
    split: Annotated[
        str | None,
        typer.Option(
            "--split",
            help="dataset[/split_by][:split], a comma list, or all; by default every dataset found.",
        ),
    ] = None,
    masks: Annotated[
        bool, typer.Option("--masks/--no-masks", help="Draw every target, to find odd ones.")
    ] = True,
    json: JsonOption = False,
) -> None:
    """Check datasets: counts beside the published ones, images, annotations, and image leakage.

    Image headers are read, pixels are not. Ends with code 3 if an image is missing or cannot be used, or if a
    file cannot be loaded; what else is odd is only told.

    Example: ris data check --data data --split refcoco,refcocog
    """
    from ris_cache.datasets import parse_selections
    from ris_cache.datasets.check import check_datasets

    selections = parse_selections(split) if split is not None else None
    with _Bars() as bars:
        report = check_datasets(data, selections, with_masks=masks, progress=bars)
    if json:
        print_json(report.as_dict())
    else:
        _show(report)
    for failure in report.failures:
        typer.echo(printable(f"error: {failure.table_name}: {failure.error}"), err=True)
    if report.exit_code:
        raise typer.Exit(report.exit_code)


class _Bars:
    """One bar after another on a terminal, nothing elsewhere."""

    def __init__(self) -> None:
        self._what = ""
        self._bar: Any = None

    def __enter__(self) -> _Bars:
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.close()

    def __call__(self, what: str, done: int, total: int) -> None:
        from tqdm import tqdm

        if what != self._what:
            self.__exit__()
            self._what, self._bar = what, tqdm(total=total, desc=what, leave=False, disable=None)
        self._bar.update(done - self._bar.n)


def _show(report: CheckReport) -> None:
    for dataset in report.datasets:
        _show_counts(dataset)
        _show_images(dataset)
        _show_oddities(dataset)
        _show_lines("seen in the files", [_fact(name, value) for name, value in dataset.seen.items()])
        _show_lines("warnings of the loader", dataset.warnings)
        print()
    if any(dataset.table_name in PUBLISHED for dataset in report.datasets):
        print("Published numbers are S stated by a source, D derived from stated ones, ? believed;")
        print("= found as published, ≠ not, ≠? not, but the published number is unsure.\n")
    _show_leakage(report)
    for merged in report.merges:
        _show_merge(merged)


def _show_counts(dataset: DatasetReport) -> None:
    published = PUBLISHED.get(dataset.table_name)
    groups = published.groups if published else {}
    marks = {(one.group, one.quantity): "≠" if one.is_sure else "≠?" for one in dataset.differences}
    in_table: tuple[Quantity, ...] = ("refs", "images", "sentences")
    kinds: tuple[Quantity, ...] = ("none", "one", "many")

    def said(group: str, quantity: Quantity) -> str:
        return _published(groups.get(group, {}).get(quantity), marks.get((group, quantity)))

    head = ["split"]
    for quantity in in_table:
        head += [quantity, "published"] if published else [quantity]
    rows = []
    lines = []
    for group, counts in dataset.counts.items():
        row = [group]
        for quantity in in_table:
            row += [f"{counts[quantity]:,}", *([said(group, quantity)] if published else [])]
        is_split = "+" not in group
        if is_split:
            rows.append([*row, *(f"{counts[quantity]:,}" for quantity in kinds)])
        lines += [
            f"{_QUANTITIES[quantity]}, {group}: {counts[quantity]:,}, published {said(group, quantity)}"
            for quantity in groups.get(group, {})
            if not is_split or quantity not in in_table
        ]
    print_table(dataset.table_name, [*head, "no target", "one", "many"], rows)
    _print_lines(lines)
    if dataset.differences:
        is_sure = any(one.is_sure for one in dataset.differences)
        print(f"differs from the published dataset{'' if is_sure else ' where its numbers are unsure'}")
    if dataset.missing_splits:
        print(f"splits of the published dataset that it lacks: {', '.join(dataset.missing_splits)}")
    if published and published.note:
        print(f"note: {published.note}")


def _published(figure: Figure | None, mark: str | None) -> str:
    return "–" if figure is None else f"{mark or '='} {figure}"


def _show_images(dataset: DatasetReport) -> None:
    images = dataset.images
    usable = images.num_images - images.num_unusable
    print(f"images: {usable:,} of {images.num_images:,} can be used")
    if images.missing:
        places = ", ".join(
            f"{folder} ({'no match' if exists else 'no such folder'})"
            for folder, exists in images.searched.items()
        )
        lines = (f"for example {', '.join(images.missing_examples)}", f"searched: {places}")
        _show_lines(f"missing images, {images.missing:,}", lines)
    for what, number, examples in (
        ("images of another size", images.other_size, images.other_size_examples),
        ("unreadable images", images.unreadable, images.unreadable_examples),
    ):
        if number:
            _show_lines(f"{what}, {number:,}, for example", examples)


def _show_oddities(dataset: DatasetReport) -> None:
    """Show the kinds of oddity that there are, and name the others."""
    found: dict[str, dict[str, float]] = {}
    for split in dataset.splits:
        words, masks = dataset.words[split], dataset.masks.get(split)
        found[split] = {name: getattr(words, name) for name in _WORDS}
        if masks is not None:
            found[split] |= {name: getattr(masks, name) for name in _MASKS}
    names = {name: title for name, title in (_WORDS | _MASKS).items() if name in found[dataset.splits[0]]}
    odd = {name: title for name, title in names.items() if any(found[split][name] for split in found)}
    if odd:
        rows = [
            [split, *(percent(of[name]) if name == "lost" else f"{of[name]:,}" for name in odd)]
            for split, of in found.items()
        ]
        print_table("Odd sentences", ["split", *odd.values()], rows)
    fine = [title for name, title in names.items() if name not in odd and name != "lost"]
    if fine:
        print(f"no sentence is: {', '.join(fine)}")
    if dataset.dropped:
        dropped = dataset.dropped
        print(
            f"degenerate polygons, dropped: {dropped.parts:,}, of {dropped.affected:,} of the "
            f"{dropped.annotations:,} annotations that are referred to"
        )


def _show_leakage(report: CheckReport) -> None:
    if not report.leaks:
        return
    shared = [leak for leak in report.leaks if leak.images]
    print_table(
        "Image leakage: trained on, and evaluated on",
        ["train", "evaluation", "images", "sentences of train"],
        [[leak.train, leak.evaluation, f"{leak.images:,}", f"{leak.sentences:,}"] for leak in shared],
        f"{len(report.leaks) - len(shared)} of {len(report.leaks)} pairs share no image.",
        left=["evaluation"],
    )


def _show_merge(merged: MergeReport) -> None:
    rows = []
    for name, found in merged.figures.items():
        said = merged.published.get(name)
        mark = None if said is None or said.value == found else "≠"
        rows.append([name, f"{found:,}", *([_published(said, mark)] if merged.published else [])])
    print(f"Merged: {', '.join(merged.tables)}")
    print_table("", ["", "found", *(["published"] if merged.published else [])], rows)


def _fact(name: str, value: object) -> str:
    if isinstance(value, Mapping):
        value = ", ".join(f"{key} {number:,}" for key, number in value.items()) or "none"
    elif isinstance(value, bool):
        value = "yes" if value else "no"
    elif isinstance(value, int):
        value = f"{value:,}"
    return f"{name}: {value}"


def _show_lines(title: str, lines: Sequence[str]) -> None:
    if lines:
        print(f"{title}:")
        _print_lines([f"  {line}" for line in lines])


def _print_lines(lines: Sequence[str]) -> None:
    """Print text that comes from files; what could steer a terminal is escaped."""
    for line in lines:
        print(printable(line))

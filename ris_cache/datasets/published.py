"""How large the published datasets are said to be, by whom, and how sure that is.

`python -m ris_cache.datasets.published docs/datasets.md` writes these numbers into that document.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, Literal

from ris_cache.errors import DataError

Evidence = Literal["S", "D", "?"]
"""S: stated by a source; D: derived from stated numbers by arithmetic; ?: believed, not verified."""

Quantity = Literal["refs", "images", "sentences", "objects", "none", "one", "many"]
"""What is counted: objects are targets, each once; none, one, many are sentences by number of targets."""

TOTAL: Final = "total"
"""The name of the group of all splits together."""

BEGIN: Final = "<!-- counts: begin; written by `python -m ris_cache.datasets.published docs/datasets.md` -->"
END: Final = "<!-- counts: end -->"


@dataclass(frozen=True, slots=True)
class Figure:
    """One published number.

    Attributes:
        source: who says so; for D what it follows from; empty where the source is not known by name.
    """

    value: int
    evidence: Evidence
    source: str = ""

    def __str__(self) -> str:
        return f"{self.value:,} {self.evidence}"


Figures = Mapping[Quantity, Figure]


@dataclass(frozen=True, slots=True, kw_only=True)
class PublishedDataset:
    """The published numbers of one dataset of one split_by.

    Attributes:
        groups: by split, by splits joined with "+", and by `TOTAL`; only what is known.
        is_settled: False where sources contradict each other, so that a difference says little.
        note: what else is known.
    """

    groups: Mapping[str, Figures]
    is_settled: bool = True
    note: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Difference:
    """A count that is not the published one.

    Attributes:
        is_sure: False if the published number is not certain enough to say which of the two is wrong.
    """

    group: str
    quantity: Quantity
    published: Figure
    found: int
    is_sure: bool


_TFDS: Final = "TFDS ref_coco catalogue"
_FLAGEVAL: Final = "FlagEval"
_NOTEBOOK: Final = "refer's demo notebook"
_SUMS: Final = "with the other splits it makes the stated total"
_SPLITS: Final = "sum of the splits"
_ISSUE: Final = "an issue in varun-nagaraja/referring-expressions"
_MCN: Final = "MCN issue 7"
_PAPER: Final = "gRefCOCO's paper"
_GSVA: Final = "GSVA's README"
_RESTATED: Final = "a later paper, after Ref-ZOM's"
_FORK: Final = "a fork of CRIS"


def _split(refs: int, images: int, sentences: Figure) -> Figures:
    return {"refs": Figure(refs, "S", _TFDS), "images": Figure(images, "S", _TFDS), "sentences": sentences}


PUBLISHED: Final[Mapping[str, PublishedDataset]] = {
    "refcoco.unc": PublishedDataset(
        groups={
            "train": _split(42_404, 16_994, Figure(120_624, "S", _FLAGEVAL)),
            "val": _split(3_811, 1_500, Figure(10_834, "S", _FLAGEVAL)),
            "testA": _split(1_975, 750, Figure(5_657, "S", _FLAGEVAL)),
            "testB": _split(1_810, 750, Figure(5_095, "S", _FLAGEVAL)),
            TOTAL: {
                "refs": Figure(50_000, "D", _SPLITS),
                "images": Figure(19_994, "D", _SPLITS),
                "sentences": Figure(142_210, "S", _NOTEBOOK),
            },
        },
        note="Papers print 142,209 sentences.",
    ),
    "refcoco.google": PublishedDataset(
        groups={
            "train": {"refs": Figure(40_000, "S", _TFDS), "images": Figure(19_213, "S", _TFDS)},
            "val": {"refs": Figure(5_000, "S", _TFDS), "images": Figure(4_559, "S", _TFDS)},
            "test": {"refs": Figure(5_000, "S", _TFDS), "images": Figure(4_527, "S", _TFDS)},
            TOTAL: {"sentences": Figure(142_210, "?", "the same sentences as unc")},
        },
        note="Divides objects, not images, among its splits.",
    ),
    "refcoco+.unc": PublishedDataset(
        groups={
            "train": _split(42_278, 16_992, Figure(120_191, "D", _SUMS)),
            "val": _split(3_805, 1_500, Figure(10_758, "D", _SUMS)),
            "testA": _split(1_975, 750, Figure(5_726, "D", _SUMS)),
            "testB": _split(1_798, 750, Figure(4_889, "D", _SUMS)),
            "val+testA+testB": {"sentences": Figure(21_373, "S", "Ref-L4's README")},
            TOTAL: {
                "refs": Figure(49_856, "D", _SPLITS),
                "images": Figure(19_992, "D", _SPLITS),
                "sentences": Figure(141_564, "S"),
            },
        },
    ),
    "refcocog.umd": PublishedDataset(
        groups={
            "train": _split(42_226, 21_899, Figure(80_512, "D", _SUMS)),
            "val": _split(2_573, 1_300, Figure(4_896, "D", _SUMS)),
            "test": _split(5_023, 2_600, Figure(9_602, "S", _ISSUE)),
            "train+val": {"sentences": Figure(85_408, "S", _ISSUE)},
            TOTAL: {
                "refs": Figure(49_822, "D", _SPLITS),
                "images": Figure(25_799, "D", _SPLITS),
                "sentences": Figure(95_010, "S", _MCN),
            },
        },
        note="The often quoted 104,560 sentences include a test part that was not released.",
    ),
    "refcocog.google": PublishedDataset(
        groups={
            "train": _split(44_822, 24_698, Figure(85_474, "S")),
            "val": _split(5_000, 4_650, Figure(9_536, "D", _SUMS)),
            TOTAL: {"refs": Figure(49_822, "D", _SPLITS), "sentences": Figure(95_010, "S", _MCN)},
        },
        note="Divides objects, not images, among its splits; papers call its val `val*`.",
    ),
    "grefcoco.unc": PublishedDataset(
        groups={
            "train": {"sentences": Figure(209_344, "D", _SUMS)},
            "val": {"images": Figure(1_500, "S", _GSVA), "sentences": Figure(16_870, "D", _SUMS)},
            "testA": {"images": Figure(750, "S", _GSVA), "sentences": Figure(18_712, "D", _SUMS)},
            "testB": {"images": Figure(750, "S", _GSVA), "sentences": Figure(14_933, "D", _SUMS)},
            "testA+testB": {
                "none": Figure(9_121, "S", "a third party's tests"),
                "one": Figure(11_563, "S", "a third party's tests"),
            },
            TOTAL: {
                "images": Figure(19_994, "S", _PAPER),
                "sentences": Figure(259_859, "S", "gRefCOCO issue 6"),
                "objects": Figure(60_287, "S", _PAPER),
            },
        },
        is_settled=False,
        note="The paper counts 278,232 sentences (80,022 with many targets, 32,202 with none); about 6 % of "
        "them were withheld for a challenge. A public audit of the released file counts 221,670 with and "
        "37,166 without target, 1,023 fewer than its 259,859; nobody has explained that.",
    ),
    "ref-zom.final": PublishedDataset(
        groups={
            "train": {
                "refs": Figure(57_624, "?", _FORK),
                "images": Figure(43_749, "S", _RESTATED),
                "objects": Figure(58_356, "S", _RESTATED),
            },
            "test": {
                "refs": Figure(15_406, "?", _FORK),
                "images": Figure(11_329, "S", _RESTATED),
                "objects": Figure(16_586, "S", _RESTATED),
            },
            TOTAL: {
                "images": Figure(55_078, "S", _RESTATED),
                "objects": Figure(74_942, "S", _RESTATED),
            },
        },
    ),
}
"""By `dataset.split_by`."""


_REPORT: Final = "a public data preparation report"


@dataclass(frozen=True, slots=True, kw_only=True)
class PublishedMerge:
    """What merging datasets is said to give; figures have the names that `leakage` gives them.

    Attributes:
        tables: the datasets that are merged.
        twins: whose images are evaluated on by `first` and by `second` as well: tables of either side.
    """

    tables: tuple[str, ...]
    twins: tuple[tuple[str, ...], tuple[str, ...]]
    figures: Mapping[str, Figure] = field(default_factory=dict)


MERGE: Final = PublishedMerge(
    tables=("refcoco.unc", "refcoco+.unc", "refcocog.umd"),
    twins=(("refcoco.unc", "refcoco+.unc"), ("refcocog.umd",)),
    figures={
        "sentences": Figure(378_784, "D", "sum of the totals"),
        "images of a test split": Figure(3_982, "S", _REPORT),
        "sentences on them": Figure(54_052, "S", _REPORT),
        "images of a val split alone": Figure(2_567, "S", _REPORT),
        "sentences on these": Figure(37_128, "S", _REPORT),
        "images of train splits alone": Figure(24_407, "S", _REPORT),
        "train sentences": Figure(321_327, "D", "sum of the train splits"),
        "train sentences that leak": Figure(33_723, "D", "all train sentences but the clean ones"),
        "train sentences that are clean": Figure(287_604, "S", _REPORT),
        "images that both test on": Figure(118, "D", "images of the test splits and of their union"),
        "images that both validate or test on": Figure(
            351, "D", "images of all these splits and of their union"
        ),
    },
)
"""RefCOCO (unc), RefCOCO+ (unc) and RefCOCOg (umd) merged; both: RefCOCO or RefCOCO+, and RefCOCOg."""


def is_sure(figure: Figure, table_name: str = "") -> bool:
    """Whether a count that differs from this number speaks against the file that was counted."""
    return figure.evidence != "?" and (table_name not in PUBLISHED or PUBLISHED[table_name].is_settled)


def differences(table_name: str, found: Mapping[str, Mapping[Quantity, int]]) -> tuple[Difference, ...]:
    """Compare counts with the published ones.

    Args:
        table_name: `dataset.split_by`; nothing is published of a custom dataset.
        found: by the name of a group as in `PublishedDataset.groups`; missing groups are not compared.
    """
    published = PUBLISHED.get(table_name)
    if published is None:
        return ()
    return tuple(
        Difference(
            group=group,
            quantity=quantity,
            published=figure,
            found=found[group][quantity],
            is_sure=is_sure(figure, table_name),
        )
        for group, figures in published.groups.items()
        if group in found
        for quantity, figure in figures.items()
        if found[group][quantity] != figure.value
    )


# The tables of docs/datasets.md.


def counts_tables() -> str:
    """Write all published numbers as Markdown."""
    head = ("Dataset", "Split", "Refs", "Images", "Sentences", "Others", "Sources")
    rows = (
        _row(table_name, group, figures)
        for table_name, dataset in PUBLISHED.items()
        for group, figures in dataset.groups.items()
    )
    notes = "\n".join(f"- `{name}`: {dataset.note}" for name, dataset in PUBLISHED.items() if dataset.note)
    merged = _table(
        ("RefCOCO, RefCOCO+ (unc) and RefCOCOg (umd) merged", "Published", "Source"),
        ([name, str(figure), figure.source] for name, figure in MERGE.figures.items()),
    )
    return f"{_table(head, rows)}\n\n{notes}\n\n{merged}"


def update(text: str) -> str:
    """Replace what stands between the markers of a document by the tables.

    Raises:
        DataError: the document lacks a marker, or has one twice.
    """
    if text.count(BEGIN) != 1 or text.count(END) != 1 or text.index(BEGIN) > text.index(END):
        raise DataError(f"The document needs the lines {BEGIN!r} and {END!r}, once each and in this order.")
    before, _, rest = text.partition(BEGIN)
    return f"{before}{BEGIN}\n\n{counts_tables()}\n\n{END}{rest.partition(END)[2]}"


def _row(table_name: str, group: str, figures: Figures) -> list[str]:
    names: dict[Quantity, str] = {"objects": "objects", "none": "without target", "one": "with one target"}
    others = ", ".join(f"{figures[key]} {name}" for key, name in names.items() if key in figures)
    columns: tuple[Quantity, ...] = ("refs", "images", "sentences")
    quantities: dict[str, list[str]] = {}
    for quantity, figure in figures.items():
        quantities.setdefault(figure.source or "not named", []).append(quantity)
    return [
        f"`{table_name}`",
        group,
        *(str(figures[key]) if key in figures else "–" for key in columns),
        others or "–",
        "; ".join(f"{', '.join(counted)}: {source}" for source, counted in quantities.items()),
    ]


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = ["| " + " | ".join(cells) + " |" for cells in (head, *rows)]
    return "\n".join([lines[0], "|" + "---|" * len(head), *lines[1:]])


def main() -> None:
    """Rewrite the tables of the document that the command line names."""
    parser = argparse.ArgumentParser(description="Put the published counts into a document.")
    parser.add_argument("document", type=Path, help="docs/datasets.md")
    path: Path = parser.parse_args().document
    path.write_text(update(path.read_text("utf-8")), "utf-8")


if __name__ == "__main__":
    main()

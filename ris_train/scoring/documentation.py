"""The tables of docs/metrics.md, made from the rule sets themselves.

`python -m ris_train.scoring.documentation docs/metrics.md` puts them between the markers of that file. What a
rule set does to a case is not described but computed, so that the tables cannot say anything else than the
code does. A case is given as I, P, G, e, n: intersection, predicted and annotated positives, annotated as
no-target, the head says no-target.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Final

from ris_cache.errors import DataError
from ris_train.scoring.counts import Counts, SampleCount, collect
from ris_train.scoring.rule_set import RuleSet
from ris_train.scoring.rules import RULES
from ris_train.scoring.views import View

BEGIN: Final = (
    "<!-- tables: begin; written by `python -m ris_train.scoring.documentation docs/metrics.md` -->"
)
END: Final = "<!-- tables: end -->"

SAMPLES: Final = {
    "A": SampleCount(4, 4, 4),
    "B": SampleCount(4, 4, 8),
    "C": SampleCount(0, 0, 4),
    "D": SampleCount(4, 6, 4),
    "J": SampleCount(9, 9, 10),
    "I": SampleCount(2, 3, 4, says_no_target=True),
    "F": SampleCount(0, 3, 0, is_no_target=True),
    "G": SampleCount(0, 2, 0, is_no_target=True, says_no_target=True),
    "H": SampleCount(0, 0, 0, is_no_target=True),
    "E": SampleCount(0, 0, 0, is_no_target=True, says_no_target=True),
}
"""Ten samples on 4 × 4 pixels that tell no-target rules and epsilons apart; the first six have a target."""

_CASES: Final = {
    "refers to something that covers no pixel; mask empty": SampleCount(0, 0, 0),
    "refers to something, mask exact; head says no-target": SampleCount(90, 90, 90, says_no_target=True),
    "no-target, mask empty; head says so": SampleCount(0, 0, 0, is_no_target=True, says_no_target=True),
    "no-target, mask empty; head says target": SampleCount(0, 0, 0, is_no_target=True),
    "no-target, mask of 90; head says no-target": SampleCount(
        0, 90, 0, is_no_target=True, says_no_target=True
    ),
    "no-target, mask of 90; head says target": SampleCount(0, 90, 0, is_no_target=True),
}


def metrics_tables() -> str:
    """Write all tables as Markdown."""
    return "\n\n".join(
        (
            "### Pixels\n\n" + _pixels(),
            "### Formulas\n\n" + _formulas(),
            "### One sample by each rule set\n\n" + _cases(),
            "### An IoU exactly on the threshold\n\n" + _ties(),
            "### The same ten samples by each rule set\n\n" + _examples(),
            "### Sources\n\n" + _sources(),
        )
    )


def update(text: str) -> str:
    """Replace what stands between the markers of a document by the tables.

    Raises:
        DataError: the document lacks a marker, or has one twice.
    """
    if text.count(BEGIN) != 1 or text.count(END) != 1 or text.index(BEGIN) > text.index(END):
        raise DataError(f"The document needs the lines {BEGIN!r} and {END!r}, once each and in this order.")
    before, _, rest = text.partition(BEGIN)
    return f"{before}{BEGIN}\n\n{metrics_tables()}\n\n{END}{rest.partition(END)[2]}"


# Tables.


def _pixels() -> str:
    grids = {"original": "the image's own", "1024": "1024 × 1024, squashed", "480": "480 × 480, squashed"}
    rasters = {
        "polygons": "polygons scaled, drawn on the grid",
        "nearest": "drawn in the original frame, resized (nearest)",
    }
    overlaps = {"union": "foreground", "one": "**background**"}
    by_view: dict[str, list[str]] = {}
    for rules in RULES.values():
        by_view.setdefault(rules.view.name, []).append(f"`{rules.name}`")

    def row(view: View, names: Sequence[str]) -> list[str]:
        raster = "drawn in the original frame" if view.grid == "original" else rasters[view.raster]
        return [
            f"`{view.name}`",
            ", ".join(names),
            grids[view.grid],
            raster,
            overlaps[view.overlap],
            f"> {view.threshold}",
        ]

    views = {rules.view.name: rules.view for rules in RULES.values()}
    return _table(
        ("View", "Rule sets", "Grid", "Ground truth", "Pixel under two parts", "Positive at probability"),
        (row(views[name], names) for name, names in by_view.items()),
    )


def _formulas() -> str:
    no_target = {
        "refused": "refused",
        "alike": "scored as any other",
        "apart": "Acc alone: share of empty masks",
        "classified": "the decision: right 1, wrong 0",
    }
    heads = {"ignored": "ignored", "empties": "empties the mask", "decides": "decides; without one, P = 0"}

    def row(rules: RuleSet) -> list[str]:
        return [
            f"`{rules.name}`",
            ", ".join(f"**{name}**" if name == rules.headline else name for name in _short_metrics(rules)),
            _iou_text(rules),
            _empty_text(rules),
            _precision_text(rules),
            no_target[rules.no_target],
            heads[rules.head] if rules.takes_no_target else "–",
        ]

    head = (
        "Rule set",
        "Scores",
        "IoU of a sample; other roundings",
        "IoU if U = 0",
        "Pr@X",
        "No-target samples",
        "No-target head",
    )
    return _table(head, map(row, RULES.values()))


def _cases() -> str:
    def cell(rules: RuleSet, case: SampleCount) -> str:
        if case.is_no_target and not rules.takes_no_target:
            return "–"
        counts = collect([case], has_head=True)
        names = [name for name in ("mIoU", "gIoU", "Acc") if name in rules.metrics]
        values = rules.score(counts).values
        found = [
            f"{name} {values[name]:.0f}"
            for name in names
            if not math.isnan(values[name]) and name not in rules.constants
        ]
        (intersection,), (union,) = rules.summed_pixels(counts)
        return ", ".join(found) + f"; {intersection} / {union}"

    # The grid changes nothing here, so one row serves all grids of a rule set.
    chosen = [rules for rules in RULES.values() if "@" not in rules.name]
    rows = ([f"`{rules.name}`", *(cell(rules, case) for case in _CASES.values())] for rules in chosen)
    return _table(("Rule set", *_CASES), rows)


def _ties() -> str:
    def cell(rules: RuleSet, threshold: float, union: int) -> str:
        found = round(threshold * union)
        name = f"Pr@{threshold}"
        if name not in rules.metrics or name in rules.constants:
            return ""
        return "yes" if rules.score(_one(SampleCount(found, found, union))).values[name] else "no"

    names = ("ris", "gres", "lavt", "dmmi", "rela", "dfam", "cris", "cgformer")
    rows = (
        [f"{threshold}, U = {union:,}", *(cell(RULES[name], threshold, union) for name in names)]
        for union in (10, 100_000)
        for threshold in (0.5, 0.6, 0.7, 0.8, 0.9)
    )
    return _table(("IoU = X: does Pr@X count it?", *(f"`{name}`" for name in names)), rows)


def _examples() -> str:
    def cells(rules: RuleSet, counts: Counts) -> list[str]:
        if counts.is_no_target.any() and not rules.takes_no_target:
            return ["refused", ""]
        values = rules.score(counts).values
        means = [name for name in ("oIoU", "cIoU", "mIoU", "gIoU", "N-acc", "T-acc", "Acc") if name in values]
        precisions = [name for name in values if name.startswith("Pr@")]
        return [
            ", ".join(f"{name} {_percent(values[name], 3)}" for name in means),
            " ".join(_percent(values[name], 1) for name in precisions),
        ]

    targeted = collect(list(SAMPLES.values())[:5])
    every = collect(SAMPLES.values(), has_head=True)
    chosen = [rules for rules in RULES.values() if "@" not in rules.name]
    rows = ([f"`{rules.name}`", *cells(rules, targeted), *cells(rules, every)] for rules in chosen)
    return _table(("Rule set", "A B C D J", "Pr@X", "all ten", "Pr@X"), rows)


def _sources() -> str:
    def row(rules: RuleSet) -> list[str]:
        source = rules.source
        link = f"[{source.repository}](https://github.com/{source.repository})" if source.repository else ""
        return [
            f"`{rules.name}`",
            source.project,
            link,
            source.evaluates,
            source.sentences,
            source.scale,
            source.not_reproduced,
        ]

    head = ("Rule set", "Whose", "Repository", "For", "Sentences", "Printed as", "Not reproduced")
    return _table(head, (row(rules) for rules in RULES.values() if "@" not in rules.name))


# Cells.


def _one(sample: SampleCount) -> Counts:
    return collect([sample])


def _percent(value: float, digits: int) -> str:
    return "–" if math.isnan(value) else f"{100 * value:.{digits}f}"


def _short_metrics(rules: RuleSet) -> list[str]:
    precisions = [name for name in rules.metrics if name.startswith("Pr@")]
    names = [name for name in rules.metrics if name not in precisions]
    if precisions:
        names.append(f"{precisions[0]}–{precisions[-1].removeprefix('Pr@0')}")
    return names


def _iou_text(rules: RuleSet) -> str:
    def formula(epsilon: float, is_single: bool) -> str:
        divided = f"I / (U + {epsilon:.0e})".replace("e-0", "e-") if epsilon else "I / U"
        return divided + (" in float32" if is_single else "")

    text = formula(rules.iou.epsilon, rules.iou.is_single)
    if rules.giou is not None:
        text += f"; gIoU {formula(rules.giou.epsilon, rules.giou.is_single)}"
    if rules.is_single_mean:
        text += "; mean in float32"
    others = {
        "mean over N": rules.count_epsilon,
        "Σ U": rules.sum_epsilon,
        "Acc over their number": rules.acc_epsilon,
    }
    text += "".join(
        f"; {what} + {epsilon:.0e}".replace("e-0", "e-") for what, epsilon in others.items() if epsilon
    )
    return text + ("; gIoU never updated: 0" if "gIoU" in rules.constants else "")


def _empty_text(rules: RuleSet) -> str:
    text = f"{rules.iou.empty:.0f}"
    return text if rules.giou is None else f"{text}; gIoU {rules.giou.empty:.0f}"


def _precision_text(rules: RuleSet) -> str:
    if rules.precision is None:
        return "never updated: 0" if rules.constants else "–"
    over = "all" if rules.no_target == "alike" else "targeted"
    sign = ">" if rules.precision.is_strict else "≥"
    return f"{sign}, over {over}" + (", X in float32" if rules.precision.is_single else "")


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = ["| " + " | ".join(cells) + " |" for cells in (head, *rows)]
    return "\n".join([lines[0], "|" + "---|" * len(head), *lines[1:]])


def main() -> None:
    """Rewrite the tables of the document that the command line names."""
    parser = argparse.ArgumentParser(description="Put the tables of the rule sets into a document.")
    parser.add_argument("document", type=Path, help="docs/metrics.md")
    path: Path = parser.parse_args().document
    path.write_text(update(path.read_text("utf-8")), "utf-8")


if __name__ == "__main__":
    main()

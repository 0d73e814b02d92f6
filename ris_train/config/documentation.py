"""The tables of docs/training.md, made from the recipes themselves.

`python -m ris_train.config.documentation docs/training.md` puts them between the markers of that file.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Final

from ris_cache.errors import DataError
from ris_train.config.deviations import SWITCHED, UNSWITCHED, value_of
from ris_train.config.loading import load_config
from ris_train.config.recipes import recipe_head, recipes

COMMAND: Final = "python -m ris_train.config.documentation docs/training.md"
AUTHORS: Final = "authors-code"
OURS: Final = "paper-refcoco"


def markers(name: str) -> tuple[str, str]:
    """The lines between which a table stands."""
    return f"<!-- {name}: begin; written by `{COMMAND}` -->", f"<!-- {name}: end -->"


def recipes_table() -> str:
    """Every recipe with what it says of itself."""
    heads = [recipe_head(name) for name in recipes()]
    return _table(
        ("Recipe", "What it trains", "Needs", "Cost and score"),
        ((f"`{head.name}`", head.about, head.needs, head.cost) for head in heads),
    )


def deviations_tables() -> str:
    """What has a switch, then what has none."""
    authors, ours = (load_config(recipe=name).model_dump(mode="json") for name in (AUTHORS, OURS))
    switched = _table(
        ("What", "Supplement", f"Authors' code, `{AUTHORS}`", f"Ours, `{OURS}`", "Settings"),
        (
            (
                row.subject,
                row.supplement,
                *(row.text(*(value_of(tree, key) for key in row.keys)) for tree in (authors, ours)),
                ", ".join(f"`{key}`" for key in row.keys),
            )
            for row in SWITCHED
        ),
    )
    unswitched = _table(
        ("What", "Supplement", "Authors' code", "Ours", "Why there is no switch"),
        ((row.subject, row.supplement, row.authors, row.ours, row.why) for row in UNSWITCHED),
    )
    return f"{switched}\n\nWithout a switch:\n\n{unswitched}"


BLOCKS: Final[Mapping[str, Callable[[], str]]] = {
    "recipes": recipes_table,
    "deviations": deviations_tables,
}


def update(text: str) -> str:
    """Replace what stands between the markers of a document by the tables.

    Raises:
        DataError: the document lacks a marker, or has one twice.
    """
    for name, make in BLOCKS.items():
        begin, end = markers(name)
        if text.count(begin) != 1 or text.count(end) != 1 or text.index(begin) > text.index(end):
            raise DataError(
                f"The document needs the lines {begin!r} and {end!r}, once each and in this order.",
                block=name,
            )
        before, _, rest = text.partition(begin)
        text = f"{before}{begin}\n\n{make()}\n\n{end}{rest.partition(end)[2]}"
    return text


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = ["| " + " | ".join(cells) + " |" for cells in (head, *rows)]
    return "\n".join([lines[0], "|" + "---|" * len(head), *lines[1:]])


def main() -> None:
    """Rewrite the tables of the document that the command line names."""
    parser = argparse.ArgumentParser(description="Put the tables of the recipes into a document.")
    parser.add_argument("document", type=Path, help="docs/training.md")
    path: Path = parser.parse_args().document
    path.write_text(update(path.read_text("utf-8")), "utf-8")


if __name__ == "__main__":
    main()

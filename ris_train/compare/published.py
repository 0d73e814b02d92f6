"""Published rows: every number of the supplement's Tables 1, 3, 4 and 5, as data with its source.

A published number was scored by whoever published it. It carries the rule set "as published", and is never
more than a row beside rows that were scored here.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from decimal import Decimal
from functools import cache
from importlib.resources import files
from types import MappingProxyType
from typing import Any

from ris_cache.errors import ConfigError

AS_PUBLISHED = "as published"
SAME_METRIC = {"cIoU": "oIoU"}
"""Other names under which rule sets print a metric of the supplement."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PublishedValue:
    """One number of one table.

    Attributes:
        table: number of the supplement's table.
        table_name: `dataset.split_by`.
        printed: percent, digit for digit.
    """

    table: str
    table_name: str
    split: str
    metric: str
    printed: str

    @property
    def fraction(self) -> float:
        """The nearest float to the printed percentage divided by 100."""
        return float(Decimal(self.printed) / 100)


@dataclass(frozen=True, slots=True, kw_only=True)
class PublishedMethod:
    """The rows of one method.

    Attributes:
        key: how it is asked for, after `published:`.
        wording: what each table calls it.
        size: parameters as Table 5 prints them; None where the tables do not say.
        category_source: what the method reads at test time, as far as its code says.
        text: which form of the expression its code reads, `raw` or `sent`.
        remark: one line on what the row is.
    """

    key: str
    name: str
    wording: Mapping[str, str]
    size: str | None
    category_source: str
    text: str
    remark: str
    values: tuple[PublishedValue, ...]

    def value(self, table_name: str, split: str, metric: str, *, table: str | None) -> PublishedValue | None:
        """Find a number, in `table` if it has it, else in the first table that does; None if none does."""
        wanted = (table_name, split, SAME_METRIC.get(metric, metric))
        found = [value for value in self.values if (value.table_name, value.split, value.metric) == wanted]
        return next((value for value in found if value.table == table), found[0] if found else None)


@dataclass(frozen=True, slots=True, kw_only=True)
class Inconsistency:
    """Where the supplement contradicts itself or its code; fields are None where it concerns all of them."""

    method: str | None
    table_name: str
    split: str | None
    metric: str
    values: Mapping[str, str]
    text: str


@dataclass(frozen=True, slots=True, kw_only=True)
class PublishedTables:
    """The whole file.

    Attributes:
        captions: by table number.
        num_expressions: how many expressions each published split has, by table name and split.
    """

    source: str
    captions: Mapping[str, str]
    methods: Mapping[str, PublishedMethod]
    inconsistencies: tuple[Inconsistency, ...]
    num_expressions: Mapping[str, Mapping[str, int]]


@cache
def published_tables() -> PublishedTables:
    """Read the published rows that are part of the package."""
    document = json.loads(files("ris_train.compare").joinpath("published.json").read_text(encoding="utf-8"))
    return PublishedTables(
        source=document["source"],
        captions=MappingProxyType(document["tables"]),
        methods=MappingProxyType(
            {key: _method(key, fields, document["values"]) for key, fields in document["methods"].items()}
        ),
        inconsistencies=tuple(
            Inconsistency(
                method=entry["method"],
                table_name=entry["dataset"],
                split=entry["split"],
                metric=entry["metric"],
                values=MappingProxyType(entry["values"]),
                text=entry["text"],
            )
            for entry in document["inconsistencies"]
        ),
        num_expressions=MappingProxyType(document["expressions"]),
    )


def published_method(key: str) -> PublishedMethod:
    """Find a published method by the name after `published:`.

    Raises:
        ConfigError: there is none of that name; the message lists them.
    """
    methods = published_tables().methods
    if key not in methods:
        near = difflib.get_close_matches(key, methods, n=1)
        hint = f" Did you mean published:{near[0]}?" if near else ""
        raise ConfigError(
            f"There are no published rows {key!r}; there are "
            f"{', '.join(f'published:{name}' for name in methods)}.{hint}",
            found=key,
            expected=tuple(methods),
        )
    return methods[key]


def _method(key: str, fields: Mapping[str, Any], values: list[dict[str, Any]]) -> PublishedMethod:
    return PublishedMethod(
        key=key,
        name=fields["name"],
        wording=MappingProxyType(fields["wording"]),
        size=fields["size"],
        category_source=fields["category_source"],
        text=fields["text"],
        remark=fields["remark"],
        values=tuple(
            PublishedValue(
                table=entry["table"],
                table_name=entry["dataset"],
                split=split,
                metric=entry["metric"],
                printed=printed,
            )
            for entry in values
            if entry["method"] == key
            for split, printed in entry["values"].items()
        ),
    )

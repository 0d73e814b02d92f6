"""The samples table: what an evaluation keeps of every sample, from which any score can be taken again.

A Parquet file with one row per sample: which sample it is, what it is like, and I, P and G on the pixels of
each view. `ris eval` and `ris score` write it, `ris compare` reads it. N samples.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Protocol

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from ris_cache.datasets.records import InstanceRecord
from ris_cache.errors import DataError, ShapeError
from ris_cache.store.files import write_atomically
from ris_cache.store.tables import NO_CATEGORY, table_bytes
from ris_train.scoring.counts import Counts

METADATA_KEY: Final = b"ris"

POSITION_WORDS: Final = frozenset(
    (
        *("left", "leftmost", "right", "rightmost", "top", "topmost", "upper", "uppermost"),
        *("bottom", "bottommost", "lower", "lowermost", "middle", "center", "centre", "central"),
        *("front", "foreground", "behind", "back", "background", "near", "nearer", "nearest"),
        *("far", "farthest", "furthest", "close", "closer", "closest", "above", "below"),
        *("under", "underneath", "over", "between", "beside", "next", "side", "corner", "edge", "end"),
        *("first", "second", "third", "fourth", "fifth", "last", "north", "south", "east", "west"),
    )
)
"""Words that tell a place, in the image or in a row. RefCOCO+ was collected without location words."""

_COLUMNS: Final = {
    "table": pa.string(),
    "split": pa.string(),
    "ref_id": pa.int64(),
    "sent_id": pa.int64(),
    "image_id": pa.int64(),
    "text": pa.string(),
    "is_no_target": pa.bool_(),
    "says_no_target": pa.bool_(),
    "is_degenerate": pa.bool_(),
    "num_targets": pa.int32(),
    "num_same_category": pa.int32(),
    "num_words": pa.int32(),
    "has_position_word": pa.bool_(),
    "has_head": pa.bool_(),
}

Column = npt.NDArray[Any] | list[str]
Key = tuple[str, str, int, int]


class _Sample(Protocol):
    """What a table takes of a sample; `ris_train.data.samples.Sample` has it."""

    @property
    def table_name(self) -> str: ...
    @property
    def split(self) -> str: ...
    @property
    def ref_id(self) -> int: ...
    @property
    def sent_id(self) -> int: ...
    @property
    def image_id(self) -> int: ...
    @property
    def text(self) -> str: ...
    @property
    def ann_ids(self) -> tuple[int, ...]: ...
    @property
    def is_degenerate(self) -> bool: ...


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class SampleTable:
    """N samples with their counts.

    Attributes:
        columns: by name, N values each, text as a list, everything else as an array: table (`refcoco.unc`),
            split, ref_id, sent_id, image_id, text; is_no_target, says_no_target, is_degenerate; num_targets;
            num_same_category (objects in the image of the first target's category, the target included; 0
            without a target or a category); num_words; has_position_word; has_head (the model has a no-target
            head); and `I:<view>`, `P:<view>`, `G:<view>` of each view.
        views: names of the views.
        metadata: what the numbers mean: method, weights, category_source, text, expressions, fingerprint,
            source (`run` or `predictions`), and what else the writer knows.
    """

    columns: dict[str, Column]
    views: tuple[str, ...]
    metadata: dict[str, Any]

    def __post_init__(self) -> None:
        expected = [*_COLUMNS, *_count_columns(self.views)]
        if list(self.columns) != expected:
            raise ShapeError(f"A samples table has the columns {expected}; got {list(self.columns)}.")
        lengths = {len(column) for column in self.columns.values()}
        if len(lengths) > 1:
            raise ShapeError(f"The columns of a samples table are of one length; got {sorted(lengths)}.")

    @classmethod
    def of(
        cls,
        samples: Sequence[_Sample],
        counts: Mapping[str, Counts],
        instances: Mapping[str, Mapping[int, InstanceRecord]],
        *,
        metadata: Mapping[str, Any],
    ) -> SampleTable:
        """Make the table of an evaluation.

        Args:
            samples: each (table, split, ref_id, sent_id) once.
            counts: of the samples in their order, by name of the view.
            instances: by ann_id, of each table by its name.
            metadata: plain values.
        """
        same_category = {name: _category_counts(found.values()) for name, found in instances.items()}
        one = next(iter(counts.values()))
        columns: dict[str, Column] = {
            "table": [sample.table_name for sample in samples],
            "split": [sample.split for sample in samples],
            **{
                name: np.array([getattr(sample, name) for sample in samples], dtype=np.int64)
                for name in ("ref_id", "sent_id", "image_id")
            },
            "text": [sample.text for sample in samples],
            "is_no_target": one.is_no_target,
            "says_no_target": one.says_no_target,
            "is_degenerate": np.array([sample.is_degenerate for sample in samples], dtype=np.bool_),
            "num_targets": np.array([len(sample.ann_ids) for sample in samples], dtype=np.int32),
            "num_same_category": np.array(
                [
                    _num_same_category(sample, instances[sample.table_name], same_category[sample.table_name])
                    for sample in samples
                ],
                dtype=np.int32,
            ),
            "num_words": np.array([len(sample.text.split()) for sample in samples], dtype=np.int32),
            "has_position_word": np.array(
                [has_position_word(sample.text) for sample in samples], dtype=np.bool_
            ),
            "has_head": np.full(len(samples), one.has_head, dtype=np.bool_),
        }
        for view, found in counts.items():
            arrays = (found.intersection, found.predicted, found.annotated)
            columns |= dict(zip(_count_columns([view]), arrays, strict=True))
        return cls(columns=columns, views=tuple(counts), metadata=dict(metadata))

    def __len__(self) -> int:
        """N."""
        return len(self.columns["split"])

    @property
    def key(self) -> list[Key]:
        """(table, split, ref_id, sent_id) of each sample."""
        names = ("table", "split", "ref_id", "sent_id")
        columns = [np.asarray(self.columns[name]).tolist() for name in names]
        return list(zip(*columns, strict=True))

    def counts(self, view: str) -> Counts:
        """Return the counts on a view.

        Raises:
            DataError: the evaluation did not count on it.
        """
        if view not in self.views:
            raise DataError(
                f"The samples were not counted on the view {view!r}; they were on {', '.join(self.views)}. "
                "Evaluate again with --rules all.",
                view=view,
                known=self.views,
            )
        intersection, predicted, annotated = (
            np.asarray(self.columns[name]) for name in _count_columns([view])
        )
        return Counts(
            intersection=intersection,
            predicted=predicted,
            annotated=annotated,
            is_no_target=np.asarray(self.columns["is_no_target"]),
            says_no_target=np.asarray(self.columns["says_no_target"]),
            has_head=bool(np.any(np.asarray(self.columns["has_head"]))),
        )

    def select(self, chosen: npt.NDArray[np.bool_] | npt.NDArray[np.integer[Any]]) -> SampleTable:
        """Return some of the samples: bool[N], or their positions in any order."""
        positions = np.arange(len(self))[chosen]
        columns: dict[str, Column] = {
            name: [column[position] for position in positions]
            if isinstance(column, list)
            else column[positions]
            for name, column in self.columns.items()
        }
        return SampleTable(columns=columns, views=self.views, metadata=self.metadata)

    def write(self, path: Path) -> None:
        """Write the file, atomically; the same table gives the same bytes."""
        types = _COLUMNS | dict.fromkeys(_count_columns(self.views), pa.int64())
        text = json.dumps(self.metadata, allow_nan=False)  # ASCII: a path may hold what UTF-8 cannot
        schema = pa.schema(
            [pa.field(name, kind, nullable=False) for name, kind in types.items()],
            metadata={METADATA_KEY: text.encode()},
        )
        write_atomically(path, table_bytes(pa.table(self.columns, schema=schema)))

    @classmethod
    def read(cls, path: Path) -> SampleTable:
        """Read what `write` wrote.

        Raises:
            DataError: missing, not Parquet, or not a samples table; the message says which.
        """
        try:
            with pq.ParquetFile(path, pre_buffer=False) as file:
                table = file.read(use_threads=False)
            table.validate(full=True)
        except (OSError, pa.ArrowException) as error:
            raise _unreadable(path, f"cannot be read as Parquet ({error})") from error
        views = [name.removeprefix("I:") for name in table.schema.names if name.startswith("I:")]
        types = _COLUMNS | dict.fromkeys(_count_columns(views), pa.int64())
        found = {field.name: field.type for field in table.schema}
        if found != types or list(found) != list(types) or any(c.null_count for c in table.columns):
            wrong = [name for name in dict.fromkeys((*types, *found)) if types.get(name) != found.get(name)]
            raise _unreadable(
                path, "is no samples table; these columns differ: " + (", ".join(wrong) or "order or nulls")
            )
        try:
            metadata = json.loads((table.schema.metadata or {})[METADATA_KEY])
        except (KeyError, ValueError, RecursionError) as error:
            raise _unreadable(path, "lacks the description of its numbers") from error
        if not isinstance(metadata, dict):
            raise _unreadable(path, "lacks the description of its numbers")
        columns: dict[str, Column] = {
            name: table.column(name).to_pylist()
            if kind == pa.string()
            else np.asarray(table.column(name).to_numpy(zero_copy_only=False))
            for name, kind in types.items()
        }
        found_table = cls(columns=columns, views=tuple(views), metadata=metadata)
        try:
            for view in views:
                found_table.counts(view)
        except ValueError as error:
            raise _unreadable(path, f"holds impossible counts ({error})") from error
        return found_table


def has_position_word(text: str) -> bool:
    """Whether an expression tells a place by one of `POSITION_WORDS`."""
    return not POSITION_WORDS.isdisjoint(re.findall(r"[a-z]+", text.lower()))


def _count_columns(views: Iterable[str]) -> list[str]:
    return [f"{letter}:{view}" for view in views for letter in "IPG"]


def _category_counts(instances: Iterable[InstanceRecord]) -> dict[tuple[int, int], int]:
    """Objects by image and category."""
    counts: dict[tuple[int, int], int] = {}
    for instance in instances:
        key = (instance.image_id, instance.category_id)
        counts[key] = counts.get(key, 0) + 1
    return counts


def _num_same_category(
    sample: _Sample, instances: Mapping[int, InstanceRecord], counts: Mapping[tuple[int, int], int]
) -> int:
    if not sample.ann_ids:
        return 0
    category_id = instances[sample.ann_ids[0]].category_id
    return 0 if category_id == NO_CATEGORY else counts[sample.image_id, category_id]


def _unreadable(path: Path, problem: str) -> DataError:
    return DataError(
        f"{path} {problem}. `ris eval` and `ris score` write samples tables; make it again.",
        path=path,
        problem=problem,
    )

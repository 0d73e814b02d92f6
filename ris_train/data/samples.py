"""Samples: one expression with its image and targets, selected from a cache's tables."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final, overload

import numpy as np
import numpy.typing as npt

from ris_cache.datasets.selection import Selection, matching_splits
from ris_cache.errors import CacheMissError
from ris_cache.store.cache import FeatureCache


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """One expression, the unit of training and of evaluation.

    Attributes:
        table_name: `dataset.split_by`, whose instances `ann_ids` are.
        text: the expression as the model reads it.
        ann_ids: target instances; empty if the expression refers to nothing.
        category_id: annotated category of the first target, raw COCO id; −1 without one.
        clip_category_id: the category that CLIP-T finds nearest to the expression.
        is_degenerate: targets exist, but their polygons enclose nothing.
    """

    table_name: str
    split: str
    ref_id: int
    sent_id: int
    image_id: int
    text: str
    ann_ids: tuple[int, ...]
    category_id: int
    clip_category_id: int
    is_degenerate: bool

    @property
    def is_no_target(self) -> bool:
        """Whether the expression is annotated as referring to nothing."""
        return not self.ann_ids


_PLAIN: Final = ("ref_id", "sent_id", "image_id", "category_id", "clip_category_id", "is_degenerate")
"""Columns of numbers that a table of expressions and a sample both have."""
_ROW: Final = np.dtype(
    [
        *((name, np.int64) for name in ("ref_id", "sent_id", "image_id")),
        *((name, np.int32) for name in ("category_id", "clip_category_id")),
        ("is_degenerate", np.bool_),
        *((name, np.int16) for name in ("table", "split")),
        *((name, np.int64) for name in ("first_byte", "first_ann")),
        *((name, np.int32) for name in ("num_bytes", "num_anns")),
    ]
)
"""One sample: numbers of its own; its table and split among their names, its text and ann_ids among all."""


class Samples(Sequence[Sample]):
    """Samples kept as columns, 70 bytes and their text each; a `Sample` is made when it is asked for.

    Slices and selections share text and ann_ids with what they were taken from.

    Args:
        rows: one per sample.
        texts: UTF-8 of all expressions.
        ann_ids: int64, of all expressions.
        tables: names that `rows["table"]` counts.
        splits: names that `rows["split"]` counts.
    """

    def __init__(
        self,
        rows: npt.NDArray[Any],
        texts: bytes,
        ann_ids: npt.NDArray[np.int64],
        tables: Sequence[str],
        splits: Sequence[str],
    ) -> None:
        self._rows = rows
        self._texts = texts
        self._ann_ids = ann_ids
        self._tables = tuple(tables)
        self._splits = tuple(splits)

    @classmethod
    def of(cls, samples: Iterable[Sample]) -> Samples:
        """Put samples into columns; those that are already stay as they are."""
        if isinstance(samples, cls):
            return samples
        given = list(samples)
        plain = {name: [getattr(sample, name) for sample in given] for name in _PLAIN}
        return _from_columns(
            plain,
            tables=[sample.table_name for sample in given],
            splits=[sample.split for sample in given],
            texts=[sample.text for sample in given],
            ann_ids=[sample.ann_ids for sample in given],
        )

    def __len__(self) -> int:
        return len(self._rows)

    @overload
    def __getitem__(self, index: int) -> Sample: ...
    @overload
    def __getitem__(self, index: slice) -> Samples: ...
    def __getitem__(self, index: int | slice) -> Sample | Samples:
        if isinstance(index, slice):
            return self.select(index)
        (ref_id, sent_id, image_id, category_id, clip_category_id, is_degenerate, *rest) = self._rows[
            index
        ].item()
        table, split, first_byte, first_ann, num_bytes, num_anns = rest
        return Sample(
            table_name=self._tables[table],
            split=self._splits[split],
            ref_id=ref_id,
            sent_id=sent_id,
            image_id=image_id,
            text=self._texts[first_byte : first_byte + num_bytes].decode("utf-8", "surrogatepass"),
            ann_ids=tuple(self._ann_ids[first_ann : first_ann + num_anns].tolist()),
            category_id=category_id,
            clip_category_id=clip_category_id,
            is_degenerate=is_degenerate,
        )

    def __iter__(self) -> Iterator[Sample]:
        return map(self.__getitem__, range(len(self)))

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Samples):
            return NotImplemented
        return len(self) == len(other) and all(one == its for one, its in zip(self, other, strict=True))

    __hash__ = None  # type: ignore[assignment]

    def __add__(self, other: Samples) -> Samples:
        """Those of both, one after the other."""
        tables = tuple(dict.fromkeys((*self._tables, *other._tables)))
        splits = tuple(dict.fromkeys((*self._splits, *other._splits)))
        rows = np.concatenate([self._rows, other._rows])
        added = rows[len(self) :]
        added["table"] = _places(other._tables, tables)[added["table"]]
        added["split"] = _places(other._splits, splits)[added["split"]]
        added["first_byte"] += len(self._texts)
        added["first_ann"] += len(self._ann_ids)
        ann_ids = np.concatenate([self._ann_ids, other._ann_ids])
        return Samples(rows, self._texts + other._texts, ann_ids, tables, splits)

    def column(self, name: str) -> npt.NDArray[Any]:
        """One value of each sample: an attribute of `Sample` that is a number or a truth value."""
        assert name in (*_PLAIN, "is_no_target"), name
        found: npt.NDArray[Any] = self._rows["num_anns"] == 0 if name == "is_no_target" else self._rows[name]
        return found

    def longer_texts(self, num_bytes: int) -> Iterator[str]:
        """Yield the texts that have more bytes in UTF-8, in the order of the samples."""
        rows = self._rows[self._rows["num_bytes"] > num_bytes]
        starts = rows["first_byte"].tolist()
        for start, size in zip(starts, rows["num_bytes"].tolist(), strict=True):
            yield self._texts[start : start + size].decode("utf-8", "surrogatepass")

    def select(self, chosen: npt.NDArray[Any] | slice) -> Samples:
        """Choose samples as numpy chooses rows: by a slice, by positions, or by a truth value of each."""
        return Samples(self._rows[chosen], self._texts, self._ann_ids, self._tables, self._splits)


def _from_columns(
    plain: Mapping[str, Sequence[Any]],
    *,
    tables: Sequence[str],
    splits: Sequence[str],
    texts: Sequence[str],
    ann_ids: Sequence[tuple[int, ...]],
) -> Samples:
    """Make samples of columns, `plain` being those of `_PLAIN`."""
    rows = np.empty(len(texts), _ROW)
    for name in _PLAIN:
        rows[name] = plain[name]
    names = []
    for name, labels in (("table", tables), ("split", splits)):
        number = {label: place for place, label in enumerate(dict.fromkeys(labels))}
        rows[name] = [number[label] for label in labels]
        names.append(tuple(number))
    encoded = [text.encode("utf-8", "surrogatepass") for text in texts]
    for start, count, lists in (("first_byte", "num_bytes", encoded), ("first_ann", "num_anns", ann_ids)):
        rows[count] = [len(one) for one in lists]
        ends = np.cumsum(rows[count], dtype=np.int64)
        rows[start] = ends - rows[count]
    flat = np.fromiter((ann_id for some in ann_ids for ann_id in some), np.int64)
    return Samples(rows, b"".join(encoded), flat, *names)


def _places(names: Sequence[str], known: Sequence[str]) -> npt.NDArray[np.int16]:
    return np.array([known.index(name) for name in names], np.int16)


@dataclass(frozen=True, slots=True, kw_only=True)
class SampleSet:
    """The samples of one selection, in the order of the dataset's file.

    Attributes:
        table_name: `dataset.split_by`, that of every sample.
        quarantined: expressions left out because their image could not be read at extraction.
    """

    table_name: str
    samples: Samples
    quarantined: int


def load_samples(cache: FeatureCache, selection: Selection, *, text: str) -> SampleSet:
    """Select samples from the cache's tables.

    Args:
        cache: the cache.
        selection: one dataset and, if it names one, one split.
        text: `raw` or `sent`.

    Raises:
        CacheMissError: the dataset or split was not extracted into this cache.
    """
    entry = cache.manifest.datasets.get(selection.table_name)
    if entry is None:
        raise CacheMissError(
            f"{cache.root} holds no expressions of {selection.table_name}; it holds "
            f"{', '.join(cache.manifest.datasets) or 'none'}. Add them: `ris extract --split "
            f"{selection.dataset}/{selection.split_by} --cache {cache.root}`, or use "
            "what is there, in training by --set data.train=… --set data.val=….",
            table_name=selection.table_name,
        )
    splits = (
        tuple(entry.splits)
        if selection.split is None
        else matching_splits(selection.split, entry.splits, selection.dataset)
    )
    if not splits:
        raise CacheMissError(
            f"{cache.root} holds no split {selection.split!r} of {selection.table_name}; it holds "
            f"{', '.join(entry.splits)}. Add it: `ris extract --split "
            f"{selection.dataset}/{selection.split_by}:{selection.split} --cache {cache.root}`.",
            split=selection.split,
            known=tuple(entry.splits),
        )
    names = ("raw" if text == "raw" else "sent", "split", "ann_ids", *_PLAIN)
    texts, labels, ann_ids, *plain = cache.expression_columns(selection.table_name, names, splits=splits)
    whole = _from_columns(
        dict(zip(_PLAIN, plain, strict=True)),
        tables=[selection.table_name] * len(texts),
        splits=labels,
        texts=texts,
        ann_ids=ann_ids,
    )
    is_readable = ~np.isin(whole.column("image_id"), list(cache.quarantined))
    samples = whole.select(is_readable)
    return SampleSet(table_name=selection.table_name, samples=samples, quarantined=len(whole) - len(samples))


def shuffle_expressions(samples: Sequence[Sample], *, seed: int) -> Samples:
    """Permute expressions among the samples of the same image; targets and annotated categories stay.

    What the text alone decides, this destroys: the fall of a score shows how much the model listens.

    Args:
        samples: any samples; the order is kept.
        seed: of the permutation.
    """
    generator = np.random.default_rng(seed)
    by_image: dict[int, list[int]] = {}
    for index, sample in enumerate(samples):
        by_image.setdefault(sample.image_id, []).append(index)
    shuffled = list(samples)
    for indices in by_image.values():
        for target, source in zip(indices, generator.permutation(indices), strict=True):
            shuffled[target] = replace(
                samples[target],
                text=samples[source].text,
                clip_category_id=samples[source].clip_category_id,
            )
    return Samples.of(shuffled)

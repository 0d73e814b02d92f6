"""The tables of an extraction: expressions with the categories that CLIP predicts, instances, categories.

They are written when an extraction finishes, and built again where a cache has lost them.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TypeAlias

import numpy as np
import numpy.typing as npt
import torch

from ris_cache.datasets import Selection
from ris_cache.datasets.load import load_dataset
from ris_cache.encoders.frozen import FrozenEncoders
from ris_cache.errors import (
    CacheMissError,
    ConfigError,
    CorruptShardError,
    DataError,
    ShapeError,
    StoppedError,
)
from ris_cache.extraction.sources import Part, load_sources
from ris_cache.store import tables
from ris_cache.store.draft import CacheDraft, Recipe
from ris_cache.store.files import SAM_HEADS_NAME
from ris_cache.store.findings import Finding
from ris_cache.store.manifest import DatasetEntry, Manifest, SplitCounts
from ris_cache.store.tables import NO_CATEGORY, CategorySet

_TEXT_BATCH = 256
_Rewrite: TypeAlias = Callable[[CacheDraft, FrozenEncoders, Callable[[], bool]], None]


def write_annotations(
    draft: CacheDraft, part: Part, encoders: FrozenEncoders, should_stop: Callable[[], bool]
) -> None:
    """Add one dataset to a draft; texts of splits that the draft has are not embedded again.

    Raises:
        DataError: the draft has other content by the same names.
        StoppedError: `should_stop` said so; the draft is of no use then.
    """
    categories = part.dataset.categories
    ids = np.array([category.category_id for category in categories])
    names = tuple(category.name for category in categories)
    sizes: dict[str, int] = {}
    for expression in part.expressions:
        sizes[expression.split] = sizes.get(expression.split, 0) + 1
    known = {
        split
        for split, size in sizes.items()
        if draft.has_split(part.table_name, split, num_expressions=size)
    }
    texts = [expression.sent for expression in part.expressions if expression.split not in known]
    if texts or not draft.has_category_set(part.table_name):
        embeddings = encoders.category_embeddings(names).cpu()
        draft.write_categories(
            part.table_name,
            CategorySet(
                ids=tuple(int(category_id) for category_id in ids),
                names=names,
                template=encoders.spec.clip.prompt_template,
                embeddings=embeddings.numpy(),
            ),
        )
        nearest = iter(ids[nearest_categories(texts, embeddings, encoders, should_stop)])
    else:
        nearest = iter(())
    image_ids = {expression.image_id for expression in part.expressions}
    draft.write_tables(
        part.table_name,
        part.expressions,
        [instance for instance in part.dataset.instances.values() if instance.image_id in image_ids],
        # A split that the draft has keeps the categories it has.
        clip_category_ids=[
            NO_CATEGORY if expression.split in known else int(next(nearest))
            for expression in part.expressions
        ],
        category_set=part.table_name,
        incomplete_splits=part.incomplete_splits,
    )


def nearest_categories(
    texts: Sequence[str],
    embeddings: torch.Tensor,
    encoders: FrozenEncoders,
    should_stop: Callable[[], bool] = lambda: False,
) -> npt.NDArray[np.int64]:
    """Return the index of the category whose embedding is nearest to each text's.

    Args:
        embeddings: float32[K, D], normalised as the texts' are, so the cosine is a product.

    Returns:
        int64[texts].
    """
    if not texts:
        return np.zeros(0, np.int64)
    # Annotators repeat themselves ("left", "man in red"), so each different text is encoded once.
    # Not by an array of texts, in which each takes as much memory as the longest.
    different = sorted(set(texts))
    places = {text: place for place, text in enumerate(different)}
    nearest = []
    for start in range(0, len(different), _TEXT_BATCH):
        if should_stop():
            raise StoppedError("Stopped while embedding expressions; all features are done.")
        texts_embedded = encoders.encode_texts(different[start : start + _TEXT_BATCH]).cpu()
        nearest.append((texts_embedded @ embeddings.T).argmax(dim=1))
    found: npt.NDArray[np.int64] = torch.cat(nearest).numpy()[[places[text] for text in texts]]
    return found


@dataclass(frozen=True, slots=True, kw_only=True)
class LostCategories:
    """A category set of which a file is lost.

    Attributes:
        names: by raw category id, in order.
        embeddings: float32[K, D] if their file is sound; None if they are to be computed.
    """

    names: Mapping[int, str]
    embeddings: npt.NDArray[np.float32] | None


@dataclass(frozen=True, slots=True, kw_only=True)
class LostAnnotations:
    """What a cache has lost beside its features, and what it can be made of again.

    Attributes:
        has_lost_heads: SAM's heads are lost.
        categories: by name of the category set.
        parts: by dataset whose tables are lost: the splits that can be built again.
        left_out: splits of these that cannot, `refcoco/unc:train`, since the cache held a part of them.
        obstacles: why something cannot be made again, by what it is.
    """

    has_lost_heads: bool = False
    categories: Mapping[str, LostCategories] = field(default_factory=dict)
    parts: Mapping[str, Part] = field(default_factory=dict)
    left_out: tuple[str, ...] = ()
    obstacles: Mapping[str, str] = field(default_factory=dict)

    @property
    def things(self) -> dict[str, _Rewrite]:
        """How each thing that can be made again is put into a draft, by its name for messages.

        Tables come last, since they need their category set.
        """
        found: dict[str, _Rewrite] = {}
        if self.has_lost_heads:
            found["SAM's heads"] = _rewrite_heads
        for name, lost in self.categories.items():
            found[_set_label(name)] = partial(_rewrite_categories, name, lost)
        for name, part in self.parts.items():
            found[_tables_label(name)] = partial(_rewrite_tables, part)
        return found


@dataclass(frozen=True, slots=True, kw_only=True)
class Rebuilt:
    """What became of lost annotations.

    Attributes:
        things: that were made again.
        failures: why something was not, by what it is.
        is_stopped: asked to stop before all was done.
    """

    things: tuple[str, ...] = ()
    failures: Mapping[str, str] = field(default_factory=dict)
    is_stopped: bool = False


def find_lost(
    root: Path, manifest: Manifest, findings: Iterable[Finding], data_root: Path
) -> LostAnnotations:
    """Say which tables, category sets and heads are to be made again, and load the annotations for it.

    Args:
        data_root: holds a folder for each dataset and the images; looked at only where they are needed.
    """
    damaged = {found.path for found in findings if found.is_repairable and found.kind != "features"}
    categories: dict[str, LostCategories] = {}
    parts: dict[str, Part] = {}
    left_out: list[str] = []
    obstacles: dict[str, str] = {}
    for name in manifest.category_sets:
        if not damaged.isdisjoint(_category_paths(name)):
            try:
                categories[name] = _find_categories(root, manifest, name, damaged, data_root)
            except (DataError, ConfigError, CorruptShardError) as error:
                obstacles[_set_label(name)] = str(error)
    for name, entry in manifest.datasets.items():
        if not damaged.isdisjoint((entry.expressions_file, entry.instances_file)):
            try:
                parts[name] = _find_part(name, entry, data_root)
            except (DataError, ConfigError) as error:
                obstacles[_tables_label(name)] = str(error)
            else:
                shown = name.replace(".", "/")
                left_out += [f"{shown}:{split}" for split, c in entry.splits.items() if not c.is_complete]
    return LostAnnotations(
        has_lost_heads=SAM_HEADS_NAME in damaged,
        categories=categories,
        parts=parts,
        left_out=tuple(left_out),
        obstacles=obstacles,
    )


def rebuild(
    root: Path,
    recipe: Recipe,
    lost: LostAnnotations,
    encoders: FrozenEncoders,
    should_stop: Callable[[], bool],
) -> Rebuilt:
    """Make lost annotations again, each with a manifest of its own, so that one failure keeps none from it.

    The caller holds the lock of the cache, and has compared the encoders with its fingerprint.
    """
    done: list[str] = []
    failures = dict(lost.obstacles)
    for label, rewrite in lost.things.items():
        draft = CacheDraft.begin(root, recipe)
        try:
            if should_stop():
                raise StoppedError("Stopped before all was built again.")
            rewrite(draft, encoders, should_stop)
            draft.commit()
        except StoppedError:
            return Rebuilt(things=tuple(done), failures=failures, is_stopped=True)
        except (DataError, ShapeError, CacheMissError, CorruptShardError) as error:
            failures[label] = str(error)
        else:
            done.append(label)
    return Rebuilt(things=tuple(done), failures=failures)


def _rewrite_heads(draft: CacheDraft, encoders: FrozenEncoders, should_stop: Callable[[], bool]) -> None:
    draft.drop_files([SAM_HEADS_NAME])
    draft.write_sam_heads({name: tensor.cpu().numpy() for name, tensor in encoders.sam_heads().items()})


def _rewrite_categories(
    name: str,
    lost: LostCategories,
    draft: CacheDraft,
    encoders: FrozenEncoders,
    should_stop: Callable[[], bool],
) -> None:
    names = tuple(lost.names.values())
    embeddings = lost.embeddings
    if embeddings is None:
        embeddings = encoders.category_embeddings(names).cpu().numpy()
    draft.replace_categories(
        name,
        CategorySet(
            ids=tuple(lost.names),
            names=names,
            template=encoders.spec.clip.prompt_template,
            embeddings=embeddings,
        ),
    )


def _rewrite_tables(
    part: Part, draft: CacheDraft, encoders: FrozenEncoders, should_stop: Callable[[], bool]
) -> None:
    draft.drop_tables(part.table_name)
    write_annotations(draft, part, encoders, should_stop)


def _find_categories(
    root: Path, manifest: Manifest, name: str, damaged: set[str], data_root: Path
) -> LostCategories:
    tensors, description = _category_paths(name)
    embeddings = None if tensors in damaged else tables.read_tensors(root / tensors).get("embeddings")
    if description not in damaged:
        described = json.loads((root / description).read_bytes())
        return LostCategories(
            names=dict(zip(described["ids"], described["names"], strict=True)), embeddings=embeddings
        )
    for table_name, entry in manifest.datasets.items():
        if entry.category_set == name:
            dataset = load_dataset(data_root, *_dataset_of(table_name))
            names = {category.category_id: category.name for category in dataset.categories}
            return LostCategories(names=names, embeddings=embeddings)
    raise DataError(f"No dataset of the cache uses the category set {name!r}, so its names are lost.")


def _find_part(name: str, entry: DatasetEntry, data_root: Path) -> Part:
    """Return the complete splits of a dataset, as they were extracted.

    Raises:
        DataError: annotations that are missing, contradict each other, or are others than the cache's.
    """
    dataset, split_by = _dataset_of(name)
    (part,) = load_sources([Selection(dataset=dataset, split_by=split_by)], data_root).parts
    complete = {split: counts for split, counts in entry.splits.items() if counts.is_complete}
    for split, expected in complete.items():
        own = [expression for expression in part.expressions if expression.split == split]
        found = SplitCounts(
            expressions=len(own),
            refs=len({expression.ref_id for expression in own}),
            images=len({expression.image_id for expression in own}),
        )
        if found != expected:
            raise DataError(
                f"The annotations of {name}:{split} in {data_root} are not those that the cache was made of: "
                f"{_counted(found)} instead of {_counted(expected)}. Name the data root that it was made of "
                "with --data.",
                split=split,
                expected=expected,
                found=found,
            )
    return replace(part, expressions=tuple(e for e in part.expressions if e.split in complete))


def _counted(counts: SplitCounts) -> str:
    return f"{counts.expressions} expressions of {counts.refs} refs on {counts.images} images"


def _dataset_of(table_name: str) -> tuple[str, str]:
    dataset, _, split_by = table_name.rpartition(".")
    return dataset, split_by


def _category_paths(name: str) -> tuple[str, str]:
    return f"categories/{name}.safetensors", f"categories/{name}.json"


def _set_label(name: str) -> str:
    return f"the category set {name}"


def _tables_label(name: str) -> str:
    return f"the tables of {name}"

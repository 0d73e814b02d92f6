"""The next state of a cache: what the manifest will say, and the files that it needs.

A draft starts from the manifest in place and collects changes in memory. `commit` writes the new files beside
the old ones, none of which it touches, and then replaces the manifest: that one rename is the moment at which
the cache changes. A draft lives under the cache's lock (`.lock`).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import safetensors.numpy

from ris_cache.datasets.records import ExpressionRecord, InstanceRecord
from ris_cache.errors import CacheMissError, ConfigError, DataError, IncompleteCacheError
from ris_cache.store import files, manifest, tables
from ris_cache.store.backends import make_backend
from ris_cache.store.fingerprint import FORMAT_VERSION, Fingerprint
from ris_cache.store.layout import StoredArray
from ris_cache.store.manifest import (
    ArrayEntry,
    DatasetEntry,
    FileEntry,
    ImagesEntry,
    Manifest,
    StoredFingerprint,
)
from ris_cache.store.merging import merge_expressions, merge_instances, merged_counts
from ris_cache.store.opening import read_file, read_listed_table
from ris_cache.store.precision import FEATURES, stored_arrays
from ris_cache.store.tables import CachedImage, CategorySet

SHARD_ROWS = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """What makes a cache, and how it is laid out.

    Attributes:
        preset: name of the encoder preset.
        weights: human label of each set of weights by role.
        shapes: shape per image of each feature, `EncoderSpec.feature_shapes`.
        dtype: how features are stored, `precision.DTYPES`.
        backend: `backends.BACKENDS`.
        shard_rows: rows per shard.
        libraries: versions worth recording beside those of this room.
    """

    fingerprint: Fingerprint
    preset: str
    weights: Mapping[str, str]
    shapes: Mapping[str, tuple[int, ...]]
    dtype: str = "float16"
    backend: str = "zarr"
    shard_rows: int = SHARD_ROWS
    libraries: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def of(cls, found: Manifest) -> Recipe:
        """Return the recipe that a cache was made by."""
        arrays = {entry.name: entry.shape for entry in found.arrays}
        return cls(
            fingerprint=found.to_fingerprint(),
            preset=found.preset,
            weights=found.weights,
            shapes={name: arrays[name] for name in FEATURES if name in arrays},
            dtype=found.dtype,
            backend=found.backend,
            shard_rows=found.shard_rows,
            libraries=found.recorded.libraries,
        )

    @property
    def arrays(self) -> tuple[StoredArray, ...]:
        """The arrays that the features are stored as."""
        return stored_arrays(self.dtype, self.shapes)

    @property
    def image_bytes(self) -> int:
        """Bytes of features per image."""
        return sum(array.row_bytes for array in self.arrays)


class CacheDraft:
    """Changes to a cache, not yet visible to anybody."""

    def __init__(self, root: Path, base: Manifest | None, current: Manifest) -> None:
        """For `begin` and `of` only."""
        self._root = root
        self._base = base
        self._current = current
        self._rows = current.rows
        self._files = dict(current.files)
        self._datasets = dict(current.datasets)
        self._category_sets = list(current.category_sets)
        self._new_category_sets: dict[str, CategorySet] = {}
        self._new_files: dict[str, bytes] = {}
        self._images: dict[int, CachedImage] = {}
        if base is not None:
            table = read_listed_table(root, base, base.images.file, tables.IMAGES)
            self._images = {image.image_id: image for image in tables.read_images(table)}

    @classmethod
    def of(cls, root: Path) -> CacheDraft:
        """Start from the cache in `root`.

        Raises:
            IncompleteCacheError: there is none.
        """
        base = manifest.load_manifest(root)
        return cls(root, base, base)

    @classmethod
    def begin(cls, root: Path, recipe: Recipe) -> CacheDraft:
        """Start from the cache in `root`, or from an empty one where there is none."""
        recorded = manifest.recorded_facts(recipe.libraries)
        if (root / files.MANIFEST_NAME).exists():
            base = manifest.load_manifest(root)
            recorded = recorded.model_copy(update={"created": base.recorded.created})
            return cls(root, base, base.model_copy(update={"recorded": recorded}))
        fingerprint = recipe.fingerprint
        empty = Manifest.model_validate(
            {
                "format": manifest.FORMAT_NAME,
                "format_version": FORMAT_VERSION,
                "fingerprint": StoredFingerprint(digest=fingerprint.digest, fields=fingerprint.fields),
                "preset": recipe.preset,
                "weights": dict(recipe.weights),
                "backend": recipe.backend,
                "shard_rows": recipe.shard_rows,
                "dtype": recipe.dtype,
                "arrays": tuple(ArrayEntry.of(array) for array in recipe.arrays),
                "rows": 0,
                "images": ImagesEntry(file="", ok=0, quarantined=0),
                "datasets": {},
                "category_sets": (),
                "recorded": recorded,
                "files": {},
                "digest": "0" * 64,
            }
        )
        return cls(root, None, empty)

    @property
    def images(self) -> Mapping[int, CachedImage]:
        """Every image by image_id."""
        return self._images

    @property
    def datasets(self) -> Mapping[str, DatasetEntry]:
        """Every dataset by table name."""
        return self._datasets

    def add_shard(
        self, shard: int, shard_files: Mapping[str, FileEntry], images: Iterable[CachedImage]
    ) -> None:
        """Add a shard that lies on disk, and its images; an image known so far moves to its new row."""
        self._files.update(shard_files)
        self._images.update({image.image_id: image for image in images})
        self._rows = max(self._rows, (shard + 1) * self._current.shard_rows)

    def replace_shard_files(self, shard_files: Mapping[str, FileEntry]) -> None:
        """Take over files that were written anew in the place of damaged ones."""
        self._files.update(shard_files)

    def replace_images(self, images: Iterable[CachedImage]) -> None:
        """Take over what is now known of images that the cache has."""
        self._images.update({image.image_id: image for image in images})

    def drop_images(self, image_ids: Iterable[int]) -> None:
        """Forget images; their rows stay where they are until their shard goes."""
        for image_id in image_ids:
            del self._images[image_id]

    def drop_files(self, relatives: Iterable[str]) -> None:
        """Forget files; `remove_unlisted` removes them once the draft is committed."""
        for relative in relatives:
            self._files.pop(relative, None)  # a damaged manifest may not list what it refers to

    def drop_dataset(self, name: str) -> None:
        """Forget a dataset, and its category set if no other uses it.

        The files are not looked at, so what is lost or damaged can be dropped too.

        Raises:
            CacheMissError: there is none of this name.
        """
        category_set = self.drop_tables(name).category_set
        if all(other.category_set != category_set for other in self._datasets.values()):
            self._category_sets.remove(category_set)
            self.drop_files(_category_files(category_set))

    def drop_tables(self, name: str) -> DatasetEntry:
        """Forget a dataset but not its category set; returns what was known of it.

        Raises:
            CacheMissError: there is none of this name.
        """
        if name not in self._datasets:
            raise CacheMissError(
                f"{self._root} has no dataset {name!r}; it has {', '.join(self._datasets) or 'none'}.",
                name=name,
                known=tuple(self._datasets),
            )
        entry = self._datasets.pop(name)
        self.drop_files((entry.expressions_file, entry.instances_file))
        return entry

    def has_split(self, name: str, split: str, *, num_expressions: int) -> bool:
        """Whether a split is there, with as many expressions or more; `write_tables` compares them."""
        entry = self._datasets.get(name)
        return (
            entry is not None and split in entry.splits and entry.splits[split].expressions >= num_expressions
        )

    def write_tables(
        self,
        name: str,
        expressions: Sequence[ExpressionRecord],
        instances: Iterable[InstanceRecord],
        *,
        clip_category_ids: Sequence[int],
        category_set: str,
        incomplete_splits: frozenset[str] = frozenset(),
    ) -> None:
        """Add splits of a dataset to its tables.

        Args:
            name: `<dataset>.<split_by>`.
            expressions: of the splits to add, in the order of the annotation file.
            instances: at least every target; instances that the table has are kept.
            clip_category_ids: predicted category of each expression, raw COCO id or -1. Expressions that the
                table has keep theirs.
            category_set: name of the set that the category ids belong to.
            incomplete_splits: those of which `expressions` holds a part.

        Raises:
            DataError: a split or instance that the tables have with other content, an expression whose image
                was never added, or a target that is no instance.
        """
        if not manifest.is_safe_name(name):
            raise ConfigError(f"{name!r} cannot be the name of a table; it becomes a file name.", name=name)
        all_expressions = tables.expressions_table(expressions, clip_category_ids)
        all_instances = tables.instances_table(instances)
        known = self._datasets.get(name)
        if known is not None:
            all_expressions = merge_expressions(
                name, self._read(known.expressions_file, tables.EXPRESSIONS), all_expressions
            )
            all_instances = merge_instances(
                name, self._read(known.instances_file, tables.INSTANCES), all_instances
            )
        self._require_targets(name, expressions, all_instances)
        if known is not None:
            self.drop_files((known.expressions_file, known.instances_file))
        self._datasets[name] = DatasetEntry(
            expressions_file=self._add_table("expressions", name, all_expressions),
            instances_file=self._add_table("instances", name, all_instances),
            category_set=category_set,
            splits=merged_counts(
                all_expressions,
                known.splits if known else {},
                {expression.split for expression in expressions} - incomplete_splits,
            ),
        )

    def write_categories(self, name: str, categories: CategorySet) -> None:
        """Add a category set; one that the cache has by this name is kept, embeddings too.

        Raises:
            DataError: the cache has other categories by this name.
        """
        if not manifest.is_safe_name(name):
            raise ConfigError(f"{name!r} cannot name a category set; it becomes a file name.", name=name)
        paths = _category_files(name)
        if name not in self._category_sets:
            for path, content in zip(paths, tables.category_set_files(categories), strict=True):
                self._add_file(path, content)
            self._category_sets.append(name)
            self._new_category_sets[name] = categories
            return
        known = self._new_category_sets.get(name) or self._read_category_set(name)
        if (known.ids, known.names, known.template) != (
            categories.ids,
            categories.names,
            categories.template,
        ):
            raise DataError(
                f"{self._root} holds a category set {name!r} with other ids, names or prompt template. Give "
                "this one another name, or extract into another directory.",
                name=name,
            )

    def replace_categories(self, name: str, categories: CategorySet) -> None:
        """Write a category set that the cache has, and whose files are lost or damaged, anew."""
        assert name in self._category_sets, "there is none to replace"
        for path, content in zip(_category_files(name), tables.category_set_files(categories), strict=True):
            self._add_file(path, content)
        self._new_category_sets[name] = categories

    def has_category_set(self, name: str) -> bool:
        """Whether there is a category set of this name."""
        return name in self._category_sets

    def write_sam_heads(self, tensors: Mapping[str, npt.NDArray[Any]]) -> None:
        """Add the weights of SAM's prompt encoder and mask decoder; those that the cache has are kept."""
        if files.SAM_HEADS_NAME not in self._files:
            contiguous = {name: np.asarray(tensor, order="C") for name, tensor in tensors.items()}
            self._add_file(files.SAM_HEADS_NAME, safetensors.numpy.save(contiguous))

    def commit(self) -> Manifest:
        """Write new files, then the manifest; what is there already is not written again.

        Raises:
            IncompleteCacheError: a dataset's category set is missing.
        """
        missing = {entry.category_set for entry in self._datasets.values()}.difference(self._category_sets)
        if missing:
            raise IncompleteCacheError(
                f"{self._root} cannot be finished: category sets {sorted(missing)} are missing.",
                path=self._root,
                category_sets=sorted(missing),
            )
        self._files.pop(self._current.images.file, None)
        images_file = self._add_table("images", "pool", tables.images_table(self._images.values()))
        num_quarantined = sum(image.is_quarantined for image in self._images.values())
        finished = self._current.model_copy(
            update={
                "rows": self._rows,
                "images": ImagesEntry(
                    file=images_file,
                    ok=len(self._images) - num_quarantined,
                    quarantined=num_quarantined,
                ),
                "datasets": self._datasets,
                "category_sets": tuple(self._category_sets),
                "files": dict(sorted(self._files.items())),
            }
        )
        for relative, content in self._new_files.items():
            # Where a damaged file is written anew, the manifest may stay what it is.
            if relative in self._files and not _holds(self._root / relative, content):
                files.write_atomically(self._root / relative, content)
        backend = make_backend(finished.backend, self._root, finished.stored_arrays(), finished.shard_rows)
        metadata = backend.metadata_files(self._rows)
        if self._base is not None:
            unstamped = {"recorded": self._base.recorded, "digest": self._base.digest}
            if finished.model_copy(update=unstamped) == self._base:
                lost = [relative for relative in metadata if not (self._root / relative).exists()]
                for relative in lost:
                    files.write_atomically(self._root / relative, metadata[relative])
                return self._base
        # An array that is longer than the manifest says harms nobody; one that is shorter would.
        for relative, content in metadata.items():
            files.write_atomically(self._root / relative, content)
        sealed = finished.sealed()
        files.write_atomically(self._root / files.MANIFEST_NAME, sealed.to_json())
        return sealed

    def _require_targets(self, name: str, expressions: Sequence[ExpressionRecord], instances: Any) -> None:
        known_ann_ids = set(instances.column("ann_id").to_pylist())
        for expression in expressions:
            if expression.image_id not in self._images:
                raise CacheMissError(
                    f"Image {expression.image_id} was never added to {self._root}; add images before tables.",
                    image_id=expression.image_id,
                )
            if not known_ann_ids.issuperset(expression.ann_ids):
                raise DataError(
                    f"{name}: ref {expression.ref_id} targets {expression.ann_ids}, of which some are no "
                    "instances of the dataset. Check that refs and instances.json belong together.",
                    ref_id=expression.ref_id,
                    ann_ids=expression.ann_ids,
                )

    def _add_table(self, kind: str, name: str, table: Any) -> str:
        content = tables.table_bytes(table)
        relative = files.table_file(kind, name, content)
        self._add_file(relative, content)
        return relative

    def _add_file(self, relative: str, content: bytes) -> None:
        self._new_files[relative] = content
        self._files[relative] = FileEntry.of(files.digest_of(content))

    def _read(self, relative: str, schema: Any) -> Any:
        content = self._new_files.get(relative)
        if content is None:
            assert self._base is not None, "without a base, every file is new"
            content = read_file(self._root, self._base, relative, "first-open")
        return tables.read_table(BytesIO(content), schema, name=self._root / relative)

    def _read_category_set(self, name: str) -> CategorySet:
        assert self._base is not None, "without a base, every file is new"
        paths = _category_files(name)
        for path in paths:
            read_file(self._root, self._base, path, "first-open")
        return tables.read_category_set(*(self._root / path for path in paths))


def remove_unlisted(root: Path, finished: Manifest) -> dict[str, int]:
    """Remove every file that the manifest does not list; returns their sizes by path."""
    kept = {*finished.files, *metadata_paths(finished)}
    sizes = {
        relative: path.stat().st_size
        for relative, path in files.all_files(root).items()
        if relative not in kept
    }
    files.remove_files(root, sizes)
    return sizes


def metadata_paths(finished: Manifest) -> set[str]:
    """Return the files that belong to a cache though its manifest does not list them."""
    if finished.backend != "zarr":
        return set()
    names = [entry.name for entry in finished.arrays]
    return {"features.zarr/zarr.json", *(f"features.zarr/{name}/zarr.json" for name in names)}


def _holds(path: Path, content: bytes) -> bool:
    """Whether a file is there with this content."""
    try:
        return path.stat().st_size == len(content) and path.read_bytes() == content
    except OSError:
        return False


def _category_files(name: str) -> tuple[str, str]:
    return f"categories/{name}.safetensors", f"categories/{name}.json"

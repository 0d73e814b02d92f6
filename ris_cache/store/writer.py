"""Writing a cache: rows for images, shards of features, tables, and the manifest last.

A fresh cache is marked by `extraction.json` until its manifest is there. Adding to a cache leaves all that
its manifest speaks of as it is: new shards lie past the old rows, and every file that grows (tables, array
metadata) waits in `pending/` until `finish` puts them all in place together with the new manifest.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, replace
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import safetensors.numpy

from ris_cache.datasets.records import ExpressionRecord, ImageRecord, InstanceRecord
from ris_cache.errors import CacheMissError, ConfigError, DataError, IncompleteCacheError, NonFiniteError
from ris_cache.store import files, manifest, tables
from ris_cache.store.fingerprint import FORMAT_VERSION, Fingerprint, require_match
from ris_cache.store.manifest import DatasetEntry, FileEntry, ImageCounts, Manifest
from ris_cache.store.merging import count_splits, merge_expressions, merge_instances
from ris_cache.store.tables import CachedImage, CategorySet
from ris_cache.store.zarr_shards import ZarrShardWriter

SHARD_ROWS = 64


class CacheWriter:
    """One extraction into one cache directory; one writer per directory, one thread at a time.

    Order of calls: `create`; `add_images`; for each shard `record_file` or `quarantine` per image, then
    `write_shard`; tables, categories and heads once their images are added; `finish` last.
    """

    def __init__(
        self, root: Path, shards: ZarrShardWriter, draft: Manifest, images: Iterable[CachedImage]
    ) -> None:
        """For `create` only."""
        self._root = root
        self._shards = shards
        self._draft = draft
        self._images = {image.image_id: image for image in images}
        self._files = dict(draft.files)
        self._datasets = dict(draft.datasets)
        self._category_sets = list(draft.category_sets)
        self._new_category_sets: dict[str, CategorySet] = {}
        self._changed: dict[str, bytes] = {}
        self._next_row = draft.rows
        self._unwritten: set[int] = set()

    @classmethod
    def create(
        cls,
        root: Path,
        fingerprint: Fingerprint,
        *,
        preset: str,
        shapes: Mapping[str, tuple[int, ...]],
        weights: Mapping[str, str],
        dtype: str = "float16",
        shard_rows: int = SHARD_ROWS,
        libraries: Mapping[str, str] | None = None,
    ) -> CacheWriter:
        """Start a cache, start an unfinished one over, or open a finished one to add to it.

        Args:
            root: the cache directory; new, empty, or a cache.
            shapes: shape per image by array name, `EncoderSpec.feature_shapes`.
            weights: human label of each set of weights by role.
            dtype: float16 or float32.
            shard_rows: rows per shard; a finished cache keeps its own.
            libraries: versions to record beside those of this room.

        Raises:
            ConfigError: `root` is a file, or a directory that holds something else.
            FingerprintMismatchError: a finished cache made with other settings.
        """
        recorded = manifest.recorded_facts(libraries or {})
        if root.exists() and not root.is_dir():
            raise ConfigError(f"{root} is a file; name a directory for the cache.", path=root)
        is_finished = (root / files.MANIFEST_NAME).exists()
        if is_finished:
            manifest.load_manifest(root)  # before anything is moved: the directory may be somebody else's
        if files.has_pending(root) and (is_finished or (root / files.MARKER_NAME).exists()):
            files.commit_pending(root)
            is_finished = True
        if is_finished:
            draft = manifest.load_manifest(root)
            require_match(fingerprint, draft.to_fingerprint(), where=str(root))
            images = tables.read_images(tables.read_table(root / files.IMAGES_NAME, tables.IMAGES))
            shards = ZarrShardWriter(root / files.FEATURES_NAME)
            shards.discard_beyond(draft.rows)
            files.discard_pending(root)
            (root / files.MARKER_NAME).unlink(missing_ok=True)
            kept = recorded.model_copy(update={"created": draft.recorded.created})
            return cls(root, shards, draft.model_copy(update={"recorded": kept}), images)
        files.prepare_fresh(root)
        shards = ZarrShardWriter.create(root / files.FEATURES_NAME, shapes, dtype, shard_rows)
        draft = Manifest.model_validate(
            {
                "format": manifest.FORMAT_NAME,
                "format_version": FORMAT_VERSION,
                "fingerprint": {"digest": fingerprint.digest, "fields": fingerprint.fields},
                "preset": preset,
                "weights": dict(weights),
                "backend": "zarr",
                "shard_rows": shard_rows,
                "dtype": dtype,
                "arrays": {name: tuple(shape) for name, shape in shapes.items()},
                "rows": 0,
                "images": ImageCounts(ok=0, quarantined=0),
                "datasets": {},
                "category_sets": (),
                "recorded": recorded,
                "files": {
                    f"{files.FEATURES_NAME}/zarr.json": FileEntry.of(
                        files.sha256_file(root / files.FEATURES_NAME / "zarr.json")
                    )
                },
            }
        )
        return cls(root, shards, draft, ())

    @property
    def known_images(self) -> dict[int, CachedImage]:
        """Every image of the cache so far, by image_id, with those that `add_images` gave a row."""
        return dict(self._images)

    @property
    def shard_rows(self) -> int:
        """S, rows per shard."""
        return self._shards.shard_rows

    def add_images(
        self, images: Sequence[ImageRecord], *, namespace: str = "coco", retry_quarantined: bool = False
    ) -> dict[int, int]:
        """Give rows to images that the cache does not know, in their order, beginning at a fresh shard.

        Args:
            namespace: whose ids the image_ids are.
            retry_quarantined: give new rows to quarantined images as well, from any file.

        Returns:
            The row of each image that needs features, by image_id.

        Raises:
            DataError: an image_id that the cache knows with another name, size or namespace.
        """
        rows: dict[int, int] = {}
        self._next_row = self._whole_shards(self._next_row)
        for record in images:
            known = self._images.get(record.image_id)
            if known is not None:
                _require_same_image(known, record, namespace)
                is_written = known.row // self.shard_rows not in self._unwritten
                if not (retry_quarantined and known.is_quarantined and is_written):
                    continue
            rows[record.image_id] = self._next_row
            self._images[record.image_id] = CachedImage(
                **asdict(record), namespace=namespace, row=self._next_row, sha256=None, reason=None
            )
            self._unwritten.add(self._next_row // self.shard_rows)
            self._next_row += 1
        return rows

    def record_file(self, image_id: int, sha256: str) -> None:
        """Record the digest of an image's file, or check it against the one recorded.

        Raises:
            DataError: the cache was made from another file.
        """
        image = self._image(image_id)
        if image.sha256 not in (None, sha256):
            raise DataError(
                f"Image {image_id} ({image.file_name}) has SHA-256 {sha256}, but {self._root} was made from "
                f"a file with {image.sha256}. Restore that file, or extract into another directory.",
                image_id=image_id,
                expected=image.sha256,
                found=sha256,
            )
        self._images[image_id] = replace(image, sha256=sha256)

    def quarantine(self, image_id: int, reason: str) -> None:
        """Leave an image without features, for a reason; before its shard is written.

        Raises:
            ConfigError: its shard is written already.
        """
        image = self._image(image_id)
        if image.row // self.shard_rows not in self._unwritten:
            raise ConfigError(
                f"Image {image_id} cannot be quarantined: its shard is written. Do it before `write_shard`.",
                image_id=image_id,
            )
        self._images[image_id] = replace(image, reason=reason)

    def shard_images(self, shard_index: int) -> list[CachedImage]:
        """Return the images of a shard that this extraction writes, by row."""
        first = shard_index * self.shard_rows
        in_shard = (image for image in self._images.values() if first <= image.row < first + self.shard_rows)
        return sorted(in_shard, key=lambda image: image.row)

    def write_shard(self, shard_index: int, arrays: Mapping[str, npt.NDArray[Any]]) -> None:
        """Write the features of one shard whole.

        Args:
            arrays: float[n, ...] of every array, row i of the i-th image of `shard_images`; rows of
                quarantined images are not looked at.

        Raises:
            NonFiniteError: with `image_id`; nothing was written, so the image can be quarantined and the
                shard written again.
            ConfigError: not a shard of this extraction, or an image without a recorded file.
            ShapeError: arrays that do not fit.
        """
        if shard_index not in self._unwritten:
            raise ConfigError(
                f"Shard {shard_index} is not waiting to be written; waiting: {sorted(self._unwritten)}.",
                shard_index=shard_index,
            )
        images = self.shard_images(shard_index)
        for image in images:
            if image.sha256 is None and not image.is_quarantined:
                raise ConfigError(
                    f"Image {image.image_id} has no file digest; call `record_file` before `write_shard`.",
                    image_id=image.image_id,
                )
        valid = np.array([not image.is_quarantined for image in images])
        try:
            digests = self._shards.write_shard(shard_index, arrays, valid)
        except NonFiniteError as error:
            image_id = images[int(str(error.facts["row"])) - shard_index * self.shard_rows].image_id
            raise NonFiniteError(f"Image {image_id}: {error}", **error.facts, image_id=image_id) from error
        for relative, digest in digests.items():
            self._files[f"{files.FEATURES_NAME}/{relative}"] = FileEntry.of(digest)
        self._unwritten.remove(shard_index)

    def write_tables(
        self,
        name: str,
        expressions: Sequence[ExpressionRecord],
        instances: Iterable[InstanceRecord],
        *,
        clip_category_ids: Sequence[int],
        category_set: str,
    ) -> None:
        """Add splits of a dataset to its tables.

        Args:
            name: `<dataset>.<split_by>`.
            expressions: every expression of the splits to add, in the order of the annotation file.
            instances: at least every target; instances that the table has are kept.
            clip_category_ids: predicted category of each expression, raw COCO id or -1.
            category_set: name of the set that the category ids belong to.

        Raises:
            DataError: a split or instance that the tables have with other content, an expression whose image
                was never added, or a target that is no instance.
        """
        if not manifest.is_safe_name(name):
            raise ConfigError(f"{name!r} cannot be the name of a table; it becomes a file name.", name=name)
        expressions_path, instances_path = f"expressions/{name}.parquet", f"instances/{name}.parquet"
        all_expressions = tables.expressions_table(expressions, clip_category_ids)
        all_instances = tables.instances_table(instances)
        if name in self._datasets:
            known_expressions = self._read_known(expressions_path, tables.EXPRESSIONS)
            all_expressions = merge_expressions(name, known_expressions, all_expressions)
            all_instances = merge_instances(
                name, self._read_known(instances_path, tables.INSTANCES), all_instances
            )
        known_ann_ids = set(all_instances.column("ann_id").to_pylist())
        for expression in expressions:
            self._image(expression.image_id)
            if not known_ann_ids.issuperset(expression.ann_ids):
                raise DataError(
                    f"{name}: ref {expression.ref_id} targets {expression.ann_ids}, of which some are no "
                    "instances of the dataset. Check that refs and instances.json belong together.",
                    ref_id=expression.ref_id,
                    ann_ids=expression.ann_ids,
                )
        self._changed[expressions_path] = tables.table_bytes(all_expressions)
        self._changed[instances_path] = tables.table_bytes(all_instances)
        self._datasets[name] = DatasetEntry(category_set=category_set, splits=count_splits(all_expressions))

    def write_categories(self, name: str, categories: CategorySet) -> None:
        """Add a category set; one that the cache has by this name is kept, embeddings too.

        Raises:
            DataError: the cache has other categories by this name.
        """
        if not manifest.is_safe_name(name):
            raise ConfigError(f"{name!r} cannot name a category set; it becomes a file name.", name=name)
        paths = (f"categories/{name}.safetensors", f"categories/{name}.json")
        if name not in self._category_sets:
            self._changed.update(zip(paths, tables.category_set_files(categories), strict=True))
            self._category_sets.append(name)
            self._new_category_sets[name] = categories
            return
        known = self._new_category_sets.get(name) or tables.read_category_set(
            *(self._root / path for path in paths)
        )
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

    def write_sam_heads(self, tensors: Mapping[str, npt.NDArray[Any]]) -> None:
        """Add the weights of SAM's prompt encoder and mask decoder; those that the cache has are kept."""
        if files.SAM_HEADS_NAME not in self._files:
            contiguous = {name: np.asarray(tensor, order="C") for name, tensor in tensors.items()}
            self._changed[files.SAM_HEADS_NAME] = safetensors.numpy.save(contiguous)

    def finish(self) -> Manifest:
        """Write what changed, then the manifest; from here on the cache is usable.

        Raises:
            IncompleteCacheError: shards are still unwritten, or a dataset's category set is.
        """
        missing = {entry.category_set for entry in self._datasets.values()}.difference(self._category_sets)
        if self._unwritten or missing:
            raise IncompleteCacheError(
                f"{self._root} cannot be finished: unwritten shards {sorted(self._unwritten)}, missing "
                f"category sets {sorted(missing)}. Run `ris extract` again.",
                path=self._root,
                shards=sorted(self._unwritten),
                category_sets=sorted(missing),
            )
        rows = self._whole_shards(self._next_row)
        self._changed[files.IMAGES_NAME] = tables.table_bytes(tables.images_table(self._images.values()))
        for relative, content in self._shards.resized_metadata(rows).items():
            self._changed[f"{files.FEATURES_NAME}/{relative}"] = content
        files.discard_pending(self._root)
        pending = self._root / files.PENDING_NAME
        for relative, content in self._changed.items():
            files.write_atomically(pending / relative, content)
            self._files[relative] = FileEntry.of(files.sha256_file(pending / relative))
        num_quarantined = sum(image.is_quarantined for image in self._images.values())
        finished = self._draft.model_copy(
            update={
                "rows": rows,
                "images": ImageCounts(ok=len(self._images) - num_quarantined, quarantined=num_quarantined),
                "datasets": self._datasets,
                "category_sets": tuple(self._category_sets),
                "files": dict(sorted(self._files.items())),
            }
        )
        files.write_atomically(pending / files.MANIFEST_NAME, finished.to_json())
        files.commit_pending(self._root)
        (self._root / files.MARKER_NAME).unlink(missing_ok=True)
        self._changed.clear()
        return finished

    def _whole_shards(self, rows: int) -> int:
        return -(-rows // self.shard_rows) * self.shard_rows

    def _image(self, image_id: int) -> CachedImage:
        if image_id not in self._images:
            raise CacheMissError(
                f"Image {image_id} was never added to {self._root}; call `add_images` first.",
                image_id=image_id,
            )
        return self._images[image_id]

    def _read_known(self, relative: str, schema: Any) -> Any:
        changed = self._changed.get(relative)
        return tables.read_table(self._root / relative if changed is None else BytesIO(changed), schema)


def _require_same_image(known: CachedImage, record: ImageRecord, namespace: str) -> None:
    expected = (known.namespace, known.file_name, known.height, known.width)
    found = (namespace, record.file_name, record.height, record.width)
    if expected != found:
        raise DataError(
            f"Image {record.image_id} is {found} here, but {expected} (namespace, file, height, width) in "
            "the cache. One cache holds one image per image_id: extract into another directory.",
            image_id=record.image_id,
            expected=expected,
            found=found,
        )

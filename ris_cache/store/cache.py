"""Opening and reading a cache: all that a user of features needs.

Axes: B images asked for, C channels, P side of SAM's embedding grid, N CLIP patch tokens, D their width,
E CLIP's joint width, K categories.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from ris_cache.datasets.records import InstanceRecord
from ris_cache.errors import CacheError, CacheMissError, CorruptShardError, IncompleteCacheError, ShapeError
from ris_cache.store import files, tables
from ris_cache.store.fingerprint import Fingerprint
from ris_cache.store.manifest import Manifest, load_manifest
from ris_cache.store.tables import CachedExpression, CachedImage, CategorySet
from ris_cache.store.zarr_shards import ZarrShardReader

__all__ = ["CachedExpression", "CachedImage", "CategorySet", "FeatureBatch", "FeatureCache", "FeatureStore"]

_MAX_LISTED = 10


class FeatureStore(Protocol):
    """What a backend does for a cache: copy rows into buffers."""

    @property
    def rows(self) -> int:
        """Rows of every array."""
        ...

    @property
    def dtype(self) -> np.dtype[Any]:
        """Element type of every array."""
        ...

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape per row by array name."""
        ...

    def read_rows(
        self, rows: Sequence[int] | npt.NDArray[np.int64], out: Mapping[str, npt.NDArray[Any]]
    ) -> None:
        """Copy rows into C-contiguous [len(rows), ...] buffers of the arrays wanted."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class FeatureBatch:
    """Features of B images, in the dtype of the cache (float16 or float32).

    Attributes:
        image_ids: int64[B]; row i of every other array belongs to image_ids[i].
        sam: float[B, C, P, P], SAM's image embeddings on the squashed input frame.
        clip: float[B, N, D], CLIP's patch tokens, row by row over its grid.
        clip_pooled: float[B, E], CLIP's projected image embedding.
    """

    image_ids: npt.NDArray[np.int64]
    sam: npt.NDArray[Any]
    clip: npt.NDArray[Any]
    clip_pooled: npt.NDArray[Any]

    def first(self, size: int) -> FeatureBatch:
        """Return the first `size` images, as views of the same memory."""
        return FeatureBatch(
            image_ids=self.image_ids[:size],
            sam=self.sam[:size],
            clip=self.clip[:size],
            clip_pooled=self.clip_pooled[:size],
        )


class FeatureCache:
    """A finished cache, open for reading; never writes. Safe to share between threads, forks and pickles."""

    def __init__(
        self, root: Path, manifest: Manifest, images: Sequence[CachedImage], store: FeatureStore
    ) -> None:
        """For `open` only."""
        self._root = root
        self._manifest = manifest
        self._store = store
        self._images = {image.image_id: image for image in images}
        self._rows = {image.image_id: image.row for image in images if not image.is_quarantined}

    @classmethod
    def open(cls, root: Path | str) -> FeatureCache:
        """Open a cache directory without reading features.

        Raises:
            CacheMissError: there is no such directory.
            IncompleteCacheError: it is empty, or its extraction never finished.
            CacheError: it holds something else, or a format newer than this version reads.
            CorruptShardError: the manifest or a table is damaged, or a file is missing.
        """
        root = Path(root).absolute()
        manifest = _load_manifest(root)
        _require_files(root, manifest)
        images = tables.read_images(tables.read_table(root / files.IMAGES_NAME, tables.IMAGES))
        store = ZarrShardReader(root / files.FEATURES_NAME)
        expected = (manifest.arrays, np.dtype(manifest.dtype))
        if (store.shapes, store.dtype) != expected or store.rows < manifest.rows:
            raise CorruptShardError(
                f"{root / files.FEATURES_NAME} holds {store.rows} rows of {store.dtype.name} {store.shapes}, "
                f"but the manifest says {manifest.rows} of {manifest.dtype} {manifest.arrays}. Restore it "
                "from a copy, or extract the cache again into another directory with `ris extract`.",
                path=root,
            )
        return cls(root, manifest, images, store)

    def __reduce__(self) -> tuple[Any, tuple[Path]]:
        return FeatureCache.open, (self._root,)

    @property
    def root(self) -> Path:
        """The cache directory."""
        return self._root

    @property
    def manifest(self) -> Manifest:
        """What the cache holds and what made it."""
        return self._manifest

    @property
    def fingerprint(self) -> Fingerprint:
        """What made it."""
        return self._manifest.to_fingerprint()

    @property
    def images(self) -> dict[int, CachedImage]:
        """Every image by image_id, quarantined ones too."""
        return dict(self._images)

    @property
    def image_ids(self) -> npt.NDArray[np.int64]:
        """int64[images with features], by row."""
        return np.fromiter(self._rows, np.int64, len(self._rows))

    @property
    def sizes(self) -> dict[int, tuple[int, int]]:
        """(height, width) of the original frame of every image by image_id, quarantined ones too."""
        return {image_id: (image.height, image.width) for image_id, image in self._images.items()}

    @property
    def quarantined(self) -> dict[int, str]:
        """Why an image has no features, by image_id."""
        return {
            image_id: image.reason for image_id, image in self._images.items() if image.reason is not None
        }

    def allocate(self, batch_size: int) -> FeatureBatch:
        """Make buffers for `read`, once for many reads: fresh memory costs more than the copy into it."""
        dtype, shapes = self._store.dtype, self._store.shapes
        return FeatureBatch(
            image_ids=np.zeros(batch_size, np.int64),
            sam=np.zeros((batch_size, *shapes["sam"]), dtype),
            clip=np.zeros((batch_size, *shapes["clip"]), dtype),
            clip_pooled=np.zeros((batch_size, *shapes["clip_pooled"]), dtype),
        )

    def read(self, image_ids: Sequence[int], out: FeatureBatch | None = None) -> FeatureBatch:
        """Read the features of B images, in the order asked for; repeats are allowed.

        Args:
            out: buffers from `allocate` for at least B images, overwritten; the batch returned is a view of
                their first B rows. Without it, the batch is new memory.

        Raises:
            CacheMissError: an image that the cache does not hold, or holds as quarantined.
            ShapeError: buffers for fewer images.
            CorruptShardError: a damaged shard.
        """
        rows = self._rows_of(image_ids)
        if out is None:
            out = self.allocate(len(rows))
        elif len(out.image_ids) < len(rows):
            raise ShapeError(
                f"The buffers hold {len(out.image_ids)} images; {len(rows)} were asked for. Allocate more.",
                expected=len(rows),
                found=len(out.image_ids),
            )
        batch = out.first(len(rows))
        batch.image_ids[:] = image_ids
        self._store.read_rows(rows, {"sam": batch.sam, "clip": batch.clip, "clip_pooled": batch.clip_pooled})
        return batch

    def expressions(self, table_name: str) -> tuple[CachedExpression, ...]:
        """Return the expressions of `<dataset>.<split_by>`, all splits; their images may be quarantined.

        Raises:
            CacheMissError: no such table; the message lists those there are.
        """
        path = self._table_path("expressions", table_name)
        return tuple(tables.read_expressions(tables.read_table(path, tables.EXPRESSIONS)))

    def instances(self, table_name: str) -> dict[int, InstanceRecord]:
        """Return the instances of `<dataset>.<split_by>` by ann_id.

        Raises:
            CacheMissError: no such table; the message lists those there are.
        """
        path = self._table_path("instances", table_name)
        return tables.read_instances(tables.read_table(path, tables.INSTANCES))

    def categories(self, name: str) -> CategorySet:
        """Return a category set; a dataset's is `manifest.datasets[table_name].category_set`.

        Raises:
            CacheMissError: no such set; the message lists those there are.
        """
        known = self._manifest.category_sets
        if name not in known:
            raise CacheMissError(
                f"{self._root} has no category set {name!r}; it has {', '.join(known) or 'none'}. `ris "
                "extract` adds the sets of the datasets it extracts.",
                name=name,
                known=known,
            )
        folder = self._root / "categories"
        return tables.read_category_set(folder / f"{name}.safetensors", folder / f"{name}.json")

    def sam_heads(self) -> dict[str, npt.NDArray[Any]]:
        """Return the weights of SAM's prompt encoder and mask decoder by parameter name.

        Raises:
            CacheMissError: the cache was made without them.
        """
        if files.SAM_HEADS_NAME not in self._manifest.files:
            raise CacheMissError(
                f"{self._root} holds no {files.SAM_HEADS_NAME}. `ris extract` with the same weights adds it.",
                path=self._root / files.SAM_HEADS_NAME,
            )
        return tables.read_tensors(self._root / files.SAM_HEADS_NAME)

    def _rows_of(self, image_ids: Sequence[int]) -> list[int]:
        rows = [self._rows.get(int(image_id), -1) for image_id in image_ids]
        if -1 not in rows:
            return rows
        wanted = [int(image_id) for image_id in image_ids]
        unknown = [image_id for image_id in dict.fromkeys(wanted) if image_id not in self._images]
        if unknown:
            listed = [str(image_id) for image_id in unknown[:_MAX_LISTED]]
            if len(unknown) > _MAX_LISTED:
                listed.append(f"and {len(unknown) - _MAX_LISTED} more")
            raise CacheMissError(
                f"{self._root} holds no features of the images {', '.join(listed)}. Add them with "
                "`ris extract`.",
                path=self._root,
                image_ids=unknown,
            )
        reasons = {
            image_id: self._images[image_id].reason for image_id in wanted if image_id not in self._rows
        }
        listed = [f"{image_id}: {reason}" for image_id, reason in reasons.items()]
        raise CacheMissError(
            f"{self._root} has quarantined {len(reasons)} of the images asked for "
            f"({'; '.join(listed[:_MAX_LISTED])}). Leave them out (`quarantined` lists all), or repair the "
            "files and extract them again.",
            path=self._root,
            image_ids=list(reasons),
            reasons=reasons,
        )

    def _table_path(self, kind: str, table_name: str) -> Path:
        known = self._manifest.datasets
        if table_name not in known:
            raise CacheMissError(
                f"{self._root} has no table {table_name!r}; it has {', '.join(known) or 'none'}. Add the "
                "dataset with `ris extract --split …`.",
                table_name=table_name,
                known=tuple(known),
            )
        return self._root / kind / f"{table_name}.parquet"


def _load_manifest(root: Path) -> Manifest:
    if not root.exists():
        raise CacheMissError(f"There is no cache at {root}. Make one with `ris extract`.", path=root)
    if not root.is_dir():
        raise CacheError(f"{root} is a file, not a cache directory as `ris extract` makes.", path=root)
    if (root / files.MANIFEST_NAME).exists():
        return load_manifest(root)
    if (root / files.MARKER_NAME).exists():
        raise IncompleteCacheError(
            f"The extraction into {root} has not finished. Run `ris extract` again.", path=root
        )
    if not any(root.iterdir()):
        raise IncompleteCacheError(f"{root} is empty. Make a cache there with `ris extract`.", path=root)
    raise CacheError(
        f"{root} is not a cache: it holds files, but no {files.MANIFEST_NAME}. Point --cache at a directory "
        "that `ris extract` made.",
        path=root,
    )


def _require_files(root: Path, manifest: Manifest) -> None:
    """Check that every file listed is there, and every shard whole; shards never change once written."""
    required = [files.IMAGES_NAME]
    for name in manifest.datasets:
        required += [f"expressions/{name}.parquet", f"instances/{name}.parquet"]
    for name in manifest.category_sets:
        required += [f"categories/{name}.safetensors", f"categories/{name}.json"]
    missing = [relative for relative in required if relative not in manifest.files]
    for relative, entry in manifest.files.items():
        path = files.safe_join(root, relative)
        if not path.is_file():
            missing.append(relative)
        elif relative.startswith(f"{files.FEATURES_NAME}/") and path.name != "zarr.json":
            num_bytes = path.stat().st_size
            if num_bytes != entry.bytes:
                raise CorruptShardError(
                    f"The shard {path} has {num_bytes} bytes, but the manifest says {entry.bytes}. Restore "
                    "the file from a copy, or extract the cache again into another directory.",
                    path=path,
                    expected=entry.bytes,
                    found=num_bytes,
                )
    if missing:
        more = f" and {len(missing) - _MAX_LISTED} more" if len(missing) > _MAX_LISTED else ""
        raise CorruptShardError(
            f"{root} lacks files of its manifest: {', '.join(missing[:_MAX_LISTED])}{more}. Restore them "
            "from a copy, or extract the cache again into another directory with `ris extract`.",
            path=root,
            missing=missing,
        )

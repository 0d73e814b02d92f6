"""Opening and reading a cache: all that a user of features needs.

Axes: B images asked for, C channels, P side of SAM's embedding grid, N CLIP patch tokens, D their width,
E CLIP's joint width, K categories.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ris_cache.datasets.records import InstanceRecord
from ris_cache.errors import CacheMissError, CorruptShardError, ShapeError
from ris_cache.store import files, tables
from ris_cache.store.backends import make_backend
from ris_cache.store.batch import FeatureBatch
from ris_cache.store.checking import Integrity, RowChecker, require_integrity
from ris_cache.store.columns import expression_columns
from ris_cache.store.fingerprint import Fingerprint
from ris_cache.store.layout import FeatureStore, Way
from ris_cache.store.manifest import DatasetEntry, Manifest
from ris_cache.store.mapped import MappedReader
from ris_cache.store.opening import find_manifest, read_file, require_files, require_sound_images
from ris_cache.store.prefetch import prefetch
from ris_cache.store.tables import CachedExpression, CachedImage, CategorySet

__all__ = ["CachedExpression", "CachedImage", "CategorySet", "FeatureBatch", "FeatureCache"]

_MAX_LISTED = 10


class FeatureCache:
    """A finished cache, open for reading; never writes. Safe to share between threads, forks and pickles.

    A cache that grows meanwhile is read as it was when it was opened.
    """

    def __init__(
        self, root: Path, manifest: Manifest, table: Any, store: FeatureStore, integrity: Integrity
    ) -> None:
        """For `open` only."""
        self._root = root
        self._manifest = manifest
        self._store = store
        self._table = table
        self._integrity = integrity
        self._arrays = manifest.stored_arrays()
        self._checker = RowChecker(table, [array.name for array in self._arrays], integrity)
        ids, rows = (table.column(name).to_numpy() for name in ("image_id", "row"))
        present = np.asarray(table.column("status").to_numpy(zero_copy_only=False) == tables.OK)
        self._image_ids = ids[present]
        # Position in the table and row of every image that has features.
        self._places = {
            image_id: (position, row)
            for image_id, position, row in zip(
                ids[present].tolist(), np.flatnonzero(present).tolist(), rows[present].tolist(), strict=True
            )
        }
        # int64[images, arrays], the opening that each was last read from and found right in. Threads that
        # write the same image at once may mix their openings, each of which is right for its array.
        self._openings = np.zeros((len(table), len(self._arrays)), np.int64)
        self._images: dict[int, CachedImage] | None = None

    @classmethod
    def open(cls, root: Path | str, *, integrity: Integrity = "first-open") -> FeatureCache:
        """Open a cache directory without reading features.

        Args:
            integrity: when to compare features with their checksums: `first-open` the first time that an
                image is read since this process opened its shard, `every-read`, or `off`. Files other than
                features are compared whenever they are read, unless `off`.

        Raises:
            CacheMissError: there is no such directory.
            IncompleteCacheError: it is empty, or its extraction never finished.
            CacheError: it holds something else, a format newer than this version reads, or may not be read.
            CorruptShardError: the manifest or a table is damaged, or a file is missing or cut short.
        """
        require_integrity(integrity)
        root = Path(root).absolute()
        manifest = find_manifest(root)
        require_files(root, manifest)
        content = read_file(root, manifest, manifest.images.file, integrity)
        table = tables.read_table(BytesIO(content), tables.IMAGES, name=root / manifest.images.file)
        require_sound_images(root / manifest.images.file, manifest, table)
        backend = make_backend(manifest.backend, root, manifest.stored_arrays(), manifest.shard_rows)
        return cls(root, manifest, table, MappedReader(backend), integrity)

    def __reduce__(self) -> tuple[Any, tuple[Path, Integrity]]:
        return _reopen, (self._root, self._integrity)

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
        if self._images is None:
            self._images = {image.image_id: image for image in tables.read_images(self._table)}
        return dict(self._images)

    @property
    def image_ids(self) -> npt.NDArray[np.int64]:
        """int64[images with features], by row."""
        ids: npt.NDArray[np.int64] = self._image_ids.copy()
        return ids

    @property
    def sizes(self) -> dict[int, tuple[int, int]]:
        """(height, width) of the original frame of every image by image_id, quarantined ones too."""
        ids, heights, widths = (
            self._table.column(name).to_pylist() for name in ("image_id", "height", "width")
        )
        return {
            image_id: (height, width) for image_id, height, width in zip(ids, heights, widths, strict=True)
        }

    @property
    def quarantined(self) -> dict[int, str]:
        """Why an image has no features, by image_id."""
        ids, reasons = (self._table.column(name).to_pylist() for name in ("image_id", "reason"))
        return {image_id: reason for image_id, reason in zip(ids, reasons, strict=True) if reason is not None}

    def __len__(self) -> int:
        """Number of images with features."""
        return len(self._places)

    def __contains__(self, image_id: object) -> bool:
        """Whether the cache holds features of an image."""
        return image_id in self._places

    def allocate(self, batch_size: int, *, pinned: bool = False) -> FeatureBatch:
        """Make buffers for `read`, once for many reads: fresh memory costs more than the copy into it.

        Args:
            pinned: in page-locked memory, from which a GPU copies faster and without waiting.
        """
        return FeatureBatch.allocate(self._arrays, batch_size, dtype=self._manifest.dtype, pinned=pinned)

    def read(self, image_ids: Sequence[int], out: FeatureBatch | None = None) -> FeatureBatch:
        """Read the features of B images, in the order asked for; repeats are allowed.

        Args:
            out: buffers from `allocate` for at least B images, overwritten; the batch returned is a view of
                their first B rows. Without it, the batch is new memory.

        Raises:
            CacheMissError: an image that the cache does not hold, or holds as quarantined.
            ShapeError: buffers for fewer images.
            CorruptShardError: a damaged shard; what the buffers hold then is of no use.
        """
        return self.read_into(image_ids, out, way="map")

    def read_into(self, image_ids: Sequence[int], out: FeatureBatch | None, *, way: Way) -> FeatureBatch:
        """Read as `read` does, and choose how.

        Args:
            way: `map` copies images that were read before, since this process opened their shard, out of
                memory maps, the fastest way as long as they are still in the page cache; the others it reads
                as `file`. `file` reads all from their files, through the page cache, which the disk answers
                several times faster. `disk` takes from the page cache what is there and reads the rest past
                it, leaving nothing in it.

        Raises:
            CacheMissError, ShapeError, CorruptShardError: as `read`.
        """
        positions, rows = self._places_of(image_ids)
        if out is None:
            out = self.allocate(len(rows))
        elif len(out.image_ids) < len(rows):
            raise ShapeError(
                f"The buffers hold {len(out.image_ids)} images; {len(rows)} were asked for. Allocate more.",
                expected=len(rows),
                found=len(out.image_ids),
            )
        batch = out.first(len(rows))
        seen = self._openings[positions]
        openings = self._store.read_rows(rows, batch.stored, seen=seen, way=way)
        wrong = self._checker.first_wrong(positions, batch.stored, (openings == seen).all(axis=1))
        if wrong is not None:
            index, name = wrong
            raise CorruptShardError(
                f"Image {int(image_ids[index])} of {self._root} is damaged: row {rows[index]} of {name} "
                "contradicts its checksum. Find all that is damaged with `ris cache verify`, and restore it "
                "from a copy or with `ris cache verify --repair`.",
                path=self._root,
                image_id=int(image_ids[index]),
                array=name,
                row=rows[index],
                shard_index=rows[index] // self._manifest.shard_rows,
            )
        self._openings[positions] = openings
        batch.image_ids[:] = image_ids
        return batch

    def prefetch(
        self,
        batches: Iterable[Sequence[int]],
        *,
        depth: int = 2,
        threads: int = 4,
        read_ahead: int = 0,
        pinned: bool | None = None,
        page_cache: bool | None = None,
    ) -> Iterator[FeatureBatch]:
        """Read batches ahead of their use, on threads, into buffers that are used again.

        Memory is `(depth + 1)` batches of the largest size seen, whatever the number of batches.

        Args:
            batches: image_ids of each batch, in the order wanted; may be endless.
            depth: batches read, or being read, beyond the one in use.
            threads: that read, each a part of a batch.
            read_ahead: batches beyond those for which the disk is asked to start already; without effect past
                the page cache.
            pinned: whether buffers are page-locked; by default where torch is loaded and sees a GPU.
            page_cache: whether what is read stays in memory. True suits a cache that fits: later epochs come
                from memory. False suits a larger one: each epoch runs at the disk's speed, the processor
                copies nothing, and nothing else is pushed out of memory; what is there already is taken from
                there. By default True if all features of the cache take at most `PAGE_CACHE_SHARE` of the
                memory available at the call.

        Yields:
            Batches in order. A batch is overwritten once the next one is asked for: copy what has to stay.

        Raises:
            CacheMissError, CorruptShardError: as `read`, where the batch would have come.
        """
        return prefetch(
            self,
            batches,
            depth=depth,
            threads=threads,
            read_ahead=read_ahead,
            pinned=pinned,
            page_cache=page_cache,
        )

    def advise(self, image_ids: Sequence[int]) -> None:
        """Ask the operating system to start reading images that will be wanted soon; unknown ones are
        passed over."""
        rows = [self._places[image_id][1] for image_id in map(int, image_ids) if image_id in self._places]
        self._store.advise(rows, [array.name for array in self._arrays])

    def expressions(self, table_name: str) -> tuple[CachedExpression, ...]:
        """Return the expressions of `<dataset>.<split_by>`, all splits; their images may be quarantined.

        Raises:
            CacheMissError: no such table; the message lists those there are.
        """
        table = self._read_table(self._dataset(table_name).expressions_file, tables.EXPRESSIONS)
        return tuple(tables.read_expressions(table))

    def expression_columns(
        self, table_name: str, names: Sequence[str], *, splits: Collection[str] | None = None
    ) -> tuple[list[Any], ...]:
        """Return some columns of `expressions`, a list each: for many expressions without a record of each.

        Args:
            names: columns of `tables.EXPRESSIONS`.
            splits: those wanted; by default all.

        Raises:
            CacheMissError: no such table; the message lists those there are.
        """
        table = self._read_table(self._dataset(table_name).expressions_file, tables.EXPRESSIONS)
        return expression_columns(table, names, splits=splits)

    def instances(self, table_name: str) -> Mapping[int, InstanceRecord]:
        """Return the instances of `<dataset>.<split_by>` by ann_id; each is parsed when it is asked for.

        Raises:
            CacheMissError: no such table; the message lists those there are.
        """
        table = self._read_table(self._dataset(table_name).instances_file, tables.INSTANCES)
        return tables.read_instances(table)

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
        paths = f"categories/{name}.safetensors", f"categories/{name}.json"
        for relative in paths:
            read_file(self._root, self._manifest, relative, self._integrity)
        return tables.read_category_set(*(self._root / relative for relative in paths))

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
        read_file(self._root, self._manifest, files.SAM_HEADS_NAME, self._integrity)
        return tables.read_tensors(self._root / files.SAM_HEADS_NAME)

    def _places_of(self, image_ids: Sequence[int]) -> tuple[list[int], list[int]]:
        try:
            places = [self._places[image_id] for image_id in map(int, image_ids)]
        except KeyError:
            raise self._miss([int(image_id) for image_id in image_ids]) from None
        return [position for position, _ in places], [row for _, row in places]

    def _miss(self, wanted: list[int]) -> CacheMissError:
        images = self.images
        unknown = [image_id for image_id in dict.fromkeys(wanted) if image_id not in images]
        if unknown:
            listed = [str(image_id) for image_id in unknown[:_MAX_LISTED]]
            if len(unknown) > _MAX_LISTED:
                listed.append(f"and {len(unknown) - _MAX_LISTED} more")
            return CacheMissError(
                f"{self._root} holds no features of the images {', '.join(listed)}. Add them with "
                "`ris extract`.",
                path=self._root,
                image_ids=unknown,
            )
        reasons = {image_id: images[image_id].reason for image_id in wanted if image_id not in self._places}
        listed = [f"{image_id}: {reason}" for image_id, reason in reasons.items()]
        return CacheMissError(
            f"{self._root} has quarantined {len(reasons)} of the images asked for "
            f"({'; '.join(listed[:_MAX_LISTED])}). Leave them out (`quarantined` lists all), or repair the "
            "files and extract them again.",
            path=self._root,
            image_ids=list(reasons),
            reasons=reasons,
        )

    def _dataset(self, table_name: str) -> DatasetEntry:
        known = self._manifest.datasets
        if table_name not in known:
            raise CacheMissError(
                f"{self._root} has no table {table_name!r}; it has {', '.join(known) or 'none'}. Add the "
                "dataset with `ris extract --split …`.",
                table_name=table_name,
                known=tuple(known),
            )
        return known[table_name]

    def _read_table(self, relative: str, schema: Any) -> Any:
        content = read_file(self._root, self._manifest, relative, self._integrity)
        return tables.read_table(BytesIO(content), schema, name=self._root / relative)


def _reopen(root: Path, integrity: Integrity) -> FeatureCache:
    return FeatureCache.open(root, integrity=integrity)

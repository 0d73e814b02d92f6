"""Mending a cache from what it was made of: damaged shards are computed again from their images, lost tables
built again from the annotations, category embeddings and SAM's heads from the encoders. The rest stays.

A shard that comes out with the bytes it had is mended, and nothing else changes. The same encoders on other
hardware, or in other batches, may round otherwise; then the new checksums go into tables and manifest, which
are replaced as an extraction does it. A repair that is cut off can be run again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ris_cache.datasets import ImageRoots
from ris_cache.encoders.batch_size import find_batch_size
from ris_cache.encoders.frozen import FrozenEncoders
from ris_cache.errors import CorruptShardError, DataError, NonFiniteError
from ris_cache.extraction.annotations import LostAnnotations, Rebuilt, find_lost, rebuild
from ris_cache.extraction.pipeline import BufferPool, Pipeline
from ris_cache.extraction.run import default_workers
from ris_cache.progress import Progress, Silent
from ris_cache.store import files, tables
from ris_cache.store.backends import make_backend
from ris_cache.store.draft import CacheDraft, Recipe
from ris_cache.store.findings import Finding, bad_shards, find_wrong_size
from ris_cache.store.fingerprint import cache_fingerprint, require_match
from ris_cache.store.journal import PlannedImage
from ris_cache.store.layout import Array, Backend
from ris_cache.store.locks import FileLock
from ris_cache.store.manifest import FileEntry, Manifest
from ris_cache.store.opening import find_manifest
from ris_cache.store.precision import decode, encode, stored_arrays
from ris_cache.store.rows import row_checksums
from ris_cache.store.tables import CachedImage


@dataclass(frozen=True, slots=True, kw_only=True)
class RepairReport:
    """What a repair did, or would do.

    Attributes:
        num_images: computed again.
        restored: shards that have the bytes they had.
        changed: shards whose features differ from those before, by an unknown amount: what was there is
            damaged. Their new checksums are recorded.
        rewritten: metadata files, relative to the cache.
        failures: why a shard could not be mended.
        rebuilt: tables, category sets and heads that were made again.
        not_rebuilt: why one was not, by what it is.
        left_out: splits that rebuilt tables lack, `refcoco/unc:train`, since the cache held a part of them.
        is_stopped: asked to stop before all was done; what is named above is done.
    """

    num_images: int
    restored: tuple[int, ...] = ()
    changed: tuple[int, ...] = ()
    rewritten: tuple[str, ...] = ()
    failures: Mapping[int, str] = field(default_factory=dict)
    rebuilt: tuple[str, ...] = ()
    not_rebuilt: Mapping[str, str] = field(default_factory=dict)
    left_out: tuple[str, ...] = ()
    is_stopped: bool = False

    def as_dict(self) -> dict[str, Any]:
        """Return the values by name."""
        return asdict(self)


@dataclass(frozen=True, slots=True, kw_only=True)
class RepairPlan:
    """What a repair would do.

    Attributes:
        images: of each shard that would be computed again; none where only its files have to be written.
        metadata: files that would be written anew.
        obstacles: why a shard could not be mended.
        annotations: tables, category sets and heads that would be made again.
    """

    images: Mapping[int, tuple[CachedImage, ...]]
    metadata: Mapping[str, bytes]
    obstacles: Mapping[int, str]
    annotations: LostAnnotations = field(default_factory=LostAnnotations)


def plan_repair(root: Path, findings: Iterable[Finding], data_root: Path) -> RepairPlan:
    """Say what `repair` would do; nothing is written.

    Raises:
        CacheMissError, IncompleteCacheError, CorruptShardError: as `repair`.
        DataError: an image folder that cannot be read.
    """
    root = root.absolute()
    findings = tuple(findings)
    manifest = find_manifest(root)
    backend = _backend_of(root, manifest)
    by_shard = _images_by_shard(root, manifest)
    roots = ImageRoots(data_root)
    images, obstacles = {}, {}
    for shard in bad_shards(findings):
        images[shard] = by_shard.get(shard, ())
        obstacle = _obstacle(images[shard], roots)
        if obstacle is not None:
            obstacles[shard] = obstacle
    wrong = {finding.path for finding in findings if finding.kind == "metadata"}
    metadata = backend.metadata_files(manifest.rows) if wrong else {}
    return RepairPlan(
        images=images,
        metadata={path: content for path, content in metadata.items() if path in wrong},
        obstacles=obstacles,
        annotations=find_lost(root, manifest, findings, data_root),
    )


def repair(
    root: Path,
    findings: Iterable[Finding],
    *,
    data_root: Path,
    load_encoders: Callable[[], FrozenEncoders],
    batch_size: int | None = None,
    workers: int | None = None,
    progress: Progress | None = None,
    should_stop: Callable[[], bool] = lambda: False,
) -> RepairReport:
    """Mend what can be mended: compute the images of damaged shards again, write damaged metadata anew, and
    make lost tables, category sets and heads again.

    Quarantined images stay so. What cannot be mended is reported and does not keep the rest from it. An
    extraction that is under way or was cut off is left alone: it has rows of its own.

    Args:
        findings: of `verify`; those that no repair can mend are passed over.
        data_root: holds the images and the annotations.
        load_encoders: called if there is anything to compute; must give the encoders of the fingerprint.
        batch_size: images per forward pass; by default what fits the device.
        workers: decoding threads; by default one per processor, at most 8.
        progress: who watches.
        should_stop: looked at before each shard, and each thing beside them.

    Raises:
        FingerprintMismatchError: other encoders than the cache was made by; nothing was changed.
        CorruptShardError: the manifest or the table of images is damaged, so nobody knows what belongs where.
        CacheMissError, IncompleteCacheError: there is no finished cache.
        CacheError: the directory may not be written to.
        OSError: the disk is full, say.
    """
    root, watcher = root.absolute(), progress or Silent()
    findings = tuple(findings)
    find_manifest(root)  # so that no lock is left in a directory that is no cache
    lock = FileLock(root / files.LOCK_NAME)
    if not lock.acquire(wait=False):
        watcher.say(f"another process changes {root}; waiting for it to end")
        lock.acquire()
    with lock:
        plan = plan_repair(root, findings, data_root)
        work = _Repair(root, plan, ImageRoots(data_root), watcher, should_stop)
        has_features = any(images for shard, images in plan.images.items() if shard not in plan.obstacles)
        if has_features or plan.annotations.things:
            encoders = load_encoders()
            work.use(encoders)
            if has_features:
                work.make_pipeline(batch_size or find_batch_size(encoders), workers or default_workers())
        # First, since a backend writes no shard beside metadata that says otherwise.
        for path, content in plan.metadata.items():
            files.write_atomically(root / path, content)
        return work.run()


class _Repair:
    """One repair, under the lock of the cache."""

    def __init__(
        self,
        root: Path,
        plan: RepairPlan,
        roots: ImageRoots,
        progress: Progress,
        should_stop: Callable[[], bool],
    ) -> None:
        self._root = root
        self._plan = plan
        self._roots = roots
        self._progress = progress
        self._should_stop = should_stop
        self._manifest = find_manifest(root)
        self._backend = _backend_of(root, self._manifest)
        self._recipe = Recipe.of(self._manifest)
        self._stages = (*_rounded_through(self._manifest), self._manifest.dtype)
        self._encoders: FrozenEncoders | None = None
        self._pipeline: Pipeline | None = None

    def use(self, encoders: FrozenEncoders) -> None:
        """Take the encoders, which must be those of the fingerprint."""
        fingerprint = cache_fingerprint(
            encoders.spec,
            {role: record.as_dict() for role, record in encoders.weights.items()},
            arithmetic=encoders.arithmetic,
            dtype=self._manifest.dtype,
            rounded_through=_rounded_through(self._manifest),
        )
        require_match(fingerprint, self._manifest.to_fingerprint(), where=str(self._root))
        self._encoders = encoders

    def make_pipeline(self, batch_size: int, workers: int) -> None:
        """Get ready to compute features."""
        assert self._encoders is not None
        self._pipeline = Pipeline(
            encoders=self._encoders,
            paths={
                image.image_id: self._roots.path_of(image.file_name)
                for shard, images in self._plan.images.items()
                if shard not in self._plan.obstacles
                for image in images
            },
            dtype=self._stages[0],
            batch_size=batch_size,
            workers=workers,
            strict=True,
            on_image=self._progress.advance,
        )

    def run(self) -> RepairReport:
        """Compute and write shard by shard, record what has changed, then make again what lies beside."""
        todo = [shard for shard in self._plan.images if shard not in self._plan.obstacles]
        failures = dict(self._plan.obstacles)
        restored: list[int] = []
        changed: list[int] = []
        new_files: dict[str, FileEntry] = {}
        new_images: list[CachedImage] = []
        self._progress.start(total=sum(len(self._plan.images[shard]) for shard in todo), done=0)
        is_stopped = False
        try:
            for shard in todo:
                if self._should_stop():
                    is_stopped = True
                    break
                images = self._plan.images[shard]
                try:
                    arrays = self._compute(images)
                except (DataError, NonFiniteError) as error:
                    failures[shard] = str(error)
                    continue
                written, renewed = self._write(shard, images, arrays)
                if renewed == images and all(self._manifest.files.get(p) == e for p, e in written.items()):
                    restored.append(shard)
                else:
                    changed.append(shard)
                    new_files.update(written)
                    new_images += renewed
        finally:
            self._progress.stop()
            if changed:
                self._record(new_files, new_images)
        rebuilt = self._rebuild(is_stopped)
        return RepairReport(
            num_images=sum(len(self._plan.images[shard]) for shard in (*restored, *changed)),
            restored=tuple(restored),
            changed=tuple(changed),
            rewritten=tuple(self._plan.metadata),
            failures=failures,
            rebuilt=rebuilt.things,
            not_rebuilt=rebuilt.failures,
            left_out=self._plan.annotations.left_out,
            is_stopped=rebuilt.is_stopped,
        )

    def _rebuild(self, is_stopped: bool) -> Rebuilt:
        lost = self._plan.annotations
        if is_stopped or self._encoders is None or not lost.things:
            return Rebuilt(failures=lost.obstacles, is_stopped=is_stopped)
        return rebuild(self._root, self._new_recipe(), lost, self._encoders, self._should_stop)

    def _new_recipe(self) -> Recipe:
        return replace(self._recipe, libraries={"torch": torch.__version__})

    def _compute(self, images: Sequence[CachedImage]) -> dict[str, Array]:
        """Return [n, ...] of every stored array.

        Raises:
            DataError: an image that cannot be read.
            NonFiniteError: features that cannot be stored.
        """
        if not images:
            return {a.name: np.empty((0, *a.shape), a.numpy_dtype) for a in self._recipe.arrays}
        assert self._pipeline is not None
        pool = BufferPool(stored_arrays(self._stages[0], self._recipe.shapes), len(images), 1)
        (shard,) = self._pipeline.compute([_Work(_planned(images))], pool)
        arrays = shard.arrays
        for before, after in zip(self._stages, self._stages[1:], strict=False):
            arrays = _recoded(before, arrays, after)
        return arrays

    def _write(
        self, shard: int, images: Sequence[CachedImage], arrays: Mapping[str, Array]
    ) -> tuple[dict[str, FileEntry], tuple[CachedImage, ...]]:
        """Write a shard; returns the entries of its files, and its images with the rows' checksums."""
        first_row = shard * self._backend.shard_rows
        positions = np.array([image.row - first_row for image in images], np.int64)
        digests = self._backend.write_shard(shard, positions, arrays)
        checksums = row_checksums([arrays[array.name] for array in self._backend.arrays])
        return (
            {path: FileEntry.of(digest) for path, digest in digests.items()},
            tuple(replace(image, crc32c=own) for image, own in zip(images, checksums, strict=True)),
        )

    def _record(self, new_files: Mapping[str, FileEntry], new_images: Iterable[CachedImage]) -> None:
        draft = CacheDraft.begin(self._root, self._new_recipe())
        draft.replace_shard_files(new_files)
        draft.replace_images(new_images)
        draft.commit()


@dataclass(frozen=True, slots=True)
class _Work:
    images: Sequence[PlannedImage]


def _backend_of(root: Path, manifest: Manifest) -> Backend:
    return make_backend(manifest.backend, root, manifest.stored_arrays(), manifest.shard_rows)


def _rounded_through(manifest: Manifest) -> tuple[str, ...]:
    return tuple(manifest.fingerprint.fields.get("rounded_through", ()))


def _images_by_shard(root: Path, manifest: Manifest) -> dict[int, tuple[CachedImage, ...]]:
    """Return the images with features of each shard, by ascending row.

    Raises:
        CorruptShardError: the table of images is not the one that the manifest lists.
    """
    path = manifest.images.file
    entry = manifest.files.get(path)
    content = b""
    if entry is not None and find_wrong_size(root, path, entry.bytes) is None:
        content = (root / path).read_bytes()
    if entry is None or files.digest_of(content).sha256 != entry.sha256:
        raise CorruptShardError(
            f"{root / path} is missing or damaged, so it is not known which images the damaged shards hold. "
            "Restore it from a copy, or extract the cache again into another directory with `ris extract`.",
            path=root / path,
        )
    by_shard: dict[int, list[CachedImage]] = {}
    table = tables.read_table(BytesIO(content), tables.IMAGES, name=root / path)
    for image in sorted(tables.read_images(table), key=lambda image: image.row):
        if not image.is_quarantined:
            by_shard.setdefault(image.row // manifest.shard_rows, []).append(image)
    return {shard: tuple(images) for shard, images in by_shard.items()}


def _obstacle(images: Iterable[CachedImage], roots: ImageRoots) -> str | None:
    """Return why features cannot be computed from the image files that are there; None if they can."""
    for image in images:
        path = roots.path_of(image.file_name)
        if path is None:
            return f"No image file {image.file_name} in the image folders of {roots.data_root}. Add it."
        try:
            digest = files.sha256_file(path).sha256
        except OSError as error:
            return f"{path} cannot be read ({error.strerror or error})."
        if digest != image.sha256:
            return (
                f"{path} is not the file that the features were computed from (SHA-256 {digest[:12]}, "
                f"recorded {str(image.sha256)[:12]}). Restore the file."
            )
    return None


def _planned(images: Iterable[CachedImage]) -> list[PlannedImage]:
    return [
        PlannedImage(
            image_id=image.image_id,
            namespace=image.namespace,
            row=image.row,
            file_name=image.file_name,
            height=image.height,
            width=image.width,
        )
        for image in images
    ]


def _recoded(before: str, arrays: Mapping[str, Array], after: str) -> dict[str, Array]:
    """Turn features stored in one precision into another, as `ris cache convert` did.

    Raises:
        NonFiniteError: features that the other precision cannot hold.
    """
    features = {name: torch.from_numpy(array) for name, array in decode(before, arrays).items()}
    encoded = encode(after, features)
    if encoded.problems:
        problem = next(iter(encoded.problems.values()))
        raise NonFiniteError(f"Features cannot be stored as {after}: {problem}.", problem=problem)
    return {name: tensor.numpy() for name, tensor in encoded.arrays.items()}

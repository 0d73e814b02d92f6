"""Checking a whole cache: is every file there and as it was written, and do manifest, tables and shards agree?

Axes: S rows per shard.

Nothing is changed, and the first problem does not end it: each becomes a `Finding`. Each file is read once,
from its first byte to its last, with one row in memory per thread; through read calls rather than memory maps,
so that a disk that cannot give back a block is a finding too, instead of the end of the process.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow.compute as pc

from ris_cache.ahead import map_ahead
from ris_cache.errors import CacheError, CorruptShardError
from ris_cache.store import files, tables
from ris_cache.store.backends import make_backend
from ris_cache.store.cache import find_manifest
from ris_cache.store.journal import Journal
from ris_cache.store.layout import Backend
from ris_cache.store.manifest import DatasetEntry, FileEntry, Manifest
from ris_cache.store.merging import count_splits
from ris_cache.store.scanning import ShardChecker, ShardImages, find_wrong_size

Kind = Literal["features", "metadata", "manifest", "table", "categories", "heads", "access"]

_MAX_WORKERS = 4
_AGAIN = "or extract the cache again into another directory with `ris extract`"
_REMEDIES: dict[str, str] = {
    "features": "`ris cache verify --repair --data DIR` recomputes them.",
    "metadata": "`ris cache verify --repair` writes it anew.",
    "manifest": f"Restore manifest.json from a copy, {_AGAIN}.",
    "table": f"Restore the file from a copy, {_AGAIN}.",
    "categories": f"Restore the file from a copy, {_AGAIN}.",
    "heads": f"Restore the file from a copy, {_AGAIN}.",
    "access": "Ask the owner of the cache to make it a readable file inside the cache.",
}
_KINDS: dict[str, Kind] = {
    "features.zarr": "features",
    "features": "features",
    "categories": "categories",
    files.SAM_HEADS_NAME: "heads",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """One thing that is wrong with a cache.

    Attributes:
        kind: what is affected: the `features` of a shard, Zarr's `metadata` (zarr.json), the `manifest`, a
            `table`, `categories`, SAM's `heads`; or `access`: a file that cannot be looked at.
        path: of the file, posix, relative to the cache.
        problem: what is wrong; continues the path.
        shard: of features.
        image_ids: whose rows are wrong; empty where that is not known.
    """

    kind: Kind
    path: str
    problem: str
    shard: int | None = None
    image_ids: tuple[int, ...] = ()

    @property
    def is_repairable(self) -> bool:
        """Whether `ris cache verify --repair` can mend it."""
        return self.kind in ("features", "metadata")

    @property
    def remedy(self) -> str:
        """What to do."""
        return _REMEDIES[self.kind]

    def __str__(self) -> str:
        return f"{self.path} {self.problem}"


@dataclass(frozen=True, slots=True, kw_only=True)
class VerifyReport:
    """What was looked at, and what is wrong with it.

    Attributes:
        manifest: None if it is damaged; nothing else could be checked then.
        is_fast: no byte of features was read.
        num_shards: looked at.
        num_files: listed, of these shards and beside the shards.
        num_bytes: of files compared with their checksums.
        findings: everything wrong.
        notes: what is odd and harms nobody.
    """

    root: Path
    manifest: Manifest | None
    is_fast: bool
    num_shards: int
    num_files: int
    num_bytes: int
    findings: tuple[Finding, ...]
    notes: tuple[str, ...]

    @property
    def is_sound(self) -> bool:
        """Whether nothing is wrong."""
        return not self.findings

    @property
    def bad_shards(self) -> tuple[int, ...]:
        """Shards with findings, ascending."""
        return tuple(sorted({finding.shard for finding in self.findings if finding.shard is not None}))


def verify(
    root: Path,
    *,
    fast: bool = False,
    shards: Collection[int] | None = None,
    workers: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> VerifyReport:
    """Check a finished cache.

    Everything beside the features is always compared with its SHA-256, and tables, counts, category sets,
    `zarr.json` and the indexes of the shards with each other. Without `fast` so is every file of features, and
    every row with its CRC-32C; rows of floats are searched for NaN and infinity.

    Args:
        fast: read no features.
        shards: look at these only; by default at all.
        workers: threads; by default one per processor, at most 4.
        progress: called after each shard with how many are done, and of how many.

    Raises:
        CacheMissError, IncompleteCacheError: there is no finished cache.
        CacheError: something else than a cache, or a newer format.
    """
    root = root.absolute()
    try:
        manifest = find_manifest(root)
    except CorruptShardError as error:
        finding = Finding(
            kind="manifest", path=files.MANIFEST_NAME, problem=f"is damaged: {_problem_of(error)}"
        )
        return VerifyReport(
            root=root,
            manifest=None,
            is_fast=fast,
            num_shards=0,
            num_files=0,
            num_bytes=0,
            findings=(finding,),
            notes=(),
        )
    backend = make_backend(manifest.backend, root, manifest.stored_arrays(), manifest.shard_rows)
    annotations = _Annotations(root, manifest)
    findings = [*annotations.findings, *_check_metadata(root, manifest, backend)]
    checker = ShardChecker(
        root,
        manifest,
        backend,
        annotations.images,
        fast=fast,
        # Without sound metadata no row of Zarr can be found; the files' own checksums still say all.
        can_locate=not any(finding.kind == "metadata" for finding in findings),
    )
    findings += _check_listed_shards(manifest, backend)
    all_shards = range(manifest.rows // manifest.shard_rows)
    chosen = [shard for shard in all_shards if shards is None or shard in shards]
    workers = workers or min(_MAX_WORKERS, os.cpu_count() or 1)
    num_unused = 0
    for done, state in enumerate(map_ahead(checker.check, chosen, workers=workers, depth=2 * workers), 1):
        num_unused += state.num_unused
        findings += [
            Finding(
                kind="access" if problem.is_access else "features",
                path=problem.path,
                problem=problem.problem,
                shard=None if problem.is_access else state.shard,
                image_ids=problem.image_ids,
            )
            for problem in state.problems
        ]
        if progress is not None:
            progress(done, len(chosen))
    of_features = manifest.shard_files()
    looked_at = {path for shard in chosen for path in backend.shard_files(shard)} & of_features.keys()
    others = manifest.files.keys() - of_features.keys()
    return VerifyReport(
        root=root,
        manifest=manifest,
        is_fast=fast,
        num_shards=len(chosen),
        num_files=len(looked_at) + len(others),
        num_bytes=sum(manifest.files[path].bytes for path in (others if fast else others | looked_at)),
        findings=tuple(findings),
        notes=tuple(_notes(root, manifest, backend, num_unused)),
    )


def unlisted_files(root: Path, manifest: Manifest, backend: Backend) -> dict[str, Path]:
    """Return the files that belong to nothing in a cache, by path relative to it.

    Files of an extraction that is under way are not among them.
    """
    kept = {*manifest.files, *backend.metadata_files(manifest.rows)}
    plan = Journal(root).read_plan()
    if plan is not None:
        kept |= {path for shard in plan.shards() for path in backend.shard_files(shard)}
    return {path: place for path, place in files.all_files(root).items() if path not in kept}


class _Annotations:
    """All that lies beside the features, checked: tables, category sets, SAM's heads.

    Attributes:
        findings: what is wrong.
        images: what the table of images says of the shards; None if it cannot be read.
    """

    def __init__(self, root: Path, manifest: Manifest) -> None:
        self.findings: list[Finding] = []
        self.images: ShardImages | None = None
        self._root = root
        self._manifest = manifest
        of_features = manifest.shard_files()
        self._contents = {
            path: self._read(path, entry)
            for path, entry in manifest.files.items()
            if path not in of_features
        }
        image_ids = self._check_images()
        for name, entry in manifest.datasets.items():
            self._check_dataset(name, entry, image_ids)
        for name in manifest.category_sets:
            self._check_categories(f"categories/{name}.safetensors", f"categories/{name}.json")
        if self._contents.get(files.SAM_HEADS_NAME) is not None:
            with self._collected(files.SAM_HEADS_NAME):
                tables.read_tensors(root / files.SAM_HEADS_NAME)

    def _add(self, path: str, problem: str, kind: Kind | None = None) -> None:
        known = kind or _KINDS.get(path.split("/")[0], "table")
        self.findings.append(Finding(kind=known, path=path, problem=problem))

    def _collected(self, path: str) -> _Collected:
        return _Collected(self, path)

    def _read(self, path: str, entry: FileEntry) -> bytes | None:
        """Return the content of a file, None if it is not what the manifest says."""
        wrong = find_wrong_size(self._root, path, entry.bytes)
        if wrong is not None:
            self._add(path, wrong.problem, "access" if wrong.is_access else None)
            return None
        try:
            content = (self._root / path).read_bytes()
        except OSError as error:
            self._add(path, f"cannot be read ({error.strerror or error})", "access")
            return None
        if files.digest_of(content).sha256 != entry.sha256:
            self._add(path, "contradicts its SHA-256")
            return None
        return content

    def _table(self, path: str, schema: Any) -> Any | None:
        if path not in self._contents:
            self._add(files.MANIFEST_NAME, f"does not list {path}, which it refers to", "manifest")
            return None
        content = self._contents[path]
        if content is not None:
            with self._collected(path):
                return tables.read_table(BytesIO(content), schema, name=self._root / path)
        return None

    def _check_images(self) -> Any | None:
        """Check the table of images; returns its image_ids."""
        path, entry = self._manifest.images.file, self._manifest.images
        table = self._table(path, tables.IMAGES)
        if table is None:
            return None
        ids, rows = (table.column(name).to_numpy() for name in ("image_id", "row"))
        has_reason = table.column("reason").is_valid().to_numpy()
        is_ok = np.asarray(table.column("status").to_numpy(zero_copy_only=False) == tables.OK)
        lengths = table.column("crc32c").combine_chunks().value_lengths().to_numpy()
        for name, values in (("image_id", ids), ("row", rows)):
            if len(np.unique(values)) < len(values):
                self._add(path, f"has an {name} twice" if name == "image_id" else "gives a row twice")
        if len(rows) and not 0 <= rows.min() <= rows.max() < self._manifest.rows:
            self._add(path, f"gives rows outside 0 to {self._manifest.rows - 1}")
            return table.column("image_id")
        if (has_reason == is_ok).any():
            self._add(path, "has images whose status and reason contradict each other")
        if (lengths[is_ok] != len(self._manifest.arrays)).any():
            self._add(path, f"does not give {len(self._manifest.arrays)} checksums for every image")
            return table.column("image_id")
        self.images = ShardImages(table, is_ok, self._manifest.shard_rows)
        for state, counted, listed in (
            ("ok", int(is_ok.sum()), entry.ok),
            ("quarantined", int((~is_ok).sum()), entry.quarantined),
        ):
            if counted != listed:
                self._add(path, f"has {counted} images that are {state}; the manifest says {listed}")
        return table.column("image_id")

    def _check_dataset(self, name: str, entry: DatasetEntry, image_ids: Any | None) -> None:
        expressions = self._table(entry.expressions_file, tables.EXPRESSIONS)
        instances = self._table(entry.instances_file, tables.INSTANCES)
        if expressions is None:
            return
        path = entry.expressions_file
        counted = count_splits(expressions)
        for split in dict.fromkeys((*entry.splits, *counted)):
            listed, found = entry.splits.get(split), counted.get(split)
            if listed is None or found is None:
                where = "the manifest" if listed is None else "the table"
                self._add(path, f"and the manifest disagree: split {split} of {name} is not in {where}")
                continue
            for what in ("expressions", "refs", "images"):
                one, other = getattr(found, what), getattr(listed, what)
                if one != other:
                    self._add(path, f"has {one} {what} in split {split}; the manifest says {other}")
        if image_ids is not None:
            unknown = _unknown(expressions.column("image_id"), image_ids)
            if unknown:
                self._add(path, f"names images that the table of images lacks: {_listed(unknown)}")
        if instances is not None:
            targets = pc.list_flatten(expressions.column("ann_ids"))
            unknown = _unknown(targets, instances.column("ann_id"))
            if unknown:
                self._add(path, f"names targets that are no instances: {_listed(unknown)}")

    def _check_categories(self, tensors: str, description: str) -> None:
        unlisted = [path for path in (tensors, description) if path not in self._contents]
        for path in unlisted:
            self._add(files.MANIFEST_NAME, f"does not list {path}, which it refers to", "manifest")
        if not unlisted and None not in (self._contents[tensors], self._contents[description]):
            with self._collected(tensors):
                tables.read_category_set(self._root / tensors, self._root / description)


class _Collected:
    """Turns a `CorruptShardError` raised inside into a finding about a file."""

    def __init__(self, annotations: _Annotations, path: str) -> None:
        self._annotations = annotations
        self._path = path

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: Any) -> bool:
        if not isinstance(error, CorruptShardError):
            return False
        self._annotations._add(self._path, _problem_of(error))
        return True

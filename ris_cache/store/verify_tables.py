"""Checking what lies beside the features of a cache: tables, category sets, SAM's heads."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow.compute as pc

from ris_cache.errors import CorruptShardError
from ris_cache.store import files, tables
from ris_cache.store.findings import (
    Finding,
    Kind,
    error_finding,
    find_wrong_size,
    finding,
    listed,
    lost_part_advice,
)
from ris_cache.store.manifest import DatasetEntry, FileEntry, Manifest
from ris_cache.store.merging import count_splits
from ris_cache.store.verify_shards import ImageRows


class Annotations:
    """Everything beside the features, read whole and compared with the manifest and with each other.

    Attributes:
        findings: what is wrong.
        images: who lies where; None if the table of images cannot be trusted with that.
    """

    def __init__(self, root: Path, manifest: Manifest) -> None:
        """Read and check."""
        self.findings: list[Finding] = []
        self.images: ImageRows | None = None
        self._root = root
        self._manifest = manifest
        of_features = manifest.shard_files()
        # None for a file that is not what the manifest says.
        self._contents = {
            path: self._read(path, entry) for path, entry in manifest.files.items() if path not in of_features
        }
        self._image_ids: Any = None
        images = self._table(manifest.images.file, tables.IMAGES)
        if images is not None:
            self._image_ids = images.column("image_id")
            self._check_images(images)
        for name, entry in manifest.datasets.items():
            self._check_dataset(name, entry)
        for name in manifest.category_sets:
            self._check_categories(name)
        if self._contents.get(files.SAM_HEADS_NAME) is not None:
            self._attempt(files.SAM_HEADS_NAME, lambda: tables.read_tensors(root / files.SAM_HEADS_NAME))
        self.findings = [self._advised(found) for found in self.findings]

    def _advised(self, found: Finding) -> Finding:
        """Say of tables that hold parts of splits alone that these cannot be built again."""
        if found.kind != "table":
            return found
        for name, entry in self._manifest.datasets.items():
            if found.path in (entry.expressions_file, entry.instances_file) and not any(
                counts.is_complete for counts in entry.splits.values()
            ):
                return replace(found, advice=lost_part_advice(name, entry.splits))
        return found

    def _add(self, path: str, problem: str, kind: Kind | None = None) -> None:
        self.findings.append(finding(path, problem, kind=kind))

    def _attempt(self, path: str, read: Callable[[], Any]) -> Any:
        """Return what `read` returns; None, and a finding, if the file is damaged."""
        try:
            return read()
        except CorruptShardError as error:
            self.findings.append(error_finding(path, error))
            return None

    def _read(self, path: str, entry: FileEntry) -> bytes | None:
        wrong = find_wrong_size(self._root, path, entry.bytes)
        if wrong is not None:
            self.findings.append(wrong)
            return None
        try:
            content = (self._root / path).read_bytes()
        except OSError as error:
            self.findings.append(error_finding(path, error))
            return None
        if files.digest_of(content).sha256 != entry.sha256:
            self._add(path, "contradicts its SHA-256")
            return None
        return content

    def _is_listed(self, path: str) -> bool:
        if path not in self._contents:
            self._add(files.MANIFEST_NAME, f"refers to {path} and does not list it")
        return path in self._contents

    def _table(self, path: str, schema: Any) -> Any:
        """Return a table, None if there is something wrong with its file."""
        content = self._contents[path] if self._is_listed(path) else None
        if content is None:
            return None
        return self._attempt(
            path, lambda: tables.read_table(BytesIO(content), schema, name=self._root / path)
        )

    def _check_images(self, table: Any) -> None:
        path, entry, num_arrays = (
            self._manifest.images.file,
            self._manifest.images,
            len(self._manifest.arrays),
        )
        ids, rows = (table.column(name).to_numpy() for name in ("image_id", "row"))
        is_ok = _equal(table.column("status"), tables.OK)
        checksums = table.column("crc32c").combine_chunks()
        has_checksums = checksums.value_lengths().to_numpy() == np.where(is_ok, num_arrays, 0)
        can_be_used = True
        if len(np.unique(ids)) < len(ids) or len(np.unique(rows)) < len(rows):
            self._add(path, "names an image or a row twice")
            can_be_used = False
        if len(rows) and not 0 <= rows.min() <= rows.max() < self._manifest.rows:
            self._add(path, f"names rows outside 0 to {self._manifest.rows - 1}")
            can_be_used = False
        if not has_checksums.all():
            self._add(path, f"does not give {num_arrays} checksums to every image with features")
            can_be_used = False
        is_quarantined = _equal(table.column("status"), tables.QUARANTINED)
        if (is_ok == table.column("reason").is_valid().to_numpy()).any() or not (
            is_ok | is_quarantined
        ).all():
            self._add(path, "has images whose status and reason contradict each other")
        for state, found, expected in (
            ("with features", is_ok, entry.ok),
            ("in quarantine", is_quarantined, entry.quarantined),
        ):
            if found.sum() != expected:
                self._add(path, f"has {found.sum()} images {state}; the manifest says {expected}")
        if can_be_used:
            values = checksums.flatten().to_numpy().reshape(-1, num_arrays)
            self.images = ImageRows(ids[is_ok], rows[is_ok], values)

    def _check_dataset(self, name: str, entry: DatasetEntry) -> None:
        expressions = self._table(entry.expressions_file, tables.EXPRESSIONS)
        instances = self._table(entry.instances_file, tables.INSTANCES)
        if expressions is None:
            return
        path, counted = entry.expressions_file, count_splits(expressions)
        for split in dict.fromkeys((*entry.splits, *counted)):
            expected, found = entry.splits.get(split), counted.get(split)
            for what in ("expressions", "refs", "images"):
                one, other = getattr(found, what, 0), getattr(expected, what, 0)
                if one != other:
                    self._add(path, f"has {one} {what} of {name}:{split}; the manifest says {other}")
        if self._image_ids is not None:
            unknown = _unknown(expressions.column("image_id"), self._image_ids)
            if unknown:
                self._add(path, f"refers to images that the table of images lacks: {listed(unknown)}")
        if instances is not None:
            unknown = _unknown(pc.list_flatten(expressions.column("ann_ids")), instances.column("ann_id"))
            if unknown:
                self._add(path, f"refers to instances that {entry.instances_file} lacks: {listed(unknown)}")

    def _check_categories(self, name: str) -> None:
        paths = f"categories/{name}.safetensors", f"categories/{name}.json"
        are_listed = [self._is_listed(path) for path in paths]
        if all(are_listed) and None not in map(self._contents.get, paths):
            tensors, description = (self._root / path for path in paths)
            self._attempt(paths[0], lambda: tables.read_category_set(tensors, description))


def _equal(column: Any, value: str) -> npt.NDArray[np.bool_]:
    return np.asarray(column.to_numpy(zero_copy_only=False) == value, np.bool_)


def _unknown(values: Any, known: Any) -> list[int]:
    """Return the different values of a column that are not in another one."""
    is_known = pc.is_in(values, value_set=known.combine_chunks())
    unknown: list[int] = pc.unique(values.filter(pc.invert(is_known))).to_pylist()
    return unknown

"""Checking the features of a cache, shard by shard.

Axes: S rows per shard.

A file is read once, from its first byte to its last, with one row in memory; through read calls rather than
memory maps, so that a disk which cannot give back a block is a finding, not the end of the process.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Final

import numpy as np
import numpy.typing as npt

from ris_cache.errors import CacheError
from ris_cache.store.findings import Finding, error_finding, find_wrong_size, finding, listed
from ris_cache.store.layout import ABSENT, Backend, RowPlaces, StoredArray
from ris_cache.store.manifest import Manifest
from ris_cache.store.rows import row_checksum

_BLOCK_BYTES: Final = 1 << 20
_NON_FINITE: Final[Mapping[str, tuple[str, int]]] = {
    "float16": ("<u2", 0x7C00),
    "uint16": ("<u2", 0x7F80),  # the bits of bfloat16
    "float32": ("<u4", 0x7F800000),
}
"""The exponent bits by dtype, and the integer to see them through; all set in NaN and infinity alone."""


class ImageRows:
    """Which image lies in which row, and its checksums; from the table of images, quarantined ones left out.

    Attributes:
        image_ids, rows: int64[images], by ascending row.
        checksums: uint32[images, arrays].
    """

    def __init__(
        self,
        image_ids: npt.NDArray[np.int64],
        rows: npt.NDArray[np.int64],
        checksums: npt.NDArray[np.uint32],
    ) -> None:
        order = np.argsort(rows, kind="stable")
        self.image_ids = image_ids[order]
        self.rows = rows[order]
        self.checksums = checksums[order]

    def of_shard(self, shard: int, shard_rows: int) -> ImageRows:
        """Return those of one shard."""
        first, last = np.searchsorted(self.rows, (shard * shard_rows, (shard + 1) * shard_rows))
        return ImageRows(self.image_ids[first:last], self.rows[first:last], self.checksums[first:last])


@dataclass(frozen=True, slots=True, kw_only=True)
class ShardState:
    """What was found out about one shard.

    Attributes:
        num_unused: rows with features that no image refers to.
    """

    findings: tuple[Finding, ...]
    num_unused: int


@dataclass(frozen=True, slots=True, kw_only=True)
class _Row:
    """One row in a file: where, and what it has to be."""

    offset: int
    array: StoredArray
    image_id: int
    checksum: int


class ShardChecker:
    """Checks single shards; safe to use from several threads."""

    def __init__(
        self,
        root: Path,
        manifest: Manifest,
        backend: Backend,
        images: ImageRows | None,
        *,
        fast: bool,
        can_locate: bool,
    ) -> None:
        """Take what shards are compared with.

        Args:
            images: None if it is not known; then files are checked, but no rows.
            fast: read no features.
            can_locate: whether the backend can be asked where rows lie.
        """
        self._root = root
        self._manifest = manifest
        self._backend = backend
        self._images = images
        self._fast = fast
        self._can_locate = can_locate

    def check(self, shard: int) -> ShardState:
        """Check one shard."""
        paths = self._backend.shard_files(shard)
        images = self._images.of_shard(shard, self._manifest.shard_rows) if self._images else None
        unlisted = [path for path in paths if path not in self._manifest.files]
        if len(unlisted) == len(paths) and (images is None or not len(images.rows)):
            return ShardState(findings=(), num_unused=0)  # removed, or all of it quarantined
        found = [finding(path, "is not listed in the manifest", shard=shard) for path in unlisted]
        intact = []
        for path in paths:
            if path not in unlisted:
                wrong = find_wrong_size(self._root, path, self._manifest.files[path].bytes, shard=shard)
                if wrong is None:
                    intact.append(path)
                else:
                    found.append(wrong)
        places: dict[str, RowPlaces] | None = {}
        num_unused = 0
        if len(intact) == len(paths) and self._can_locate:
            try:
                places = self._backend.locate(shard)
            except CacheError as error:
                found.append(error_finding(self._path_of(error, paths), error, shard=shard))
            else:
                if images is not None and places is not None:
                    absent, num_unused = self._compare_presence(shard, places, images)
                    found += absent
        if not self._fast:
            rows = self._rows_by_file(shard, places or {}, images)
            blamed = {one.path for one in found}
            found += [
                wrong
                for path in intact
                for wrong in self._check_content(shard, path, rows.get(path, []))
                # A file whose index is damaged need not be told twice that it is.
                if path not in blamed or wrong.image_ids
            ]
            if places is None and images is not None:
                found += self._check_through_library(shard, images)
        return ShardState(findings=tuple(found), num_unused=num_unused)

    def _compare_presence(
        self, shard: int, places: Mapping[str, RowPlaces], images: ImageRows
    ) -> tuple[list[Finding], int]:
        """Compare which rows are there with which the table of images expects."""
        found = []
        positions = images.rows - shard * self._manifest.shard_rows
        is_expected = np.zeros(self._manifest.shard_rows, np.bool_)
        is_expected[positions] = True
        num_unused = 0
        for name, place in places.items():
            is_present = place.offsets != ABSENT
            num_unused = max(num_unused, int((is_present & ~is_expected).sum()))
            missing = images.image_ids[~is_present[positions]].tolist()
            if missing:
                found.append(
                    finding(
                        self._relative(place.path),
                        f"lacks {name} of the images {listed(missing)}",
                        shard=shard,
                        image_ids=tuple(missing),
                    )
                )
        return found, num_unused

    def _rows_by_file(
        self, shard: int, places: Mapping[str, RowPlaces], images: ImageRows | None
    ) -> dict[str, list[_Row]]:
        rows: dict[str, list[_Row]] = {}
        if images is None:
            return rows
        for column, array in enumerate(self._backend.arrays):
            place = places.get(array.name)
            if place is None:
                continue
            offsets = place.offsets[images.rows - shard * self._manifest.shard_rows]
            own = rows.setdefault(self._relative(place.path), [])
            for offset, image_id, checksum in zip(
                offsets.tolist(),
                images.image_ids.tolist(),
                images.checksums[:, column].tolist(),
                strict=True,
            ):
                if offset != ABSENT:
                    own.append(_Row(offset=offset, array=array, image_id=image_id, checksum=checksum))
        return rows

    def _check_content(self, shard: int, path: str, rows: Sequence[_Row]) -> Iterator[Finding]:
        wrong: dict[str, list[_Row]] = {}
        try:
            with (self._root / path).open("rb") as file:
                digest = _scan(file, rows, wrong)
        except OSError as error:
            yield error_finding(path, error, shard=shard)
            return
        damage = []
        if digest != self._manifest.files[path].sha256:
            damage.append("contradicts its SHA-256")
        yield from _as_findings(path, shard, damage, wrong)

    def _check_through_library(self, shard: int, images: ImageRows) -> Iterator[Finding]:
        """Check rows that cannot be read by offset, one by one."""
        for column, array in enumerate(self._backend.arrays):
            wrong: dict[str, list[_Row]] = {}
            path = self._path_of_array(shard, array)
            for image_id, row, checksum in zip(
                images.image_ids.tolist(),
                images.rows.tolist(),
                images.checksums[:, column].tolist(),
                strict=True,
            ):
                expected = _Row(offset=0, array=array, image_id=image_id, checksum=checksum)
                try:
                    values = self._backend.read_row(array.name, row)
                except CacheError as error:
                    yield error_finding(path, error, shard=shard)
                    break
                if values is None:
                    wrong.setdefault("lacks", []).append(expected)
                else:
                    _check_row(np.ascontiguousarray(values).reshape(-1).view(np.uint8), expected, wrong)
            yield from _as_findings(path, shard, [], wrong)

    def _path_of_array(self, shard: int, array: StoredArray) -> str:
        paths = self._backend.shard_files(shard)
        return paths[self._backend.arrays.index(array) if len(paths) > 1 else 0]

    def _path_of(self, error: CacheError, paths: Sequence[str]) -> str:
        path = error.facts.get("path")
        relative = self._relative(path) if isinstance(path, Path) else ""
        return relative if relative in paths else paths[0]

    def _relative(self, path: Path) -> str:
        return path.relative_to(self._backend.root).as_posix()


def _scan(file: BinaryIO, rows: Sequence[_Row], wrong: dict[str, list[_Row]]) -> str:
    """Read a file from start to end; returns its SHA-256 and adds the wrong rows to `wrong`, by problem."""
    digest = hashlib.sha256()
    row_buffer = np.empty(max((row.array.row_bytes for row in rows), default=0), np.uint8)
    block = bytearray(_BLOCK_BYTES)
    position = 0

    def read_until(end: int | None) -> None:
        nonlocal position
        while end is None or position < end:
            size = _BLOCK_BYTES if end is None else min(_BLOCK_BYTES, end - position)
            num_read = file.readinto(memoryview(block)[:size])  # type: ignore[attr-defined]
            if not num_read:
                return
            digest.update(memoryview(block)[:num_read])
            position += num_read

    for row in sorted(rows, key=lambda row: row.offset):
        read_until(row.offset)
        content = row_buffer[: row.array.row_bytes]
        if row.offset != position or file.readinto(content.data) != len(content):  # type: ignore[attr-defined]
            wrong.setdefault("misplaces", []).append(row)
            continue
        position += len(content)
        digest.update(content.data)
        _check_row(content, row, wrong)
    read_until(None)
    return digest.hexdigest()


def _check_row(content: npt.NDArray[np.uint8], row: _Row, wrong: dict[str, list[_Row]]) -> None:
    """Add a row to `wrong`, by problem, if its bytes are not what they have to be."""
    if row_checksum(content) != row.checksum:
        wrong.setdefault("contradicts the checksum of", []).append(row)
    elif has_non_finite(content, row.array.dtype):
        wrong.setdefault("has NaN or infinity in", []).append(row)


def has_non_finite(content: npt.NDArray[np.uint8], dtype: str) -> bool:
    """Whether the bytes of stored floats hold NaN or infinity; int8 codes never do."""
    if dtype not in _NON_FINITE:
        return False
    view, exponent = _NON_FINITE[dtype]
    return bool(((content.view(view) & exponent) == exponent).any())


def _as_findings(
    path: str, shard: int, damage: Sequence[str], wrong: Mapping[str, Sequence[_Row]]
) -> Iterator[Finding]:
    """Yield one finding that names everything wrong with one file, if anything is."""
    problems = list(damage)
    for problem, rows in wrong.items():
        names = dict.fromkeys(row.array.name for row in rows)
        problems += [
            f"{problem} {name} of the images {listed([r.image_id for r in rows if r.array.name == name])}"
            for name in names
        ]
    if problems:
        image_ids = dict.fromkeys(row.image_id for rows in wrong.values() for row in rows)
        yield finding(path, "; ".join(problems), shard=shard, image_ids=tuple(image_ids))

"""`manifest.json`: what a cache holds, what made it, and the digest of every file.

The manifest is the last file written; its presence means that the cache is usable. It is outside text to
whoever opens a cache, so it is checked whole here and nowhere else.
"""

from __future__ import annotations

import hashlib
import json
import platform
import re
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any, Literal, NoReturn, Self

from pydantic import (
    AwareDatetime,
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    field_validator,
    model_validator,
)

from ris_cache.errors import CacheError, CorruptShardError, IncompleteCacheError
from ris_cache.store.files import FEATURE_DIRECTORIES, MANIFEST_NAME, FileDigest, is_safe_relative
from ris_cache.store.fingerprint import FORMAT_VERSION, Fingerprint
from ris_cache.store.layout import StoredArray

FORMAT_NAME = "ris-feature-cache"
Count = Annotated[int, Field(ge=0)]
Digest = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]

_LIBRARIES = ("numpy", "pyarrow", "safetensors", "zarr")
_NAME = re.compile(r"[A-Za-z0-9_+-][A-Za-z0-9_+.-]*")


def is_safe_name(name: str) -> bool:
    """Say whether a table or category set may have this name; it becomes a file name."""
    return _NAME.fullmatch(name) is not None


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class FileEntry(_Strict):
    """Size and SHA-256 of one file."""

    bytes: Count
    sha256: Digest

    @classmethod
    def of(cls, digest: FileDigest) -> FileEntry:
        """Return the entry of a digest."""
        return cls(bytes=digest.num_bytes, sha256=digest.sha256)


class StoredFingerprint(_Strict):
    """The fingerprint as stored; the digest must be that of the fields."""

    digest: Digest
    fields: dict[str, Any]

    @model_validator(mode="after")
    def _digest_fits(self) -> Self:
        if Fingerprint.of(self.fields).digest != self.digest:
            raise ValueError("digest is not the digest of fields")
        return self


class ArrayEntry(_Strict):
    """One stored array: its name, shape per row and element type; uint16 holds the bits of bfloat16."""

    name: str
    shape: tuple[Annotated[int, Field(ge=1)], ...]
    dtype: Literal["float16", "float32", "uint16", "int8"]

    @classmethod
    def of(cls, array: StoredArray) -> ArrayEntry:
        """Return the entry of an array."""
        return cls(name=array.name, shape=array.shape, dtype=array.dtype)

    def to_array(self) -> StoredArray:
        """Return the array."""
        return StoredArray(name=self.name, shape=self.shape, dtype=self.dtype)


class SplitCounts(_Strict):
    """How much of one split the expression table holds; a trial with `--limit` holds a part."""

    expressions: Count
    refs: Count
    images: Count
    is_complete: bool = True


class DatasetEntry(_Strict):
    """One `<dataset>.<split_by>`: its tables, its category set and its splits, in the order of the table."""

    expressions_file: str
    instances_file: str
    category_set: str
    splits: dict[str, SplitCounts]


class ImagesEntry(_Strict):
    """The table of images: those with features, and those left out for a reason that the table gives."""

    file: str
    ok: Count
    quarantined: Count


class RecordedFacts(_Strict):
    """What is worth knowing about the making but does not change the numbers, so is not hashed.

    Attributes:
        created: when the first extraction finished, UTC.
        updated: when the latest one did, UTC.
        ris: version of this project.
        libraries: version by library name.
    """

    created: AwareDatetime
    updated: AwareDatetime
    ris: str
    libraries: dict[str, str]


class Manifest(_Strict):
    """The whole manifest; field order is the order in the file.

    Attributes:
        preset: name of the encoder preset.
        weights: human label of each set of weights by role, e.g. "random(seed=0)".
        shard_rows: rows per shard.
        dtype: how features are stored, `precision.DTYPES`.
        arrays: every stored array.
        rows: rows of every array, a multiple of `shard_rows`; some hold no image.
        datasets: by table name.
        category_sets: names of the files in `categories/`.
        files: every file of the cache by relative posix path, but this one and Zarr's `zarr.json`.
        digest: SHA-256 of the canonical JSON of all other fields.
    """

    format: Literal["ris-feature-cache"]
    format_version: Literal[1]
    fingerprint: StoredFingerprint
    preset: str
    weights: dict[str, str]
    backend: Literal["zarr", "hdf5"]
    shard_rows: Annotated[int, Field(ge=1)]
    dtype: Literal["float16", "bfloat16", "float32", "int8"]
    arrays: tuple[ArrayEntry, ...]
    rows: Count
    images: ImagesEntry
    datasets: dict[str, DatasetEntry]
    category_sets: tuple[str, ...]
    recorded: RecordedFacts
    files: dict[str, FileEntry]
    digest: Digest

    @field_validator("arrays")
    @classmethod
    def _array_names_are_safe(cls, value: tuple[ArrayEntry, ...]) -> tuple[ArrayEntry, ...]:
        _require_safe_names([entry.name for entry in value])
        return value

    @field_validator("datasets")
    @classmethod
    def _dataset_names_are_safe(cls, value: dict[str, DatasetEntry]) -> dict[str, DatasetEntry]:
        _require_safe_names(list(value))
        return value

    @field_validator("category_sets")
    @classmethod
    def _set_names_are_safe(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        _require_safe_names(value)
        return value

    @field_validator("files")
    @classmethod
    def _paths_are_safe(cls, value: dict[str, FileEntry]) -> dict[str, FileEntry]:
        for relative in value:
            if not is_safe_relative(relative) or relative == MANIFEST_NAME:
                raise ValueError(f"{relative!r} is not a plain relative path of a file in the cache")
        return value

    @model_validator(mode="after")
    def _parts_agree(self) -> Self:
        if self.rows % self.shard_rows:
            raise ValueError(f"rows ({self.rows}) is not a multiple of shard_rows ({self.shard_rows})")
        for table, entry in self.datasets.items():
            if entry.category_set not in self.category_sets:
                raise ValueError(
                    f"dataset {table!r} uses the category set {entry.category_set!r}, not listed"
                )
        return self

    def sealed(self) -> Manifest:
        """Return the same manifest with its digest."""
        return self.model_copy(update={"digest": _digest(json.loads(self.model_dump_json()))})

    def shard_files(self) -> dict[str, FileEntry]:
        """Return the files of features, by path."""
        directories = tuple(f"{name}/" for name in FEATURE_DIRECTORIES)
        return {path: entry for path, entry in self.files.items() if path.startswith(directories)}

    def stored_arrays(self) -> tuple[StoredArray, ...]:
        """Return what `arrays` describes."""
        return tuple(entry.to_array() for entry in self.arrays)

    def to_fingerprint(self) -> Fingerprint:
        """Return the fingerprint as a value."""
        return Fingerprint.of(self.fingerprint.fields)

    def to_json(self) -> bytes:
        """Return the bytes of `manifest.json`."""
        return (self.model_dump_json(indent=1) + "\n").encode("utf-8")


def load_manifest(root: Path) -> Manifest:
    """Read and check `root/manifest.json`.

    Raises:
        IncompleteCacheError: there is none.
        CacheError: a newer format, or the manifest of something else.
        CorruptShardError: damaged, or contradicting itself.
    """
    path = root / MANIFEST_NAME
    try:
        text = path.read_bytes().decode("utf-8")
        found = json.loads(text, parse_constant=_refuse_constant)
    except FileNotFoundError:
        raise IncompleteCacheError(
            f"{root} has no {MANIFEST_NAME}: no extraction has finished there. Run `ris extract` to "
            "make the cache.",
            path=root,
        ) from None
    except (ValueError, RecursionError) as error:
        raise _damaged(path, f"it is not JSON ({error})") from error
    if not isinstance(found, dict) or found.get("format") != FORMAT_NAME:
        raise CacheError(
            f'{path} does not describe a feature cache (no "format": "{FORMAT_NAME}"). Point --cache at a '
            "directory that `ris extract` made.",
            path=path,
        )
    version = found.get("format_version")
    if isinstance(version, int) and version > FORMAT_VERSION:
        raise CacheError(
            f"{root} is in cache format {version}; this version of ris reads format {FORMAT_VERSION}. Update "
            "ris, or make a cache with this version: `ris extract` into another directory.",
            path=path,
            format_version=version,
            supported=FORMAT_VERSION,
        )
    if found.get("digest") != _digest(found):
        raise _damaged(path, "its digest is not that of its content")
    try:
        return Manifest.model_validate_json(text)
    except ValidationError as error:
        problems = "; ".join(
            f"{'.'.join(str(part) for part in problem['loc']) or 'manifest'}: {problem['msg']}"
            for problem in error.errors()[:5]
        )
        raise _damaged(path, problems) from error


def _digest(document: dict[str, Any]) -> str:
    content = {key: value for key, value in document.items() if key != "digest"}
    text = json.dumps(content, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return hashlib.sha256(text.encode("ascii")).hexdigest()


def _require_safe_names(names: Sequence[str]) -> None:
    for name in names:
        if not is_safe_name(name):
            raise ValueError(f"{name!r} cannot be a name: it is no plain file name")
    if len(set(names)) < len(names):
        raise ValueError(f"names repeat in {list(names)}")


def recorded_facts(libraries: Mapping[str, str]) -> RecordedFacts:
    """Return the facts as of now.

    Args:
        libraries: versions to record beside those that the format itself depends on.
    """
    now = datetime.now(UTC).replace(microsecond=0)
    own = {"python": platform.python_version(), **{name: version(name) for name in _LIBRARIES}}
    return RecordedFacts(created=now, updated=now, ris=version("ris"), libraries={**own, **libraries})


def _damaged(path: Path, problems: str) -> CorruptShardError:
    return CorruptShardError(
        f"{path} is damaged: {problems}. Restore it from a copy, or extract the cache again into another "
        "directory with `ris extract`.",
        path=path,
        problems=problems,
    )


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a JSON number")

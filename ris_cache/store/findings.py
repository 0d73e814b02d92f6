"""What can be wrong with a cache, as values."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal

from ris_cache.errors import CacheError, CorruptShardError
from ris_cache.store import files

Kind = Literal["features", "metadata", "manifest", "table", "categories", "heads", "access"]

MAX_LISTED: Final = 8

_RESTORE = (
    "Restore the file from a copy, or extract the cache again into another directory with `ris extract`."
)
_REMEDIES: Mapping[Kind, str] = {
    "features": "`ris cache verify --repair --data DIR` computes them again.",
    "metadata": "`ris cache verify --repair` writes the file anew.",
    "manifest": _RESTORE,
    "table": _RESTORE,
    "categories": _RESTORE,
    "heads": _RESTORE,
    "access": "Ask its owner to make it a readable file that lies inside the cache.",
}
_KINDS: Mapping[str, Kind] = {
    **dict.fromkeys(files.FEATURE_DIRECTORIES, "features"),
    "categories": "categories",
    files.SAM_HEADS_NAME: "heads",
    files.MANIFEST_NAME: "manifest",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """One thing that is wrong with a cache.

    Attributes:
        kind: what is affected: the `features` of a shard, Zarr's `metadata` (zarr.json), the `manifest`, a
            `table`, `categories`, SAM's `heads`; or `access`: a file that this process may not look at.
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
        """What to do about it."""
        return _REMEDIES[self.kind]

    def __str__(self) -> str:
        return f"{self.path} {self.problem}"


def bad_shards(findings: Iterable[Finding]) -> tuple[int, ...]:
    """Return the shards whose features are to be computed again, ascending."""
    return tuple(
        sorted({found.shard for found in findings if found.kind == "features" and found.shard is not None})
    )


def finding(
    path: str,
    problem: str,
    *,
    kind: Kind | None = None,
    shard: int | None = None,
    image_ids: tuple[int, ...] = (),
) -> Finding:
    """Return a finding about a file; its kind follows from the path unless given."""
    kind = kind or _KINDS.get(path.split("/")[0], "table")
    return Finding(kind=kind, path=path, problem=problem, shard=shard, image_ids=image_ids)


def error_finding(path: str, error: CacheError | OSError, *, shard: int | None = None) -> Finding:
    """Return the finding for what was raised while a file was read."""
    if isinstance(error, OSError):
        is_refused = error.errno in (errno.EACCES, errno.EPERM)
        problem = f"cannot be read ({error.strerror or error})"
        return finding(path, problem, kind="access" if is_refused else None, shard=shard)
    problem = str(error.facts.get("problem") or error.facts.get("problems") or error)
    return finding(
        path, problem, kind=None if isinstance(error, CorruptShardError) else "access", shard=shard
    )


def find_wrong_size(root: Path, path: str, expected: int, *, shard: int | None = None) -> Finding | None:
    """Say what is wrong with a listed file that can be seen without opening it.

    Args:
        path: relative to the cache.
        expected: bytes.
    """
    try:
        found = os.stat(files.safe_join(root, path)).st_size  # noqa: PTH116 - a third of the time
    except CorruptShardError:
        return finding(path, "leads out of the cache through a symbolic link", kind="access", shard=shard)
    except (FileNotFoundError, NotADirectoryError):
        return finding(path, "is missing", shard=shard)
    except OSError as error:
        return error_finding(path, error, shard=shard)
    if found != expected:
        return finding(path, f"has {found} bytes instead of {expected}", shard=shard)
    return None


def listed(values: Any) -> str:
    """Name the first of some values, and say how many more there are."""
    shown = [str(value) for value in values[:MAX_LISTED]]
    more = len(values) - MAX_LISTED
    return ", ".join(shown) + (f" and {more} more" if more > 0 else "")

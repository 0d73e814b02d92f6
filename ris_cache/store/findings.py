"""What can be wrong with a cache, as values."""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal

from ris_cache.errors import CacheError, CorruptShardError
from ris_cache.store import files

Kind = Literal["features", "metadata", "manifest", "images", "table", "categories", "heads", "access"]

MAX_LISTED: Final = 8

_RESTORE = (
    "Restore the file from a copy, or extract the cache again into another directory with `ris extract`."
)
_REMEDIES: Mapping[Kind, str] = {
    "features": "`ris cache verify --repair --data DIR` computes them again.",
    "metadata": "`ris cache verify --repair` writes the file anew.",
    "manifest": _RESTORE,
    "images": _RESTORE,
    "table": "`ris cache verify --repair --data DIR` builds it again from the annotations.",
    "categories": "`ris cache verify --repair --data DIR` embeds them again.",
    "heads": "`ris cache verify --repair --data DIR` writes them again from the weights.",
    "access": "Ask its owner to make it a readable file that lies inside the cache.",
}
_REPAIRABLE: Final = ("features", "metadata", "table", "categories", "heads")
_NO_FILE = "is not a file"
_REMOVE = "Remove what is there, then run `ris cache verify --repair --data DIR`."
_KINDS: Mapping[str, Kind] = {
    **dict.fromkeys(files.FEATURE_DIRECTORIES, "features"),
    "images": "images",
    "categories": "categories",
    files.SAM_HEADS_NAME: "heads",
    files.MANIFEST_NAME: "manifest",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """One thing that is wrong with a cache.

    Attributes:
        kind: what is affected: the `features` of a shard, Zarr's `metadata` (zarr.json), the `manifest`, the
            table of `images`, a `table` of expressions or instances, `categories`, SAM's `heads`; or
            `access`: what this process may not look at, or what is no file.
        path: of the file, posix, relative to the cache.
        problem: what is wrong; continues the path.
        shard: of features.
        image_ids: whose rows are wrong; empty where that is not known.
        advice: what to do about this one, where no repair can mend it though it mends others of its kind.
    """

    kind: Kind
    path: str
    problem: str
    shard: int | None = None
    image_ids: tuple[int, ...] = ()
    advice: str = ""

    @property
    def is_repairable(self) -> bool:
        """Whether `ris cache verify --repair` can mend it."""
        return self.kind in _REPAIRABLE and not self.advice

    @property
    def remedy(self) -> str:
        """What to do about it."""
        return self.advice or _REMEDIES[self.kind]

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
    problem = str(error.facts.get("problem") or error)
    if "problems" in error.facts:
        problem = f"is damaged: {error.facts['problems']}"
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
        found = os.stat(files.safe_join(root, path))  # noqa: PTH116 - a third of the time
    except CorruptShardError:
        return finding(path, "leads out of the cache through a symbolic link", kind="access", shard=shard)
    except (FileNotFoundError, NotADirectoryError):
        return finding(path, "is missing", shard=shard)
    except OSError as error:
        return error_finding(path, error, shard=shard)
    if not stat.S_ISREG(found.st_mode):
        return no_file(path, shard=shard)
    if found.st_size != expected:
        return finding(path, f"has {found.st_size} bytes instead of {expected}", shard=shard)
    return None


def no_file(path: str, *, shard: int | None = None) -> Finding:
    """Return the finding for a directory, or something else, in the place of a file."""
    return Finding(kind="access", path=path, problem=_NO_FILE, shard=shard, advice=_REMOVE)


def lost_part_advice(name: str, splits: Iterable[str]) -> str:
    """Say what to do about lost tables of splits of which the cache held a part, from a run with `--limit`.

    Args:
        name: `<dataset>.<split_by>`.
    """
    again = ",".join(f"{name.replace('.', '/')}:{split}" for split in splits)
    return (
        f"Of {again} the cache held a part, which cannot be built again: extract it again, after `ris cache "
        f"remove {name}`, with `ris extract --split {again}`. Features are kept."
    )


def listed(values: Any) -> str:
    """Name the first of some values, and say how many more there are."""
    shown = [str(value) for value in values[:MAX_LISTED]]
    more = len(values) - MAX_LISTED
    return ", ".join(shown) + (f" and {more} more" if more > 0 else "")

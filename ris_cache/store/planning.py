"""Deciding what is to be written: which plan is in place, whether to join it, what a new one says.

All of it happens under the cache's lock (`.lock`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ris_cache.datasets.records import ImageRecord
from ris_cache.errors import CacheError, ConfigError, DataError
from ris_cache.store import files, manifest, tables
from ris_cache.store.draft import Recipe
from ris_cache.store.fingerprint import Fingerprint, require_match
from ris_cache.store.journal import Journal, Plan, PlannedImage, assign_rows
from ris_cache.store.manifest import ArrayEntry, Manifest, StoredFingerprint
from ris_cache.store.tables import CachedImage


@dataclass(frozen=True, slots=True, kw_only=True)
class NewImage(ImageRecord):
    """An image that is to get features.

    Attributes:
        namespace: whose ids `image_id` is one of.
        row: the row it must get; None leaves it to the plan.
    """

    namespace: str = "coco"
    row: int | None = None


def require_same_image(known: CachedImage, record: ImageRecord, namespace: str, root: Path) -> None:
    """Refuse an image that the cache knows with another name, size or namespace.

    Raises:
        DataError: naming both.
    """
    expected = (known.namespace, known.file_name, known.height, known.width)
    found = (namespace, record.file_name, record.height, record.width)
    if expected != found:
        raise DataError(
            f"Image {record.image_id} is {found} here, but {expected} (namespace, file, height, width) in "
            f"{root}. One cache holds one image per image_id: extract into another directory.",
            image_id=record.image_id,
            expected=expected,
            found=found,
        )


def require_cache_directory(root: Path) -> None:
    if root.exists() and not root.is_dir():
        raise ConfigError(f"{root} is a file; name a directory for the cache.", path=root)
    own = {files.MANIFEST_NAME, files.LOCK_NAME, files.EXTRACTION_NAME}
    if root.exists() and any(root.iterdir()) and not any((root / name).exists() for name in own):
        raise ConfigError(
            f"{root} holds files but no feature cache. Name a new or empty directory for the cache; nothing "
            "was changed.",
            path=root,
        )


def load_base(root: Path) -> Manifest | None:
    """Return the manifest of the cache in `root`; None if there is no finished one."""
    return manifest.load_manifest(root) if (root / files.MANIFEST_NAME).exists() else None


def require_same_making(root: Path, recipe: Recipe, base: Manifest | None, interrupted: Plan | None) -> None:
    """Refuse a recipe that is not that of the cache, or of the extraction that was cut off before the first.

    Raises:
        FingerprintMismatchError: naming the fields that differ.
        CacheError: another backend or shard size.
    """
    found = base or interrupted
    if found is None:
        return
    stored = Fingerprint.of(found.fingerprint.fields)
    require_match(recipe.fingerprint, stored, where=str(root))
    differing = []
    if found.backend != recipe.backend:
        differing.append(f"stored as {found.backend}, not {recipe.backend} (--store)")
    if found.shard_rows != recipe.shard_rows:
        differing.append(f"in shards of {found.shard_rows} images, not {recipe.shard_rows} (--shard-rows)")
    if differing:
        raise CacheError(
            f"{root} is {' and '.join(differing)}. Leave that option out to add to it, or name another "
            "directory.",
            path=root,
            expected=(recipe.backend, recipe.shard_rows),
            found=(found.backend, found.shard_rows),
        )


def plan_in_place(journal: Journal, root: Path, base: Manifest | None) -> Plan | None:
    """Return the plan that is still to be carried out."""
    plan = journal.read_plan()
    if plan is None or not is_carried_out(plan, root, base):
        return plan
    # Whoever finished it was cut off before it could remove the journal.
    journal.discard()
    return None


def is_carried_out(plan: Plan, root: Path, base: Manifest | None) -> bool:
    """Whether the manifest in place holds what was planned.

    Another digest alone does not say so: a process that has only tables to add needs no plan, and may add
    them while others carry out theirs.
    """
    if base is None or plan.base == base.digest:
        return base is None and plan.base is not None
    images = tables.read_images(tables.read_table(root / base.images.file, tables.IMAGES))
    rows = {image.image_id: image.row for image in images}
    return all(rows.get(image.image_id) == image.row for image in plan.images)


def asks_for(plan: Plan, request: Mapping[str, Any], wanted: Sequence[NewImage]) -> bool:
    if plan.request != request:
        return False
    planned = {image.image_id for image in plan.images}
    return {image.image_id for image in wanted} <= planned


def make_plan(
    recipe: Recipe,
    base: Manifest | None,
    wanted: Sequence[NewImage],
    *,
    purpose: str,
    request: Mapping[str, Any],
    agreed: Mapping[str, int],
    after: tuple[Plan, Journal] | None = None,
) -> Plan:
    kept: list[PlannedImage] = []
    taken: set[int] = set()
    if after is not None:
        old_plan, journal = after
        shards = old_plan.shards()
        taken = journal.committed(shards)
        kept = [image for shard in sorted(taken) for image in shards[shard]]
    known = {image.image_id for image in kept}
    images = [image for image in wanted if image.image_id not in known]
    rows = assign_rows(
        len(images), first_row=base.rows if base else 0, shard_rows=recipe.shard_rows, taken=taken
    )
    planned = [
        PlannedImage(
            image_id=image.image_id,
            namespace=image.namespace,
            row=row if image.row is None else image.row,
            file_name=image.file_name,
            height=image.height,
            width=image.width,
        )
        for image, row in zip(images, rows, strict=True)
    ]
    return Plan(
        version=1,
        purpose=purpose,
        request=dict(request),
        agreed=dict(agreed),
        fingerprint=StoredFingerprint(digest=recipe.fingerprint.digest, fields=recipe.fingerprint.fields),
        backend="hdf5" if recipe.backend == "hdf5" else "zarr",
        dtype=recipe.dtype,
        arrays=tuple(ArrayEntry.of(array) for array in recipe.arrays),
        shard_rows=recipe.shard_rows,
        base=base.digest if base else None,
        images=tuple(sorted((*kept, *planned), key=lambda image: image.row)),
    )


def described(request: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in request.items())

"""Merging caches of one fingerprint: what was extracted in parts becomes one pool of images and tables.

Everything is compared before the first image is copied, so a merge that cannot succeed changes nothing. What
the cache has stays as it is; only images that it holds as quarantined are taken from whoever has them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from ris_cache.datasets.records import ImageRecord
from ris_cache.errors import ConfigError, DataError, FingerprintMismatchError
from ris_cache.progress import Progress
from ris_cache.store.cache import FeatureCache
from ris_cache.store.draft import CacheDraft, Recipe
from ris_cache.store.fingerprint import differences
from ris_cache.store.manifest import Manifest
from ris_cache.store.planning import NewImage, require_same_image
from ris_cache.store.tables import CachedImage
from ris_cache.store.transfer import Origin, as_new, copy_annotations, origins, transfer

PURPOSE = "cache merge"


@dataclass(frozen=True, slots=True, kw_only=True)
class Merge:
    """What a merge is to do; `plan_merge` makes and checks it.

    Attributes:
        into: the cache that grows, as it is before.
        sources: in the order in which they are asked for an image.
        added: image_ids that `into` lacks.
        mended: image_ids that `into` has quarantined and a source has features of.
        quarantined: those of `added` of which no source has features either.
        splits: `<dataset>.<split_by>:<split>` that `into` lacks, or has a part of.
        category_sets: that `into` lacks.
    """

    into: FeatureCache
    sources: tuple[FeatureCache, ...]
    added: tuple[int, ...]
    mended: tuple[int, ...]
    quarantined: tuple[int, ...]
    splits: tuple[str, ...]
    category_sets: tuple[str, ...]

    @property
    def num_bytes(self) -> int:
        """Bytes of features to copy."""
        num_images = len(self.added) - len(self.quarantined) + len(self.mended)
        return num_images * Recipe.of(self.into.manifest).image_bytes

    @property
    def request(self) -> dict[str, str]:
        """What processes that do this together have in common."""
        return {"FROM": " ".join(cache.manifest.digest[:16] for cache in self.sources)}


def plan_merge(into: Path, sources: Sequence[Path]) -> Merge:
    """Compare caches and say what a merge would do; nothing is written.

    Args:
        into: the cache that is to grow.
        sources: one or more other caches.

    Raises:
        ConfigError: a cache named twice.
        FingerprintMismatchError: a cache of another making, with the fields that differ.
        DataError: an image or table that two of them hold with other content.
        CacheError: one of them cannot be opened.
    """
    seen = {into.resolve()}
    for source in sources:
        if source.resolve() in seen:
            raise ConfigError(
                f"{source} is named twice. Name the cache that grows, and then other ones.", path=source
            )
        seen.add(source.resolve())
    base = FeatureCache.open(into)
    caches = [FeatureCache.open(source) for source in sources]
    for cache in caches:
        _require_same_making(base, cache)
    _require_same_images([base, *caches])
    found = origins(caches)
    draft = CacheDraft.of(into)
    wanted = _wanted(found, draft.images)
    added = tuple(image.image_id for image in wanted if image.image_id not in draft.images)
    draft.replace_images(found[image_id].image for image_id in added)
    for cache in caches:  # refuses here what it would refuse after hours of copying
        copy_annotations(draft, cache)
    before = base.manifest.datasets
    return Merge(
        into=base,
        sources=tuple(caches),
        added=added,
        mended=tuple(image.image_id for image in wanted if image.image_id not in added),
        quarantined=tuple(image_id for image_id in added if found[image_id].image.is_quarantined),
        splits=tuple(
            f"{name}:{split}"
            for name, entry in draft.datasets.items()
            for split, counts in entry.splits.items()
            if name not in before or counts != before[name].splits.get(split)
        ),
        category_sets=tuple(
            name
            for name in dict.fromkeys(name for cache in caches for name in cache.manifest.category_sets)
            if name not in base.manifest.category_sets
        ),
    )


def merge(
    planned: Merge,
    *,
    progress: Progress | None = None,
    should_stop: Callable[[], bool] = lambda: False,
) -> tuple[int, Manifest]:
    """Carry out a merge, going on where one was cut off; the sources are only read.

    Images get new rows after the last one, so whoever reads `into` meanwhile is not disturbed.

    Returns:
        How many images this process copied, and the manifest of `into`.

    Raises:
        CacheError, CorruptShardError, DiskFullError, StoppedError: as `transfer`.
    """
    found = origins(planned.sources)

    def edit(draft: CacheDraft) -> None:
        for cache in planned.sources:
            copy_annotations(draft, cache)

    return transfer(
        planned.into.root,
        Recipe.of(planned.into.manifest),
        purpose=PURPOSE,
        request=planned.request,
        choose=lambda known: _wanted(found, known),
        origin_of=found.__getitem__,
        edit=edit,
        progress=progress,
        should_stop=should_stop,
    )


def _wanted(found: Mapping[int, Origin], known: Mapping[int, CachedImage]) -> list[NewImage]:
    """Return the images to copy: unknown ones, and known ones without features that a source has."""
    return [
        as_new(origin.image)
        for image_id, origin in found.items()
        if image_id not in known or (known[image_id].is_quarantined and not origin.image.is_quarantined)
    ]


def _require_same_making(base: FeatureCache, cache: FeatureCache) -> None:
    fields = differences(base.fingerprint, cache.fingerprint)
    if fields:
        listed = "\n".join(f"  {field}" for field in fields)
        raise FingerprintMismatchError(
            f"{cache.root} cannot be merged into {base.root}, since it was made otherwise:\n{listed}\n"
            "One cache has one fingerprint. If only the precision differs, `ris cache convert` can make it "
            "the same; otherwise extract again with the same settings.",
            path=cache.root,
            expected=base.fingerprint.digest,
            found=cache.fingerprint.digest,
            differences=fields,
        )


def _require_same_images(caches: Sequence[FeatureCache]) -> None:
    """Refuse an image_id that stands for other images, or for other files of one, in two caches."""
    known: dict[int, tuple[CachedImage, FeatureCache]] = {}
    for cache in caches:
        for image_id, image in cache.images.items():
            first, holder = known.setdefault(image_id, (image, cache))
            record = ImageRecord(
                image_id=image_id, file_name=image.file_name, height=image.height, width=image.width
            )
            require_same_image(first, record, image.namespace, holder.root)
            if first.is_quarantined:  # its file was unreadable, so it says nothing about others
                known[image_id] = image, cache
            elif not image.is_quarantined and image.sha256 != first.sha256:
                raise DataError(
                    f"Image {image_id} ({image.file_name}) was extracted from another file in {cache.root} "
                    f"(SHA-256 {image.sha256}) than in {holder.root} ({first.sha256}). Extract it again from "
                    "the same images.",
                    image_id=image_id,
                    expected=first.sha256,
                    found=image.sha256,
                )

"""Whether a cache is what an earlier conversion of another one gave: then what has been gained since may be
added to it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from ris_cache.store.cache import FeatureCache
from ris_cache.store.fingerprint import converted_fingerprint, differences
from ris_cache.store.journal import PlannedImage
from ris_cache.store.tables import CachedExpression, CachedImage

if TYPE_CHECKING:
    from ris_cache.store.convert import Conversion


def why_not_earlier(conversion: Conversion, found: FeatureCache) -> str | None:
    """Say why a cache cannot have come from the source, as it is or as it was; None if it can have."""
    source, recipe = conversion.source, conversion.recipe
    if found.fingerprint.digest != recipe.fingerprint.digest:
        dtype = found.manifest.dtype
        if found.fingerprint.digest == converted_fingerprint(source.fingerprint, dtype).digest:
            return f"it is stored as {dtype}, not {recipe.dtype} (--dtype {dtype} would add to it)"
        fields = ", ".join(field.path for field in differences(recipe.fingerprint, found.fingerprint))
        return f"it was made otherwise ({fields})"
    if (found.manifest.backend, found.manifest.shard_rows) != (recipe.backend, recipe.shard_rows):
        return (
            f"it is stored as {found.manifest.backend} in shards of {found.manifest.shard_rows} (leave "
            "--store and --shard-rows out to add to it)"
        )
    images = source.images
    for image_id, image in found.images.items():
        wanted = images.get(image_id)
        if wanted is None:
            return f"its image {image_id} ({image.file_name}) is not in the source"
        if identity(image) != identity(wanted) or (
            not image.is_quarantined and outcome(image) != outcome(wanted)
        ):
            return f"its image {image_id} ({image.file_name}) is another one in the source"
    return _why_not_earlier_tables(source, found)


def _why_not_earlier_tables(source: FeatureCache, found: FeatureCache) -> str | None:
    for name in found.manifest.category_sets:
        if name not in source.manifest.category_sets:
            return f"its category set {name} is not in the source"
        known, wanted = found.categories(name), source.categories(name)
        if (known.ids, known.names, known.template) != (wanted.ids, wanted.names, wanted.template) or (
            not np.array_equal(known.embeddings, wanted.embeddings)
        ):
            return f"its category set {name} is another one in the source"
    datasets = source.manifest.datasets
    for name, entry in found.manifest.datasets.items():
        if name not in datasets:
            return f"its dataset {name} is not in the source"
        if entry != datasets[name] and not (
            entry.category_set == datasets[name].category_set and _are_tables_part(found, source, name)
        ):
            return f"its dataset {name} is annotated otherwise in the source"
    return None


def _are_tables_part(known: FeatureCache, whole: FeatureCache, name: str) -> bool:
    """Whether tables hold nothing that other ones do not, so that adding these gives just these."""
    instances = whole.instances(name)
    if any(instances.get(ann_id) != instance for ann_id, instance in known.instances(name).items()):
        return False
    splits = _by_split(whole.expressions(name))
    return all(
        part == splits.get(split)
        or (len(part) < len(splits.get(split, ())) and set(part).issubset(splits[split]))
        for split, part in _by_split(known.expressions(name)).items()
    )


def _by_split(expressions: Sequence[CachedExpression]) -> dict[str, list[CachedExpression]]:
    splits: dict[str, list[CachedExpression]] = {}
    for expression in expressions:
        splits.setdefault(expression.split, []).append(expression)
    return splits


def identity(image: CachedImage | PlannedImage) -> tuple[str, str, int, int]:
    return image.namespace, image.file_name, image.height, image.width


def outcome(image: CachedImage) -> tuple[str | None, str | None]:
    return image.sha256, image.reason

"""Stage 1: frozen SAM and CLIP features of images, extracted once into a cache that training reads.

The names below load on first use, so that importing `ris_cache.errors` or printing help costs nothing.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ris_cache.store.cache import FeatureBatch, FeatureCache
    from ris_cache.store.fingerprint import Fingerprint, cache_fingerprint
    from ris_cache.store.manifest import Manifest
    from ris_cache.store.tables import CachedExpression, CachedImage, CategorySet
    from ris_cache.store.writer import CacheWriter

__all__ = [
    "CacheWriter",
    "CachedExpression",
    "CachedImage",
    "CategorySet",
    "FeatureBatch",
    "FeatureCache",
    "Fingerprint",
    "Manifest",
    "cache_fingerprint",
]

_HOMES = {
    "CacheWriter": "writer",
    "CachedExpression": "tables",
    "CachedImage": "tables",
    "CategorySet": "tables",
    "FeatureBatch": "cache",
    "FeatureCache": "cache",
    "Fingerprint": "fingerprint",
    "Manifest": "manifest",
    "cache_fingerprint": "fingerprint",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"ris_cache.store.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})

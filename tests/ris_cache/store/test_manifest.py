"""The manifest: checked whole when it is read."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ris_cache.errors import CacheError, CorruptShardError, IncompleteCacheError
from ris_cache.store.fingerprint import Fingerprint
from ris_cache.store.manifest import Manifest, load_manifest


@pytest.fixture
def document() -> dict[str, Any]:
    fingerprint = Fingerprint.of({"dtype": "float16", "scale": 255.0})
    return {
        "format": "ris-feature-cache",
        "format_version": 1,
        "fingerprint": {"digest": fingerprint.digest, "fields": fingerprint.fields},
        "preset": "tiny",
        "weights": {"sam": "random(seed=0)"},
        "backend": "zarr",
        "shard_rows": 64,
        "dtype": "float16",
        "arrays": {"sam": [2, 3, 3], "clip": [4, 2], "clip_pooled": [2]},
        "rows": 64,
        "images": {"ok": 3, "quarantined": 1},
        "datasets": {
            "refcoco+.unc": {
                "category_set": "coco",
                "splits": {"val": {"expressions": 5, "refs": 2, "images": 1}},
            }
        },
        "category_sets": ["coco"],
        "recorded": {
            "created": "2024-01-02T03:04:05Z",
            "updated": "2024-01-02T03:04:05Z",
            "ris": "0.1.0",
            "libraries": {"numpy": "2.0"},
        },
        "files": {"images.parquet": {"bytes": 3, "sha256": "0" * 64}},
    }


def write(root: Path, document: object) -> Path:
    (root / "manifest.json").write_text(json.dumps(document))
    return root


def test_what_is_written_reads_back_equal(tmp_path: Path, document: dict[str, Any]) -> None:
    manifest = load_manifest(write(tmp_path, document))
    (tmp_path / "manifest.json").write_bytes(manifest.to_json())
    assert load_manifest(tmp_path) == manifest
    assert manifest.arrays["sam"] == (2, 3, 3)
    assert manifest.to_fingerprint().digest == document["fingerprint"]["digest"]


def test_a_missing_manifest_is_an_unfinished_cache(tmp_path: Path) -> None:
    with pytest.raises(IncompleteCacheError, match="ris extract"):
        load_manifest(tmp_path)


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe", b'{"a": NaN}', b"[" * 200_000])
def test_bytes_that_are_not_json_are_damage(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "manifest.json").write_bytes(content)
    with pytest.raises(CorruptShardError, match="damaged"):
        load_manifest(tmp_path)


@pytest.mark.parametrize("content", [{}, [], {"format": "something-else"}])
def test_the_manifest_of_something_else_is_no_cache(tmp_path: Path, content: object) -> None:
    with pytest.raises(CacheError, match="does not describe a feature cache") as caught:
        load_manifest(write(tmp_path, content))
    assert not isinstance(caught.value, CorruptShardError)


def test_a_newer_format_asks_for_a_newer_version(tmp_path: Path, document: dict[str, Any]) -> None:
    document |= {"format_version": 2, "invented_later": True}
    with pytest.raises(CacheError, match=r"format 2.*Update ris") as caught:
        load_manifest(write(tmp_path, document))
    assert not isinstance(caught.value, CorruptShardError)
    assert caught.value.facts["format_version"] == 2


@pytest.mark.parametrize(
    "path", ["../secret", "/etc/passwd", "a/../../b", "C:/x", "a\\b", "manifest.json", "", "a//b", "./a"]
)
def test_a_path_that_leaves_the_cache_is_refused(tmp_path: Path, document: dict[str, Any], path: str) -> None:
    document["files"][path] = {"bytes": 1, "sha256": "0" * 64}
    with pytest.raises(CorruptShardError, match="plain relative path"):
        load_manifest(write(tmp_path, document))


def rename_dataset(document: dict[str, Any]) -> None:
    document["datasets"]["../x"] = document["datasets"].pop("refcoco+.unc")


DAMAGE: dict[str, Callable[[dict[str, Any]], object]] = {
    "extra": lambda document: document.update(extra=1),
    "rows": lambda document: document.update(rows=63),
    "rows.missing": lambda document: document.pop("rows"),
    "shard_rows": lambda document: document.update(shard_rows=0),
    "digest": lambda document: document["fingerprint"]["fields"].update(scale=1.0),
    "sha256": lambda document: document["files"]["images.parquet"].update(sha256="xyz"),
    "bytes": lambda document: document["files"]["images.parquet"].update(bytes=-1),
    "images.ok": lambda document: document["images"].update(ok="3"),
    "coco": lambda document: document.update(category_sets=[]),
    "arrays": lambda document: document["arrays"].update({"..": [1]}),
    "datasets": rename_dataset,
    "backend": lambda document: document.update(backend="pickle"),
    "created": lambda document: document["recorded"].update(created="2024-01-02T03:04:05"),
}


@pytest.mark.parametrize("where", DAMAGE)
def test_every_contradiction_is_damage_and_named(
    tmp_path: Path, document: dict[str, Any], where: str
) -> None:
    DAMAGE[where](document)
    with pytest.raises(CorruptShardError, match=where.split(".")[0]):
        load_manifest(write(tmp_path, document))


def test_unknown_fields_are_refused_in_code_too(document: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="extra"):
        Manifest.model_validate(document | {"extra": 1})

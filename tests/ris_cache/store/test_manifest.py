"""The manifest: checked whole when it is read."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ris_cache.errors import CacheError, CorruptShardError, IncompleteCacheError
from ris_cache.store.fingerprint import Fingerprint
from ris_cache.store.layout import StoredArray
from ris_cache.store.manifest import Manifest, load_manifest, recorded_facts


def make_document() -> dict[str, Any]:
    """A manifest that holds together, but has no digest yet."""
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
        "arrays": [
            {"name": "sam", "shape": [2, 3, 3], "dtype": "float16"},
            {"name": "clip", "shape": [4, 2], "dtype": "float16"},
        ],
        "rows": 64,
        "images": {"file": "images/pool.0123.parquet", "ok": 3, "quarantined": 1},
        "datasets": {
            "refcoco+.unc": {
                "expressions_file": "expressions/refcoco+.unc.0123.parquet",
                "instances_file": "instances/refcoco+.unc.0123.parquet",
                "category_set": "coco",
                "splits": {"val": {"expressions": 5, "refs": 2, "images": 1, "is_complete": True}},
            }
        },
        "category_sets": ["coco"],
        "recorded": {
            "created": "2024-01-02T03:04:05Z",
            "updated": "2024-01-02T03:04:05Z",
            "ris": "0.1.0",
            "libraries": {"numpy": "2.0", "é": "1"},
        },
        "files": {
            "images/pool.0123.parquet": {"bytes": 3, "sha256": "0" * 64},
            "features.zarr/sam/c/0/0/0/0": {"bytes": 4, "sha256": "1" * 64},
            "features/00000.h5": {"bytes": 4, "sha256": "2" * 64},
        },
    }


@pytest.fixture
def document() -> dict[str, Any]:
    return make_document()


def seal(document: dict[str, Any]) -> dict[str, Any]:
    """Add the digest that the format describes: of canonical JSON of all else."""
    content = {key: value for key, value in document.items() if key != "digest"}
    text = json.dumps(content, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return content | {"digest": hashlib.sha256(text.encode("ascii")).hexdigest()}


def write(root: Path, document: object) -> Path:
    (root / "manifest.json").write_text(json.dumps(document))
    return root


def test_what_is_written_reads_back_equal(tmp_path: Path, document: dict[str, Any]) -> None:
    manifest = load_manifest(write(tmp_path, seal(document)))
    (tmp_path / "manifest.json").write_bytes(manifest.to_json())
    assert load_manifest(tmp_path) == manifest
    assert manifest.arrays[0].shape == (2, 3, 3)
    assert manifest.stored_arrays()[1] == StoredArray(name="clip", shape=(4, 2), dtype="float16")
    assert manifest.to_fingerprint().digest == document["fingerprint"]["digest"]
    assert sorted(manifest.shard_files()) == ["features.zarr/sam/c/0/0/0/0", "features/00000.h5"]


def test_sealing_gives_the_digest_that_the_format_describes(document: dict[str, Any]) -> None:
    """Whoever writes a manifest with another program needs nothing but the rule."""
    unsealed = Manifest.model_validate_json(json.dumps(document | {"digest": "f" * 64}))
    assert json.loads(unsealed.sealed().to_json()) == seal(document)
    assert unsealed.sealed().sealed() == unsealed.sealed()


def test_order_and_whitespace_do_not_matter(tmp_path: Path, document: dict[str, Any]) -> None:
    manifest = load_manifest(write(tmp_path, seal(document)))
    backwards = dict(reversed(seal(document).items()))
    (tmp_path / "manifest.json").write_text(json.dumps(backwards, indent=4, ensure_ascii=False))
    assert load_manifest(tmp_path) == manifest


@given(st.data())
def test_no_byte_can_change_unnoticed(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    """A change is either refused or, within whitespace and the like, none."""
    root = tmp_path_factory.mktemp("manifest")
    sound = load_manifest(write(root, seal(make_document())))
    content = bytearray(sound.to_json())
    position = data.draw(st.integers(0, len(content) - 1))
    content[position] ^= data.draw(st.integers(1, 255))
    (root / "manifest.json").write_bytes(content)
    try:
        found = load_manifest(root)
    except CacheError:
        return
    assert found == sound


@pytest.mark.parametrize("digest", [None, "0" * 64, 7])
def test_a_wrong_or_missing_digest_is_damage(
    tmp_path: Path, document: dict[str, Any], digest: object
) -> None:
    document |= {} if digest is None else {"digest": digest}
    with pytest.raises(CorruptShardError, match="its digest is not that of its content"):
        load_manifest(write(tmp_path, document))


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
        load_manifest(write(tmp_path, seal(document)))


def rename_dataset(document: dict[str, Any]) -> None:
    document["datasets"]["../x"] = document["datasets"].pop("refcoco+.unc")


DAMAGE: dict[str, Callable[[dict[str, Any]], object]] = {
    "extra": lambda document: document.update(extra=1),
    "rows": lambda document: document.update(rows=63),
    "rows.missing": lambda document: document.pop("rows"),
    "shard_rows": lambda document: document.update(shard_rows=0),
    "fingerprint": lambda document: document["fingerprint"]["fields"].update(scale=1.0),
    "sha256": lambda document: document["files"]["features/00000.h5"].update(sha256="xyz"),
    "bytes": lambda document: document["files"]["features/00000.h5"].update(bytes=-1),
    "images.ok": lambda document: document["images"].update(ok="3"),
    "images.file": lambda document: document["images"].pop("file"),
    "coco": lambda document: document.update(category_sets=[]),
    "category_sets": lambda document: document.update(category_sets=["coco", "coco"]),
    "category_sets.name": lambda document: document.update(category_sets=["coco", "a/b"]),
    "arrays": lambda document: document["arrays"].append({"name": "..", "shape": [1], "dtype": "int8"}),
    "arrays.twice": lambda document: document["arrays"].append(document["arrays"][0]),
    "arrays.shape": lambda document: document["arrays"][0].update(shape=[0]),
    "arrays.dtype": lambda document: document["arrays"][0].update(dtype="float64"),
    "datasets": rename_dataset,
    "backend": lambda document: document.update(backend="pickle"),
    "dtype": lambda document: document.update(dtype="float8"),
    "created": lambda document: document["recorded"].update(created="2024-01-02T03:04:05"),
}


@pytest.mark.parametrize("where", DAMAGE)
def test_every_contradiction_is_damage_and_named(
    tmp_path: Path, document: dict[str, Any], where: str
) -> None:
    """The digest is right here: a program may be wrong where a disk is not."""
    DAMAGE[where](document)
    with pytest.raises(CorruptShardError, match=where.split(".")[0]):
        load_manifest(write(tmp_path, seal(document)))


def test_unknown_fields_are_refused_in_code_too(document: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="extra"):
        Manifest.model_validate_json(json.dumps(seal(document) | {"extra": 1}))


def test_what_is_recorded_names_the_libraries_of_the_format() -> None:
    facts = recorded_facts({"torch": "2.6"})
    assert facts.libraries["torch"] == "2.6"
    assert {"python", "numpy", "pyarrow", "safetensors", "zarr", "torch"} == set(facts.libraries)
    assert facts.created == facts.updated
    assert facts.created.utcoffset() == timedelta(0)

"""What `--dry-run` says comes true, and costs nothing on disk."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ris_cache.datasets import parse_selections
from ris_cache.encoders.frozen import FrozenEncoders
from ris_cache.errors import CacheError, DataError, FingerprintMismatchError
from ris_cache.extraction.estimate import Estimate, estimate
from ris_cache.extraction.run import ExtractionReport, Layout, extract


@pytest.fixture
def both(tmp_path: Path, data: Path, encoders: FrozenEncoders) -> Callable[..., Any]:
    """Estimate, or extract, with the same arguments."""

    def both(function: Callable[..., Any], split: str = "refcoco:val", **options: Any) -> Any:
        layout = Layout(
            backend=options.pop("store", None),
            dtype=options.pop("dtype", None),
            shard_rows=options.pop("shard_rows", 3),
        )
        terms = {"data_root": data, "cache_root": tmp_path / "feats", "batch_size": 4} | options
        return function(parse_selections(split), encoders=encoders, layout=layout, **terms)

    return both


def bytes_of_features(report: ExtractionReport) -> int:
    """Bytes of the rows in the shards; indexes and the like are not features."""
    arrays = report.manifest.stored_arrays()
    return report.manifest.images.ok * sum(array.row_bytes for array in arrays)


@pytest.mark.parametrize("limit", [None, 4])
@pytest.mark.parametrize("dtype", ["float16", "int8"])
def test_a_first_extraction_does_what_was_estimated(limit, dtype, both, tmp_path):
    told: Estimate = both(estimate, limit=limit, dtype=dtype)
    assert not (tmp_path / "feats").exists()
    report: ExtractionReport = both(extract, limit=limit, dtype=dtype)

    counts = report.manifest.datasets["refcoco.unc"].splits["val"]
    assert (told.num_images, told.num_present, told.num_missing) == (report.added, 0, 0)
    assert told.num_images == (limit or 8)
    assert told.num_shards == report.manifest.rows // 3
    assert told.num_bytes == bytes_of_features(report)
    assert told.num_bytes <= sum(entry.bytes for entry in report.manifest.shard_files().values())
    assert told.num_expressions == counts.expressions
    assert told.num_categories > 0
    assert (told.backend, told.dtype, told.batch_size) == ("zarr", dtype, 4)
    assert told.images_per_second > 0
    assert told.seconds == pytest.approx(told.num_images / told.images_per_second)
    assert told.free_bytes > told.num_bytes


def test_an_estimate_changes_nothing_in_a_cache(both, tmp_path):
    both(extract)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}

    both(estimate, "refcoco+")

    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before


def test_a_cache_that_has_everything_needs_nothing(both):
    both(extract)

    told = both(estimate)

    assert (told.num_images, told.num_present, told.num_shards, told.num_bytes) == (0, 8, 0, 0)
    assert (told.num_expressions, told.num_categories) == (0, 0)
    assert (told.images_per_second, told.seconds) == (0.0, 0.0)


def test_only_what_a_cache_lacks_is_counted(both):
    both(extract, "refcoco+:val")

    told = both(estimate, "refcoco+,refcoco:val")
    report = both(extract, "refcoco+,refcoco:val")

    assert (told.num_images, told.num_present) == (report.added, 4) == (16, 4)
    before = {"refcoco+.unc": {"val"}}
    assert told.num_expressions == sum(
        counts.expressions
        for name, entry in report.manifest.datasets.items()
        for split, counts in entry.splits.items()
        if split not in before.get(name, ())
    )


def test_shards_that_a_cut_off_extraction_committed_count_as_present(both, trials, tmp_path, committed):
    cache = tmp_path / "feats"
    trials.run(trials.trial(cache, kill_at=["fsync", 120, "after"]))
    done = len(committed(cache))
    assert 0 < done < 52

    told = both(estimate, "refcoco", shard_rows=None)
    rest = trials.extract(cache)

    assert (told.num_images, told.num_present) == (rest.added, done) == (52 - done, done)
    assert told.num_shards == 13 - done // 4


def test_missing_images_are_counted(both, data, tmp_path):
    own = Path(shutil.copytree(data, tmp_path / "data"))
    for path in sorted(own.rglob("*_000002*.jpg"))[:2]:
        path.unlink()

    told = both(estimate, data_root=own)
    report = both(extract, data_root=own)

    assert told.num_missing == len(report.quarantined) == 2
    assert told.num_images - told.num_missing == report.added


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"dtype": "float32"}, FingerprintMismatchError),
        ({"store": "hdf5"}, CacheError),
        ({"shard_rows": 5}, CacheError),
        ({"split": "refcocog"}, DataError),
    ],
)
def test_what_an_extraction_would_refuse_is_refused_already(options, error, both):
    both(extract)

    with pytest.raises(error) as of_estimate:
        both(estimate, **options)
    with pytest.raises(error) as of_extraction:
        both(extract, **options)

    assert str(of_estimate.value) == str(of_extraction.value)

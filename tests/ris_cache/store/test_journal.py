"""The journal of an extraction: plans, commit records, and what damage to them means."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ris_cache.errors import CorruptShardError
from ris_cache.store.fingerprint import Fingerprint
from ris_cache.store.journal import Journal, Plan, PlannedImage, RecordedImage, ShardRecord, assign_rows
from ris_cache.store.manifest import ArrayEntry, FileEntry, StoredFingerprint

pytestmark = pytest.mark.usefixtures("no_waiting_for_the_disk")


def make_plan(rows: list[int], **changes: Any) -> Plan:
    fingerprint = Fingerprint.of({"dtype": "float16"})
    values: dict[str, Any] = {
        "version": 1,
        "purpose": "extract",
        "agreed": {"batch_size": 4},
        "request": {"--split": "refcoco/unc", "--limit": 3},
        "fingerprint": StoredFingerprint(digest=fingerprint.digest, fields=fingerprint.fields),
        "backend": "zarr",
        "dtype": "float16",
        "arrays": (ArrayEntry(name="sam", shape=(2, 3, 3), dtype="float16"),),
        "shard_rows": 4,
        "base": None,
        "images": tuple(
            PlannedImage(
                image_id=100 + row, namespace="coco", row=row, file_name=f"{row}.jpg", height=3, width=4
            )
            for row in rows
        ),
    }
    return Plan(**(values | changes))


def make_record(shard: int) -> ShardRecord:
    return ShardRecord(
        shard=shard,
        files={f"features/{shard:05}.h5": FileEntry(bytes=10, sha256="a" * 64)},
        images=(
            RecordedImage(image_id=1, sha256="b" * 64, reason=None, crc32c=(0, 2**32 - 1)),
            RecordedImage(image_id=2, sha256=None, reason="not a JPEG “file”", crc32c=()),
        ),
    )


@pytest.fixture
def journal(tmp_path: Path) -> Journal:
    return Journal(tmp_path)


def test_without_a_plan_there_is_nothing(journal: Journal, tmp_path: Path) -> None:
    assert journal.read_plan() is None
    assert not journal.exists
    assert journal.identity() is None
    assert journal.record(0) is None
    journal.discard()
    assert list(tmp_path.iterdir()) == []


def test_a_plan_comes_back_as_it_was_and_says_which_images_a_shard_has(journal: Journal) -> None:
    plan = make_plan([0, 1, 2, 3, 9, 10])
    journal.start(plan, keep_records=False)
    found = journal.read_plan()
    assert found == plan
    assert journal.exists
    assert {shard: [image.row for image in images] for shard, images in found.shards().items()} == {
        0: [0, 1, 2, 3],
        2: [9, 10],
    }


def test_a_record_is_there_once_it_is_committed(journal: Journal) -> None:
    journal.start(make_plan([0, 4, 8]), keep_records=False)
    assert journal.committed([0, 1, 2]) == set()
    journal.commit(make_record(1))
    assert journal.record(1) == make_record(1)
    assert journal.committed([0, 1, 2]) == {1}
    assert list(journal.records([0, 1, 2])) == [make_record(1)]


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe\x00", b"[]", b'{"shard": 1}', b'"' * 100])
def test_a_damaged_record_means_that_the_shard_is_to_do(
    journal: Journal, tmp_path: Path, content: bytes
) -> None:
    journal.start(make_plan([0]), keep_records=False)
    journal.commit(make_record(0))
    (tmp_path / "extraction" / "shards" / "00000.json").write_bytes(content)
    assert journal.record(0) is None
    assert journal.committed([0]) == set()
    journal.commit(make_record(0))
    assert journal.record(0) == make_record(0)


@given(st.data())
def test_a_record_that_is_cut_short_is_never_taken_for_a_whole_one(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    root = tmp_path_factory.mktemp("journal")
    journal = Journal(root)
    journal.start(make_plan([0]), keep_records=False)
    journal.commit(make_record(0))
    path = root / "extraction" / "shards" / "00000.json"
    content = path.read_bytes()
    path.write_bytes(content[: data.draw(st.integers(0, len(content) - 1))])
    assert journal.record(0) is None


@pytest.mark.parametrize("content", [b"", b"{}", b'{"version": 1', b"\xff", b"null"])
def test_a_damaged_plan_says_what_to_remove(journal: Journal, tmp_path: Path, content: bytes) -> None:
    journal.start(make_plan([0]), keep_records=False)
    (tmp_path / "extraction" / "plan.json").write_bytes(content)
    with pytest.raises(CorruptShardError, match=r"plan\.json is damaged.*Remove .*extraction") as caught:
        journal.read_plan()
    assert caught.value.facts["path"] == tmp_path / "extraction" / "plan.json"


def test_a_new_plan_drops_the_records_of_the_old_unless_it_takes_them_over(journal: Journal) -> None:
    journal.start(make_plan([0, 4]), keep_records=False)
    journal.commit(make_record(0))
    journal.start(make_plan([0, 8]), keep_records=True)
    assert journal.committed([0]) == {0}
    journal.start(make_plan([0, 8]), keep_records=False)
    assert journal.committed([0]) == set()


@given(st.data())
def test_no_byte_of_a_plan_or_a_record_can_change_unnoticed(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    """What they say goes into the manifest, where one wrong digit makes a cache that nobody can open."""
    root = tmp_path_factory.mktemp("journal")
    journal = Journal(root)
    journal.start(make_plan([0, 4]), keep_records=False)
    journal.commit(make_record(0))
    for path in (root / "extraction" / "plan.json", root / "extraction" / "shards" / "00000.json"):
        content = bytearray(path.read_bytes())
        content[data.draw(st.integers(0, len(content) - 1))] ^= data.draw(st.integers(1, 255))
        path.write_bytes(content)
    with pytest.raises(CorruptShardError):
        journal.read_plan()
    assert journal.record(0) is None


def test_plan_and_record_are_json_that_ends_with_its_own_digest(journal: Journal, tmp_path: Path) -> None:
    journal.start(make_plan([0, 4]), keep_records=False)
    journal.commit(make_record(0))
    for path in (tmp_path / "extraction" / "plan.json", tmp_path / "extraction" / "shards" / "00000.json"):
        content = path.read_bytes()
        document = json.loads(content)
        assert list(document)[-1] == "digest"
        digest = document["digest"].encode()
        without = content.replace(b',"digest":"' + digest + b'"}\n', b"}")
        assert hashlib.sha256(without).hexdigest().encode() == digest


def test_every_plan_put_in_place_has_an_identity_of_its_own(journal: Journal) -> None:
    """The same plan put in place again is another one: whoever holds the first must not go on with it."""
    seen = set()
    for _ in range(20):
        journal.start(make_plan([0]), keep_records=False)
        assert journal.identity() == journal.identity()
        seen.add(journal.identity())
    assert len(seen) == 20


def test_discarding_leaves_nothing_and_ends_the_plan_first(
    journal: Journal, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    journal.start(make_plan([0]), keep_records=False)
    journal.commit(make_record(0))

    def cut_off(path: Path, **options: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("shutil.rmtree", cut_off)
        with pytest.raises(KeyboardInterrupt):
            journal.discard()
    assert journal.read_plan() is None
    journal.discard()
    assert list(tmp_path.iterdir()) == []


def test_what_a_discarded_plan_left_does_not_pass_for_the_next_ones(journal: Journal) -> None:
    """`discard` may be cut off after the plan: its records lie there still."""
    journal.start(make_plan([0, 4]), keep_records=False)
    journal.commit(make_record(0))
    journal.start(make_plan([0, 4], base="c" * 64), keep_records=False)
    assert journal.record(0) is None


def test_locks_lie_in_the_journal(journal: Journal, tmp_path: Path) -> None:
    journal.start(make_plan([0]), keep_records=False)
    with journal.claim_lock(7), journal.activity_lock():
        found = {path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*.lock")}
    assert found == {"extraction/claims/00007.lock", "extraction/active.lock"}


@given(
    num_images=st.integers(0, 40),
    first_row=st.integers(0, 30),
    shard_rows=st.integers(1, 7),
    taken=st.sets(st.integers(0, 12)),
)
def test_rows_ascend_in_free_shards_of_their_own_all_full_but_the_last(
    num_images: int, first_row: int, shard_rows: int, taken: set[int]
) -> None:
    rows = assign_rows(num_images, first_row=first_row, shard_rows=shard_rows, taken=taken)
    assert len(rows) == num_images
    assert rows == sorted(set(rows))
    shards = sorted({row // shard_rows for row in rows})
    assert not taken.intersection(shards)
    by_shard = {shard: [row % shard_rows for row in rows if row // shard_rows == shard] for shard in shards}
    assert all(places == list(range(len(places))) for places in by_shard.values())
    assert all(len(by_shard[shard]) == shard_rows for shard in shards[:-1])
    # A shard is never shared with rows that the cache has already, and none is left out.
    first_shard = -(-first_row // shard_rows)
    free = [shard for shard in range(first_shard, first_shard + 60) if shard not in taken]
    assert shards == free[: len(shards)]

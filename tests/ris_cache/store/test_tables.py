"""Records to Parquet tables and back."""

from __future__ import annotations

import time
from dataclasses import replace
from io import BytesIO
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ris_cache.datasets.records import ExpressionRecord, InstanceRecord, Rle
from ris_cache.errors import CorruptShardError, ShapeError
from ris_cache.store import tables

IDS = st.integers(-(2**63), 2**63 - 1)
TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)
EXPRESSIONS = st.builds(
    ExpressionRecord,
    split=st.sampled_from(["train", "val", "testA"]),
    ref_id=IDS,
    sent_id=IDS,
    sent_index=st.integers(0, 2**31 - 1),
    image_id=IDS,
    raw=TEXT,
    sent=TEXT,
    ann_ids=st.lists(IDS, max_size=3).map(tuple),
    category_ids=st.lists(st.integers(0, 2**31 - 1), max_size=3).map(tuple),
    is_degenerate=st.booleans(),
)


def expression(sent_id: int, split: str = "train", **changes: object) -> ExpressionRecord:
    values: dict[str, object] = {
        "split": split,
        "ref_id": sent_id // 2,
        "sent_id": sent_id,
        "sent_index": sent_id % 2,
        "image_id": sent_id // 4,
        "raw": f"The cup {sent_id}",
        "sent": f"the cup {sent_id}",
        "ann_ids": (sent_id,),
        "category_ids": (47,),
        "is_degenerate": False,
    }
    return ExpressionRecord(**(values | changes))  # type: ignore[arg-type]


def instance(ann_id: int, category_id: int = 1) -> InstanceRecord:
    polygons = ((0.5, 1.0, 3.25, 1.0, 2.0, 4.125),)
    return InstanceRecord(
        ann_id=ann_id, image_id=7, category_id=category_id, segmentation=polygons, is_crowd=False
    )


@given(st.lists(st.tuples(EXPRESSIONS, st.integers(-1, 90)), max_size=6))
def test_expressions_come_back_as_they_were(rows: list[tuple[ExpressionRecord, int]]) -> None:
    expressions, clip_category_ids = [row[0] for row in rows], [row[1] for row in rows]
    table = tables.expressions_table(expressions, clip_category_ids)
    found = tables.read_expressions(pq.read_table(pa.BufferReader(tables.table_bytes(table))))
    for record, original, clip_category_id in zip(found, expressions, clip_category_ids, strict=True):
        assert {name: getattr(record, name) for name in original.__slots__} == {
            name: getattr(original, name) for name in original.__slots__
        }
        assert record.clip_category_id == clip_category_id
        assert record.category_id == (original.category_ids or (-1,))[0]
        assert record.is_no_target == (not original.ann_ids)


def test_the_derived_columns_are_right() -> None:
    table = tables.expressions_table([expression(3), expression(4, ann_ids=(), category_ids=())], [5, -1])
    assert table.column("no_target").to_pylist() == [False, True]
    assert table.column("category_id").to_pylist() == [47, -1]
    assert table.column("clip_category_id").to_pylist() == [5, -1]


def test_predicted_categories_must_be_as_many_as_expressions() -> None:
    with pytest.raises(ShapeError, match="2 expressions need as many"):
        tables.expressions_table([expression(0), expression(1)], [1])


def test_instances_come_back_by_ann_id_with_their_segmentation() -> None:
    crowd = InstanceRecord(
        ann_id=3,
        image_id=7,
        category_id=1,
        segmentation=Rle(size=(2, 3), counts="06"),
        is_crowd=True,
    )
    table = tables.instances_table([instance(9), crowd])
    assert table.column("ann_id").to_pylist() == [3, 9]
    assert tables.read_instances(table) == {3: crowd, 9: instance(9)}


IMAGES = st.builds(
    tables.CachedImage,
    image_id=IDS,
    namespace=st.sampled_from(["coco", "o365"]),
    row=st.integers(0, 2**63 - 1),
    file_name=TEXT,
    height=st.integers(1, 2**31 - 1),
    width=st.integers(1, 2**31 - 1),
    sha256=st.none() | st.text("0123456789abcdef", min_size=64, max_size=64),
    reason=st.none() | TEXT,
    crc32c=st.lists(st.integers(0, 2**32 - 1), max_size=4).map(tuple),
)


@given(st.lists(IMAGES, max_size=6))
def test_images_come_back_by_row(images: list[tables.CachedImage]) -> None:
    content = tables.table_bytes(tables.images_table(images))
    table = tables.read_table(BytesIO(content), tables.IMAGES)
    assert tables.read_images(table) == sorted(images, key=lambda image: image.row)
    assert tables.table_bytes(table) == content


def test_the_status_says_whether_there_are_features() -> None:
    good = tables.CachedImage(
        image_id=5,
        namespace="coco",
        row=1,
        file_name="a.jpg",
        height=3,
        width=4,
        sha256="ab",
        reason=None,
        crc32c=(1, 2),
    )
    bad = replace(good, image_id=2, row=0, sha256=None, reason="cut off", crc32c=())
    assert tables.images_table([good, bad]).column("status").to_pylist() == ["quarantined", "ok"]
    assert (bad.is_quarantined, good.is_quarantined) == (True, False)


def test_a_table_read_from_memory_is_named_as_asked() -> None:
    with pytest.raises(CorruptShardError, match=r"feats/images\.parquet cannot be read"):
        tables.read_table(BytesIO(b"PAR1"), tables.IMAGES, name=Path("feats/images.parquet"))


def test_a_table_with_other_columns_is_refused_by_name(tmp_path: Path) -> None:
    path = tmp_path / "table.parquet"
    columns = tables.instances_table([instance(1)])
    wrong = columns.drop_columns(["iscrowd"]).append_column("area", pa.array([1.5]))
    pq.write_table(wrong, path)
    with pytest.raises(CorruptShardError, match=r"iscrowd: expected .*found none; area: expected none"):
        tables.read_table(path, tables.INSTANCES)


def test_a_nullable_column_is_not_taken_for_a_required_one(tmp_path: Path) -> None:
    path = tmp_path / "table.parquet"
    pq.write_table(pa.table({name: [] for name in tables.INSTANCES.names}), path)
    with pytest.raises(CorruptShardError, match="ann_id"):
        tables.read_table(path, tables.INSTANCES)


@pytest.mark.parametrize("content", [None, b"", b"PAR1 not really PAR1"])
def test_a_missing_or_damaged_table_is_named(tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "table.parquet"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(CorruptShardError, match=r"table\.parquet cannot be read as Parquet"):
        tables.read_table(path, tables.INSTANCES)


def test_folder_names_do_not_become_columns(tmp_path: Path) -> None:
    path = tmp_path / "split=val" / "table.parquet"
    path.parent.mkdir()
    path.write_bytes(tables.table_bytes(tables.instances_table([instance(1)])))
    assert tables.read_table(path, tables.INSTANCES).num_columns == 5


def test_a_whole_dataset_takes_about_a_second() -> None:
    expressions = [expression(sent_id) for sent_id in range(142_000)]
    start = time.perf_counter()
    content = tables.table_bytes(tables.expressions_table(expressions, [-1] * len(expressions)))
    found = tables.read_expressions(pq.read_table(pa.BufferReader(content)))
    seconds = time.perf_counter() - start
    assert len(found) == 142_000
    assert seconds < 15  # about 1.2 s on an idle machine; the rest is for a busy one


def test_a_category_set_comes_back(tmp_path: Path) -> None:
    original = tables.CategorySet(
        ids=(1, 90),
        names=("person", "toothbrush “é”"),
        template="a photo of a {}.",
        embeddings=np.arange(6, dtype=np.float32).reshape(3, 2).T,
    )
    for name, content in zip(("a.safetensors", "a.json"), tables.category_set_files(original), strict=True):
        (tmp_path / name).write_bytes(content)
    found = tables.read_category_set(tmp_path / "a.safetensors", tmp_path / "a.json")
    assert (found.ids, found.names, found.template) == (original.ids, original.names, original.template)
    np.testing.assert_array_equal(found.embeddings, original.embeddings)


def test_a_category_set_must_fit_itself(tmp_path: Path) -> None:
    with pytest.raises(ShapeError, match="as many ids as names"):
        tables.CategorySet(ids=(1,), names=("a", "b"), template="{}", embeddings=np.zeros((2, 3), np.float32))
    with pytest.raises(ShapeError, match="float64"):
        tables.CategorySet(ids=(1,), names=("a",), template="{}", embeddings=np.zeros((1, 3)))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "content", [b"", b"{", b"[]", b'{"ids": [1]}', b'{"ids": [1], "names": [], "template": ""}']
)
def test_a_damaged_category_description_is_named(tmp_path: Path, content: bytes) -> None:
    good = tables.CategorySet(ids=(1,), names=("a",), template="{}", embeddings=np.zeros((1, 3), np.float32))
    (tmp_path / "a.safetensors").write_bytes(tables.category_set_files(good)[0])
    (tmp_path / "a.json").write_bytes(content)
    with pytest.raises(CorruptShardError, match=r"a\.json"):
        tables.read_category_set(tmp_path / "a.safetensors", tmp_path / "a.json")


@pytest.mark.parametrize("content", [None, b"", b"\xff" * 40])
def test_damaged_tensors_are_named(tmp_path: Path, content: bytes | None) -> None:
    if content is not None:
        (tmp_path / "a.safetensors").write_bytes(content)
    with pytest.raises(CorruptShardError, match=r"a\.safetensors cannot be read"):
        tables.read_tensors(tmp_path / "a.safetensors")

"""The samples table: what it says of each sample, and what is left of it after a file."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from ris_cache.datasets.records import InstanceRecord
from ris_cache.errors import DataError, ShapeError
from ris_train.data.samples import Sample
from ris_train.scoring import Counts
from ris_train.scoring.samples import POSITION_WORDS, SampleTable, has_position_word

TABLE = "grefcoco.unc"


def instance(ann_id: int, image_id: int, category_id: int) -> InstanceRecord:
    return InstanceRecord(
        ann_id=ann_id, image_id=image_id, category_id=category_id, segmentation=(), is_crowd=False
    )


INSTANCES = {
    TABLE: {
        1: instance(1, 7, 3), 2: instance(2, 7, 3), 3: instance(3, 7, 5), 4: instance(4, 8, 3),
        5: instance(5, 8, -1), 6: instance(6, 8, -1),
    }
}  # fmt: skip


def sample(sent_id: int, image_id: int, text: str, *ann_ids: int) -> Sample:
    return Sample(
        table_name=TABLE, split="val", ref_id=sent_id // 2, sent_id=sent_id, image_id=image_id, text=text,
        ann_ids=ann_ids, category_id=3, clip_category_id=3, is_degenerate=sent_id == 2,
    )  # fmt: skip


SAMPLES = [
    sample(0, 7, "the Left one", 1),
    sample(1, 7, "both dogs  and the cat", 1, 2, 3),
    sample(2, 8, "über-gross", 4),
    sample(3, 8, "a unicorn"),
    sample(4, 8, "thing", 5),
]


def counts(offset: int, *, has_head: bool = True) -> Counts:
    annotated = np.array([5, 6, 0, 0, 9]) + offset * np.array([1, 1, 0, 0, 1])
    return Counts(
        intersection=np.array([1, 2, 0, 0, 4]),
        predicted=np.array([5, 6, 3, 2, 9]),
        annotated=annotated,
        is_no_target=np.array([False, False, False, True, False]),
        says_no_target=np.array([False, True, False, True, False]) & has_head,
        has_head=has_head,
    )


def table(*, has_head: bool = True) -> SampleTable:
    by_view = {"original": counts(0, has_head=has_head), "480": counts(3, has_head=has_head)}
    return SampleTable.of(SAMPLES, by_view, INSTANCES, metadata={"method": "μ", "weights": {"sam": "a"}})


def same_columns(one: SampleTable, other: SampleTable) -> bool:
    return list(one.columns) == list(other.columns) and all(
        np.array_equal(one.columns[name], other.columns[name]) for name in one.columns
    )


def test_each_sample_is_described() -> None:
    columns = table().columns
    assert columns["table"] == [TABLE] * 5
    assert np.asarray(columns["num_targets"]).tolist() == [1, 3, 1, 0, 1]
    # Two of category 3 in image 7, one in image 8; none without a target, none where no category is known.
    assert np.asarray(columns["num_same_category"]).tolist() == [2, 2, 1, 0, 0]
    assert np.asarray(columns["num_words"]).tolist() == [3, 5, 1, 2, 1]
    assert np.asarray(columns["has_position_word"]).tolist() == [True, False, False, False, False]
    assert np.asarray(columns["is_degenerate"]).tolist() == [False, False, True, False, False]
    assert np.asarray(columns["G:480"]).tolist() == [8, 9, 0, 0, 12]
    assert table().key[1] == (TABLE, "val", 0, 1)


@pytest.mark.parametrize("has_head", [True, False])
def test_a_file_gives_back_what_was_written(tmp_path: Path, has_head: bool) -> None:
    written = table(has_head=has_head)
    written.write(tmp_path / "deep" / "t.parquet")
    found = SampleTable.read(tmp_path / "deep" / "t.parquet")
    assert same_columns(found, written)
    assert (found.views, found.metadata) == (("original", "480"), {"method": "μ", "weights": {"sam": "a"}})
    for view, offset in (("original", 0), ("480", 3)):
        expected = counts(offset, has_head=has_head)
        assert repr(found.counts(view)) == repr(expected)
    written.write(tmp_path / "again.parquet")
    assert (tmp_path / "again.parquet").read_bytes() == (tmp_path / "deep" / "t.parquet").read_bytes()


def test_the_columns_have_the_types_that_other_readers_expect(tmp_path: Path) -> None:
    table().write(tmp_path / "t.parquet")
    schema = pq.read_schema(tmp_path / "t.parquet")
    assert {schema.field(name).type for name in ("ref_id", "sent_id", "image_id", "I:480")} == {pa.int64()}
    assert {schema.field(name).type for name in ("num_targets", "num_words")} == {pa.int32()}
    assert {schema.field(name).type for name in ("is_no_target", "has_head")} == {pa.bool_()}


def test_no_samples_make_a_table_too(tmp_path: Path) -> None:
    empty = table().select(np.zeros(5, dtype=bool))
    empty.write(tmp_path / "t.parquet")
    assert len(SampleTable.read(tmp_path / "t.parquet")) == 0


def test_some_samples_are_selected_by_flags_or_by_position() -> None:
    by_flag = table().select(np.array([False, True, False, True, False]))
    by_position = table().select(np.array([1, 3]))
    assert same_columns(by_flag, by_position)
    assert by_flag.key == [table().key[1], table().key[3]]
    assert by_flag.counts("480").annotated.tolist() == [9, 0]
    assert table().select(np.array([3, 1])).key == by_flag.key[::-1]


def test_a_view_that_was_not_counted_is_named() -> None:
    with pytest.raises(
        DataError, match=r"'1024'; they were on original, 480\. Evaluate again with --rules all"
    ):
        table().counts("1024")


def test_columns_that_do_not_fit_are_refused() -> None:
    good = table()
    with pytest.raises(ShapeError, match="are of one length"):
        SampleTable(columns=good.columns | {"split": ["val"]}, views=good.views, metadata={})
    with pytest.raises(ShapeError, match="has the columns"):
        SampleTable(columns=good.columns, views=("original",), metadata={})


def foreign_tables(tmp_path: Path) -> dict[str, Path]:
    table().write(tmp_path / "good.parquet")
    good = pq.read_table(tmp_path / "good.parquet")
    files = {
        "missing": tmp_path / "none.parquet",
        "text": tmp_path / "text.parquet",
        "column": tmp_path / "column.parquet",
        "type": tmp_path / "type.parquet",
        "metadata": tmp_path / "metadata.parquet",
    }
    files["text"].write_text("I am no Parquet file")
    pq.write_table(good.drop_columns(["num_words"]), files["column"])
    index = good.schema.get_field_index("G:480")
    pq.write_table(good.set_column(index, "G:480", good.column("G:480").cast(pa.float64())), files["type"])
    pq.write_table(good.replace_schema_metadata({}), files["metadata"])
    return files


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("missing", "cannot be read as Parquet"),
        ("text", "cannot be read as Parquet"),
        ("column", "these columns differ: num_words"),
        ("type", "these columns differ: G:480"),
        ("metadata", "lacks the description of its numbers"),
    ],
)
def test_a_file_that_is_no_samples_table_is_refused(tmp_path: Path, kind: str, message: str) -> None:
    path = foreign_tables(tmp_path)[kind]
    with pytest.raises(DataError, match=message) as caught:
        SampleTable.read(path)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize(("column", "value"), [("I:480", 99), ("G:480", 5), ("P:original", -1)])
def test_counts_that_cannot_be_are_refused(tmp_path: Path, column: str, value: int) -> None:
    """An intersection beyond its mask, pixels of a sample that is annotated as no-target, less than none."""
    changed = table()
    numbers = np.array(changed.columns[column])
    numbers[3] = value
    changed.columns[column] = numbers
    changed.write(tmp_path / "t.parquet")
    with pytest.raises(DataError, match="holds impossible counts"):
        SampleTable.read(tmp_path / "t.parquet")


def test_metadata_that_utf_8_cannot_hold_comes_back(tmp_path: Path) -> None:
    one = table()
    one.metadata["method"] = "run\udcff"
    one.write(tmp_path / "t.parquet")
    assert SampleTable.read(tmp_path / "t.parquet").metadata["method"] == "run\udcff"


@pytest.mark.parametrize(
    ("text", "expected"),
    [("man on the LEFT", True), ("left-most", True), ("bright car", False), ("second from right", True),
     ("woman, closest", True), ("the leftovers", False), ("", False), ("next to the dog", True)],
)  # fmt: skip
def test_position_words_are_whole_words_in_any_case(text: str, expected: bool) -> None:
    assert has_position_word(text) is expected
    assert all(word == word.lower() and word.isalpha() for word in POSITION_WORDS)

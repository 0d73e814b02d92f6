"""Finding what an argument names."""

from __future__ import annotations

import hashlib
import os
import re
from pathlib import Path

import numpy as np
import pytest

from ris_cache.errors import CheckpointError, ConfigError, DataError
from ris_train.compare.methods import dataset_title, find_methods, ordered_splits
from ris_train.scoring.rules import rules_named

VAL, TEST_A = ("refcoco.unc", "val"), ("refcoco.unc", "testA")


@pytest.fixture
def runs(tmp_path) -> Path:
    """A runs directory with the run `first`, not evaluated yet."""
    run = tmp_path / "runs" / "first"
    (run / "eval").mkdir(parents=True)
    (run / "config.yaml").write_text("")
    return run.parent


def keep(runs: Path, name: str, table, *, age: int = 0) -> Path:
    """Write an evaluation of `first`, `age` seconds before the newest possible."""
    path = runs / "first" / "eval" / f"{name}.parquet"
    table.write(path)
    os.utime(path, (1e9 - age, 1e9 - age))
    return path


def found(runs: Path, *arguments: object, **options):
    return find_methods([str(argument) for argument in arguments], runs_dir=runs, **options)


def test_a_run_is_its_newest_evaluation(runs, make_table):
    keep(runs, "old", make_table(1), age=60)
    newest = keep(runs, "new", make_table(2))
    (method,) = found(runs, "first")
    assert (method.name, method.origin) == ("first", str(newest))
    assert (method.splits[VAL].columns["P:original"] == make_table(2).columns["P:original"]).all()


def test_older_evaluations_of_the_same_weights_fill_in_splits(runs, make_table):
    a = keep(runs, "testA", make_table(1, {TEST_A: 5}), age=60)
    keep(runs, "other", make_table(1, {TEST_A: 5}, category_source="annotated"), age=50)
    keep(runs, "before", make_table(1, {TEST_A: 5}, step=50), age=40)
    val = keep(runs, "val", make_table(1, {VAL: 5}))
    (method,) = found(runs, "first")
    assert tuple(method.splits) == (VAL, TEST_A)
    assert method.origin == f"{val}, {a}"


def test_an_evaluation_of_a_checkpoint_that_another_took_the_place_of_is_passed_over(runs, make_table):
    """Both are of the same name and step: the run went on from an earlier state with other settings."""
    checkpoint = runs / "first" / "checkpoints" / "best.safetensors"
    checkpoint.parent.mkdir()
    checkpoint.write_bytes(b"weights")
    digest = hashlib.sha256(b"weights").hexdigest()
    now = keep(runs, "now", make_table(1, checkpoint_sha256=digest), age=60)
    keep(runs, "before", make_table(2, {TEST_A: 5}, checkpoint_sha256="0" * 64), age=50)
    keep(runs, "silent", make_table(3, {TEST_A: 5}), age=40)
    (method,) = found(runs, "first")
    assert (method.origin, tuple(method.splits)) == (str(now), (VAL,))
    now.unlink()
    with pytest.raises(DataError) as caught:
        found(runs, "first")
    message = str(caught.value)
    assert "before.parquet is of an earlier checkpoint best" in message
    assert "silent.parquet is of a checkpoint best that it does not identify" in message
    assert f"ris eval --run {runs / 'first'} --checkpoint best" in message
    checkpoint.unlink()
    assert tuple(found(runs, "first")[0].splits) == (TEST_A,), "what is gone is known by its evaluations"
    assert found(runs, "first")[0].origin.endswith("silent.parquet")


def test_shuffled_and_other_checkpoints_are_passed_over(runs, make_table):
    best = keep(runs, "best", make_table(1), age=60)
    keep(runs, "shuffled", make_table(2, expressions="shuffled(seed=0)"), age=20)
    last = keep(runs, "last", make_table(3, checkpoint="last"))
    assert found(runs, "first")[0].origin == str(best)
    assert found(runs, "first", checkpoint="last")[0].origin == str(last)


def test_the_newest_that_counted_for_the_rules_is_taken(runs, make_table):
    every = keep(runs, "all", make_table(1, views=("original", "1024", "480")), age=60)
    default = keep(runs, "default", make_table(1))
    dfam_only = keep(runs, "dfam", make_table(1, views=("1024",)), age=-60)
    assert found(runs, "first")[0].origin == str(default)
    assert found(runs, "first", rules=rules_named("ris,dfam"))[0].origin == str(every)
    assert found(runs, "first", rules=rules_named("dfam"))[0].origin == str(dfam_only)
    with pytest.raises(DataError, match=rf"ris eval --run {runs / 'first'} --checkpoint best --rules lavt"):
        found(runs, "first", rules=rules_named("lavt"))


def test_a_run_without_evaluation_says_how_to_make_one(runs):
    with pytest.raises(
        DataError, match=rf"holds no samples table.*ris eval --run {runs / 'first'} --checkpoint best"
    ):
        found(runs, "first")


def test_an_unknown_run_lists_the_known_ones(runs):
    with pytest.raises(CheckpointError, match=r"There is no run 'secnd'.*first"):
        found(runs, "secnd")


def test_a_samples_table_is_named_by_its_metadata_or_by_the_user(tmp_path, runs, make_table):
    path = tmp_path / "a.parquet"
    make_table(1, method="theirs").write(path)
    assert found(runs, path)[0].name == "theirs"
    assert found(runs, f"mine={path}")[0].name == "mine"


def test_an_existing_path_with_an_equals_sign_is_a_path(tmp_path, runs, make_table):
    path = tmp_path / "step=5.parquet"
    make_table(1).write(path)
    assert found(runs, path)[0].name == "made up"


def test_a_missing_table_says_who_writes_one(runs):
    with pytest.raises(DataError, match=r"no samples table absent\.parquet. `ris eval` and `ris score`"):
        found(runs, "absent.parquet")


def test_an_empty_table_is_refused(tmp_path, runs, make_table):
    path = tmp_path / "empty.parquet"
    table = make_table(1)
    table.select(table.columns["image_id"] < 0).write(path)
    with pytest.raises(DataError, match="holds no samples"):
        found(runs, path)


def test_published_alone_is_every_published_row(runs):
    names = [method.name for method in found(runs, "published")]
    assert len(names) == 6
    assert {"Ours, published", "ReLA †, published"} <= set(names)


def test_a_published_row_is_marked_as_such(runs):
    (ours,) = found(runs, "paper=published:ours")
    assert (ours.name, ours.category_source, ours.size, ours.is_published) == (
        "paper",
        "annotated",
        "524M",
        True,
    )
    assert "supplementary material, Table 1 (p_sparse), Table 3 (Ours)" in ours.origin


def test_two_methods_of_one_name_are_refused(runs):
    with pytest.raises(ConfigError, match=r"Two methods are called 'x'. .*NAME=path"):
        found(runs, "x=published:ours", "x=published:rela")


@pytest.mark.parametrize("argument", ["=a.parquet", "name="])
def test_half_a_name_is_refused(runs, argument):
    with pytest.raises(ConfigError, match="is no NAME=path"):
        found(runs, argument)


def test_nothing_to_compare_is_refused(runs):
    with pytest.raises(ConfigError, match="Nothing to compare"):
        found(runs)


def test_names_from_files_cannot_move_the_cursor(tmp_path, runs, make_table):
    path = tmp_path / "a.parquet"
    make_table(1, method="\x1b[2Jbad\n", category_source="\x1b[1m", notes={"original": "\x07note"}).write(
        path
    )
    (method,) = found(runs, path)
    assert (method.name, method.category_source) == ("�[2Jbad�", "�[1m")
    assert method.notes == {"original": "�note"}


def test_what_a_file_does_not_say_is_not_stated(tmp_path, runs, make_table):
    path = tmp_path / "a.parquet"
    table = make_table(1)
    del table.metadata["category_source"], table.metadata["text"]
    table.write(path)
    (method,) = found(runs, path)
    assert (method.category_source, method.text, method.size) == ("not stated", "not stated", None)


def test_sizes_are_in_millions(tmp_path, runs, make_table):
    path = tmp_path / "a.parquet"
    make_table(1, num_parameters=523_960_000).write(path)
    assert found(runs, path)[0].size == "524M"


def test_splits_come_in_the_order_of_the_supplement():
    keys = [("custom.birds", "x"), ("refcocog.umd", "test"), ("refcoco+.unc", "val"), ("refcoco.unc", "testB"),
            ("refcoco.unc", "testA"), ("refcoco.unc", "val"), ("grefcoco.unc", "val")]  # fmt: skip
    assert ordered_splits(keys) == (
        ("refcoco.unc", "val"), ("refcoco.unc", "testA"), ("refcoco.unc", "testB"), ("refcoco+.unc", "val"),
        ("refcocog.umd", "test"), ("grefcoco.unc", "val"), ("custom.birds", "x"),
    )  # fmt: skip


def test_a_google_split_is_not_called_by_the_bare_name():
    titles = [
        dataset_title(name) for name in ("refcocog.umd", "refcocog.google", "custom.birds", "ref-zom.final")
    ]
    assert titles == ["G-Ref", "G-Ref (google)", "birds", "Ref-ZOM"]


def damaged(whole, columns):
    """The table with some columns of one value throughout."""
    for name, value in columns.items():
        old = whole.columns[name]
        whole.columns[name] = [value] * len(old) if isinstance(old, list) else np.full_like(old, value)
    return whole


@pytest.mark.parametrize(
    ("columns", "problem"),
    [
        ({"I:original": 2**30}, "An intersection exceeds the prediction"),
        ({"I:original": -1, "P:original": -1}, "An intersection is negative"),
        ({"I:original": 0, "P:original": 2**62, "G:original": 2**62}, f"{2**62} pixels of one image"),
        ({"is_no_target": True}, "annotated as no-target has ground-truth pixels"),
        ({"says_no_target": True}, "without a no-target head says no-target"),
        ({"num_words": -1}, "num_words is negative"),
        ({"num_same_category": -1}, "num_same_category is negative"),
        ({"split": "\x1b[31mval"}, "'\\x1b[31mval' of a dataset, split or view cannot be printed"),
        ({"table": "refcoco"}, "'refcoco' is not of the form dataset.split_by"),
    ],
)
def test_a_damaged_table_is_refused_by_name(tmp_path, runs, make_table, columns, problem):
    path = tmp_path / "t.parquet"
    damaged(make_table(), columns).write(path)
    with pytest.raises(DataError, match=re.escape(problem)) as caught:
        found(runs, path)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("size", [10**400, -1, True, "many", None])
def test_an_impossible_size_is_no_size(tmp_path, runs, make_table, size):
    path = tmp_path / "t.parquet"
    make_table(num_parameters=size).write(path)
    assert found(runs, path)[0].size is None


def test_masks_of_an_unknown_threshold_are_noted_on_each_view(tmp_path, runs, make_table):
    path = tmp_path / "t.parquet"
    views = ("original", "original-p35", "480")
    labels = {"source": "predictions", "notes": {"480": "resized"}}
    make_table(views=views, thresholds={"original": 0.5, "original-p35": None}, **labels).write(path)
    assert found(runs, path)[0].notes == {
        "original-p35": "masks as predicted; that probability > 0.35 made them is not stated",
        "480": "resized; masks as predicted; that probability > 0.5 made them is not stated",
    }
    make_table(views=views).write(path)  # of a run, which applies the thresholds itself
    assert found(runs, path)[0].notes == {}


def test_weights_are_in_one_line(tmp_path, runs, make_table):
    path = tmp_path / "t.parquet"
    make_table(weights={"sam": "vit_b", "clip": "random(seed=0)"}).write(path)
    assert found(runs, path)[0].weights == "sam vit_b, clip random(seed=0)"
    make_table(weights=7).write(path)
    assert found(runs, path)[0].weights == "not stated"


def test_a_run_whose_name_has_an_equals_sign_is_found(runs, make_table):
    keep(runs, "val", make_table())
    (runs / "first").rename(runs / "lr=1e-4")
    assert found(runs, "lr=1e-4")[0].name == "lr=1e-4"
    assert found(runs, "mine=lr=1e-4")[0].name == "mine"

"""Methods meet on the same samples, or not at all."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from ris_cache.errors import ConfigError, DataError
from ris_train.compare.comparison import compare
from ris_train.compare.layouts import lay_out
from ris_train.compare.methods import published_row
from ris_train.compare.pairing import pair_splits
from ris_train.scoring.rules import RULES

VAL, TEST_A = ("refcoco.unc", "val"), ("refcoco.unc", "testA")


def changed(table, column: str, row: int, value):
    values = np.array(table.columns[column])
    values[row] = value
    return replace(table, columns=table.columns | {column: values})


def test_rows_are_brought_into_one_order(make_table, method_of):
    table = make_table(1)
    backwards = table.select(np.arange(len(table))[::-1])
    (paired,) = pair_splits([method_of("a", table), method_of("b", backwards)])
    assert paired.tables[0].key == paired.tables[1].key == table.key
    assert (paired.tables[1].columns["P:original"] == table.columns["P:original"]).all()
    assert paired.left_out == {0: 0, 1: 0}


def test_samples_that_one_method_lacks_are_left_out_and_counted(make_table, method_of):
    table = make_table(1)
    methods = [method_of("a", table), method_of("b", table.select(np.arange(3, len(table))))]
    (paired,) = pair_splits(methods)
    assert paired.num_samples == len(table) - 3
    assert paired.left_out == {0: 3, 1: 0}
    (split,) = compare(methods, num_resamples=0).by_rules["ris"]
    expected = RULES["ris"].score(table.counts("original").select(np.arange(3, len(table)))).values
    assert split.estimates[0]["mIoU"].value == split.estimates[1]["mIoU"].value == expected["mIoU"]


def test_a_split_that_one_method_lacks_altogether_is_scored_for_the_others(make_table, method_of):
    one, other = make_table(1, {VAL: 5, TEST_A: 4}), make_table(2, {VAL: 5})
    val, test_a = pair_splits([method_of("a", one), method_of("b", other)])
    assert (val.key, tuple(val.tables)) == (VAL, (0, 1))
    assert (test_a.key, tuple(test_a.tables)) == (TEST_A, (0,))


def test_nothing_in_common_is_refused(make_table, method_of):
    table = make_table(1)
    half = len(table) // 2
    methods = [
        method_of("a", table.select(np.arange(half))),
        method_of("b", table.select(np.arange(half, len(table)))),
    ]
    with pytest.raises(DataError, match="a, b share no expression of RefCOCO val"):
        pair_splits(methods)


@pytest.mark.parametrize(
    ("column", "value"), [("G:original", 10**6), ("is_no_target", True), ("image_id", 5)]
)
def test_other_annotation_is_refused_by_name(make_table, method_of, column, value):
    table = make_table(1)
    with pytest.raises(DataError, match="a and b were scored against different annotation") as caught:
        pair_splits([method_of("a", table), method_of("b", changed(table, column, 2, value))])
    key = table.key[2]
    assert caught.value.facts == {"ref_id": key[2], "sent_id": key[3], "column": column, "num_different": 1}
    assert f"ref_id {key[2]}, sent_id {key[3]} has {column}" in str(caught.value)


def test_an_expression_scored_twice_is_refused(make_table, method_of):
    table = make_table(1)
    twice = table.select(np.array([0, 1, 1]))
    with pytest.raises(DataError, match=rf"ref_id {table.key[1][2]}, sent_id {table.key[1][3]} twice"):
        pair_splits([method_of("a", twice)])


def test_a_grid_that_was_not_counted_names_what_to_do(make_table, method_of):
    with pytest.raises(ConfigError, match=r"a \(a.parquet\) has no counts on the grid '1024'.*--rules dfam"):
        compare([method_of("a", make_table(1))], rules=[RULES["dfam"]])


def test_each_dataset_is_scored_by_its_own_rules(make_table, method_of):
    table = make_table(1, {VAL: 4, ("grefcoco.unc", "val"): 4}, no_target=0.0)
    found = compare([method_of("a", table), published_row("rela")], num_resamples=0).by_rules
    assert {name: [split.key for split in splits] for name, splits in found.items()} == {
        "ris": [VAL],
        "gres": [("grefcoco.unc", "val")],
    }


def test_rule_sets_without_a_rule_for_no_target_samples_leave_a_split_to_the_others(make_table, method_of):
    table = make_table(1, {VAL: 4, ("grefcoco.unc", "val"): 8}, no_target=0.4)
    table.columns["is_no_target"][np.array(table.columns["table"]) == VAL[0]] = False
    methods = [method_of("a", table)]
    comparison = compare(methods, rules=[RULES["ris"], RULES["gres"]], num_resamples=0)
    assert {name: [found.key[0] for found in splits] for name, splits in comparison.by_rules.items()} == {
        "ris": ["refcoco.unc"],
        "gres": ["refcoco.unc", "grefcoco.unc"],
    }
    text = "not scored, for want of a rule for no-target samples: gRefCOCO val by ris"
    assert all(text in laid.caption for laid in lay_out(comparison, "plain"))
    assert comparison.as_dict()["refused"] == [{"table": "grefcoco.unc", "split": "val", "rules": "ris"}]
    with pytest.raises(DataError, match="The rule set ris has no rule for no-target samples"):
        compare(methods, rules=[RULES["ris"]], num_resamples=0)


def test_a_dataset_of_ones_own_has_one_rule_set_for_all_its_splits(make_table, method_of):
    table = make_table(1, {("custom.birds", "train"): 6, ("custom.birds", "test"): 6}, no_target=0.5)
    is_train = np.array(table.columns["split"]) == "train"
    table.columns["is_no_target"][is_train] = False
    found = compare([method_of("a", table)], num_resamples=0).by_rules
    assert {name: len(splits) for name, splits in found.items()} == {"gres": 2}


def test_differences_are_to_the_first_method_with_samples(make_table, method_of):
    methods = [published_row("ours"), method_of("a", make_table(1)), method_of("b", make_table(2))]
    (split,) = compare(methods, num_resamples=0).by_rules["ris"]
    a, b = split.estimates[1]["oIoU"], split.estimates[2]["oIoU"]
    assert a.difference is None
    assert b.difference == b.value - a.value

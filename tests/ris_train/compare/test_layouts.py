"""Tables laid out like the supplement's, with what sets their rows apart."""

from __future__ import annotations

import numpy as np
import pytest

from ris_cache.errors import ConfigError
from ris_train.compare.comparison import compare
from ris_train.compare.intervals import interval_tables
from ris_train.compare.layouts import lay_out
from ris_train.compare.methods import published_row
from ris_train.scoring.rules import RULES

SPLITS = {
    ("refcoco.unc", "val"): 6, ("refcoco.unc", "testA"): 5, ("refcoco.unc", "testB"): 4,
    ("refcocog.umd", "val"): 5, ("refcocog.umd", "test"): 6,
}  # fmt: skip
RIS = RULES["ris"]


@pytest.fixture(scope="module")
def scored(make_table, method_of):
    """Two methods on five splits; the second is given the annotated category and has no testB."""
    one, other = make_table(1, SPLITS), make_table(2, SPLITS, quality=0.8)
    other = other.select(np.array(other.columns["split"]) != "testB")
    return one, [method_of("plain", one), method_of("fed", other, category_source="annotated", size="12M")]


def texts(table, label: str) -> list[list[str]]:
    return [[cell.text for cell in row.cells] for row in table.rows if row.label == label]


def notes_of(table, label: str) -> list[str]:
    row = next(row for row in table.rows if row.label == label)
    return [table.notes[mark - 1] for mark in row.marks]


def expected(table, key, metric: str) -> str:
    chosen = np.array([found[:2] == key for found in table.key])
    return f"{100 * RIS.score(table.counts('original').select(chosen)).values[metric]:.2f}"


def test_table_3_has_datasets_over_splits_and_a_block_for_each_metric(scored):
    one, methods = scored
    (table,) = lay_out(
        compare([*methods, published_row("rela"), published_row("ours")], num_resamples=0), "table3"
    )
    assert table.groups == (("RefCOCO", 3), ("G-Ref", 2))
    assert [column.title for column in table.columns] == ["Val", "TestA", "TestB", "Val", "Test"]
    assert [block.title for block in table.blocks] == ["oIoU", "mIoU", ""]
    labels = [[row.label for row in block.rows] for block in table.blocks]
    # As in the supplement, ReLA as published is in the first block alone.
    assert labels == [
        ["plain", "fed", "ReLA, published", "Ours, published"], ["plain", "fed", "Ours, published"], ["samples"],
    ]  # fmt: skip
    assert texts(table, "plain") == [
        [expected(one, key, metric) for key in SPLITS] for metric in ("oIoU", "mIoU")
    ]
    assert texts(table, "ReLA, published") == [["73.82", "76.48", "70.18", "65.00", "65.97"]]
    assert texts(table, "Ours, published")[1] == ["76.75", "79.55", "72.74", "69.56", "70.34"]


def test_a_split_that_a_method_lacks_is_a_dash(scored):
    _, methods = scored
    (table,) = lay_out(compare(methods, num_resamples=0), "table3")
    assert [row[2] for row in texts(table, "fed")] == ["–", "–"]


def test_the_last_row_counts_the_samples(scored):
    one, methods = scored
    (table,) = lay_out(compare(methods[:1], num_resamples=0), "table3")
    (row,) = [row for row in table.rows if row.label == "samples"]
    assert [cell.value for cell in row.cells] == [
        sum(found[:2] == key for found in one.key) for key in SPLITS
    ]


def test_table_1_has_both_metrics_under_each_split(scored):
    _, methods = scored
    tables = lay_out(compare(methods, num_resamples=0), "table1")
    assert [table.title for table in tables] == [
        "RefCOCO: oIoU and mIoU by split", "G-Ref: oIoU and mIoU by split",
    ]  # fmt: skip
    assert tables[0].groups == (("Val", 2), ("TestA", 2), ("TestB", 2))
    assert [column.title for column in tables[0].columns] == ["oIoU", "mIoU"] * 3


def test_table_1_of_published_rows_is_the_supplements():
    methods = [published_row("ours"), published_row("ours-cls")]
    (table,) = lay_out(compare(methods), "table1")
    assert texts(table, "Ours, published") == [["66.19", "70.56", "72.37", "75.87", "56.75", "62.08"]]
    assert texts(table, "Ours with p′sparse, published") == [
        ["66.08", "70.08", "71.02", "75.41", "56.70", "61.89"]
    ]


def test_table_4_has_a_block_for_each_split(scored):
    _, methods = scored
    (table,) = lay_out(compare([*methods, published_row("rela-reproduced")], num_resamples=0), "table4")
    assert [column.title for column in table.columns] == [f"Pr@0.{x}" for x in (5, 6, 7, 8, 9)] + ["samples"]
    assert [block.title for block in table.blocks][-2:] == ["G-Ref val", "G-Ref test"]
    assert texts(table, "ReLA †, published")[-2:] == [
        ["76.92", "72.90", "66.79", "56.70", "29.68", "–"], ["77.55", "73.50", "67.70", "57.08", "30.65", "–"],
    ]  # fmt: skip
    assert any("higher than X" in note for note in notes_of(table, "ReLA †, published"))


def test_table_5_has_the_size_and_the_digits_as_printed(scored):
    _, methods = scored
    (table,) = lay_out(
        compare([*methods, published_row("lisa"), published_row("ours")], num_resamples=0), "table5"
    )
    assert table.lead_titles == ("Methods", "category source", "Size")
    assert table.groups == (("RefCOCO", 3), ("RefCOCO+", 3), ("G-Ref", 2))
    sizes = {row.label: row.lead[1] for row in table.rows}
    assert sizes == {
        "plain": "–",
        "fed": "12M",
        "LISA, published": "7.3B",
        "Ours, published": "524M",
        "samples": "",
    }
    assert texts(table, "LISA, published") == [
        ["74.9", "79.1", "72.3", "65.1", "70.8", "58.1", "67.9", "70.6"]
    ]


def test_the_value_and_the_note_of_test_a_follow_the_table():
    methods = [published_row("ours"), published_row("rela")]
    (table,) = lay_out(compare(methods), "table5")
    assert texts(table, "Ours, published")[0][4] == "72.38"
    assert "oIoU of Ours on RefCOCO+ testA is 72.37 in Table 1 and 72.38 in Table 5" in notes_of(
        table, "Ours, published"
    )


def test_plain_has_every_metric_of_the_rules(make_table, method_of):
    method = method_of("a", make_table(1, {("grefcoco.unc", "val"): 8}, no_target=0.4, has_head=True))
    (table,) = lay_out(compare([method], num_resamples=0), "auto")
    assert [column.title for column in table.columns] == [*RULES["gres"].metrics, "samples"]
    assert [block.title for block in table.blocks] == ["gRefCOCO val"]


@pytest.mark.parametrize(
    ("datasets", "title"),
    [
        (["refcoco.unc"], "RefCOCO: oIoU and mIoU by split"),
        (["refcoco.unc", "refcocog.umd"], "oIoU and mIoU"),
    ],
)
def test_auto_takes_table_1_for_one_dataset_and_table_3_for_several(make_table, method_of, datasets, title):
    method = method_of("a", make_table(1, {(name, "val"): 4 for name in datasets}))
    # Published rows do not add splits that nothing was scored on.
    (table,) = lay_out(compare([method, published_row("ours")], num_resamples=0))
    assert table.title == title
    assert len([column for column in table.columns if column.title in ("Val", "oIoU")]) == len(datasets)


def test_auto_of_published_rows_is_every_table_that_has_them():
    methods = [published_row(key) for key in ("rela", "lisa", "rela-reproduced")]
    tables = lay_out(compare(methods))
    assert [sorted({row.label for row in table.rows}) for table in tables] == [
        ["ReLA †, published", "ReLA, published"],
        ["ReLA †, published"],
        ["LISA, published", "ReLA, published"],
    ]
    assert all("rules: as published" in table.caption for table in tables)


def test_a_row_that_was_asked_for_is_never_dropped_in_silence():
    (table,) = lay_out(compare([published_row("ours"), published_row("rela-reproduced")]), "table1")
    assert texts(table, "ReLA †, published") == [["–"] * 6]


def test_every_rule_set_has_its_own_table_naming_rules_and_grid(make_table, method_of):
    method = method_of("a", make_table(1, views=("original", "1024")), weights="sam a")
    tables = lay_out(compare([method], rules=[RULES["ris"], RULES["ris@1024"]], num_resamples=0))
    assert [table.caption for table in tables] == [
        "rules: ris · grid: original frame, probability > 0.5 · scores in percent · weights: sam a",
        "rules: ris@1024 · grid: 1024 × 1024 squash, polygons drawn there, probability > 0.5 · "
        "scores in percent · weights: sam a",
    ]


def test_rules_without_the_metric_of_a_layout_are_refused(make_table, method_of):
    method = method_of("a", make_table(1, views=("original-p35",)))
    with pytest.raises(ConfigError, match="table3 shows oIoU or cIoU, which the rule set cris does not have"):
        lay_out(compare([method], rules=[RULES["cris"]], num_resamples=0), "table3")
    lisa = method_of("a", make_table(1, views=("original-one",)))
    with pytest.raises(ConfigError, match="rule set lisa does not have"):
        lay_out(compare([lisa], rules=[RULES["lisa"]], num_resamples=0), "table4")
    with pytest.raises(ConfigError, match="no layout 'table2'"):
        lay_out(compare([lisa], rules=[RULES["lisa"]], num_resamples=0), "table2")


def test_another_category_source_is_marked(scored):
    _, methods = scored
    (table,) = lay_out(compare(methods, num_resamples=0), "table3")
    assert notes_of(table, "plain") == []
    assert notes_of(table, "fed") == ["is given the annotated category; plain is given no category"]
    assert {row.label: row.lead[0] for row in table.rows} == {
        "plain": "none",
        "fed": "annotated",
        "samples": "",
    }


def test_another_text_shuffling_and_resized_masks_are_marked(make_table, method_of):
    table = make_table(1)
    other = method_of(
        "b",
        table,
        text="sent",
        expressions="shuffled(seed=0)",
        notes={"original": "masks resized", "480": "not this"},
    )
    (laid,) = lay_out(compare([method_of("a", table), other], num_resamples=0))
    assert notes_of(laid, "b") == [
        "reads cleaned expressions (sent); a reads expressions as they were typed (raw)",
        "expressions shuffled(seed=0)",
        "masks resized",
    ]


def test_other_weights_are_marked_and_those_of_the_first_scored_row_are_in_the_caption(make_table, method_of):
    table = make_table(1)
    methods = [
        published_row("ours"),
        method_of("a", table, weights="sam vit_b"),
        method_of("b", table, weights="sam random(seed=0)"),
    ]
    (laid,) = lay_out(compare(methods, num_resamples=0))
    assert laid.caption.endswith("weights: sam vit_b") or "weights: sam vit_b ·" in laid.caption
    other = "rests on other weights than a: sam random(seed=0)"
    assert [other in notes_of(laid, row.label) for row in laid.rows] == [False, False, True, False]


def test_a_decision_for_want_of_a_head_is_marked(make_table, method_of):
    splits = {("grefcoco.unc", "val"): 8, ("grefcoco.unc", "testA"): 8}
    tables = [make_table(1, splits, no_target=0.4, has_head=has_head) for has_head in (True, False)]
    methods = [method_of("head", tables[0]), method_of("mask", tables[1])]
    (laid,) = lay_out(compare(methods, num_resamples=0))
    assert notes_of(laid, "head") == []
    assert notes_of(laid, "mask") == ["has no no-target head: an empty mask counts as that decision"]


def test_what_a_method_does_not_state_is_said_in_words(make_table, method_of):
    table = make_table(1)
    other = method_of("b", table, text="not stated", category_source="not stated")
    (laid,) = lay_out(compare([method_of("a", table), other], num_resamples=0))
    assert notes_of(laid, "b") == [
        "does not state which category it is given, if any; a is given no category",
        "does not state which form of the expressions it reads; a reads expressions as they were typed (raw)",
    ]


def test_degenerate_annotations_are_counted_in_the_caption(make_table, method_of):
    table = make_table(1)
    table.columns["is_degenerate"][:3] = True
    (laid,) = lay_out(compare([method_of("a", table)], num_resamples=0))
    assert "3 samples of a degenerate annotation, scored with an empty truth" in laid.caption


def test_published_rows_are_marked_and_say_that_the_samples_are_others(scored):
    _, methods = scored
    (table,) = lay_out(compare([*methods, published_row("rela-reproduced")], num_resamples=0), "table3")
    published, samples = notes_of(table, "ReLA †, published")
    assert published.startswith(
        "Table 3 (“ReLA † [4]”): rules, grid and samples as published, not scored here"
    )
    assert samples.startswith("not over the same samples: scored here are expressions of RefCOCO val")
    assert "10,834" in samples
    assert "supplementary material" in table.caption


def test_left_out_samples_are_marked(make_table, method_of):
    table = make_table(1)
    methods = [method_of("a", table), method_of("b", table.select(np.arange(2, len(table))))]
    (laid,) = lay_out(compare(methods, num_resamples=0))
    assert notes_of(laid, "a") == [
        "2 more samples of RefCOCO val are left out, because another method lacks them"
    ]
    assert notes_of(laid, "b") == []


def test_intervals_have_one_block_per_split_and_a_difference_per_other_method(scored):
    _, methods = scored
    comparison = compare(methods, num_resamples=50, seed=3)
    (table,) = interval_tables(comparison)
    assert table.groups == (("plain", 1), ("fed", 2))
    assert len(table.blocks) == len(SPLITS)
    assert "50 resamples, seed 3" in table.caption
    assert "category source: plain none, fed annotated" in table.caption
    split = comparison.by_rules["ris"][0]
    found = split.estimates[1]["oIoU"]
    cell = table.blocks[0].rows[0].cells[2]
    assert (cell.value, cell.interval) == (found.difference, found.difference_interval)
    assert cell.text[0] in "+-0"
    assert texts(table, "oIoU")[2][1:] == ["–", "–"]  # testB, which `fed` lacks


def test_no_resamples_no_intervals(scored):
    _, methods = scored
    assert interval_tables(compare(methods, num_resamples=0)) == ()
    assert interval_tables(compare([published_row("ours")])) == ()

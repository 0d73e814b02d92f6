"""Bins hold every sample once, and each is scored as if alone."""

from __future__ import annotations

import numpy as np
import pytest

from ris_cache.errors import ConfigError
from ris_train.compare.breakdown import BINNINGS, break_down, breakdown_dict, breakdown_tables
from ris_train.compare.comparison import compare
from ris_train.scoring.rules import RULES

LABELS = {
    "objects": ["no target", "1", "2", "3", "4+"],
    "size": ["no target", "small, < 32²", "medium, < 96²", "large, ≥ 96²"],
    "length": ["0", "1–2", "3–5", "6–8", "9+"],
    "position": ["yes", "no"],
}


@pytest.fixture(scope="module")
def table(make_table):
    return make_table(1, {("grefcoco.unc", "val"): 60}, no_target=0.3, has_head=True)


def with_columns(table, **columns):
    from dataclasses import replace

    return replace(table, columns=table.columns | columns)


@pytest.mark.parametrize("by", BINNINGS)
def test_every_sample_is_in_one_bin(table, by):
    bins = BINNINGS[by](table)
    assert [label for label, _ in bins] == LABELS[by]
    assert (np.sum([chosen for _, chosen in bins], axis=0) == 1).all()


@pytest.mark.parametrize("by", BINNINGS)
def test_each_bin_is_scored_as_if_it_were_all(table, make_table, method_of, by):
    other = make_table(2, {("grefcoco.unc", "val"): 60}, no_target=0.3, has_head=True)
    comparison = compare([method_of("a", table), method_of("b", other)], num_resamples=20)
    (breakdown,) = break_down(comparison, by)
    for found, (label, chosen) in zip(breakdown.bins, BINNINGS[by](table), strict=True):
        assert (found.label, found.num_samples) == (label, int(chosen.sum()))
        for index, source in enumerate((table, other)):
            expected = RULES["gres"].score(source.counts("original").select(chosen)).values
            for metric in ("cIoU", "gIoU"):
                assert found.estimates[index][metric].value == pytest.approx(expected[metric], nan_ok=True)


def test_the_bounds_of_objects_sizes_and_lengths(table):
    num = len(table)
    has_target = np.zeros(num, dtype=np.bool_)
    made = with_columns(
        table,
        is_no_target=has_target,
        num_same_category=np.resize(np.array([1, 2, 3, 4, 9], dtype=np.int32), num),
        num_words=np.resize(np.array([1, 2, 3, 5, 6, 8, 9, 30], dtype=np.int32), num),
        **{"G:original": np.resize(np.array([0, 1, 1023, 1024, 9215, 9216]), num)},
    )

    for by in ("objects", "size", "length"):
        assert (np.sum([chosen for _, chosen in BINNINGS[by](made)], axis=0) == 1).all()

    def place(by: str, column: str) -> dict[int, str]:
        return {
            int(value): label
            for label, chosen in BINNINGS[by](made)
            for value in np.unique(made.columns[column][chosen])
        }

    assert place("objects", "num_same_category") == {1: "1", 2: "2", 3: "3", 4: "4+", 9: "4+"}
    assert place("length", "num_words") == {
        1: "1–2", 2: "1–2", 3: "3–5", 5: "3–5", 6: "6–8", 8: "6–8", 9: "9+", 30: "9+",
    }  # fmt: skip
    small, medium, large = LABELS["size"][1:]
    assert place("size", "G:original") == {
        0: small,
        1: small,
        1023: small,
        1024: medium,
        9215: medium,
        9216: large,
    }


def test_an_empty_bin_is_shown_with_dashes(make_table, method_of):
    made = make_table(1)
    few = with_columns(made, num_same_category=np.ones(len(made), dtype=np.int32))
    comparison = compare([method_of("a", few)], num_resamples=20)
    breakdowns = break_down(comparison, "objects")
    (laid,) = breakdown_tables(comparison, "objects", breakdowns)
    assert [row.label for row in laid.rows] == ["1", "2", "3", "4+"]
    assert [cell.text for cell in laid.rows[1].cells] == ["0", "–", "–"]
    assert laid.rows[0].cells[1].interval is not None
    assert breakdown_dict(comparison, breakdowns[0])["bins"][1]["num_samples"] == 0


def test_targets_without_a_category_have_a_bin_of_their_own(make_table):
    made = make_table(1)
    count = made.columns["num_same_category"].copy()
    count[:3] = 0
    bins = BINNINGS["objects"](with_columns(made, num_same_category=count))
    assert [label for label, _ in bins] == ["no category", "1", "2", "3", "4+"]
    assert bins[0][1].sum() == 3
    assert (np.sum([chosen for _, chosen in bins], axis=0) == 1).all()


def test_the_table_names_rules_grid_and_category_sources(table, method_of):
    comparison = compare([method_of("a", table, category_source="predicted")], num_resamples=20)
    (laid,) = breakdown_tables(comparison, "size", break_down(comparison, "size"))
    assert laid.title == "cIoU and gIoU by target size, in pixels of the original frame"
    for part in ("rules: gres", "grid: original frame", "category source: a predicted", "20 resamples"):
        assert part in laid.caption


def test_sizes_need_the_original_frame(make_table, method_of):
    comparison = compare(
        [method_of("a", make_table(1, views=("1024",)))], rules=[RULES["dfam"]], num_resamples=0
    )
    with pytest.raises(
        ConfigError, match="pixels of the original frame, on which these samples were not counted"
    ):
        break_down(comparison, "size")


def test_an_unknown_breakdown_lists_the_known_ones(table, method_of):
    with pytest.raises(ConfigError, match="objects, size, length, position"):
        break_down(compare([method_of("a", table)], num_resamples=0), "colour")

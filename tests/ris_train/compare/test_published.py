"""The published rows against a second transcription, table by table as the supplement prints them."""

from __future__ import annotations

import pytest

from ris_cache.errors import ConfigError
from ris_train.compare.published import published_method, published_tables

VAL_A_B = ("val", "testA", "testB")
VAL_TEST = ("val", "test")

# Table 1. RefCOCO+: Val oIoU, mIoU; TestA oIoU, mIoU; TestB oIoU, mIoU.
TABLE_1 = {
    "ours": (66.19, 70.56, 72.37, 75.87, 56.75, 62.08),
    "ours-cls": (66.08, 70.08, 71.02, 75.41, 56.70, 61.89),
}
# Table 3. RefCOCO Val, Test A, Test B; G-Ref Val(U), Test(U).
TABLE_3 = {
    ("rela", "oIoU"): (73.82, 76.48, 70.18, 65.00, 65.97),
    ("rela-reproduced", "oIoU"): (73.73, 76.71, 69.98, 64.40, 65.63),
    ("ours", "oIoU"): (74.80, 78.02, 69.96, 65.34, 67.08),
    ("rela-reproduced", "mIoU"): (76.06, 78.19, 73.05, 67.87, 68.45),
    ("ours", "mIoU"): (76.75, 79.55, 72.74, 69.56, 70.34),
}
# Table 4. Pr@0.5 to Pr@0.9 on G-Ref.
TABLE_4 = {
    ("rela-reproduced", "val"): (76.92, 72.90, 66.79, 56.70, 29.68),
    ("ours", "val"): (78.16, 74.75, 69.85, 60.04, 33.61),
    ("rela-reproduced", "test"): (77.55, 73.50, 67.70, 57.08, 30.65),
    ("ours", "test"): (79.34, 75.52, 70.38, 60.95, 34.57),
}
# Table 5. Size; oIoU on RefCOCO Val, Test A, Test B; RefCOCO+ likewise; G-Ref Val(U), Test(U).
TABLE_5 = {
    "rela": ("225M", 73.82, 76.48, 70.18, 66.04, 71.02, 57.65, 65.00, 65.97),
    "cgformer": ("251M", 74.75, 77.37, 70.64, 64.54, 71.00, 57.14, 64.68, 65.09),
    "lisa": ("7.3B", 74.9, 79.1, 72.3, 65.1, 70.8, 58.1, 67.9, 70.6),
    "ours": ("524M", 74.80, 78.02, 69.96, 66.19, 72.38, 56.75, 65.34, 67.08),
}


def transcription() -> dict[tuple[str, str, str, str, str], float]:
    """Percent by (table, method, dataset, split, metric)."""
    found: dict[tuple[str, str, str, str, str], float] = {}
    for method, row in TABLE_1.items():
        places = [(split, metric) for split in VAL_A_B for metric in ("oIoU", "mIoU")]
        found |= {
            ("1", method, "refcoco+.unc", *place): value for place, value in zip(places, row, strict=True)
        }
    refcoco, gref = [("refcoco.unc", s) for s in VAL_A_B], [("refcocog.umd", s) for s in VAL_TEST]
    for (method, metric), row in TABLE_3.items():
        for place, value in zip(refcoco + gref, row, strict=True):
            found["3", method, *place, metric] = value
    for (method, split), row in TABLE_4.items():
        for threshold, value in zip("56789", row, strict=True):
            found["4", method, "refcocog.umd", split, f"Pr@0.{threshold}"] = value
    for method, (_, *row) in TABLE_5.items():
        plus = [("refcoco+.unc", s) for s in VAL_A_B]
        for place, value in zip(refcoco + plus + gref, row, strict=True):
            found["5", method, *place, "oIoU"] = value
    return found


def test_every_number_of_the_supplement_is_there_and_no_other():
    shipped = {
        (value.table, method.key, value.table_name, value.split, value.metric): float(value.printed)
        for method in published_tables().methods.values()
        for value in method.values
    }
    assert shipped == transcription()
    assert len(shipped) == 12 + 25 + 20 + 32


def test_sizes_are_those_of_table_5():
    sizes = {
        key: method.size for key, method in published_tables().methods.items() if method.size is not None
    }
    assert sizes == {method: row[0] for method, row in TABLE_5.items()}


def test_the_digits_stay_as_printed_and_the_fraction_is_the_nearest_float():
    lisa = published_method("lisa").value("refcoco.unc", "val", "oIoU", table=None)
    assert lisa is not None
    assert (lisa.printed, lisa.fraction) == ("74.9", 0.749)
    for method in published_tables().methods.values():
        assert all(value.fraction == float(f"{value.printed}e-2") for value in method.values)


def test_the_two_inconsistencies_are_noted():
    one, two = published_tables().inconsistencies
    assert (one.method, one.table_name, one.split, one.metric) == ("ours", "refcoco+.unc", "testA", "oIoU")
    assert one.values == {"1": "72.37", "5": "72.38"}
    ours = published_method("ours")
    for table, printed in one.values.items():
        value = ours.value("refcoco+.unc", "testA", "oIoU", table=table)
        assert value is not None
        assert value.printed == printed
    assert two.metric == "Pr@X"
    assert "higher than" in two.text


def test_no_other_number_differs_between_two_tables():
    by_place: dict[tuple[str, ...], set[str]] = {}
    for method in published_tables().methods.values():
        for value in method.values:
            by_place.setdefault((method.key, value.table_name, value.split, value.metric), set()).add(
                value.printed
            )
    assert [place for place, printed in by_place.items() if len(printed) > 1] == [
        ("ours", "refcoco+.unc", "testA", "oIoU")
    ]


def test_only_the_row_that_reads_the_category_says_annotated():
    sources = {key: method.category_source for key, method in published_tables().methods.items()}
    assert {key for key, source in sources.items() if source == "annotated"} == {"ours"}
    assert set(sources.values()) == {"annotated", "none"}


def test_each_wording_and_caption_belongs_to_a_table_with_values():
    for method in published_tables().methods.values():
        assert set(method.wording) == {value.table for value in method.values}
    assert set(published_tables().captions) == {"1", "3", "4", "5"}


def test_an_unknown_name_lists_the_known_ones_and_the_nearest():
    with pytest.raises(ConfigError, match=r"published:cgformer.*Did you mean published:rela\?"):
        published_method("rella")

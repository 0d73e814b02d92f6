"""The published numbers agree with each other, and docs/datasets.md holds just these."""

from __future__ import annotations

from pathlib import Path

import pytest

from ris_cache.datasets.published import BEGIN, END, MERGE, PUBLISHED, TOTAL, Quantity, differences, update
from ris_cache.datasets.selection import PUBLISHED_DATASETS
from ris_cache.errors import DataError

DOCUMENT = Path(__file__).parents[3] / "docs" / "datasets.md"


def test_every_dataset_that_can_be_named_is_there() -> None:
    names = [f"{name}.{split_by}" for name, split_bys in PUBLISHED_DATASETS.items() for split_by in split_bys]
    assert list(PUBLISHED) == names


@pytest.mark.parametrize("table_name", list(PUBLISHED))
@pytest.mark.parametrize("quantity", ["refs", "images", "sentences", "objects"])
def test_groups_are_the_sums_of_their_splits(table_name: str, quantity: Quantity) -> None:
    groups = PUBLISHED[table_name].groups
    splits = [name for name in groups if name != TOTAL and "+" not in name]
    for name, figures in groups.items():
        parts = splits if name == TOTAL else name.split("+")
        values = [groups[part].get(quantity) for part in parts]
        # google divides objects, so that its splits share images.
        if (
            name in splits
            or quantity not in figures
            or None in values
            or ("google" in table_name and quantity == "images")
        ):
            continue
        assert sum(figure.value for figure in values if figure) == figures[quantity].value, name


def test_the_splits_of_one_pool_have_as_many_images() -> None:
    one, other = PUBLISHED["refcoco.unc"].groups, PUBLISHED["refcoco+.unc"].groups
    assert [one[s]["images"].value for s in ("val", "testA", "testB")] == [
        other[s]["images"].value for s in ("val", "testA", "testB")
    ]
    assert (
        PUBLISHED["refcocog.umd"].groups[TOTAL]["sentences"]
        == PUBLISHED["refcocog.google"].groups[TOTAL]["sentences"]
    )


def test_the_merged_figures_follow_from_each_other() -> None:
    figures = {name: figure.value for name, figure in MERGE.figures.items()}
    totals = [PUBLISHED[name].groups[TOTAL]["sentences"].value for name in MERGE.tables]
    train = [PUBLISHED[name].groups["train"]["sentences"].value for name in MERGE.tables]
    refcoco, refcocog = PUBLISHED["refcoco.unc"].groups, PUBLISHED["refcocog.umd"].groups
    assert figures["sentences"] == sum(totals)
    assert figures["train sentences"] == sum(train)
    assert figures["sentences"] == (
        figures["sentences on them"]
        + figures["sentences on these"]
        + figures["train sentences that are clean"]
    )
    assert figures["train sentences"] == (
        figures["train sentences that leak"] + figures["train sentences that are clean"]
    )
    test = (
        refcoco["testA"]["images"].value + refcoco["testB"]["images"].value + refcocog["test"]["images"].value
    )
    assert figures["images of a test split"] == test - figures["images that both test on"]
    evaluated = test + refcoco["val"]["images"].value + refcocog["val"]["images"].value
    assert (
        figures["images of a test split"] + figures["images of a val split alone"]
        == evaluated - figures["images that both validate or test on"]
    )


def test_a_difference_says_how_sure_it_is() -> None:
    none: dict[Quantity, int] = dict.fromkeys(
        ("refs", "images", "sentences", "objects", "none", "one", "many"), 0
    )
    (found,) = differences("refcoco.unc", {"val": none | {"images": 1500, "sentences": 10834}})
    assert (found.group, found.quantity, found.found, found.published.value) == ("val", "refs", 0, 3811)
    assert found.is_sure
    by_quantity = {d.quantity: d.is_sure for d in differences("ref-zom.final", {"train": none})}
    assert by_quantity == {"refs": False, "images": True, "objects": True}
    assert {d.is_sure for d in differences("grefcoco.unc", {TOTAL: none})} == {False}
    assert differences("custom.birds", {"train": none}) == ()


def test_the_document_holds_these_numbers() -> None:
    text = DOCUMENT.read_text("utf-8")
    assert update(text) == text, "run `python -m ris_cache.datasets.published docs/datasets.md`"
    assert "| `refcoco.unc` | testB | 1,810 S | 750 S | 5,095 S |" in text


@pytest.mark.parametrize("text", ["", BEGIN, f"{END}\n{BEGIN}", f"{BEGIN}\n{BEGIN}\n{END}"])
def test_a_document_without_its_markers_is_refused(text: str) -> None:
    with pytest.raises(DataError, match="once each and in this order"):
        update(text)

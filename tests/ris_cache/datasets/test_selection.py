"""Selections parse as written, and splits hold what the refer API says they hold."""

from __future__ import annotations

import re
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ris_cache.datasets.records import ExpressionRecord, ReferringDataset
from ris_cache.datasets.selection import (
    PUBLISHED_DATASETS,
    REFER_SPLITS,
    SPLIT_NAMES,
    Selection,
    matching_splits,
    parse_selections,
    select_split,
)
from ris_cache.errors import ConfigError

FREE_NAME = re.compile(r"[A-Za-z0-9_-]+")


def dataset_of(*splits: str, name: str = "refcoco", split_by: str = "unc") -> ReferringDataset:
    """One expression per split label, with sent_id counting up."""
    expressions = tuple(
        ExpressionRecord(
            split=split,
            ref_id=sent_id,
            sent_id=sent_id,
            sent_index=0,
            image_id=1,
            raw="left",
            sent="left",
            ann_ids=(1,),
            category_ids=(1,),
            is_degenerate=False,
        )
        for sent_id, split in enumerate(splits)
    )
    return ReferringDataset(
        name=name,
        split_by=split_by,
        images={},
        instances={},
        expressions=expressions,
        categories=(),
        warnings=(),
    )


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("refcoco", [("refcoco", "unc", None)]),
        ("refcoco+", [("refcoco+", "unc", None)]),
        ("refcocog", [("refcocog", "umd", None)]),
        ("refcoco:val", [("refcoco", "unc", "val")]),
        ("refcoco/google", [("refcoco", "google", None)]),
        ("refcocog/umd:test", [("refcocog", "umd", "test")]),
        (
            "refcoco:testA, refcoco+ ,refcocog/google:val",
            [("refcoco", "unc", "testA"), ("refcoco+", "unc", None), ("refcocog", "google", "val")],
        ),
        ("grefcoco:testB", [("grefcoco", "unc", "testB")]),
        ("ref-zom,ref-zom/final:test", [("ref-zom", "final", None), ("ref-zom", "final", "test")]),
        ("custom/birds", [("custom", "birds", None)]),
        ("custom/My-birds_2:test-7", [("custom", "My-birds_2", "test-7")]),
        ("all", [(name, split_bys[0], None) for name, split_bys in PUBLISHED_DATASETS.items()]),
        (
            "refcocog,all",
            [
                ("refcocog", "umd", None),
                ("refcoco", "unc", None),
                ("refcoco+", "unc", None),
                ("grefcoco", "unc", None),
                ("ref-zom", "final", None),
            ],
        ),
        ("refcoco,refcoco,refcoco/unc", [("refcoco", "unc", None)]),
    ],
)
def test_selections_parse(text: str, expected: list[tuple[str, str, str | None]]) -> None:
    assert [(s.dataset, s.split_by, s.split) for s in parse_selections(text)] == expected


@given(
    st.lists(
        st.sampled_from(sorted(PUBLISHED_DATASETS)).flatmap(
            lambda dataset: st.builds(
                Selection,
                dataset=st.just(dataset),
                split_by=st.sampled_from(PUBLISHED_DATASETS[dataset]),
                split=st.none() | st.sampled_from(SPLIT_NAMES[dataset]),
            )
        )
        | st.builds(
            Selection,
            dataset=st.just("custom"),
            split_by=st.from_regex(FREE_NAME, fullmatch=True),
            split=st.none() | st.from_regex(FREE_NAME, fullmatch=True),
        ),
        min_size=1,
        unique=True,
    )
)
def test_what_is_written_out_in_full_parses_back(selections: list[Selection]) -> None:
    text = ",".join(f"{s.dataset}/{s.split_by}" + (f":{s.split}" if s.split else "") for s in selections)
    assert parse_selections(text) == tuple(selections)


def test_tables_are_named_by_dataset_and_split_by() -> None:
    assert [s.table_name for s in parse_selections("refcoco:val,all,custom/birds")] == [
        "refcoco.unc",
        "refcoco.unc",
        "refcoco+.unc",
        "refcocog.umd",
        "grefcoco.unc",
        "ref-zom.final",
        "custom.birds",
    ]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("recoco", "Unknown dataset 'recoco'.*known: refcoco, refcoco[+], refcocog.*Did you mean 'refcoco'?"),
        ("RefCOCOg", "Did you mean 'refcocog'?"),
        ("grefcocoo:val", "Unknown dataset.*Did you mean 'grefcoco'?"),
        ("refzom", "Did you mean 'ref-zom'?"),
        ("grefcoco/umd", "Unknown split_by of grefcoco 'umd'"),
        ("grefcoco:test", "Unknown split of grefcoco 'test'.*known: train, val, testA, testB[.]"),
        ("ref-zom:val", "Unknown split of ref-zom 'val'.*known: train, test[.]"),
        ("custom", "names no file. Write custom/<name>"),
        ("custom:train", "names no file"),
        ("custom/", "'' cannot be the name of a custom dataset"),
        ("custom/../birds", "'../birds' cannot be the name of a custom dataset"),
        ("custom/birds.v2", "cannot be the name of a custom dataset"),
        ("custom/birds:", "'' cannot be the name of a split"),
        ("custom/birds:a b", "'a b' cannot be the name of a split"),
        ("custom/vögel", "ASCII letters"),
        ("refcoco/umd", "Unknown split_by of refcoco 'umd'.*known: unc, google"),
        ("refcocog/gogle", "Did you mean 'google'?"),
        ("refcoco+/google", "known: unc[.]"),
        ("refcoco/", "Unknown split_by of refcoco ''"),
        ("refcoco:", "Unknown split of refcoco ''"),
        (
            "refcoco:valid",
            "Unknown split of refcoco 'valid'.*known: train, val, test, testA, testB, testC.*mean 'val'?",
        ),
        ("refcoco:testa", "Did you mean 'testA'?"),
        ("refcoco:val:test", "Unknown split of refcoco 'val:test'"),
        ("all:val", "Unknown dataset 'all'"),
        ("", "empty entry"),
        ("refcoco,,refcocog", "empty entry"),
        ("refcoco,", "empty entry"),
    ],
)
def test_what_is_unknown_lists_what_is_known(text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        parse_selections(text)
    assert str(caught.value.facts.get("selection", "")) in text
    assert caught.value.exit_code == 2


@pytest.mark.parametrize(
    ("split", "expected"),
    [
        ("train", [0, 6]),
        ("val", [1]),
        ("testA", [2, 4]),
        ("testB", [3, 4]),
        ("testC", [5]),
        ("test", [2, 3, 4, 5]),
    ],
)
def test_splits_follow_the_rules_of_the_refer_api(split: str, expected: list[int]) -> None:
    dataset = dataset_of("train", "val", "testA", "testB", "testAB", "testC", "train", "minival")
    assert [e.sent_id for e in select_split(dataset, split)] == expected


def test_grefcoco_and_custom_splits_are_taken_by_equality() -> None:
    labels = ("train", "testA", "testAB", "my-test")
    for name in ("grefcoco", "custom"):
        dataset = dataset_of(*labels, name=name)
        assert [e.sent_id for e in select_split(dataset, "testA")] == [1]
        with pytest.raises(ConfigError, match="no split 'test'"):
            select_split(dataset, "test")
    assert [e.sent_id for e in select_split(dataset_of(*labels, name="custom"), "my-test")] == [3]
    assert [e.sent_id for e in select_split(dataset_of(*labels, name="ref-zom"), "test")] == [1, 2, 3]


@given(st.sampled_from(REFER_SPLITS), st.lists(st.text("ABCtestrainvl", max_size=6)))
def test_matching_splits_equals_the_rule_spelled_out(split: str, labels: list[str]) -> None:
    def belongs(label: str) -> bool:
        if split in ("testA", "testB", "testC"):
            return split[-1] in label
        return label.find("test") >= 0 if split == "test" else label == split

    assert list(matching_splits(split, labels)) == [label for label in labels if belongs(label)]


@pytest.mark.parametrize(
    ("split", "hint"),
    [("test", ""), ("testA", ""), ("trian", " Did you mean 'train'?"), ("a", ""), ("", "")],
)
def test_a_split_that_selects_nothing_lists_those_present(split: str, hint: str) -> None:
    with pytest.raises(ConfigError) as caught:
        select_split(dataset_of("train", "val", "train"), split)
    assert str(caught.value) == f"refcoco (unc) has no split {split!r}; it has train, val.{hint}"
    assert caught.value.facts["expected"] == ("train", "val")


def test_selections_need_neither_torch_nor_numpy() -> None:
    code = (
        "import sys, ris_cache.datasets; "
        "sys.exit(' '.join(m for m in ('torch', 'numpy', 'pycocotools') if m in sys.modules) or 0)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr

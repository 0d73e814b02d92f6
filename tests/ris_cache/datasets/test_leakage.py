"""Leakage against brute force over sentences, and the published figures against their own arithmetic."""

from __future__ import annotations

from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from ris_cache.datasets.leakage import (
    SplitImages,
    evaluated_by_both,
    find_leaks,
    leaking_images,
    merge,
    split_images,
)
from ris_cache.datasets.records import ExpressionRecord

Sentence = tuple[str, str, int]  # table, split, image_id

SENTENCES = st.lists(
    st.tuples(
        st.sampled_from(["a.x", "b.y", "c.z"]),
        st.sampled_from(["train", "val", "test", "testA", "dev"]),
        st.integers(0, 12),
    ),
    max_size=60,
)


def splits_of(sentences: list[Sentence]) -> list[SplitImages]:
    counts: dict[tuple[str, str], Counter[int]] = {}
    for table, split, image_id in sentences:
        counts.setdefault((table, split), Counter())[image_id] += 1
    return [SplitImages(table_name=t, split=s, sentences=of) for (t, s), of in counts.items()]


def role(split: str) -> str:
    return split if split in ("train", "val") else "test"


@given(SENTENCES)
def test_leaks_are_those_of_comparing_every_sentence_with_every_other(sentences: list[Sentence]) -> None:
    expected = {}
    names = list(dict.fromkeys((table, split) for table, split, _ in sentences))
    for train in names:
        for evaluation in names:
            if role(train[1]) == "train" and role(evaluation[1]) != "train":
                shared = [
                    image_id
                    for *name, image_id in sentences
                    if tuple(name) == train and any(s == (*evaluation, image_id) for s in sentences)
                ]
                expected[":".join(train), ":".join(evaluation)] = (len(set(shared)), len(shared))
    found = {
        (leak.train, leak.evaluation): (leak.images, leak.sentences)
        for leak in find_leaks(splits_of(sentences))
    }
    assert found == expected


@given(SENTENCES)
def test_a_merge_gives_each_image_its_gravest_role(sentences: list[Sentence]) -> None:
    roles = {}
    for image_id in {image_id for *_, image_id in sentences}:
        held = {role(split) for _, split, other in sentences if other == image_id}
        roles[image_id] = "test" if "test" in held else "val" if "val" in held else "train"
    merged = merge(splits_of(sentences))
    assert merged.images == {name: list(roles.values()).count(name) for name in ("test", "val", "train")}
    assert merged.sentences == {
        name: sum(roles[image_id] == name for *_, image_id in sentences) for name in ("test", "val", "train")
    }
    trained = [image_id for _, split, image_id in sentences if split == "train"]
    assert merged.train_sentences == len(trained)
    assert merged.leaking_sentences == sum(roles[image_id] != "train" for image_id in trained)
    # What is left is all that is said of clean images: they have no other sentences.
    assert merged.figures["train sentences that are clean"] == merged.sentences["train"]
    assert merged.figures["sentences"] == len(sentences)


@given(SENTENCES)
def test_both_sides_evaluate_what_each_evaluates(sentences: list[Sentence]) -> None:
    splits = splits_of(sentences)
    one, other = ([s for s in splits if s.table_name == name] for name in ("a.x", "b.y"))

    def held(table: str, *roles: str) -> set[int]:
        return {i for t, split, i in sentences if t == table and role(split) in roles}

    assert evaluated_by_both(one, other) == {
        "images that both test on": len(held("a.x", "test") & held("b.y", "test")),
        "images that both validate or test on": len(held("a.x", "test", "val") & held("b.y", "test", "val")),
    }


@given(
    st.dictionaries(st.sampled_from("abc"), st.lists(st.integers(0, 9))),
    st.dictionaries(st.sampled_from("xyz"), st.sets(st.integers(0, 9))),
)
def test_leaking_images_are_the_intersections(
    train: dict[str, list[int]], evaluation: dict[str, set[int]]
) -> None:
    found = leaking_images(train, evaluation)
    assert list(found) == list(train)
    for name, image_ids in train.items():
        for other, held in evaluation.items():
            assert found[name].get(other, frozenset()) == {i for i in image_ids if i in held}
        assert all(found[name].values()), "an empty intersection is not listed"


def test_expressions_are_counted_by_split_and_image() -> None:
    def expression(split: str, image_id: int, sent_id: int) -> ExpressionRecord:
        return ExpressionRecord(
            split=split, ref_id=0, sent_id=sent_id, sent_index=0, image_id=image_id, raw="a", sent="a",
            ann_ids=(), category_ids=(), is_degenerate=False,
        )  # fmt: skip

    rows = [("val", 7), ("train", 7), ("train", 7), ("train", 8)]
    splits = split_images("a.x", [expression(*row, sent_id) for sent_id, row in enumerate(rows)])
    assert [(split.name, split.role, dict(split.sentences)) for split in splits] == [
        ("a.x:val", "val", {7: 1}),
        ("a.x:train", "train", {7: 2, 8: 1}),
    ]

"""The meaning of expressions: worked cases, and laws that hold in every scene."""

from __future__ import annotations

from dataclasses import replace
from itertools import product

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ris_cache.datasets.shapes import (
    COLOURS,
    SHAPES,
    VOCABULARY,
    Constraints,
    Reading,
    Relation,
    Scene,
    SceneObject,
    matches,
    realise,
    singles_out,
)
from ris_cache.datasets.shapes.language import (
    DIRECTIONS,
    KINDS,
    PLACE_CLAIMS,
    SIZE_CLAIMS,
    Direction,
    Kind,
    PlaceClaim,
    is_minimal,
    proposals,
)

MIRRORED_PLACES: dict[PlaceClaim, PlaceClaim] = {"left": "right", "right": "left"}
MIRRORED_DIRECTIONS: dict[Direction, Direction] = {"left of": "right of", "right of": "left of"}


def thing(look: str, *, x: float, y: float, diameter: float = 30.0) -> SceneObject:
    colour, shape = look.split()
    return SceneObject(shape=shape, colour=colour, diameter=diameter, x=x, y=y)


def scene(*objects: SceneObject) -> Scene:
    return Scene(height=200, width=300, objects=objects)


few_colours, few_shapes = st.sampled_from(["red", "blue"]), st.sampled_from(["star", "circle"])
objects = st.builds(
    SceneObject,
    shape=few_shapes,
    colour=few_colours,
    diameter=st.floats(20, 70),
    x=st.floats(0, 300),
    y=st.floats(0, 200),
)
scenes = st.lists(objects, min_size=1, max_size=6).map(lambda found: scene(*found))
relations = st.builds(Relation, direction=st.sampled_from(DIRECTIONS), colour=few_colours, shape=few_shapes)
claims = st.one_of(
    st.builds(Constraints, colour=few_colours, shape=few_shapes | st.none()),
    st.builds(Constraints, shape=few_shapes, size=st.sampled_from(SIZE_CLAIMS)),
    st.builds(Constraints, colour=few_colours | st.none(), place=st.sampled_from(PLACE_CLAIMS)),
    st.builds(Constraints, shape=few_shapes | st.none(), relation=relations),
)


def test_colour_and_shape_select_together() -> None:
    view = scene(
        thing("red star", x=50, y=50), thing("red circle", x=150, y=50), thing("blue star", x=250, y=50)
    )
    assert matches(Constraints(colour="red"), view) == [0, 1]
    assert matches(Constraints(shape="star"), view) == [0, 2]
    assert matches(Constraints(colour="blue", shape="star"), view) == [2]
    assert matches(Constraints(colour="blue", shape="circle"), view) == []


def test_size_compares_among_the_described_objects_only() -> None:
    view = scene(
        thing("red star", x=50, y=50, diameter=30),
        thing("blue star", x=150, y=50, diameter=45),
        thing("red circle", x=250, y=50, diameter=60),
    )
    assert singles_out(Constraints(shape="star", size="largest"), view, 1)
    assert singles_out(Constraints(colour="red", size="smallest"), view, 0)


@pytest.mark.parametrize(("diameter", "clear"), [(38.0, False), (40.0, True)])
def test_the_largest_must_be_clearly_larger(diameter: float, clear: bool) -> None:
    view = scene(thing("red star", x=50, y=50), thing("blue star", x=250, y=50, diameter=diameter))
    largest = Constraints(shape="star", size="largest")
    assert matches(largest, view) == [1]
    assert singles_out(largest, view, 1) is clear


@pytest.mark.parametrize(("x", "clear"), [(80.0, False), (90.0, True)])
def test_the_leftmost_must_lead_by_a_margin(x: float, clear: bool) -> None:
    view = scene(thing("red star", x=50, y=20), thing("blue star", x=x, y=180))
    assert matches(Constraints(place="left"), view) == [0]
    assert singles_out(Constraints(place="left"), view, 0) is clear


def test_the_leftmost_object_is_not_on_the_left_when_it_lies_in_the_right_half() -> None:
    view = scene(thing("red star", x=200, y=50), thing("blue star", x=280, y=50))
    assert matches(Constraints(place="left"), view) == []


def test_an_object_just_left_of_the_centre_line_is_not_clearly_on_the_left() -> None:
    view = scene(thing("red star", x=140, y=50), thing("blue star", x=280, y=50))
    assert matches(Constraints(place="left"), view) == [0]
    assert not singles_out(Constraints(place="left"), view, 0)


def test_top_means_small_y() -> None:
    view = scene(thing("red star", x=150, y=30), thing("blue star", x=150, y=170))
    assert singles_out(Constraints(place="top"), view, 0)
    assert singles_out(Constraints(place="bottom"), view, 1)


def test_a_relation_needs_a_clear_direction() -> None:
    anchor = thing("blue circle", x=150, y=100)
    left = Constraints(shape="star", relation=Relation(direction="left of", colour="blue"))
    assert singles_out(left, scene(anchor, thing("red star", x=80, y=110)), 1)
    diagonal = scene(anchor, thing("red star", x=80, y=160))
    assert matches(left, diagonal) == [1]
    assert not singles_out(left, diagonal, 1)


def test_a_relation_is_spoilt_by_another_candidate_on_the_same_side() -> None:
    anchor, target = thing("blue circle", x=150, y=100), thing("red star", x=60, y=100)
    left = Constraints(shape="star", relation=Relation(direction="left of", colour="blue"))
    steep = thing("red star", x=140, y=20)
    assert matches(left, scene(anchor, target, steep)) == [1]
    assert not singles_out(left, scene(anchor, target, steep), 1)


def test_an_ambiguous_anchor_relates_nothing() -> None:
    view = scene(
        thing("blue circle", x=150, y=100), thing("blue circle", x=250, y=100), thing("red star", x=60, y=100)
    )
    left = Constraints(shape="star", relation=Relation(direction="left of", shape="circle"))
    assert matches(left, view, Reading.LOOSE) == []


def test_a_minimal_expression_says_nothing_it_could_leave_out() -> None:
    view = scene(
        thing("red star", x=50, y=50), thing("red circle", x=150, y=50), thing("blue star", x=250, y=50)
    )
    assert is_minimal(Constraints(colour="red", shape="star"), view, 0)
    assert not is_minimal(Constraints(colour="red", shape="circle"), view, 1)
    # The anchor is the only blue thing, so calling it a star as well is one word too many.
    wordy = Relation(direction="left of", colour="blue", shape="star")
    assert not is_minimal(Constraints(shape="star", relation=wordy), view, 0)


@given(scenes, claims)
def test_readings_only_widen_from_strict_to_loose(view: Scene, claim: Constraints) -> None:
    strict, plain, loose = (set(matches(claim, view, reading)) for reading in Reading)
    assert strict <= plain <= loose


@given(scenes, claims)
def test_mirroring_the_scene_swaps_left_and_right(view: Scene, claim: Constraints) -> None:
    mirrored = replace(view, objects=tuple(replace(each, x=view.width - each.x) for each in view.objects))
    opposite = claim
    if claim.place:
        opposite = replace(claim, place=MIRRORED_PLACES.get(claim.place, claim.place))
    if claim.relation:
        direction = MIRRORED_DIRECTIONS.get(claim.relation.direction, claim.relation.direction)
        opposite = replace(claim, relation=replace(claim.relation, direction=direction))
    for index in range(len(view.objects)):
        # Away from ties, where rounding may decide either way.
        if singles_out(claim, view, index):
            assert matches(opposite, mirrored) == [index]


@given(scenes, st.sampled_from(KINDS))
def test_proposals_are_of_the_kind_asked_for_and_describe_the_target(view: Scene, kind: Kind) -> None:
    for claim in proposals(kind, view, 0):
        assert claim.kind == kind
        assert claim.colour in (None, view.objects[0].colour)
        assert claim.shape in (None, view.objects[0].shape)


def test_the_vocabulary_is_small_and_holds_exactly_the_words_in_use() -> None:
    looks = [(c, s) for c, s in product([*COLOURS, None], [*SHAPES, None])]
    every = [Constraints(colour=c, shape=s) for c, s in looks if c or s]
    every += [Constraints(colour=c, shape=s, size=size) for (c, s), size in product(looks, SIZE_CLAIMS)]
    every += [Constraints(colour=c, shape=s, place=place) for (c, s), place in product(looks, PLACE_CLAIMS)]
    every += [
        Constraints(shape="star", relation=Relation(direction=direction, colour=c, shape=s))
        for (c, s), direction in product(looks, DIRECTIONS)
        if c or s
    ]
    words = {word for claim in every for phrase in realise(claim) for word in phrase.split()}
    assert words == set(VOCABULARY)
    assert len(VOCABULARY) < 120
    assert all(word.isascii() and word.islower() and word.isalpha() for word in VOCABULARY)


@given(claims)
def test_phrasings_are_several_and_all_different(claim: Constraints) -> None:
    phrases = realise(claim)
    assert len(set(phrases)) == len(phrases) >= 2
    assert all(phrase == " ".join(phrase.split()) for phrase in phrases)


def test_phrasings_read_as_people_write() -> None:
    above = Relation(direction="above", colour="yellow")
    assert "circle that is red" in realise(Constraints(colour="red", shape="circle"))
    assert "the largest star" in realise(Constraints(shape="star", size="largest"))
    assert "leftmost blue thing" in realise(Constraints(colour="blue", place="left"))
    assert "star on the far left" in realise(Constraints(shape="star", place="left"))
    assert "top object" in realise(Constraints(place="top"))
    assert "heart above the yellow one" in realise(Constraints(shape="heart", relation=above))

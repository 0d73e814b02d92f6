"""Whether sentences about several objects, about none, and RefCOCOg's long ones are true, by their words alone.

The oracle below reads the words and looks at the objects of the scene; it knows no claim of the drawing code.
"""

from __future__ import annotations

import math
import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ris_cache.datasets.shapes import SPLITS, ComposedImage, Scene, SceneObject, Shares, compose_image
from ris_cache.datasets.shapes.detailed import detailed_refs
from ris_cache.datasets.shapes.language import Constraints
from ris_cache.datasets.shapes.mixture import Ref, mixed_refs
from ris_cache.datasets.shapes.set_phrasing import realise_set
from ris_cache.datasets.shapes.sets import AllOf, Together, referents

COLOURS = {"red", "green", "blue", "yellow", "purple", "orange", "white", "black"}
SINGULAR = {"circle", "square", "triangle", "star", "cross", "heart"}
PLURAL = {
    "circles": "circle",
    "squares": "square",
    "triangles": "triangle",
    "stars": "star",
    "crosses": "cross",
    "hearts": "heart",
}
ANYTHING, ANYTHINGS = {"thing", "object", "shape", "one"}, {"things", "objects", "shapes", "ones"}
NUMBERS = {"two": 2, "both": 2, "three": 3, "four": 4, "five": 5}
SIDES = {
    **dict.fromkeys(("left", "leftmost"), (-1, 0)),
    **dict.fromkeys(("right", "rightmost"), (1, 0)),
    **dict.fromkeys(("top", "upper", "highest"), (0, -1)),
    **dict.fromkeys(("bottom", "lower", "lowest"), (0, 1)),
}
SIZES = {
    **dict.fromkeys(("big", "large", "biggest", "largest"), 1),
    **dict.fromkeys(("small", "little", "smallest", "tiny"), -1),
}
FILLERS = {"the", "all", "that", "is", "on", "at", "far", "very", "side"}
HEADINGS = {"right of": 0, "below": 1, "under": 1, "left of": 2, "above": 3, "over": 3}
LONG_SENTENCE = rf"the (?:({'|'.join(SIZES)}) )?(\w+) (\w+) (?:that is )?(.+)"

images = st.builds(
    compose_image,
    seed=st.integers(0, 2**31),
    name=st.just("refcoco"),
    split=st.sampled_from(SPLITS),
    index=st.integers(0, 999),
)
streams = st.integers(0, 2**31).map(np.random.default_rng)
EVEN = Shares(none=1.0, one=1.0, many=1.0)


def looks_like(scene: Scene, colours: set[str], shapes: set[str]) -> list[int]:
    return [
        index
        for index, thing in enumerate(scene.objects)
        if (not colours or thing.colour in colours) and (not shapes or thing.shape in shapes)
    ]


def furthest(scene: Scene, candidates: list[int], side: tuple[int, int]) -> int:
    return max(candidates, key=lambda i: scene.objects[i].x * side[0] + scene.objects[i].y * side[1])


def in_that_half(scene: Scene, index: int, side: tuple[int, int]) -> bool:
    thing = scene.objects[index]
    return (thing.x / scene.width - 0.5) * side[0] + (thing.y / scene.height - 0.5) * side[1] > 0


def meant(phrase: str, scene: Scene) -> list[int]:
    """Objects that a phrase without "and" and without relation speaks of; empty if it describes nothing."""
    words = phrase.split()
    known = COLOURS | SINGULAR | PLURAL.keys() | ANYTHING | ANYTHINGS | NUMBERS.keys() | SIDES.keys()
    assert known | SIZES.keys() | FILLERS >= set(words), set(words) - known
    colours = COLOURS & set(words)
    shapes = {PLURAL.get(word, word) for word in words if word in SINGULAR or word in PLURAL}
    assert len(colours) <= 1
    assert len(shapes) <= 1
    found = looks_like(scene, colours, shapes)
    is_plural = bool((PLURAL.keys() | ANYTHINGS) & set(words))
    assert is_plural != bool((SINGULAR | ANYTHING) & set(words)), phrase
    if is_plural:
        counts = [NUMBERS[word] for word in words if word in NUMBERS]
        assert not found or counts in ([], [len(found)]), phrase
        return found
    places = [SIDES[word] for word in words if word in SIDES]
    sizes = [SIZES[word] for word in words if word in SIZES]
    if found and places:
        found = [furthest(scene, found, places[0])]
        assert in_that_half(scene, found[0], places[0]), phrase
    if found and sizes:
        assert len(found) > 1, f"{phrase!r} compares with nothing"
        found = [max(found, key=lambda i: scene.objects[i].diameter * sizes[0])]
    assert len(found) <= 1, f"{phrase!r} is ambiguous"
    return found


def spoken_of(sentence: str, scene: Scene) -> tuple[int, ...]:
    parts = [meant(part, scene) for part in sentence.split(" and ")]
    assert len({bool(part) for part in parts}) == 1, f"{sentence!r} is true in part"
    indices = [index for part in parts for index in part]
    assert len(set(indices)) == len(indices), f"{sentence!r} names an object twice"
    return tuple(sorted(indices))


def added(rng: np.random.Generator, image: ComposedImage, shares: Shares = EVEN) -> list[Ref]:
    """The refs that gRefCOCO has beyond RefCOCO's."""
    return [ref for ref in mixed_refs(rng, image, shares) if len(ref.object_indices) != 1]


@settings(max_examples=60, deadline=None)
@given(image=images, rng=streams)
def test_the_targets_are_exactly_the_objects_that_the_words_describe(
    image: ComposedImage, rng: np.random.Generator
) -> None:
    refs = added(rng, image)
    assert refs
    for ref in refs:
        for sentence in ref.sentences:
            assert spoken_of(sentence.sent, image.drawing.scene) == ref.object_indices, sentence.sent
            assert sentence.raw.lower().strip(" .") == sentence.sent


@settings(max_examples=25, deadline=None)
@given(image=images, rng=streams)
def test_no_sentence_is_said_twice_of_several_or_of_none(
    image: ComposedImage, rng: np.random.Generator
) -> None:
    said = [sentence.sent for ref in added(rng, image) for sentence in ref.sentences]
    assert len(set(said)) == len(said)


def heading(anchor: SceneObject, other: SceneObject) -> int:
    """The quarter of the compass, clockwise from the right, in which `other` lies as seen from `anchor`."""
    return round(math.atan2(other.y - anchor.y, other.x - anchor.x) / (math.pi / 2)) % 4


def holds(claim: str, scene: Scene, index: int) -> bool:
    """Whether one claim of a long sentence is true of an object of its look, and of no other of that look."""
    me = scene.objects[index]
    alike = looks_like(scene, {me.colour}, {me.shape})
    related = re.fullmatch(r"(left of|right of|above|over|below|under) the (\w+) (\w+)", claim)
    if related:
        (anchor,) = looks_like(scene, {related[2]}, {related[3]})
        wanted = HEADINGS[related[1]]
        return [
            i for i in alike if heading(scene.objects[anchor], scene.objects[i]) == wanted and i != anchor
        ] == [index]
    (side,) = [SIDES[word] for word in claim.split() if word in SIDES]
    return furthest(scene, alike, side) == index and in_that_half(scene, index, side)


def is_extreme(scene: Scene, index: int, sign: int) -> bool:
    """Whether an object is the largest (1) or smallest (-1) among those of its look, or colour, or shape."""
    me = scene.objects[index]
    for colours, shapes in (({me.colour}, {me.shape}), ({me.colour}, set()), (set(), {me.shape})):
        among = looks_like(scene, colours, shapes)
        if len(among) > 1 and max(among, key=lambda i: scene.objects[i].diameter * sign) == index:
            return True
    return False


@settings(max_examples=60, deadline=None)
@given(image=images, rng=streams)
def test_both_claims_of_a_long_sentence_are_true_of_its_object_alone(
    image: ComposedImage, rng: np.random.Generator
) -> None:
    scene = image.drawing.scene
    for ref in detailed_refs(rng, scene):
        (index,) = ref.object_indices
        for sentence in ref.sentences:
            found = re.fullmatch(LONG_SENTENCE, sentence.sent)
            assert found, sentence.sent
            assert (scene.objects[index].colour, scene.objects[index].shape) == (found[2], found[3])
            claims = re.split(r" that is | and ", found[4])
            assert len(claims) + bool(found[1]) == 2, sentence.sent
            assert all(holds(claim, scene, index) for claim in claims), sentence.sent
            if found[1]:
                assert is_extreme(scene, index, SIZES[found[1]]), sentence.sent


def test_nearly_every_image_can_be_described_at_length() -> None:
    rng = np.random.default_rng(0)
    refs = [
        detailed_refs(rng, compose_image(seed=1, name="refcoco", split="train", index=i).drawing.scene)
        for i in range(60)
    ]
    assert sum(bool(found) for found in refs) > 55
    lengths = [len(s.sent.split()) for found in refs for ref in found for s in ref.sentences]
    assert 7 < np.mean(lengths) < 13


def test_shares_come_out_on_average_and_most_false_sentences_name_a_colour_that_is_absent() -> None:
    rng = np.random.default_rng(5)
    shares = Shares(none=0.3, one=0.4, many=0.3)
    counts = {"none": 0, "one": 0, "many": 0}
    absent = 0
    for index in range(120):
        image = compose_image(seed=2, name="refcoco", split="train", index=index)
        present = {thing.colour for thing in image.drawing.scene.objects}
        for ref in mixed_refs(rng, image, shares):
            counts[("none", "one", "many")[min(len(ref.object_indices), 2)]] += len(ref.sentences)
            if not ref.object_indices:
                absent += sum(bool(COLOURS & set(s.sent.split()) - present) for s in ref.sentences)
    total = sum(counts.values())
    assert counts["none"] / total == pytest.approx(0.3, abs=0.02)
    assert counts["one"] / total == pytest.approx(0.4, abs=0.02)
    assert absent / counts["none"] == pytest.approx(0.7, abs=0.05)


def test_without_single_targets_as_much_is_said_of_several_and_none() -> None:
    image = compose_image(seed=2, name="refcoco", split="val", index=0)
    own = sum(len(ref.expressions) for ref in image.refs)
    refs = mixed_refs(np.random.default_rng(0), image, Shares(none=1.0, one=0.0, many=1.0))
    assert all(len(ref.object_indices) != 1 for ref in refs)
    assert abs(sum(len(ref.sentences) for ref in refs) - own) <= 1


def view(*looks: str) -> Scene:
    return Scene(
        height=200,
        width=300,
        objects=tuple(
            SceneObject(colour=look.split()[0], shape=look.split()[1], diameter=30, x=40.0 + 50 * i, y=60)
            for i, look in enumerate(looks)
        ),
    )


def test_the_oracle_itself_tells_true_from_false() -> None:
    scene = view("red heart", "blue heart", "red star")
    assert spoken_of("all red things", scene) == (0, 2)
    assert spoken_of("the two hearts", scene) == (0, 1)
    assert spoken_of("the blue heart and the star", scene) == (1, 2)
    assert spoken_of("the green heart", scene) == ()
    for wrong in ("the three hearts", "the heart and the star", "the green heart and the star"):
        with pytest.raises(AssertionError):
            spoken_of(wrong, scene)


def test_claims_mean_what_their_words_say() -> None:
    scene = view("red heart", "blue heart", "red star")
    blue_and_star = Together(parts=(Constraints(colour="blue"), Constraints(shape="star")))
    assert referents(AllOf(colour="red", count=2), scene) == (0, 2)
    assert referents(AllOf(count=3), scene) == (0, 1, 2)
    assert referents(blue_and_star, scene) == (1, 2)
    assert referents(Constraints(colour="blue", shape="star"), scene) == ()
    assert "all red things" in realise_set(AllOf(colour="red", count=2))
    assert "the two hearts" in realise_set(AllOf(shape="heart", count=2))
    assert "both crosses" in realise_set(AllOf(shape="cross", count=2))
    assert "the things" not in realise_set(AllOf(count=3))
    assert "the blue one and the star" in realise_set(blue_and_star)
    # Without articles, "blue thing and star" might mean a blue star.
    assert all(phrase.count("the ") == 2 for phrase in realise_set(blue_and_star))

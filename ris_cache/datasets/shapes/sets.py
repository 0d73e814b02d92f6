"""Claims about several objects or about none: what they mean, and which of them a scene makes true or false.

gRefCOCO and Ref-ZOM hold such expressions beside those of one object: "all red things", "the two hearts",
"the red circle and the blue star", and "the green heart" where no heart is green.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import combinations

import numpy as np

from ris_cache.datasets.shapes.compose import choose
from ris_cache.datasets.shapes.language import (
    PLACE_CLAIMS,
    SIZE_CLAIMS,
    Constraints,
    Kind,
    described,
    matches,
)
from ris_cache.datasets.shapes.objects import COLOURS, SHAPES
from ris_cache.datasets.shapes.scene import Scene

ABSENT_COLOUR = 0.70
"""Share of the no-target expressions that name a colour which no object has.

The others name a colour and a shape that both occur, on different objects.
"""

_PART_WEIGHTS: dict[Kind, float] = {"colour+shape": 0.5, "colour": 0.5, "size": 0.03, "position": 0.05}
"""How eagerly each kind is tried where two or three objects are named one by one."""

_TRIPLE = 0.15
_TRIES = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class AllOf:
    """Every object of a look: of a colour, of a shape, of both, or, without either, of the whole scene.

    Attributes:
        count: how many the expression may say there are.
    """

    colour: str | None = None
    shape: str | None = None
    count: int

    def __post_init__(self) -> None:
        assert self.count >= 2


@dataclass(frozen=True, slots=True, kw_only=True)
class Together:
    """Two or three objects named one by one. No part relates its object to another."""

    parts: tuple[Constraints, ...]

    def __post_init__(self) -> None:
        assert len(self.parts) in (2, 3)
        assert not any(part.relation for part in self.parts)


SetClaim = Constraints | AllOf | Together
"""What an expression of any number of targets claims; plain `Constraints` speak of one object."""


def referents(claim: SetClaim, scene: Scene) -> tuple[int, ...]:
    """Find the objects that the claim speaks of, by its plain meaning.

    Returns:
        Indices into `scene.objects`, ascending; empty if nothing in the scene fits.
    """
    if isinstance(claim, Constraints):
        return tuple(matches(claim, scene))
    if isinstance(claim, AllOf):
        return tuple(described(scene, claim.colour, claim.shape))
    return tuple(sorted({index for part in claim.parts for index in matches(part, scene)}))


def claim_several(rng: np.random.Generator, scene: Scene) -> SetClaim | None:
    """Draw a claim that clearly means two objects or more; None if none comes up in a few tries."""
    groups = list(_groups(scene))
    for _ in range(_TRIES):
        if groups and rng.random() < 0.5:
            return groups[int(rng.integers(len(groups)))]
        pair = _name_together(rng, scene)
        if pair is not None:
            return pair
    return None


def claim_nothing(rng: np.random.Generator, scene: Scene) -> SetClaim:
    """Draw a claim that sounds like those of the scene, and that no object or set of objects fits.

    Whatever else it says, its colours and shapes alone rule out every object.
    """
    swapped = _swapped_looks(scene)
    if swapped and rng.random() >= ABSENT_COLOUR:
        looks = [swapped[place] for place in rng.permutation(len(swapped))]
        return _unmet(rng, looks, needs_shape=True)
    present = {thing.colour for thing in scene.objects}
    colours = [colour for colour in COLOURS if colour not in present]
    shapes = sorted({thing.shape for thing in scene.objects}, key=SHAPES.index)
    looks = [
        (colours[place], shapes[int(rng.integers(len(shapes)))]) for place in rng.permutation(len(colours))
    ]
    return _unmet(rng, looks, needs_shape=False)


def _groups(scene: Scene) -> Iterator[AllOf]:
    """Every look that two objects or more have in common, the whole scene last.

    Colour and shape are said together only where neither alone means the same objects.
    """
    colours = Counter(thing.colour for thing in scene.objects)
    shapes = Counter(thing.shape for thing in scene.objects)
    both = Counter((thing.colour, thing.shape) for thing in scene.objects)
    for colour, count in colours.items():
        if count >= 2:
            yield AllOf(colour=colour, count=count)
    for shape, count in shapes.items():
        if count >= 2:
            yield AllOf(shape=shape, count=count)
    for (colour, shape), count in both.items():
        if 2 <= count < min(colours[colour], shapes[shape]):
            yield AllOf(colour=colour, shape=shape, count=count)
    if len(colours) > 1 and len(shapes) > 1:
        yield AllOf(count=len(scene.objects))


def _name_together(rng: np.random.Generator, scene: Scene) -> Together | None:
    size = 3 if rng.random() < _TRIPLE else 2
    sets = list(combinations(range(len(scene.objects)), size))
    targets = rng.permutation(sets[int(rng.integers(len(sets)))])
    parts: list[Constraints] = []
    for target in targets:
        chosen = choose(rng, scene, [int(target)], list(_PART_WEIGHTS), _PART_WEIGHTS)
        if chosen is None:
            return None
        parts.append(chosen[1])
    return Together(parts=tuple(parts))


def _swapped_looks(scene: Scene) -> list[tuple[str, str]]:
    """Colour and shape of different objects that no object has together."""
    present = {(thing.colour, thing.shape) for thing in scene.objects}
    colours = dict.fromkeys(thing.colour for thing in scene.objects)
    shapes = dict.fromkeys(thing.shape for thing in scene.objects)
    return [(colour, shape) for colour in colours for shape in shapes if (colour, shape) not in present]


def _unmet(rng: np.random.Generator, looks: list[tuple[str, str]], *, needs_shape: bool) -> SetClaim:
    """Put looks that nothing has into a claim of one object, of all, or of two.

    Args:
        looks: (colour, shape), in the order of preference; at least one.
        needs_shape: the colour alone does not rule every object out.
    """
    colour, shape = looks[0]
    said_shape = shape if needs_shape or rng.random() < 0.6 else None
    style = rng.random()
    if style < 0.15:
        return AllOf(colour=colour, shape=said_shape, count=int(rng.integers(2, 4)))
    if style < 0.30 and len(looks) >= 2:
        parts = (Constraints(colour=colour, shape=said_shape), _look(looks[1], says_shape=bool(said_shape)))
        return Together(parts=parts)
    if style < 0.36:
        size = SIZE_CLAIMS[int(rng.integers(len(SIZE_CLAIMS)))]
        return Constraints(colour=colour, shape=said_shape, size=size)
    if style < 0.42:
        place = PLACE_CLAIMS[int(rng.integers(len(PLACE_CLAIMS)))]
        return Constraints(colour=colour, shape=said_shape, place=place)
    return Constraints(colour=colour, shape=said_shape)


def _look(look: tuple[str, str], *, says_shape: bool) -> Constraints:
    return Constraints(colour=look[0], shape=look[1] if says_shape else None)

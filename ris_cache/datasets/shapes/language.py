"""What an expression claims, as data, and which objects of a scene it is true of.

Words are vague, so each claim has three readings. The plain one is the meaning; the strict one asks for a
clear margin; the loose one also lets pass what nearly holds. An expression singles out an object when the
object satisfies it strictly and no other object satisfies it even loosely.

Margins are shares of the image: x shares of its width, y shares of its height, x right, y down.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from enum import IntEnum
from typing import Literal, get_args

from ris_cache.datasets.shapes.scene import Scene, SceneObject

SizeClaim = Literal["largest", "smallest"]
PlaceClaim = Literal["left", "right", "top", "bottom"]
Direction = Literal["left of", "right of", "above", "below"]
Kind = Literal["colour+shape", "colour", "shape", "size", "position", "relation"]

SIZE_CLAIMS: tuple[SizeClaim, ...] = get_args(SizeClaim)
PLACE_CLAIMS: tuple[PlaceClaim, ...] = get_args(PlaceClaim)
DIRECTIONS: tuple[Direction, ...] = get_args(Direction)
KINDS: tuple[Kind, ...] = get_args(Kind)

SIZE_RATIO = 1.3
"""How much larger in diameter the largest object must be, or the others than the smallest."""

LEAD = 0.12
"""How far the leftmost object must be ahead of the next; the same for the other sides."""

HALF_MARGIN = 0.05
"""How clearly an object "on the left" must be in the left half; the same for the other sides."""

RELATION_MARGIN = 0.12
"""How much more "left of" than "above" a clear case is, as a share of the image's shorter side."""

RELATION_SLACK = 0.05
"""How far on the anchor's other side an object may be and still pass as nearly "left of" it."""

_TOWARDS: dict[Direction, tuple[int, int]] = {
    "left of": (-1, 0),
    "right of": (1, 0),
    "above": (0, -1),
    "below": (0, 1),
}
_SIDES: dict[PlaceClaim, tuple[int, int]] = {
    "left": (-1, 0),
    "right": (1, 0),
    "top": (0, -1),
    "bottom": (0, 1),
}


class Reading(IntEnum):
    """How generously a claim is read; the value scales the tolerances."""

    STRICT = -1
    PLAIN = 0
    LOOSE = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Relation:
    """Where an object lies as seen from an anchor, the one object of that colour and shape."""

    direction: Direction
    colour: str | None = None
    shape: str | None = None

    def __post_init__(self) -> None:
        assert self.colour or self.shape, "an anchor needs a description"


@dataclass(frozen=True, slots=True, kw_only=True)
class Constraints:
    """Everything an expression claims of its object.

    Colour and shape select candidates; size and place compare among these candidates; a relation excludes
    its anchor from them. At most one of size, place and relation is claimed.
    """

    colour: str | None = None
    shape: str | None = None
    size: SizeClaim | None = None
    place: PlaceClaim | None = None
    relation: Relation | None = None

    def __post_init__(self) -> None:
        assert sum(claim is not None for claim in (self.size, self.place, self.relation)) <= 1
        assert any((self.colour, self.shape, self.size, self.place, self.relation))

    @property
    def kind(self) -> Kind:
        """The most telling claim."""
        if self.relation:
            return "relation"
        if self.place:
            return "position"
        if self.size:
            return "size"
        if self.colour and self.shape:
            return "colour+shape"
        return "colour" if self.colour else "shape"


def matches(constraints: Constraints, scene: Scene, reading: Reading = Reading.PLAIN) -> list[int]:
    """Find the objects that satisfy every claim.

    Returns:
        Indices into `scene.objects`, ascending. The strict reading's are among the plain one's, and these
        among the loose one's. Empty when a relation's anchor is missing or ambiguous.
    """
    candidates = described(scene, constraints.colour, constraints.shape)
    if constraints.size:
        return [i for i in candidates if _is_extreme(scene, i, candidates, constraints.size, reading)]
    if constraints.place:
        return [i for i in candidates if _is_at(scene, i, candidates, constraints.place, reading)]
    if constraints.relation:
        anchors = described(scene, constraints.relation.colour, constraints.relation.shape)
        if len(anchors) != 1:
            return []
        anchor = scene.objects[anchors[0]]
        direction = constraints.relation.direction
        return [
            i
            for i in candidates
            if i != anchors[0] and _lies(scene, scene.objects[i], anchor, direction, reading)
        ]
    return candidates


def singles_out(constraints: Constraints, scene: Scene, target: int) -> bool:
    """Whether the target clearly satisfies the claims and no other object nearly does."""
    readings = (Reading.STRICT, Reading.LOOSE)
    return all(matches(constraints, scene, reading) == [target] for reading in readings)


def is_minimal(constraints: Constraints, scene: Scene, target: int) -> bool:
    """Whether no claim can be left out: each shortened expression fails to single out the target."""
    return not any(singles_out(shorter, scene, target) for shorter in _shortened(constraints))


def proposals(kind: Kind, scene: Scene, target: int) -> list[Constraints]:
    """List the claims of one kind that are worth testing on the target; many do not single it out."""
    me = scene.objects[target]
    if kind == "colour+shape":
        return [Constraints(colour=me.colour, shape=me.shape)]
    if kind == "colour":
        return [Constraints(colour=me.colour)]
    if kind == "shape":
        return [Constraints(shape=me.shape)]
    looks = [(me.colour, me.shape), (me.colour, None), (None, me.shape), (None, None)]
    if kind == "size":
        return [Constraints(colour=c, shape=s, size=size) for c, s in looks[:3] for size in SIZE_CLAIMS]
    if kind == "position":
        return [Constraints(colour=c, shape=s, place=place) for c, s in looks for place in PLACE_CLAIMS]
    relations = _true_relations(scene, me)
    return [Constraints(colour=c, shape=s, relation=r) for c, s in looks for r in relations]


def _true_relations(scene: Scene, me: SceneObject) -> list[Relation]:
    return [
        Relation(direction=direction, colour=colour, shape=shape)
        for other in scene.objects
        for direction in DIRECTIONS
        if other is not me and _lies(scene, me, other, direction, Reading.PLAIN)
        for colour, shape in ((other.colour, other.shape), (other.colour, None), (None, other.shape))
    ]


def described(scene: Scene, colour: str | None, shape: str | None) -> list[int]:
    """Find the objects of a colour and a shape; None leaves either open."""
    return [
        index
        for index, thing in enumerate(scene.objects)
        if colour in (None, thing.colour) and shape in (None, thing.shape)
    ]


def _is_extreme(scene: Scene, index: int, candidates: list[int], size: SizeClaim, reading: Reading) -> bool:
    mine = scene.objects[index].diameter
    others = [scene.objects[other].diameter for other in candidates if other != index]
    if not others:
        return True
    ratio = mine / max(others) if size == "largest" else min(others) / mine
    return math.log(ratio) > -reading * math.log(SIZE_RATIO)


def _is_at(scene: Scene, index: int, candidates: list[int], place: PlaceClaim, reading: Reading) -> bool:
    """First among the candidates towards a side, and in that half of the image."""
    mine, side = _share(scene, scene.objects[index]), _SIDES[place]
    lead = min(
        (
            _along(mine, side) - _along(_share(scene, scene.objects[other]), side)
            for other in candidates
            if other != index
        ),
        default=math.inf,
    )
    depth = _along(mine, side) - _along((0.5, 0.5), side)
    return lead > -reading * LEAD and depth > -reading * HALF_MARGIN


def _lies(scene: Scene, me: SceneObject, anchor: SceneObject, direction: Direction, reading: Reading) -> bool:
    """Left of: further left than up or down. Nearly left of: anything not clearly to the right."""
    towards = _TOWARDS[direction]
    offset = (me.x - anchor.x, me.y - anchor.y)
    along = _along(offset, towards)
    across = abs(offset[0] * towards[1]) + abs(offset[1] * towards[0])
    shorter_side = min(scene.height, scene.width)
    if reading == Reading.LOOSE:
        return along > -RELATION_SLACK * shorter_side
    clearance = RELATION_MARGIN * shorter_side if reading == Reading.STRICT else 0.0
    return along > across + clearance


def _share(scene: Scene, thing: SceneObject) -> tuple[float, float]:
    return thing.x / scene.width, thing.y / scene.height


def _along(point: tuple[float, float], towards: tuple[int, int]) -> float:
    return point[0] * towards[0] + point[1] * towards[1]


def _shortened(constraints: Constraints) -> list[Constraints]:
    """The expressions with one claim less, those of the anchor's description included."""
    claimed = [
        name for name in ("colour", "shape", "size", "place", "relation") if getattr(constraints, name)
    ]
    shorter = [replace(constraints, **{name: None}) for name in claimed] if len(claimed) > 1 else []
    relation = constraints.relation
    if relation and relation.colour and relation.shape:
        shorter.append(replace(constraints, relation=replace(relation, colour=None)))
        shorter.append(replace(constraints, relation=replace(relation, shape=None)))
    return shorter

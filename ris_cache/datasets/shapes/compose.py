"""Compose one image of the drawn dataset: its scene, the objects referred to, and what is said of them.

Everything follows from (seed, pool, split, index), so an image does not depend on how many others
are drawn. Layout, paint and language each have their own random stream.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from PIL import Image

from ris_cache.datasets.shapes.language import Constraints, Kind, is_minimal, proposals, singles_out
from ris_cache.datasets.shapes.objects import ROUND_SHAPES, SHAPES
from ris_cache.datasets.shapes.paint import paint
from ris_cache.datasets.shapes.phrasing import realise
from ris_cache.datasets.shapes.scene import Drawing, Scene, lay_out

SPLITS: tuple[str, ...] = ("train", "val", "testA", "testB")

POOLS: dict[str, tuple[str, ...]] = {
    "refcoco": SPLITS,
    "refcoco+": SPLITS,
    "ref-zom": ("train", "test"),
    "custom": ("train", "val", "test"),
}
"""Pool of images → its splits. It is named after the dataset that it is drawn for; others may use it too."""

REFERABLE_SHAPES: dict[str, frozenset[str]] = {
    "train": frozenset(SHAPES),
    "val": frozenset(SHAPES),
    "testA": ROUND_SHAPES,
    "testB": frozenset(SHAPES) - ROUND_SHAPES,
    "test": frozenset(SHAPES),
}
"""Split → shapes that its refs point at. As in RefCOCO, testA and testB differ by the kind of referent."""

KIND_WEIGHTS: dict[str, dict[Kind, float]] = {
    "refcoco": {
        "colour+shape": 0.50,
        "colour": 0.50,
        "shape": 0.01,
        "size": 0.04,
        "position": 0.03,
        "relation": 0.03,
    },
    "refcoco+": {"colour+shape": 0.45, "colour": 0.15, "shape": 0.15, "size": 0.25},
}
"""Dataset name → how eagerly each kind is tried. RefCOCO+ forbids words of location.

Not every kind can tell every object, so the shares that come out differ:
for refcoco about 46 % colour+shape, 36 % colour, 2 % shape, 4 % size, 8 % position, 4 % relation.
"""


RESTATED = 0.60
"""Chance that a further sentence of a ref says the same in other words, as annotators do."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Expression:
    """One sentence.

    Attributes:
        raw: as if typed by hand: now and then capitals, a full stop or a stray space.
        sent: cleaned text.
    """

    constraints: Constraints
    raw: str
    sent: str


@dataclass(frozen=True, slots=True, kw_only=True)
class ReferredObject:
    """An object of the scene, by its index there, with the expressions that single it out."""

    object_index: int
    expressions: tuple[Expression, ...]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class ComposedImage:
    """One image with its refs, two to four of them, each with two or three expressions."""

    drawing: Drawing
    picture: Image.Image
    refs: tuple[ReferredObject, ...]


def compose_image(*, seed: int, name: str, split: str, index: int) -> ComposedImage:
    """Draw the image at one position of a split and describe objects in it.

    Args:
        seed: not negative.
        name: one of `POOLS`. It decides the language too, by `KIND_WEIGHTS`; RefCOCO's for names not there.
        split: one of the pool's.
        index: position within the split, from 0.
    """
    source = np.random.default_rng((seed, tuple(POOLS).index(name), POOLS[name].index(split), index))
    layout_rng, paint_rng, language_rng = source.spawn(3)
    referable = REFERABLE_SHAPES[split]
    weights = KIND_WEIGHTS.get(name, KIND_WEIGHTS["refcoco"])
    while True:
        drawing = lay_out(layout_rng, referable=referable)
        refs = refer(language_rng, drawing.scene, referable, weights)
        if len(refs) >= 2:
            return ComposedImage(drawing=drawing, picture=paint(drawing, paint_rng), refs=refs)


def refer(
    rng: np.random.Generator, scene: Scene, referable: frozenset[str], weights: dict[Kind, float]
) -> tuple[ReferredObject, ...]:
    """Choose two to four objects, each by a kind of expression that fits it; fewer if no more are fit."""
    eligible = [index for index, thing in enumerate(scene.objects) if thing.shape in referable]
    refs: list[ReferredObject] = []
    for _ in range(int(rng.integers(2, 5))):
        targets = [eligible[place] for place in rng.permutation(len(eligible))]
        chosen = choose(rng, scene, targets, list(weights), weights)
        if chosen is None:
            break
        target, first = chosen
        eligible.remove(target)
        expressions = _describe(rng, scene, target, first, weights)
        refs.append(ReferredObject(object_index=target, expressions=expressions))
    return tuple(refs)


def _describe(
    rng: np.random.Generator, scene: Scene, target: int, first: Constraints, weights: dict[Kind, float]
) -> tuple[Expression, ...]:
    """Say two or three things of the target: claims of other kinds, or what was said in other words."""
    claims = [first]
    for _ in range(int(rng.integers(1, 3))):
        said = {claim.kind for claim in claims}
        other_kinds = [kind for kind in weights if kind not in said]
        sayable = [claim for claim in claims if claims.count(claim) < len(realise(claim))]
        fresh = None
        if not sayable or rng.random() >= RESTATED:
            fresh = choose(rng, scene, [target], other_kinds, weights)
        if fresh is not None:
            claims.append(fresh[1])
        elif sayable:
            claims.append(sayable[int(rng.integers(len(sayable)))])
    expressions: list[Expression] = []
    for claim in claims:
        used = {expression.sent for expression in expressions}
        phrases = [phrase for phrase in realise(claim) if phrase not in used]
        assert phrases, "a claim is repeated at most as often as it can be worded"
        sent = phrases[int(rng.integers(len(phrases)))]
        expressions.append(Expression(constraints=claim, raw=type_by_hand(rng, sent), sent=sent))
    return tuple(expressions)


def choose(
    rng: np.random.Generator,
    scene: Scene,
    targets: list[int],
    kinds: list[Kind],
    weights: dict[Kind, float],
) -> tuple[int, Constraints] | None:
    """Draw the order of the kinds, then take the first target and claim that fit.

    A claim that could be left out is tolerated in colour+shape alone: people name the colour unasked.
    """
    # Exponential waiting times put the kinds in the order of a weighted draw without replacement.
    waits = {kind: rng.exponential() / weights[kind] for kind in kinds}
    for kind in sorted(waits, key=waits.__getitem__):
        for target in targets:
            options = proposals(kind, scene, target)
            for option in rng.permutation(len(options)):
                claim = options[option]
                if not singles_out(claim, scene, target):
                    continue
                if kind == "colour+shape" or is_minimal(claim, scene, target):
                    return target, claim
    return None


def type_by_hand(rng: np.random.Generator, sent: str) -> str:
    """Give cleaned text the look of typed text: now and then capitals, a full stop or a stray space."""
    style = rng.random()
    if style < 0.08:
        return sent.capitalize()
    if style < 0.12:
        return sent.upper()
    if style < 0.18:
        return f"{sent}."
    if style < 0.22:
        return f"{sent} "
    return sent

"""RefCOCOg's long sentences: one object, its colour and shape, and two more claims about it.

"the red star on the left that is above the blue circle", "the big blue heart under the yellow cross". Such a
sentence says more than it must. Each of its two claims singles the object out by itself, together with the
colour and shape, so the sentence means the same however it is read.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import combinations

import numpy as np

from ris_cache.datasets.shapes.compose import type_by_hand
from ris_cache.datasets.shapes.language import (
    PLACE_CLAIMS,
    SIZE_CLAIMS,
    Constraints,
    Direction,
    PlaceClaim,
    described,
    proposals,
    singles_out,
)
from ris_cache.datasets.shapes.mixture import Ref, Sentence
from ris_cache.datasets.shapes.scene import Scene

_SIZE_WORDS = {"largest": ("big", "large", "biggest", "largest"), "smallest": ("small", "little", "tiny")}

_PLACES: dict[PlaceClaim, tuple[str, ...]] = {
    "left": ("on the left", "on the far left"),
    "right": ("on the right", "on the far right"),
    "top": ("at the top", "at the very top"),
    "bottom": ("at the bottom", "at the very bottom"),
}

_DIRECTIONS: dict[Direction, tuple[str, ...]] = {
    "left of": ("left of",),
    "right of": ("right of",),
    "above": ("above", "over"),
    "below": ("below", "under"),
}

_SENTENCES_SHARES = (0.4, 0.35, 0.25)
"""Shares of refs with one, two and three sentences."""


def detailed_refs(rng: np.random.Generator, scene: Scene) -> tuple[Ref, ...]:
    """Describe one to three objects at length; none if no two claims single one out."""
    wanted = int(rng.integers(1, 4))
    refs: list[Ref] = []
    for target in rng.permutation(len(scene.objects)):
        if len(refs) == wanted:
            break
        pairs = [phrases for pair in _claim_pairs(scene, int(target)) if (phrases := _phrases(*pair))]
        num_sentences = 1 + int(rng.choice(3, p=_SENTENCES_SHARES))
        sents: dict[str, None] = {}
        for place in rng.permutation(len(pairs))[:num_sentences]:
            sents[pairs[place][int(rng.integers(len(pairs[place])))]] = None
        if sents:
            sentences = tuple(Sentence(raw=type_by_hand(rng, sent), sent=sent) for sent in sents)
            refs.append(Ref(object_indices=(int(target),), sentences=sentences))
    return tuple(refs)


def _claim_pairs(scene: Scene, target: int) -> Iterator[tuple[Constraints, Constraints]]:
    """Every two claims of size, place and relation that both single the target out, with its look."""
    claims = [claim for claim in _claims(scene, target) if singles_out(claim, scene, target)]
    for first, second in combinations(claims, 2):
        same_size = first.size and second.size
        same_axis = first.place and second.place and _axis(first.place) == _axis(second.place)
        if not same_size and not same_axis and not _share_anchor(first, second):
            yield first, second


def _claims(scene: Scene, target: int) -> Iterator[Constraints]:
    me = scene.objects[target]
    look = Constraints(colour=me.colour, shape=me.shape)
    # Alone in its look, an object would be the largest and the smallest at once.
    for size in SIZE_CLAIMS:
        for seen in (look, Constraints(colour=me.colour), Constraints(shape=me.shape)):
            claim = replace(seen, size=size)
            if len(described(scene, seen.colour, seen.shape)) > 1 and singles_out(claim, scene, target):
                yield replace(look, size=size)
                break
    for place in PLACE_CLAIMS:
        yield replace(look, place=place)
    for claim in proposals("relation", scene, target):
        relation = claim.relation
        if claim.colour and claim.shape and relation and relation.colour and relation.shape:
            yield claim


def _axis(place: PlaceClaim) -> str:
    return "across" if place in ("left", "right") else "down"


def _share_anchor(first: Constraints, second: Constraints) -> bool:
    one, other = first.relation, second.relation
    return bool(one and other and (one.colour, one.shape) == (other.colour, other.shape))


def _phrases(first: Constraints, second: Constraints) -> list[str]:
    """Word two claims of one look: what is about size, then place, then relation."""
    look = f"{first.colour} {first.shape}"
    sizes: tuple[str, ...] = ()
    tails: list[tuple[str, ...]] = []
    for claim in (first, second):
        if claim.size:
            sizes = _SIZE_WORDS[claim.size]
        elif claim.place:
            tails.append(_PLACES[claim.place])
        elif claim.relation:
            anchor = f"the {claim.relation.colour} {claim.relation.shape}"
            tails.append(tuple(f"{words} {anchor}" for words in _DIRECTIONS[claim.relation.direction]))
    if sizes:
        (ends,) = tails
        return [
            f"the {size} {look} {link}{end}" for size in sizes for end in ends for link in ("", "that is ")
        ]
    starts, ends = tails
    if second.relation and first.place:
        return [f"the {look} {start} that is {end}" for start in starts for end in ends]
    return [f"the {look} that is {start} and {end}" for start in starts for end in ends]

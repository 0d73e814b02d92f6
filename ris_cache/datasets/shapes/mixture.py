"""Mix expressions of one object with those of several and of none, as gRefCOCO and Ref-ZOM do.

The expressions of one object are those that the image has anyway; what is added is counted against them.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from ris_cache.datasets.shapes.compose import ComposedImage, type_by_hand
from ris_cache.datasets.shapes.scene import Scene
from ris_cache.datasets.shapes.set_phrasing import realise_set
from ris_cache.datasets.shapes.sets import SetClaim, claim_nothing, claim_several, referents

_TRIES_PER_SENTENCE = 12


@dataclass(frozen=True, slots=True, kw_only=True)
class Shares:
    """How many of a split's expressions have no target, one, and many; only the ratios count."""

    none: float
    one: float
    many: float

    def __post_init__(self) -> None:
        assert min(self.none, self.one, self.many) >= 0
        assert self.none + self.one + self.many > 0


GREFCOCO_SHARES: dict[str, Shares] = {
    "train": Shares(none=0.09, one=0.58, many=0.33),
    "val": Shares(none=0.41, one=0.0, many=0.59),
    "testA": Shares(none=0.27, one=0.34, many=0.39),
    "testB": Shares(none=0.27, one=0.34, many=0.39),
}
"""Split of gRefCOCO → shares near those of the real file. Its val has no expression of one object."""

PLAIN_SHARES = Shares(none=0.09, one=0.58, many=0.33)
"""Shares of every split of the other layouts: those of gRefCOCO's training split."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sentence:
    """One sentence, as if typed by hand and cleaned."""

    raw: str
    sent: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Ref:
    """What is said of one set of objects.

    Attributes:
        object_indices: places in the scene, ascending; empty when the sentences refer to nothing.
        sentences: one or more, all different.
    """

    object_indices: tuple[int, ...]
    sentences: tuple[Sentence, ...]


def single_refs(composed: ComposedImage) -> tuple[Ref, ...]:
    """The image's own refs, each of one object."""
    return tuple(
        Ref(
            object_indices=(ref.object_index,),
            sentences=tuple(Sentence(raw=each.raw, sent=each.sent) for each in ref.expressions),
        )
        for ref in composed.refs
    )


def mixed_refs(rng: np.random.Generator, composed: ComposedImage, shares: Shares) -> tuple[Ref, ...]:
    """The image's refs of one object, then of many, then of none, so that the shares come out on average.

    With a share of one object of 0 its refs are left out, and as many expressions are said of many and none.
    """
    scene = composed.drawing.scene
    singles = single_refs(composed)
    num_single = sum(len(ref.sentences) for ref in singles)
    scale = num_single / (shares.one or shares.none + shares.many)
    said: set[str] = set()
    several = _speak(rng, scene, claim_several, _rounded(rng, scale * shares.many), said)
    nothing = _speak(rng, scene, claim_nothing, _rounded(rng, scale * shares.none), said)
    return (*(singles if shares.one else ()), *several, *nothing)


def _rounded(rng: np.random.Generator, number: float) -> int:
    """Round up or down by chance, so that the mean stays the number."""
    whole = math.floor(number)
    return whole + int(rng.random() < number - whole)


def _speak(
    rng: np.random.Generator,
    scene: Scene,
    claims: Callable[[np.random.Generator, Scene], SetClaim | None],
    num_sentences: int,
    said: set[str],
) -> tuple[Ref, ...]:
    """Say so many sentences in refs of one to three; fewer if the scene gives no more.

    Args:
        said: the sentences that the image has; grows.
    """
    refs: list[Ref] = []
    left = num_sentences
    for _ in range(_TRIES_PER_SENTENCE * num_sentences):
        if not left:
            break
        claim = claims(rng, scene)
        if claim is None:
            continue
        phrases = [phrase for phrase in realise_set(claim) if phrase not in said]
        wanted = min(left, len(phrases), int(rng.integers(1, 4)))
        if not wanted:
            continue
        chosen = [phrases[place] for place in rng.permutation(len(phrases))[:wanted]]
        said.update(chosen)
        left -= wanted
        sentences = tuple(Sentence(raw=type_by_hand(rng, sent), sent=sent) for sent in chosen)
        refs.append(Ref(object_indices=referents(claim, scene), sentences=sentences))
    return tuple(refs)

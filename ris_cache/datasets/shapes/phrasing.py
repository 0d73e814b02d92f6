"""Say a set of constraints in English, in several ways.

Lower case, no punctuation, single spaces: the form of RefCOCO's `sent`.
"""

from __future__ import annotations

from ris_cache.datasets.shapes.language import Constraints, Direction, PlaceClaim, Relation, SizeClaim
from ris_cache.datasets.shapes.objects import COLOURS, SHAPES

_GENERIC_NOUNS = ("thing", "object", "shape")

_SIZE_ADJECTIVES: dict[SizeClaim, tuple[str, ...]] = {
    "largest": ("big", "large", "biggest", "largest"),
    "smallest": ("small", "little", "smallest", "tiny"),
}

_PLACES: dict[PlaceClaim, tuple[str, ...]] = {
    "left": ("left {}", "leftmost {}", "{} on the left", "{} on the far left", "{} on the left side"),
    "right": ("right {}", "rightmost {}", "{} on the right", "{} on the far right", "{} on the right side"),
    "top": ("top {}", "highest {}", "upper {}", "{} at the top", "{} at the very top"),
    "bottom": ("bottom {}", "lowest {}", "lower {}", "{} at the bottom", "{} at the very bottom"),
}

_DIRECTIONS: dict[Direction, tuple[str, ...]] = {
    "left of": ("left of", "to the left of"),
    "right of": ("right of", "to the right of"),
    "above": ("above", "over"),
    "below": ("below", "under"),
}

VOCABULARY: tuple[str, ...] = tuple(
    sorted(
        {
            *SHAPES,
            *COLOURS,
            *_GENERIC_NOUNS,
            *("the", "one", "that", "is"),
            *(word for words in _SIZE_ADJECTIVES.values() for word in words),
            *(
                word
                for templates in (*_PLACES.values(), *_DIRECTIONS.values())
                for template in templates
                for word in template.split()
                if word != "{}"
            ),
        }
    )
)
"""Every word that `realise` can use, sorted."""


def realise(constraints: Constraints) -> tuple[str, ...]:
    """Word the constraints in every way we know.

    Returns:
        Different phrases of `VOCABULARY`, each with and without a leading "the".
    """
    heads = _noun_phrases(constraints.colour, constraints.shape)
    if constraints.size:
        phrases = [f"{word} {head}" for head in heads for word in _SIZE_ADJECTIVES[constraints.size]]
    elif constraints.place:
        phrases = [template.format(head) for head in heads for template in _PLACES[constraints.place]]
    elif constraints.relation:
        phrases = [f"{head} {tail}" for head in heads for tail in _relation_phrases(constraints.relation)]
    else:
        phrases = list(heads)
        if constraints.colour and constraints.shape:
            phrases.append(f"{constraints.shape} that is {constraints.colour}")
    return tuple(f"{article}{phrase}" for phrase in phrases for article in ("", "the "))


def _noun_phrases(colour: str | None, shape: str | None) -> tuple[str, ...]:
    if colour and shape:
        return (f"{colour} {shape}",)
    if shape:
        return (shape,)
    if colour:
        return tuple(f"{colour} {noun}" for noun in (*_GENERIC_NOUNS, "one"))
    return _GENERIC_NOUNS


def _relation_phrases(relation: Relation) -> tuple[str, ...]:
    if relation.shape:
        anchors = _noun_phrases(relation.colour, relation.shape)
    else:
        anchors = (f"{relation.colour} one", f"{relation.colour} thing")
    return tuple(f"{words} the {anchor}" for words in _DIRECTIONS[relation.direction] for anchor in anchors)

"""Say a claim about several objects, or about none, in English, in several ways.

Like `phrasing`: lower case, no punctuation, single spaces. The words that are not in `phrasing.VOCABULARY`
are few, short, and spelled of pieces that every BERT vocabulary has.
"""

from __future__ import annotations

from itertools import product

from ris_cache.datasets.shapes.language import Constraints
from ris_cache.datasets.shapes.objects import SHAPES
from ris_cache.datasets.shapes.phrasing import realise
from ris_cache.datasets.shapes.sets import AllOf, SetClaim, Together

PLURALS: dict[str, str] = {shape: f"{shape}es" if shape == "cross" else f"{shape}s" for shape in SHAPES}

_GENERIC_PLURALS = ("things", "objects", "shapes")
_WORDS_OF_TWO, _WORDS_OF_THREE = 7, 4
"""How long each of two and of three parts may be, so that the whole stays within 20 word pieces."""

_NUMBERS = {2: "two", 3: "three", 4: "four", 5: "five"}


def realise_set(claim: SetClaim) -> tuple[str, ...]:
    """Word a claim in every way we know; the phrases are different."""
    if isinstance(claim, Constraints):
        return realise(claim)
    return _all_phrases(claim) if isinstance(claim, AllOf) else _together_phrases(claim)


def _all_phrases(claim: AllOf) -> tuple[str, ...]:
    number = _NUMBERS[claim.count]
    openings = ["all", "all the", f"the {number}"]
    if claim.colour or claim.shape:
        # Without a look, "the things" would leave open which ones are meant.
        openings += ["the", number]
    if claim.count == 2:
        openings.append("both")
    nouns = (PLURALS[claim.shape],) if claim.shape else _GENERIC_PLURALS
    if claim.colour and not claim.shape:
        nouns = (*nouns, "ones")
    heads = [f"{claim.colour} {noun}" if claim.colour else noun for noun in nouns]
    return tuple(f"{opening} {head}" for opening, head in product(openings, heads))


def _together_phrases(claim: Together) -> tuple[str, ...]:
    """Join the parts by "and"; with articles, unless each part begins with its own colour."""
    most_words = _WORDS_OF_THREE if len(claim.parts) == 3 else _WORDS_OF_TWO
    with_article = [
        [
            phrase
            for phrase in realise(part)
            if phrase.startswith("the ") and len(phrase.split()) <= most_words
        ]
        for part in claim.parts
    ]
    joined = [" and ".join(words) for words in product(*with_article)]
    if all(part.colour and not part.size and not part.place for part in claim.parts):
        bare = [
            [phrase for phrase in realise(part) if phrase.startswith(f"{part.colour} ")]
            for part in claim.parts
        ]
        joined += [" and ".join(words) for words in product(*bare)]
    return tuple(joined)

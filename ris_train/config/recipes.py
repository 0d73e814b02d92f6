"""The recipes that ship: YAML files that open with their command, their purpose and their cost.

A recipe may name another one as `extends`, and then states only where it differs from it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from ris_cache.errors import ConfigError
from ris_train.config.yaml_reading import read_yaml

RECIPE_DIR: Final = Path(__file__).parents[1] / "recipes"
EXTENDS: Final = "extends"
COST: Final = "Cost and score: "


@dataclass(frozen=True, slots=True, kw_only=True)
class RecipeHead:
    """What a recipe says of itself in its opening comment.

    Attributes:
        command: how to train by it.
        needs: the cache that the command expects.
        about: what it trains.
        cost: its cost and the score to expect, or what of them was not measured.
        extends: the recipe it differs from, if it names one.
    """

    name: str
    command: str
    needs: str
    about: str
    cost: str
    extends: str | None


def recipes() -> dict[str, Path]:
    """Name and file of each recipe that ships."""
    paths = {path.stem: path for path in RECIPE_DIR.glob("*.yaml")}
    return {name: paths[name] for name in sorted(paths)}


def recipe_layers(name: str, known: Mapping[str, Path] | None = None) -> list[tuple[str, dict[str, Any]]]:
    """Read a recipe and those it extends.

    Args:
        name: of the recipe.
        known: files by name; those that ship by default.

    Returns:
        Name and settings of each, the one that everything else is laid over first.

    Raises:
        ConfigError: no such recipe, or recipes that extend each other in a circle.
    """
    known = recipes() if known is None else known
    layers: list[tuple[str, dict[str, Any]]] = []
    wanted: Any = name
    while wanted is not None:
        if wanted not in known:
            raise ConfigError(
                f"No recipe is called {wanted!r}; there are {', '.join(known)}.",
                recipe=wanted,
                known=list(known),
            )
        above = [layer for layer, _ in layers]
        if wanted in above:
            raise ConfigError(
                f"Recipes extend each other in a circle: {' → '.join([*above, wanted])}.", recipe=wanted
            )
        tree = read_yaml(known[wanted])
        layers.append((wanted, tree))
        wanted = tree.pop(EXTENDS, None)
    return layers[::-1]


def recipe_head(name: str) -> RecipeHead:
    """Read the opening comment of a recipe that ships."""
    path = recipes()[name]
    lines = []
    for line in path.read_text(encoding="utf-8").splitlines():
        if not line.startswith("#"):
            break
        lines.append(line.lstrip("#").strip())
    paragraphs = "\n".join(lines[1:]).split("\n\n")
    about, _, cost = paragraphs[0].replace("\n", " ").partition(COST)
    command, _, needs = lines[0].partition("(")
    return RecipeHead(
        name=name,
        command=command.strip(),
        needs=needs.removesuffix(")"),
        about=about.strip(),
        cost=cost.strip(),
        extends=read_yaml(path).get(EXTENDS),
    )

"""`ris config`: what a training run would be given, what may be set, and the recipes that ship."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cli.guard import guarded
from cli.options import DEFAULT_CACHE, CacheOption, JsonOption
from cli.render import print_json, print_table, printable

if TYPE_CHECKING:
    from ris_train.config import ResolvedConfig

app = typer.Typer(
    help="The configuration of training runs: recipe < file < environment < --set.",
    no_args_is_help=True,
    rich_markup_mode=None,
)

_FALLBACK_RECIPE = "paper"


def show(
    cache: CacheOption = DEFAULT_CACHE,
    recipe: Annotated[
        str | None,
        typer.Option(
            "--recipe", help="Shipped recipe; by default the one of the cache's preset, else paper."
        ),
    ] = None,
    config: Annotated[Path | None, typer.Option("--config", help="YAML laid over the recipe.")] = None,
    set_: Annotated[
        list[str] | None, typer.Option("--set", help="section.key=value, laid over everything; repeatable.")
    ] = None,
    json: JsonOption = False,
) -> None:
    """Print the configuration that `ris train` would use, and where each value is from.

    The output is YAML and can be saved, edited and given to --config.

    Example: ris config show --recipe gres --set train.lr=1e-4
    """
    from ris_train.config import resolve_config

    resolved = resolve_config(
        recipe=recipe or _recipe_of(cache),
        config_path=config,
        environment=os.environ,
        overrides=set_ or [],
    )
    if json:
        settings = {key: {"value": value, "origin": origin} for key, value, origin in resolved.settings()}
        print_json({"recipe": resolved.config.recipe, "settings": settings})
        return
    # YAML is read as UTF-8, so that in another encoding ASCII alone comes back as it was.
    encoding = "utf-8" if "utf" in sys.stdout.encoding.lower() else "ascii"
    print(printable(_as_yaml(resolved, allow_unicode=encoding == "utf-8"), encoding))


def schema() -> None:
    """Print the JSON Schema of a --config file, for editors that complete and check YAML by one.

    Example: ris config schema > ris.schema.json
    """
    from ris_train.config.json_schema import json_schema

    print_json(json_schema())


def list_recipes(json: JsonOption = False) -> None:
    """List the recipes that ship, with what each of them says of itself.

    Example: ris config recipes
    """
    from ris_train.config import recipe_head, recipes

    heads = [recipe_head(name) for name in recipes()]
    if json:
        print_json(
            [
                {
                    "name": head.name,
                    "command": head.command,
                    "needs": head.needs,
                    "about": head.about,
                    "cost": head.cost,
                    "extends": head.extends,
                }
                for head in heads
            ]
        )
        return
    print_table(
        f"{len(heads)} recipes",
        ["recipe", "what it trains", "needs", "cost and score"],
        [[head.name, head.about, head.needs, head.cost] for head in heads],
        left=("what it trains", "needs", "cost and score"),
    )
    # Commands to copy, which a table would break.
    print("\n".join(["Train by one of them:", *(f"  {head.command}" for head in heads)]))
    print("See its settings:\n  ris config show --recipe NAME")


def _recipe_of(cache: Path) -> str:
    """Choose as `ris train` does; before there is a cache, the recipe of the paper."""
    from ris_cache import FeatureCache
    from ris_cache.store.files import MANIFEST_NAME

    if not (cache / MANIFEST_NAME).exists():
        return _FALLBACK_RECIPE
    return FeatureCache.open(cache).manifest.preset


def _as_yaml(resolved: ResolvedConfig, *, allow_unicode: bool) -> str:
    """Write sections and settings, one a line, with the origin of each value as a comment.

    Args:
        allow_unicode: whether values may hold other characters than ASCII, which are escaped otherwise.
    """
    import yaml

    lines = [(f"recipe: {resolved.config.recipe}", "")]
    open_sections: list[str] = []
    for key, value, origin in resolved.settings():
        *sections, name = key.split(".")
        for depth, section in enumerate(sections):
            if open_sections[depth : depth + 1] != [section]:
                lines.append(("  " * depth + f"{section}:", ""))
                open_sections = sections[: depth + 1]
        open_sections = sections
        flow = yaml.safe_dump([value], default_flow_style=True, allow_unicode=allow_unicode, width=2**20)
        lines.append(("  " * len(sections) + f"{name}: {flow.strip()[1:-1]}", origin))
    width = max(len(text) for text, origin in lines if origin)
    return "\n".join(f"{text:<{width}}  # {origin}" if origin else text for text, origin in lines)


app.command("show")(guarded(show))
app.command("schema")(guarded(schema))
app.command("recipes")(guarded(list_recipes))

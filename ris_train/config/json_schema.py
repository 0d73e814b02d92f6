"""JSON Schema of the configuration, with what the docstrings say of every setting, for editors."""

from __future__ import annotations

import inspect
import re
from typing import Any, Final

from pydantic import BaseModel

from ris_train.config import schema
from ris_train.config.schema import RunConfig

DIALECT: Final = "https://json-schema.org/draft/2020-12/schema"

_ATTRIBUTES = re.compile(r"^(\w+(?:, \w+)*): (.*?)(?=^\w+(?:, \w+)*: |\Z)", re.M | re.S)


def json_schema() -> dict[str, Any]:
    """Describe what a `--config` file may hold."""
    tree = RunConfig.model_json_schema()
    _describe(tree, RunConfig)
    for name, section in tree["$defs"].items():
        _describe(section, getattr(schema, name))
    return {"$schema": DIALECT, **tree}


def setting_texts(section: type[BaseModel]) -> dict[str, str]:
    """What the docstring of a section says of its settings, by name."""
    _, _, attributes = inspect.cleandoc(section.__doc__ or "").partition("\nAttributes:\n")
    found = {}
    for names, text in _ATTRIBUTES.findall(inspect.cleandoc(attributes)):
        for name in names.split(", "):
            found[name] = " ".join(text.split())
    return found


def _describe(tree: dict[str, Any], section: type[BaseModel]) -> None:
    tree["description"] = " ".join(inspect.cleandoc(section.__doc__ or "").partition("\n\n")[0].split())
    for name, text in setting_texts(section).items():
        tree["properties"][name]["description"] = text

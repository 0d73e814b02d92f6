"""The dotted keys of the configuration, such as `train.lr`, and their names in the environment."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Final

from pydantic import BaseModel

from ris_cache.errors import ConfigError
from ris_train.config.schema import RunConfig

PREFIX: Final = "RIS_"
OPTION_VARIABLES: Final = ("RIS_CACHE", "RIS_DATA", "RIS_RUNS", "RIS_WEIGHTS")
"""Variables that stand for an option of a command and are no setting of a run."""


def section_of(path: Sequence[object]) -> type[BaseModel] | None:
    """Return the section at a path, or None where there is a setting or nothing."""
    section: Any = RunConfig
    for part in path:
        field = section.model_fields.get(part)
        section = field.annotation if field is not None else None
        if not (isinstance(section, type) and issubclass(section, BaseModel)):
            return None
    found: type[BaseModel] = section
    return found


def all_keys(path: tuple[str, ...] = ()) -> Iterator[str]:
    """Every setting's dotted key, in the order of the schema; not `recipe`, which is chosen, not set."""
    section = section_of(path)
    assert section is not None
    for name in section.model_fields:
        inner = (*path, name)
        if section_of(inner) is not None:
            yield from all_keys(inner)
        elif inner != ("recipe",):
            yield ".".join(inner)


def leaves(tree: Mapping[str, Any], path: tuple[str, ...] = ()) -> Iterator[tuple[str, Any]]:
    """Dotted key and value of each setting in a tree of sections."""
    for name, value in tree.items():
        inner = (*path, name)
        if isinstance(value, Mapping):
            yield from leaves(value, inner)
        else:
            yield ".".join(inner), value


def variable(key: str) -> str:
    """Name the environment variable of a setting: `train.lr` is `RIS_TRAIN__LR`."""
    return PREFIX + key.replace(".", "__").upper()


def from_environment(environment: Mapping[str, str]) -> dict[str, tuple[str, str]]:
    """Find the settings in an environment: variable and value by dotted key, sorted by variable."""
    keys = {variable(key): key for key in all_keys()}
    return {keys[name]: (name, environment[name]) for name in sorted(environment) if name in keys}


def require_known(environment: Mapping[str, str]) -> None:
    """Refuse what begins with `RIS_` and means nothing.

    Raises:
        ConfigError: there are such variables; names the nearest that does mean something.
    """
    known = [*map(variable, all_keys()), *OPTION_VARIABLES]
    problems = []
    for name in sorted(environment):
        if not name.startswith(PREFIX) or name in known:
            continue
        if name == "RIS_RECIPE":
            problems.append(f"{name}: a recipe is chosen by --recipe")
            continue
        nearest = difflib.get_close_matches(name, known, n=1)
        hint = (
            f"did you mean {nearest[0]}?" if nearest else "settings are named like RIS_TRAIN__LR for train.lr"
        )
        problems.append(f"{name}: unknown variable; {hint}")
    if problems:
        raise ConfigError(
            f"The environment has {len(problems)} problem(s):\n  " + "\n  ".join(problems), problems=problems
        )


def nearest_key(path: Sequence[object]) -> str:
    """Say which key was meant by an unknown one: of the same section, or of that name in another."""
    section = section_of(path[:-1])
    assert section is not None
    known, name = list(section.model_fields), str(path[-1]).lower()
    nearest = difflib.get_close_matches(name, known, n=1)
    if nearest:
        return f"did you mean {nearest[0]!r}?"
    elsewhere = [key for key in all_keys() if key.rpartition(".")[2] == name]
    if elsewhere:
        return f"did you mean {' or '.join(map(repr, elsewhere))}?"
    return f"known keys: {', '.join(known)}"

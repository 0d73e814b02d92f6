"""Resolving a configuration from its layers, each value with its origin, and the errors of a wrong one.

Precedence: defaults < recipe < `--config FILE` < environment < `--set section.key=value`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final

from pydantic import ValidationError

from ris_cache.errors import ConfigError
from ris_train.config.keys import from_environment, leaves, nearest_key, require_known, section_of
from ris_train.config.recipes import EXTENDS, recipe_layers
from ris_train.config.schema import RunConfig
from ris_train.config.yaml_reading import parse_yaml, read_yaml, shortened

DEFAULT: Final = "default"
NO_ENVIRONMENT: Final[Mapping[str, str]] = MappingProxyType({})


@dataclass(frozen=True, slots=True, kw_only=True)
class ResolvedConfig:
    """A configuration that knows where its values are from.

    Attributes:
        origins: by dotted key: `default`, `recipe NAME`, `file PATH`, the name of a variable, or `--set`.
    """

    config: RunConfig
    origins: Mapping[str, str]

    def settings(self) -> list[tuple[str, Any, str]]:
        """Dotted key, plain value and origin of each setting, in the order of the schema."""
        tree = self.config.model_dump(mode="json", exclude={"recipe"})
        return [(key, value, self.origins[key]) for key, value in leaves(tree)]


class _Problems:
    """What is wrong with a configuration, layer by layer, told in one error."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._errors: list[ConfigError] = []

    @contextmanager
    def collected(self) -> Iterator[None]:
        """Keep the error that is raised while entered, if one is."""
        try:
            yield
        except ConfigError as error:
            self.add(error)

    def add(self, error: ConfigError) -> None:
        """Keep an error for later."""
        self._errors.append(error)

    def raise_any(self) -> None:
        """Raise what was kept: one error as it is, of several all problems."""
        if len(self._errors) == 1:
            raise self._errors[0]
        if self._errors:
            lines = [line for error in self._errors for line in _lines(error)]
            raise _problems_error(self._name, lines) from self._errors[0]


def _lines(error: ConfigError) -> list[str]:
    problems = error.facts.get("problems")
    return [str(problem) for problem in problems] if isinstance(problems, list) else [str(error)]


def _problems_error(name: str, lines: list[str]) -> ConfigError:
    return ConfigError(
        f"The configuration ({name}) has {len(lines)} problem(s):\n  " + "\n  ".join(lines), problems=lines
    )


def load_config(
    *,
    recipe: str,
    config_path: Path | None = None,
    environment: Mapping[str, str] = NO_ENVIRONMENT,
    overrides: Iterable[str] = (),
) -> RunConfig:
    """Resolve the configuration; see `resolve_config`."""
    return resolve_config(
        recipe=recipe, config_path=config_path, environment=environment, overrides=overrides
    ).config


def resolve_config(
    *,
    recipe: str,
    config_path: Path | None = None,
    environment: Mapping[str, str] = NO_ENVIRONMENT,
    overrides: Iterable[str] = (),
) -> ResolvedConfig:
    """Lay the layers over each other and check the whole.

    Args:
        recipe: name of a shipped recipe to start from.
        config_path: YAML file laid over the recipe.
        environment: variables such as `RIS_TRAIN__LR`, laid over the file; none by default, so that a
            program's configuration is what it says.
        overrides: `section.key=value` strings, the value in YAML, laid over everything.

    Raises:
        ConfigError: a file that is missing or not YAML, an unknown key or variable (with the nearest known
            one), or a value of the wrong kind. Wrong keys, variables and values are all named at once, unless
            a file cannot be read.
    """
    name = str(config_path or f"recipe {recipe}")
    problems = _Problems(name)
    layers = [(f"recipe {name}", tree) for name, tree in recipe_layers(recipe)]
    if config_path is not None:
        layers.append((f"file {config_path}", _read_file(config_path, recipe)))
    with problems.collected():
        require_known(environment)
    for key, (variable, value) in from_environment(environment).items():
        with problems.collected():
            layers.append((variable, _nested(key, parse_yaml(value, f"The value of {variable}"))))
    for override in overrides:
        with problems.collected():
            layers.append(("--set", _parse_override(override)))
    tree: dict[str, Any] = {}
    origins: dict[str, str] = {}
    for origin, layer in layers:
        _merge(tree, layer, origin, origins, problems)
    config = None
    with problems.collected():
        config = _validate(tree | {"recipe": recipe}, name, origins)
    problems.raise_any()
    assert config is not None
    keys = [key for key, _ in leaves(config.model_dump(mode="json", exclude={"recipe"}))]
    return ResolvedConfig(config=config, origins={key: origins.get(key, DEFAULT) for key in keys})


def parse_config(tree: Mapping[str, Any], *, origin: str) -> RunConfig:
    """Check a tree of plain values; `origin` names it in errors.

    Raises:
        ConfigError: as `resolve_config`.
    """
    return _validate(tree, origin, {})


def _read_file(path: Path, recipe: str) -> dict[str, Any]:
    tree = read_yaml(path)
    if EXTENDS in tree:
        raise ConfigError(
            f"Configuration file {path} names a recipe by {EXTENDS!r}, as recipes do that ship. Leave the "
            f"line out and choose the recipe by --recipe {tree[EXTENDS]}.",
            path=path,
        )
    if "recipe" in tree and tree["recipe"] != recipe:
        named = shortened(tree["recipe"])
        raise ConfigError(
            f"Configuration file {path} is of recipe {named}, but would be laid over {recipe!r}. Choose the "
            "recipe by --recipe, or leave that line out of the file.",
            path=path,
            recipe=recipe,
        )
    return tree


def _validate(tree: Mapping[str, Any], name: str, origins: Mapping[str, str]) -> RunConfig:
    try:
        return RunConfig.model_validate(dict(tree))
    except ValidationError as error:
        raise _problems_error(name, _problems(error, origins)) from error


def _problems(error: ValidationError, origins: Mapping[str, str]) -> list[str]:
    """One line for each wrong value, however many ways there were to get it right."""
    messages: dict[str, list[str]] = {}
    endings: dict[str, str] = {}
    for problem in error.errors():
        parts = _key_parts(problem["loc"])
        path = ".".join(map(str, parts))
        is_unknown = problem["type"] == "extra_forbidden"
        message = f"unknown key; {nearest_key(parts)}" if is_unknown else _message(problem["msg"])
        messages.setdefault(path, []).append(message)
        endings[path] = "" if is_unknown else f" (found {shortened(problem['input'])})"
        key = next((key for key in origins if key == path or path.startswith(f"{key}.")), None)
        endings[path] += f", from {origins[key]}" if key is not None else ""
    return [f"{path}: {', or: '.join(found)}{endings[path]}" for path, found in messages.items()]


def _message(text: str) -> str:
    """Pydantic's words in those of YAML."""
    return text.replace("a valid tuple", "a list, such as [a, b]")


def _key_parts(location: tuple[int | str, ...]) -> list[int | str]:
    """Leave out what pydantic adds to name the member of a union; positions in a list stay."""
    parts: list[int | str] = []
    for part in location:
        if isinstance(part, int) or section_of(parts) is not None:
            parts.append(part)
    return parts


def _parse_override(text: str) -> dict[str, Any]:
    key, separator, value = text.partition("=")
    key = key.strip()
    if not separator or not all(key.split(".")):
        raise ConfigError(f"--set takes section.key=value, not {shortened(text)}.", override=text)
    if key == "recipe":
        raise ConfigError(f"A recipe is chosen by --recipe, not by --set {text}.", override=text)
    return _nested(key, parse_yaml(value, f"The value of --set {text!r}"))


def _nested(key: str, leaf: Any) -> dict[str, Any]:
    for part in reversed(key.split(".")):
        leaf = {part: leaf}
    assert isinstance(leaf, dict)
    return leaf


def _merge(
    base: dict[str, Any],
    over: Mapping[str, Any],
    origin: str,
    origins: dict[str, str],
    problems: _Problems,
    path: tuple[str, ...] = (),
) -> None:
    """Lay `over` on `base` in place, section by section, and note where each value is from.

    A section without settings, as where all of them are commented out, changes nothing.
    """
    for key, value in over.items():
        inner = (*path, key)
        if section_of(inner) is None:  # a setting, or a key that is none, which `_validate` names
            base[key] = value
            origins[".".join(map(str, inner))] = origin
        elif isinstance(value, Mapping):
            _merge(base.setdefault(key, {}), value, origin, origins, problems, inner)
        elif value is not None:
            name = ".".join(inner)
            problems.add(
                ConfigError(
                    f"{name} ({origin}) is a section, set by {name}.KEY, and cannot be {shortened(value)}.",
                    key=name,
                )
            )

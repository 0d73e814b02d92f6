"""YAML as a configuration uses it: what could be taken in two ways is an error, not a guess.

Beside YAML 1.1, `1e-4` is a number, as it is in YAML 1.2, in JSON and in Python. A key that is there twice,
of which YAML would keep the last in silence, is refused; so are a number that YAML 1.1 takes for another one
than its digits say, as 010 for 8 and 1:30 for 90, and an alias, which can make a small file a huge or an
endless tree.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, Final

import yaml

from ris_cache.errors import ConfigError

MAX_BYTES: Final = 1 << 18
"""Of a configuration file; the largest that ships has three thousand."""

_FLOAT_TAG: Final = "tag:yaml.org,2002:float"
_INT_TAG: Final = "tag:yaml.org,2002:int"
_TWO_MEANINGS: Final = re.compile(r"[-+]?(?:0[0-9_]+|[0-9][0-9_]*:.*)$")
"""Numbers with a leading zero, which YAML 1.1 reads in base 8, and with colons, which it reads in base 60."""
_EXPONENT: Final = re.compile(r"[-+]?(?:[0-9]+\.?[0-9]*|\.[0-9]+)[eE][-+]?[0-9]+$")


class _Loader(yaml.SafeLoader):
    """Plain values only; see the module."""

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        """Refuse aliases."""
        if self.check_event(yaml.AliasEvent):
            event: Any = self.get_event()  # type: ignore[no-untyped-call]
            message = f"aliases such as *{event.anchor} are not read; write the value out"
            raise yaml.composer.ComposerError(None, None, message, event.start_mark)
        return super().compose_node(parent, index)

    def construct_number(self, node: yaml.ScalarNode) -> int | float:
        """Refuse what YAML 1.1 reads otherwise than people do."""
        if _TWO_MEANINGS.match(node.value):
            message = f"{node.value} is a number that can be read in two ways; write it in decimal"
            message += ", without leading zeros or colons, or in quotes if it is a text"
            raise yaml.constructor.ConstructorError(None, None, message, node.start_mark)
        read = self.construct_yaml_int if node.tag == _INT_TAG else self.construct_yaml_float
        number: int | float = read(node)
        return number

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """Refuse a key that is there twice."""
        seen: dict[str, yaml.Node] = {}
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode):
                if key.value in seen:
                    line = seen[key.value].start_mark.line + 1
                    raise yaml.constructor.ConstructorError(
                        None, None, f"{key.value!r} is there twice, first in line {line}", key.start_mark
                    )
                seen[key.value] = key
        return super().construct_mapping(node, deep=deep)


for _tag in (_INT_TAG, _FLOAT_TAG):
    _Loader.add_constructor(_tag, _Loader.construct_number)
_Loader.add_implicit_resolver(_FLOAT_TAG, _EXPONENT, list("-+.0123456789"))


def parse_yaml(text: str, source: str) -> Any:
    """Read plain values.

    Args:
        source: begins the sentence of an error: `The value of …`, `Configuration file …`.

    Raises:
        ConfigError: it is not YAML, or YAML that is not read here.
    """
    try:
        return yaml.load(text, Loader=_Loader)
    except RecursionError as error:
        raise ConfigError(f"{source} is nested too deeply.", source=source) from error
    except (yaml.YAMLError, ValueError) as error:  # such as a month 13
        raise ConfigError(f"{source} is not YAML: {error}", source=source) from error


def read_yaml(path: Path) -> dict[str, Any]:
    """Read a file of sections; an empty one has none.

    Raises:
        ConfigError: it is missing, too large, not YAML, or holds something else.
    """
    try:
        with path.open("rb") as file:
            content = file.read(MAX_BYTES + 1)
    except OSError as error:
        raise ConfigError(
            f"Configuration file {path} cannot be read: {error.strerror}.", path=path
        ) from error
    if len(content) > MAX_BYTES:
        raise ConfigError(
            f"Configuration file {path} has more than {MAX_BYTES >> 10} KiB; it is no configuration.",
            path=path,
        )
    try:
        text = content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ConfigError(f"Configuration file {path} is not YAML: {error}", path=path) from error
    tree = parse_yaml(text, f"Configuration file {path}")
    if tree is None:
        return {}
    if not isinstance(tree, dict):
        raise ConfigError(f"Configuration file {path} must hold sections, not {shortened(tree)}.", path=path)
    return tree


def shortened(value: object) -> str:
    """A value as an error shows it."""
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}…"

"""The JSON Schema says of every setting what the docstrings say, and allows what the schema allows."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, get_args

import pytest

from ris_cache.errors import ConfigError
from ris_train.config import RunConfig, parse_config, schema
from ris_train.config.json_schema import DIALECT, json_schema, setting_texts
from ris_train.config.keys import all_keys

SCHEMA = json_schema()


def setting(key: str) -> dict[str, Any]:
    """The schema of a setting, by references from the root."""
    section: dict[str, Any] = SCHEMA
    *sections, name = key.split(".")
    for part in sections:
        section = SCHEMA["$defs"][section["properties"][part]["$ref"].rpartition("/")[2]]
    found: dict[str, Any] = section["properties"][name]
    return found


@pytest.mark.parametrize("key", list(all_keys()))
def test_every_setting_is_described_and_has_its_default(key: str) -> None:
    value: Any = RunConfig().model_dump(mode="json")
    for part in key.split("."):
        value = value[part]
    found = setting(key)
    assert found["default"] == value
    assert len(found["description"]) > 5


def test_a_docstring_describes_no_setting_that_is_not_there() -> None:
    for section in (RunConfig, *(getattr(schema, name) for name in SCHEMA["$defs"])):
        assert set(setting_texts(section)) == set(section.model_fields)


def test_unknown_keys_and_wrong_values_are_wrong_by_the_schema() -> None:
    assert SCHEMA["$schema"] == DIALECT
    assert SCHEMA["additionalProperties"] is False
    assert all(section["additionalProperties"] is False for section in SCHEMA["$defs"].values())
    assert "required" not in SCHEMA
    assert setting("train.precision")["enum"] == ["fp32", "bf16", "fp16"]
    assert setting("train.lr")["exclusiveMinimum"] == 0


VALUES = [
    *(
        None,
        True,
        False,
        "",
        "5",
        "yes",
        "all",
        "cls",
        "category",
        "fp32",
        "sent",
        "wandb",
        "bicubic",
        "keep",
        "pairs",
        "off",
    ),
    *(-1, -0.5, 0, 0.5, 1, 1.5, 2, 3, 5.0, 1e5, 1e300, 2**53 - 1, 2**53),
    *([], [0], [0.5, 0.9], [1, 2], [1, 0], [1, 2, 3], ["wandb", "trackio"], ["csv"], [None], {}, {"a": 1}),
]


def is_valid(value: Any, rule: dict[str, Any]) -> bool:
    """Judge by the words of JSON Schema that are used, each as draft 2020-12 defines it."""
    assert not set(rule) - {"default", "description", "title", *WORDS}, rule
    return all(WORDS[word](value, bound, rule) for word, bound in rule.items() if word in WORDS)


def is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


TYPES: dict[str, Callable[[Any], bool]] = {
    "boolean": lambda value: isinstance(value, bool),
    "string": lambda value: isinstance(value, str),
    "null": lambda value: value is None,
    "array": lambda value: isinstance(value, list),
    "number": is_number,
    "integer": lambda value: is_number(value) and value == int(value),
}
WORDS: dict[str, Callable[[Any, Any, dict[str, Any]], bool]] = {
    "type": lambda value, name, _: TYPES[name](value),
    "enum": lambda value, known, _: value in known,
    "const": lambda value, only, _: value == only,
    "anyOf": lambda value, rules, _: any(is_valid(value, rule) for rule in rules),
    "minimum": lambda value, bound, _: not is_number(value) or value >= bound,
    "maximum": lambda value, bound, _: not is_number(value) or value <= bound,
    "exclusiveMinimum": lambda value, bound, _: not is_number(value) or value > bound,
    "exclusiveMaximum": lambda value, bound, _: not is_number(value) or value < bound,
    "minItems": lambda value, bound, _: not isinstance(value, list) or len(value) >= bound,
    "maxItems": lambda value, bound, _: not isinstance(value, list) or len(value) <= bound,
    "items": lambda value, inner, _: (
        not isinstance(value, list) or all(is_valid(one, inner) for one in value)
    ),
    "prefixItems": lambda value, inner, _: (
        not isinstance(value, list)
        or all(is_valid(one, rule) for one, rule in zip(value, inner, strict=False))
    ),
}


@pytest.mark.parametrize("key", list(all_keys()))
def test_what_the_json_schema_allows_is_what_is_allowed(key: str) -> None:
    for value in VALUES:
        tree: Any = value
        for part in reversed(key.split(".")):
            tree = {part: tree}
        try:
            parse_config(tree, origin="a test")
            is_taken = True
        except ConfigError:
            is_taken = False
        assert is_taken == is_valid(value, setting(key)), value


def test_every_kind_of_value_is_taken_somewhere_and_refused_somewhere() -> None:
    """Else the test above could not fail for it."""
    judged = {key: [is_valid(value, setting(key)) for value in VALUES] for key in all_keys()}
    assert all(any(found) and not all(found) for found in judged.values())


def test_the_trackers_of_the_schema_are_those_there_are() -> None:
    from ris_train.tracking import TRACKERS

    assert get_args(schema.Tracker) == TRACKERS

"""The JSON Schema says of every setting what the docstrings say, and allows what the schema allows."""

from __future__ import annotations

from typing import Any

import pytest

from ris_train.config import RunConfig, schema
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

"""Where values come from: the order of the layers, and the names of settings in the environment."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from ris_cache.errors import ConfigError
from ris_train.config import RunConfig, load_config, resolve_config
from ris_train.config.keys import all_keys, from_environment, require_known, variable

KEYS = list(all_keys())
LAYERS = ("default", "recipe", "file", "environment", "--set")


@given(set_in=st.sets(st.sampled_from(LAYERS[2:])))
@settings(deadline=None)
def test_the_highest_layer_that_sets_a_value_wins_and_is_its_origin(
    set_in: set[str], tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.getbasetemp() / "layers.yaml"
    path.write_text("train: {lr: 0.2}" if "file" in set_in else "", encoding="utf-8")
    resolved = resolve_config(
        recipe="tiny",
        config_path=path,
        environment={"RIS_TRAIN__LR": "0.3"} if "environment" in set_in else {},
        overrides=["train.lr=0.4"] if "--set" in set_in else [],
    )
    expected = {
        "recipe": (1e-3, "recipe tiny"),
        "file": (0.2, f"file {path}"),
        "environment": (0.3, "RIS_TRAIN__LR"),
        "--set": (0.4, "--set"),
    }[max({"recipe", *set_in}, key=LAYERS.index)]
    assert (resolved.config.train.lr, resolved.origins["train.lr"]) == expected


def test_every_setting_has_a_value_and_an_origin() -> None:
    resolved = resolve_config(recipe="authors-code")
    settings = {key: (value, origin) for key, value, origin in resolved.settings()}
    assert list(settings) == KEYS
    # What no layer names is a default; of a chain of recipes the one that says it is named.
    assert settings["loss.oversample"] == (RunConfig().loss.oversample, "default")
    assert settings["train.steps"] == (100_000, "recipe paper-refcoco")
    assert settings["loss.mask_dice"] == (0.5, "recipe authors-code")
    assert settings["model.bert.weights"] == ("bert-base-uncased", "recipe paper-refcoco")


def test_settings_are_named_by_section_and_key() -> None:
    assert variable("train.lr") == "RIS_TRAIN__LR"
    assert variable("model.bert.num_layers") == "RIS_MODEL__BERT__NUM_LAYERS"
    assert len({variable(key) for key in KEYS}) == len(KEYS)


@pytest.mark.parametrize("recipe", ["tiny", "authors-code"])
def test_a_whole_configuration_passes_through_the_environment(recipe: str) -> None:
    config = load_config(recipe=recipe)
    values = {key: value for key, value, _ in resolve_config(recipe=recipe).settings()}
    environment = {variable(key): yaml.safe_dump(value) for key, value in values.items()}
    found = load_config(recipe="gres", environment=environment)
    assert found.model_copy(update={"recipe": recipe}) == config


def test_variables_of_options_and_of_others_are_no_settings() -> None:
    environment = {
        "RIS_DATA": "d",
        "RIS_CACHE": "c",
        "RIS_RUNS": "r",
        "RIS_WEIGHTS": "w",
        "HOME": "/",
        "XRIS_A": "1",
    }
    require_known(environment)
    assert from_environment(environment) == {}


@pytest.mark.parametrize("key", KEYS)
def test_a_mistyped_variable_names_the_one_that_was_meant(key: str) -> None:
    name = variable(key)
    with pytest.raises(ConfigError) as caught:
        require_known({f"{name}Z": "1"})
    assert f"{name}Z: unknown variable; did you mean {name}?" in str(caught.value)


def test_one_underscore_where_two_belong_is_explained() -> None:
    with pytest.raises(ConfigError, match=r"RIS_TRAIN_LR: unknown variable; did you mean RIS_TRAIN__LR\?"):
        load_config(recipe="tiny", environment={"RIS_TRAIN_LR": "1"})


def test_every_unknown_variable_is_named_at_once() -> None:
    with pytest.raises(ConfigError, match=r"has 3 problem\(s\)") as caught:
        require_known({"RIS_TRAIN_LR": "1", "RIS_RECIPE": "gres", "RIS_QQQQQQQ": "1"})
    message = str(caught.value)
    assert "RIS_RECIPE: a recipe is chosen by --recipe" in message
    assert "RIS_QQQQQQQ: unknown variable; settings are named like RIS_TRAIN__LR for train.lr" in message
    assert caught.value.exit_code == 2


def test_a_wrong_value_in_the_environment_names_its_variable() -> None:
    with pytest.raises(ConfigError, match=r"train\.lr: .* \(found 0\), from RIS_TRAIN__LR"):
        load_config(recipe="tiny", environment={"RIS_TRAIN__LR": "0"})
    with pytest.raises(ConfigError, match="The value of RIS_TRAIN__MILESTONES is not YAML"):
        load_config(recipe="tiny", environment={"RIS_TRAIN__MILESTONES": "[1"})


def test_a_program_does_not_read_the_environment_unasked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RIS_TRAIN__LR", "0.3")
    assert load_config(recipe="tiny").train.lr == 1e-3


def test_wrong_keys_variables_and_values_of_all_layers_are_named_at_once(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("model: 3\ntrian: {steps: 5}\n")
    with pytest.raises(ConfigError) as caught:
        load_config(
            recipe="tiny",
            config_path=path,
            environment={"RIS_TRAIN__STEP": "5", "RIS_TRAIN__LR": "[1", "RIS_TRAIN__SEED": "-1"},
            overrides=["train.steps", "train.milestones=[1", "recipe=gres", "loss.dfam=much", "data.zzz=1"],
        )
    message = str(caught.value)
    assert f"The configuration ({path}) has 10 problem(s):" in message
    for words in (
        "RIS_TRAIN__STEP: unknown variable; did you mean RIS_TRAIN__STEPS?",
        "The value of RIS_TRAIN__LR is not YAML",
        "--set takes section.key=value, not 'train.steps'",
        "The value of --set 'train.milestones=[1' is not YAML",
        "A recipe is chosen by --recipe, not by --set recipe=gres",
        "model (file",
        "trian: unknown key; did you mean 'train'?",
        "train.seed: Input should be greater than or equal to 0",
        "loss.dfam: ",
        "data.zzz: unknown key",
    ):
        assert words in message
    assert len(caught.value.facts["problems"]) == 10  # type: ignore[arg-type]

"""The configuration: what wins over what, and errors that name every mistake with the key that was meant."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import BaseModel

from ris_cache.encoders.spec import PRESETS
from ris_cache.errors import ConfigError
from ris_train.config import RunConfig, load_config, parse_config, recipes


def write(path: Path, tree: Any) -> Path:
    path.write_text(yaml.safe_dump(tree), encoding="utf-8")
    return path


def sections(model: type[BaseModel], path: tuple[str, ...] = ()) -> list[tuple[tuple[str, ...], list[str]]]:
    """Path and keys of a section and of every section inside it."""
    found = [(path, list(model.model_fields))]
    for name, field in model.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            found += sections(field.annotation, (*path, name))
    return found


ALL_SECTIONS = sections(RunConfig)


def test_the_sections_are_all_found() -> None:
    """The tests below walk them; a walk that finds too few would pass in silence."""
    assert [".".join(path) for path, _ in ALL_SECTIONS] == [
        "",
        "model",
        "model.bert",
        "loss",
        "data",
        "train",
    ]


@pytest.mark.parametrize("name", recipes())
def test_every_recipe_that_ships_loads(name: str) -> None:
    assert load_config(recipe=name).recipe == name


def test_every_preset_has_a_recipe() -> None:
    assert set(recipes()) >= set(PRESETS)


def test_the_paper_recipe_has_the_papers_settings() -> None:
    """Supplement, "Implementations": batch 32, learning rate 5e-5, 100 queries, the weights of the losses."""
    config = load_config(recipe="paper")
    assert (config.train.batch_size, config.train.lr, config.model.num_queries) == (32, 5e-5, 100)
    loss = config.loss
    assert (loss.mask_dice, loss.mask_bce, loss.dfam) == (2, 0.5, 1)
    assert (loss.dfam_dice, loss.dfam_bce, loss.dfam_vl) == (5, 5, 1)


def test_a_file_wins_over_the_recipe_and_an_override_over_both(tmp_path: Path) -> None:
    recipe = load_config(recipe="tiny")
    path = write(tmp_path / "mine.yaml", {"train": {"steps": 7, "lr": 0.5}, "model": {"num_heads": 2}})
    config = load_config(recipe="tiny", config_path=path, overrides=["train.lr=0.25"])
    assert config.train.lr == 0.25
    assert config.train.steps == 7
    assert config.model.num_heads == 2
    # What neither names is the recipe's, and where the recipe is silent, the default.
    assert config.loss.oversample == RunConfig().loss.oversample
    assert config.train.batch_size == recipe.train.batch_size
    assert config.model.bert == recipe.model.bert
    assert config.train.weight_decay == recipe.train.weight_decay


def test_of_two_overrides_of_one_key_the_later_wins() -> None:
    assert load_config(recipe="tiny", overrides=["train.steps=1", "train.steps=2"]).train.steps == 2


@pytest.mark.parametrize(
    ("override", "path", "expected"),
    [
        ("train.lr=1e-4", "train.lr", 1e-4),
        ("train.milestones=[0.5, 0.75]", "train.milestones", (0.5, 0.75)),
        ("train.val_samples=null", "train.val_samples", None),
        ("model.bert.weights=some/folder=x", "model.bert.weights", "some/folder=x"),
        (" loss.vl_exclude = category", "loss.vl_exclude", "category"),
    ],
)
def test_an_override_is_a_key_and_a_yaml_value(override: str, path: str, expected: object) -> None:
    value: Any = load_config(recipe="tiny", overrides=[override])
    for part in path.split("."):
        value = getattr(value, part)
    assert value == expected


def test_a_file_of_another_recipe_is_refused(tmp_path: Path) -> None:
    """`recipe: gres` in a file must neither be passed over in silence nor stand over another recipe's values."""
    path = write(tmp_path / "saved.yaml", load_config(recipe="paper").model_dump(mode="json"))
    assert load_config(recipe="paper", config_path=path).recipe == "paper"
    with pytest.raises(ConfigError, match=r"is of recipe 'paper', but would be laid over 'tiny'") as caught:
        load_config(recipe="tiny", config_path=path)
    assert str(path) in str(caught.value)
    with pytest.raises(ConfigError, match="is of recipe 5"):
        load_config(recipe="tiny", config_path=write(tmp_path / "odd.yaml", {"recipe": 5}))


@pytest.mark.parametrize(
    ("path", "key"), [(path, key) for path, keys in ALL_SECTIONS for key in keys], ids=str
)
def test_a_mistyped_key_anywhere_names_the_one_that_was_meant(path: tuple[str, ...], key: str) -> None:
    mistyped = f"{key}s"
    tree: dict[str, Any] = {mistyped: 1}
    for part in reversed(path):
        tree = {part: tree}
    with pytest.raises(ConfigError) as caught:
        parse_config(tree, origin="a test")
    full = ".".join((*path, mistyped))
    assert f"{full}: unknown key; did you mean {key!r}?" in str(caught.value)


def test_a_key_like_no_other_lists_the_known_ones_of_its_section() -> None:
    with pytest.raises(ConfigError, match=r"data\.zzz: unknown key; known keys: train, val, text"):
        load_config(recipe="tiny", overrides=["data.zzz=1"])


def test_every_problem_is_named_at_once(tmp_path: Path) -> None:
    path = write(tmp_path / "bad.yaml", {"trian": {"steps": 5}, "train": {"batch_size": 0}})
    with pytest.raises(ConfigError) as caught:
        load_config(recipe="tiny", config_path=path, overrides=["model.sparse_prompt=clip", "loss.dfam=much"])
    message = str(caught.value)
    assert f"({path}) has 4 problem(s)" in message
    for line in (
        "trian: unknown key; did you mean 'train'?",
        "train.batch_size: Input should be greater than 0 (found 0)",
        "model.sparse_prompt: Input should be 'category' or 'cls' (found 'clip')",
        "loss.dfam: ",
    ):
        assert line in message
    assert len(caught.value.facts["problems"]) == 4  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "override",
    [
        "train.steps=0",
        "train.steps=1.5",
        "train.lr=0",
        "train.lr=.inf",
        "loss.mask_dice=.nan",
        "loss.importance_ratio=1.01",
        "train.milestones=[0.5, 2]",
        "model.max_tokens=2",
        "train=5",
        "train.seed=-1",
        "train.seed=9007199254740992",
        "train.steps=true",
        'train.steps="5"',
        "train.lr=true",
        'train.lr="0.1"',
        "train.compile=1",
        'train.compile="yes"',
        "train.trackers=[tensorbord]",
        "train.trackers=tensorboard",
        "loss.mask_dice=-1",
        "loss.no_target_weights=[1]",
        "model.bert.dropout=1",
    ],
)
def test_values_out_of_range_are_refused_by_the_name_of_their_key(override: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(recipe="tiny", overrides=[override])
    assert override.partition("=")[0] in str(caught.value)
    assert caught.value.exit_code == 2


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    path = tmp_path / "nowhere.yaml"
    with pytest.raises(ConfigError, match="cannot be read: No such file or directory") as caught:
        load_config(recipe="tiny", config_path=path)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"train: [1", "is not YAML"),
        (b"\xff\xfe\x00", "is not YAML"),
        (b"- train", r"must hold sections, not \['train'\]"),
        (b"just words", "must hold sections, not 'just words'"),
        (b"!!python/object/apply:os.getcwd []", "is not YAML"),
        (b"train:\n\tlr: 1", r"is not YAML: .*\n.*'\\t'"),
        (b"train: &a\n  lr: *a", r"is not YAML: aliases such as \*a are not read"),
        (b"a: &a [x, x]\nb: [*a, *a]", "aliases such as"),
        (b"train: {milestones: " + 3000 * b"[" + 3000 * b"]" + b"}", "is nested too deeply"),
        (b"{train: " * 1000 + b"1" + b"}" * 1000, "is nested too deeply"),
        (b"train: {steps: " + 5000 * b"9" + b"}", "is not YAML: Exceeds the limit"),
        (b"train: {lr: 2026-13-45}", "is not YAML: month must be in 1..12"),
        (b"train: {lr: 1}\n---\ntrain: {lr: 2}", "expected a single document"),
        (b"#" * (1 << 19), "has more than 256 KiB"),
    ],
    ids=lambda value: value if isinstance(value, str) else str(value[:12]),
)
def test_a_file_that_holds_no_sections_is_refused(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "wrong.yaml"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=message) as caught:
        load_config(recipe="tiny", config_path=path)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("section", ["train", "model.bert"])
def test_a_section_whose_settings_are_all_commented_out_changes_nothing(tmp_path: Path, section: str) -> None:
    tree: Any = None
    for part in reversed(section.split(".")):
        tree = {part: tree}
    path = write(tmp_path / "mine.yaml", tree)
    expected = load_config(recipe="tiny", overrides=["train.lr=0.5"])
    assert load_config(recipe="tiny", config_path=path, overrides=["train.lr=0.5"]) == expected


def test_a_value_in_the_place_of_a_section_is_refused_and_never_dropped(tmp_path: Path) -> None:
    path = write(tmp_path / "mine.yaml", {"train": 5})
    with pytest.raises(ConfigError, match=r"train \(file .*mine\.yaml\) is a section, set by train\.KEY"):
        load_config(recipe="tiny", config_path=path, overrides=["train.lr=0.5"])


def test_a_key_of_another_section_names_where_it_belongs() -> None:
    with pytest.raises(ConfigError, match=r"lr: unknown key; did you mean 'train\.lr'\?"):
        load_config(recipe="tiny", overrides=["lr=1"])


def test_a_value_that_fits_no_member_of_a_union_is_one_problem() -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(recipe="tiny", overrides=["train.bert_layers=some"])
    (line,) = caught.value.facts["problems"]  # type: ignore[misc]
    assert line.startswith("train.bert_layers: Input should be 'all', or: Input should be a valid integer")
    assert line.endswith("(found 'some'), from --set")


def test_a_file_does_not_choose_the_recipe(tmp_path: Path) -> None:
    path = write(tmp_path / "mine.yaml", {"extends": "gres"})
    with pytest.raises(ConfigError, match="Leave the line out and choose the recipe by --recipe gres"):
        load_config(recipe="tiny", config_path=path)


def test_the_recipe_is_not_set_by_a_key() -> None:
    with pytest.raises(ConfigError, match="chosen by --recipe, not by --set recipe=gres"):
        load_config(recipe="tiny", overrides=["recipe=gres"])


def test_an_empty_file_changes_nothing(tmp_path: Path) -> None:
    path = tmp_path / "empty.yaml"
    path.write_text("# nothing yet\n", encoding="utf-8")
    assert load_config(recipe="tiny", config_path=path) == load_config(recipe="tiny")


@pytest.mark.parametrize("override", ["train.steps", "=5", "  =5", "train..lr=5", ".lr=5", "train.=5"])
def test_an_override_without_key_or_value_is_refused(override: str) -> None:
    with pytest.raises(ConfigError, match=r"--set takes section\.key=value"):
        load_config(recipe="tiny", overrides=[override])


def test_an_override_whose_value_is_not_yaml_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"The value of --set 'train\.milestones=\[1' is not YAML"):
        load_config(recipe="tiny", overrides=["train.milestones=[1"])


@pytest.mark.parametrize(
    ("content", "where"),
    [
        ("train:\n  lr: 1\ntrain:\n  steps: 5\n", "'train' is there twice, first in line 1"),
        ("train:\n  lr: 1\n  steps: 5\n  lr: 2\n", "'lr' is there twice, first in line 2"),
        ("train: {lr: 1, 'lr': 2}", "'lr' is there twice, first in line 1"),
    ],
)
def test_a_key_that_is_there_twice_is_refused(tmp_path: Path, content: str, where: str) -> None:
    """YAML readers keep the last one in silence: of two sections `train` the first would be lost."""
    path = tmp_path / "twice.yaml"
    path.write_text(content, encoding="utf-8")
    with pytest.raises(ConfigError, match=where):
        load_config(recipe="tiny", config_path=path)
    assert load_config(recipe="tiny", overrides=["train={lr: 1, steps: 5}"]).train.steps == 5


@pytest.mark.parametrize(
    ("text", "key", "expected"),
    [
        ("train.steps=1e5", "steps", 100_000),
        ("train.steps=5.0", "steps", 5),
        ("train.lr=1e-4", "lr", 1e-4),
        ("train.lr=.5E-3", "lr", 5e-4),
        ("train.lr=+3.e+0", "lr", 3.0),
        ("train.lr=1", "lr", 1.0),
        ("train.bert_layers=1e1", "bert_layers", 10),
        ("train.val_samples=2e2", "val_samples", 200),
    ],
)
def test_numbers_may_be_written_with_an_exponent(text: str, key: str, expected: float) -> None:
    found = getattr(load_config(recipe="tiny", overrides=[text]).train, key)
    assert found == expected
    assert type(found) is type(expected)


@pytest.mark.parametrize("text", ["010", "-010", "+07", "00", "0_1", "1:30", "1:30.5", "190:20:30"])
def test_a_number_that_yaml_reads_otherwise_than_people_do_is_refused(text: str) -> None:
    """YAML 1.1 takes 010 for 8 and 1:30 for 90."""
    with pytest.raises(ConfigError, match=rf"{re.escape(text)} is a number that can be read in two ways"):
        load_config(recipe="tiny", overrides=[f"train.steps={text}"])
    quoted = load_config(recipe="tiny", overrides=[f"model.bert.weights='{text}'"])
    assert quoted.model.bert.weights == text


@pytest.mark.parametrize(("text", "expected"), [("0.1", 0.1), ("0", 0.0), ("0e0", 0.0), ("0.0_1", 0.01)])
def test_a_zero_before_the_point_is_no_base(text: str, expected: float) -> None:
    assert load_config(recipe="tiny", overrides=[f"train.weight_decay={text}"]).train.weight_decay == expected


def test_an_error_shows_where_a_value_is_from_and_not_all_of_a_long_one(tmp_path: Path) -> None:
    path = write(tmp_path / "long.yaml", {"train": {"lr": {"a": "b" * 10_000}}})
    with pytest.raises(ConfigError, match=r"train\.lr: .*, from file .*long\.yaml") as caught:
        load_config(recipe="tiny", config_path=path)
    assert len(str(caught.value)) < 500
    with pytest.raises(ConfigError, match=r"trian: unknown key; did you mean 'train'\?, from --set"):
        load_config(recipe="tiny", overrides=["trian.lr=1"])
    with pytest.raises(ConfigError, match=r"train\.LR: unknown key; did you mean 'lr'\?"):
        load_config(recipe="tiny", overrides=["train.LR=1"])


def test_an_unknown_recipe_lists_those_there_are() -> None:
    with pytest.raises(
        ConfigError, match="No recipe is called 'papre'; there are authors-code, gres, paper, paper-refcoco, "
    ):
        load_config(recipe="papre")


@pytest.mark.parametrize("name", recipes())
def test_a_saved_configuration_gives_the_same_configuration_back(name: str, tmp_path: Path) -> None:
    config = load_config(recipe=name, overrides=["train.milestones=[0.1, 0.2]", "train.lr=3.3e-5"])
    path = write(tmp_path / "config.yaml", config.model_dump(mode="json"))
    assert parse_config(yaml.safe_load(path.read_text()), origin=str(path)) == config
    assert load_config(recipe=name, config_path=path) == config


def test_a_configuration_cannot_be_changed_in_place() -> None:
    config = load_config(recipe="tiny")
    with pytest.raises(ValueError, match="frozen"):
        config.train.steps = 5


def test_resolving_a_configuration_does_not_import_torch() -> None:
    program = (
        "import sys; from ris_train.config import load_config; load_config(recipe='paper'); "
        "sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0

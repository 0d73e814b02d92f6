"""The recipes that ship: what they say of themselves, and how they extend one another."""

from __future__ import annotations

from pathlib import Path

import pytest

from ris_cache.datasets.selection import parse_selections
from ris_cache.errors import ConfigError
from ris_train.config import RECIPE_DIR, load_config, recipe_head, recipes
from ris_train.config.recipes import recipe_layers
from ris_train.scoring import RULES

PAPER_SIZE = (
    "authors-code",
    "gres",
    "paper",
    "paper-refcoco",
    "paper-refcoco+",
    "paper-refcocog-umd",
    "ref-zom",
)


def test_these_recipes_ship() -> None:
    assert set(recipes()) == {*PAPER_SIZE, "tiny", "tiny-gres"}


@pytest.mark.parametrize("name", recipes())
def test_a_recipe_opens_with_its_command_its_purpose_and_its_cost(name: str) -> None:
    head = recipe_head(name)
    assert head.name == name
    assert head.command.startswith("ris train --cache ./feats")
    # Without --recipe the cache's preset names the recipe.
    assert f"--recipe {name}" in head.command or name == "tiny"
    assert head.needs.startswith(f"a cache of preset {'paper' if name in PAPER_SIZE else 'tiny'}")
    assert head.about
    assert head.cost
    assert not head.about.startswith("Cost")


@pytest.mark.parametrize("name", PAPER_SIZE)
def test_a_recipe_that_nobody_ran_says_so(name: str) -> None:
    cost = recipe_head(name).cost
    assert cost.startswith("not measured") or cost == "those of paper-refcoco."


@pytest.mark.parametrize("name", PAPER_SIZE)
def test_recipes_of_the_papers_size_train_in_mixed_precision(name: str) -> None:
    expected = "fp16" if name == "authors-code" else "bf16"
    assert load_config(recipe=name).train.precision == expected


@pytest.mark.parametrize("name", recipes())
def test_a_recipe_reads_splits_that_exist_by_rules_that_exist(name: str) -> None:
    data = load_config(recipe=name).data
    assert all(selection.split for selection in parse_selections(f"{data.train},{data.val}"))
    assert data.rules is None or data.rules in RULES


def test_paper_is_another_name_of_paper_refcoco() -> None:
    """A cache of preset paper is trained by it where no recipe is named."""
    one, other = load_config(recipe="paper"), load_config(recipe="paper-refcoco")
    assert one.recipe == "paper"
    assert one.model_copy(update={"recipe": other.recipe}) == other


@pytest.mark.parametrize(
    ("name", "train", "val"),
    [
        ("paper-refcoco+", "refcoco+:train", "refcoco+:val"),
        ("paper-refcocog-umd", "refcocog/umd:train", "refcocog/umd:val"),
    ],
)
def test_the_other_datasets_are_trained_on_with_the_same_settings(name: str, train: str, val: str) -> None:
    base, found = load_config(recipe="paper-refcoco"), load_config(recipe=name)
    assert (found.data.train, found.data.val) == (train, val)
    update = {"recipe": name, "data": base.data.model_copy(update={"train": train, "val": val})}
    assert found == base.model_copy(update=update)


def shelf(directory: Path, **texts: str) -> dict[str, Path]:
    found = {name: directory / f"{name}.yaml" for name in texts}
    for name, path in found.items():
        path.write_text(texts[name], encoding="utf-8")
    return found


def test_a_recipe_is_laid_over_what_it_extends(tmp_path: Path) -> None:
    known = shelf(
        tmp_path, a="train: {lr: 1}", b="extends: a\ntrain: {lr: 2}", c="extends: b\ndata: {val: x}"
    )
    assert recipe_layers("c", known) == [
        ("a", {"train": {"lr": 1}}),
        ("b", {"train": {"lr": 2}}),
        ("c", {"data": {"val": "x"}}),
    ]


def test_recipes_that_extend_each_other_in_a_circle_are_refused(tmp_path: Path) -> None:
    known = shelf(tmp_path, a="extends: b", b="extends: a")
    with pytest.raises(ConfigError, match="in a circle: a → b → a"):
        recipe_layers("a", known)


def test_extending_what_does_not_exist_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="No recipe is called 'z'; there are a"):
        recipe_layers("a", shelf(tmp_path, a="extends: z"))


def test_the_recipes_lie_in_the_package() -> None:
    assert {path.parent for path in recipes().values()} == {RECIPE_DIR}

"""The whole configuration of a training run, typed, checked at once, and saved with every output."""

from __future__ import annotations

from ris_train.config.loading import ResolvedConfig, load_config, parse_config, resolve_config
from ris_train.config.recipes import RECIPE_DIR, RecipeHead, recipe_head, recipes
from ris_train.config.schema import (
    BertConfig,
    DataConfig,
    LossConfig,
    ModelConfig,
    RunConfig,
    TrainConfig,
)

__all__ = [
    "RECIPE_DIR",
    "BertConfig",
    "DataConfig",
    "LossConfig",
    "ModelConfig",
    "RecipeHead",
    "ResolvedConfig",
    "RunConfig",
    "TrainConfig",
    "load_config",
    "parse_config",
    "recipe_head",
    "recipes",
    "resolve_config",
]

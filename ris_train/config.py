"""The whole configuration of a training run, typed, checked at once, and saved with every output.

Precedence: defaults < recipe or `--config FILE` < `--set section.key=value`. Unknown keys are errors.
Recipes are YAML files beside this module, named after the preset of the cache they suit.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from ris_cache.errors import ConfigError

RECIPE_DIR = Path(__file__).parent / "recipes"

Positive = Annotated[int, Field(gt=0)]
NonNegative = Annotated[int, Field(ge=0)]
PositiveRate = Annotated[float, Field(gt=0)]
Share = Annotated[float, Field(ge=0, le=1)]


class _Section(BaseModel):
    # YAML can spell .inf and .nan, which no setting means and JSON cannot hold.
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class BertConfig(_Section):
    """The language model.

    Attributes:
        weights: hub name or folder of pretrained weights; null only together with random weights.
        vocabulary: `package:tiny` for the small vocabulary that ships with ris, or a folder or hub name of a
            tokenizer; null takes the tokenizer that lies beside the weights.
        hidden_size, num_layers, num_heads, ffn_dim: sizes, used where no pretrained weights state them.
        vocab_size: word pieces, for `ris params`; a model that is built takes its tokenizer's.
        dropout: of hidden states and attention, while training.
    """

    weights: str | None = "bert-base-uncased"
    vocabulary: str | None = None
    hidden_size: Positive = 768
    num_layers: Positive = 12
    num_heads: Positive = 12
    ffn_dim: Positive = 3072
    vocab_size: Positive = 30522
    dropout: Share = 0.1


class ModelConfig(_Section):
    """Sizes of the trainable parts; widths that the cache decides are not repeated here.

    Attributes:
        sparse_prompt: `category` reads the target's category, `cls` the sentence alone (supplement Sec. 2).
        no_target_head: whether the model judges if an expression refers to anything at all (supplement
            Eq. 1). Expressions that refer to nothing are trained on with it, and left out without it. They
            have no category, so it goes with `cls`.
    """

    sparse_prompt: Literal["category", "cls"] = "category"
    no_target_head: bool = False
    num_queries: Positive = 100
    num_heads: Positive = 8
    ffn_dim: Positive = 1024
    pixel_decoder_layers: Positive = 6
    num_deformable_points: Positive = 4
    norm_groups: Positive = 32
    max_tokens: Annotated[int, Field(ge=3)] = 35
    bert: BertConfig = BertConfig()


class LossConfig(_Section):
    """Weights λ of the losses (supplement, "Implementations") and how their points are drawn.

    Attributes:
        no_target: λ_nt of the no-target head's cross-entropy (supplement Eq. 2).
        no_target_weights: weights of its two classes: refers to something, refers to nothing.
        mask_size: side of the square grid on which M_SAM is compared with its target.
        num_points: points per mask for matching and DFAM's losses.
        oversample: candidates drawn per point before the most uncertain are kept (PointRend).
        importance_ratio: share of the points chosen by uncertainty.
        vl_exclude: pairs of expressions that are not counted as negatives: those of the same referent or of
            overlapping targets in one image, or in addition those of the same category.
    """

    mask_dice: float = 2.0
    mask_bce: float = 0.5
    dfam: float = 1.0
    dfam_dice: float = 5.0
    dfam_bce: float = 5.0
    dfam_vl: float = 1.0
    no_target: float = 0.1
    no_target_weights: tuple[PositiveRate, PositiveRate] = (0.9, 1.1)
    mask_size: Positive = 1024
    num_points: Positive = 12544
    oversample: Annotated[float, Field(ge=1)] = 3.0
    importance_ratio: Share = 0.75
    vl_exclude: Literal["referent", "category"] = "referent"


class DataConfig(_Section):
    """Which expressions are read.

    Attributes:
        train: split to train on, such as `refcoco:train`, or a comma list of splits to merge.
        val: split that chooses the best checkpoint.
        text: `raw` as the annotator typed it (the habit of this line of work), or the cleaned `sent`.
        rules: rule set that scores `val`, one of `ris eval --rules`; null for the one of its dataset.
        leakage: what a merge does with training images that are in a validation or test split of any
            dataset of the cache: `exclude` leaves them out, `keep` trains on them and counts them. A single
            split is never filtered.
        integrity: when features are compared with their checksums: each image once (`first-open`), always
            (`every-read`), or never (`off`).
    """

    train: str = "refcoco:train"
    val: str = "refcoco:val"
    text: Literal["raw", "sent"] = "raw"
    rules: str | None = None
    leakage: Literal["exclude", "keep"] = "exclude"
    integrity: Literal["off", "first-open", "every-read"] = "first-open"


class TrainConfig(_Section):
    """The optimiser, its schedule, and when to look.

    Attributes:
        milestones: shares of `steps` at which the learning rate is multiplied by 0.1.
        eval_every: steps between evaluations of `data.val`; the last step always evaluates.
        val_samples: at most so many expressions, evenly spread, in those evaluations; null for all.
    """

    steps: Positive = 100_000
    batch_size: Positive = 32
    lr: PositiveRate = 5e-5
    weight_decay: Annotated[float, Field(ge=0)] = 0.05
    clip_grad_norm: PositiveRate = 0.01
    milestones: tuple[Share, ...] = (0.6, 0.9)
    warmup_steps: NonNegative = 0
    eval_every: Positive = 5_000
    val_samples: Positive | None = None
    log_every: Positive = 50
    seed: NonNegative = 0


class RunConfig(_Section):
    """Everything that decides what a training run computes."""

    recipe: str = "paper"
    model: ModelConfig = ModelConfig()
    loss: LossConfig = LossConfig()
    data: DataConfig = DataConfig()
    train: TrainConfig = TrainConfig()


def recipes() -> dict[str, Path]:
    """Name and file of each recipe that ships."""
    paths = {path.stem: path for path in RECIPE_DIR.glob("*.yaml")}
    return {name: paths[name] for name in sorted(paths)}


def load_config(*, recipe: str, config_path: Path | None = None, overrides: Iterable[str] = ()) -> RunConfig:
    """Resolve the configuration.

    Args:
        recipe: name of a shipped recipe to start from.
        config_path: YAML file laid over the recipe.
        overrides: `section.key=value` strings, the value in YAML, laid over both.

    Raises:
        ConfigError: a file that is missing or not YAML, an unknown key (with the nearest known one), or a
            value of the wrong kind; every problem is named.
    """
    known = recipes()
    if recipe not in known:
        raise ConfigError(f"No recipe is called {recipe!r}; there are {', '.join(known)}.", recipe=recipe)
    tree = _read_yaml(known[recipe])
    if config_path is not None:
        _merge(tree, _read_yaml(config_path))
    for override in overrides:
        _merge(tree, _parse_override(override))
    return parse_config(tree | {"recipe": recipe}, origin=str(config_path or f"recipe {recipe}"))


def parse_config(tree: Mapping[str, Any], *, origin: str) -> RunConfig:
    """Check a tree of plain values; `origin` names it in errors.

    Raises:
        ConfigError: as `load_config`.
    """
    try:
        return RunConfig.model_validate(dict(tree))
    except ValidationError as error:
        lines = [_describe(problem) for problem in error.errors()]
        raise ConfigError(
            f"The configuration ({origin}) has {len(lines)} problem(s):\n  " + "\n  ".join(lines),
            problems=lines,
        ) from error


def _describe(problem: Any) -> str:
    path = ".".join(str(part) for part in problem["loc"])
    if problem["type"] != "extra_forbidden":
        return f"{path}: {problem['msg']} (found {problem['input']!r})"
    section: type[BaseModel] = RunConfig
    for part in problem["loc"][:-1]:
        section = section.model_fields[str(part)].annotation  # type: ignore[assignment]
    known = list(section.model_fields)
    nearest = difflib.get_close_matches(str(problem["loc"][-1]), known, n=1)
    hint = f"did you mean {nearest[0]!r}?" if nearest else f"known keys: {', '.join(known)}"
    return f"{path}: unknown key; {hint}"


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        tree = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(
            f"Configuration file {path} cannot be read: {error.strerror}.", path=path
        ) from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"Configuration file {path} is not YAML: {error}", path=path) from error
    if tree is None:
        return {}
    if not isinstance(tree, dict):
        raise ConfigError(f"Configuration file {path} must hold sections, not {tree!r}.", path=path)
    return tree


def _parse_override(text: str) -> dict[str, Any]:
    key, separator, value = text.partition("=")
    if not separator or not key.strip():
        raise ConfigError(f"--set takes section.key=value, not {text!r}.", override=text)
    try:
        leaf: Any = yaml.safe_load(value)
    except yaml.YAMLError as error:
        raise ConfigError(f"The value of --set {text!r} is not YAML: {error}", override=text) from error
    for part in reversed(key.strip().split(".")):
        leaf = {part: leaf}
    assert isinstance(leaf, dict)
    return leaf


def _merge(base: dict[str, Any], over: Mapping[str, Any]) -> None:
    """Lay `over` on `base` in place, section by section."""
    for key, value in over.items():
        if isinstance(value, Mapping) and isinstance(base.get(key), dict):
            _merge(base[key], value)
        else:
            base[key] = value

"""What a shared model says of itself: config.json, which is read again, and README.md, for people."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Final, Literal

import yaml
from pydantic import BaseModel, ConfigDict, TypeAdapter, ValidationError, field_validator

from ris_cache.encoders.spec import EncoderSpec
from ris_cache.errors import CheckpointError
from ris_cache.store.files import is_safe_relative, sha256_file
from ris_train.arithmetic import feature_arithmetic
from ris_train.checkpoint import CheckpointMetadata
from ris_train.run import RunDirectory

WEIGHTS_NAME = "model.safetensors"
RECORD_NAME = "config.json"
CARD_NAME = "README.md"
TOKENIZER_NAME = "tokenizer"
UNKNOWN_LICENCE = "unknown"
NOT_RECORDED = "Not recorded.\n"
LIBRARY_NAME: Final = "ris"
PIPELINE_TAG: Final = "image-segmentation"
# In the alphabet's order, as the hub's mixin has them; one of them is its own.
TAGS: Final = ("clip", "model_hub_mixin", "referring-image-segmentation", "segment-anything")


class _Record(BaseModel):
    # A score over nothing is NaN, for which JSON has no number.
    model_config = ConfigDict(extra="forbid", frozen=True, ser_json_inf_nan="strings")


class TrainedOn(_Record):
    """What one split gave to the training set: expressions and the images that they are of."""

    selection: str
    expressions: int
    images: int


class ReportedScore(_Record):
    """Scores of the model on one split by one rule set.

    Attributes:
        grid, threshold: of the rule set's view.
        num_samples: expressions that were scored.
        category_source: which category the model was given.
        expressions: `own`, or how they were shuffled.
        values: by metric, fractions, None where undefined.
        measured: by `ris eval`, or while it trained, on the split that chose the run's best checkpoint.
    """

    split: str
    rules: str
    grid: str
    threshold: float | str
    num_samples: int
    category_source: str
    expressions: str
    values: dict[str, float | None]
    measured: Literal["ris eval", "training"]


class ModelRecord(_Record):
    """Content of config.json.

    Attributes:
        name: of the run.
        ris_version: of the ris that wrote it.
        checkpoint: what the checkpoint says of itself: configuration, encoders, fingerprint, weights,
            categories.
        trained_on: empty if the run did not record it.
        scores: empty if it was not evaluated.
        files: SHA-256 of each file that a model is loaded from, by posix path relative to the folder.
    """

    format: Literal["ris-model"] = "ris-model"
    format_version: Literal[1] = 1
    name: str
    ris_version: str
    checkpoint: CheckpointMetadata
    trained_on: tuple[TrainedOn, ...]
    scores: tuple[ReportedScore, ...]
    files: dict[str, str]

    @field_validator("files")
    @classmethod
    def _files_stay_in_the_folder(cls, value: dict[str, str]) -> dict[str, str]:
        outside = [name for name in value if not is_safe_relative(name)]
        if outside:
            raise ValueError(f"{outside[0]!r} is not a plain relative path")
        in_tokenizer = [name for name in value if name.startswith(f"{TOKENIZER_NAME}/")]
        strangers = value.keys() - {WEIGHTS_NAME, *in_tokenizer}
        if strangers:
            raise ValueError(f"{min(strangers)!r} is no file that a model is loaded from")
        if value and WEIGHTS_NAME not in value:
            raise ValueError(f"{WEIGHTS_NAME} is not among them")
        if value and not in_tokenizer:
            raise ValueError(f"no file of {TOKENIZER_NAME}/ is among them")
        return value

    @field_validator("checkpoint")
    @classmethod
    def _checkpoint_can_be_used(cls, value: CheckpointMetadata) -> CheckpointMetadata:
        TypeAdapter(EncoderSpec).validate_json(json.dumps(value.encoders), strict=True)
        for role in ("sam", "clip"):
            seed = value.weights.get(role, {}).get("seed", "")
            if role not in value.weight_labels or type(seed) not in (int, type(None)):
                raise ValueError(f"the weights of {role} are not described")
        names = value.categories.names
        if len(names) != len(value.categories.ids):
            raise ValueError("the categories have not as many names as ids")
        if value.config.model.sparse_prompt == "category" and not names:
            raise ValueError("the model reads a category, and there is none")
        return value


def read_record(folder: Path) -> ModelRecord:
    """Read what a folder says of its model, without the weights.

    Raises:
        CheckpointError: there is no model of this version of ris.
    """
    path = folder / RECORD_NAME
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError as error:
        what = (
            f"{folder} is a training run. Name it with --run, or write its model as a folder with "
            "`ris runs export`."
            if RunDirectory(folder).config_path.is_file()
            else f"{folder} has no {RECORD_NAME}, so it holds no model of ris."
        )
        raise CheckpointError(what, path=folder) from error
    except (OSError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}.", path=path) from error
    try:
        record = ModelRecord.model_validate_json(text)
    except ValidationError as error:
        problem = error.errors()[0]
        where = ".".join(str(part) for part in problem["loc"])
        raise CheckpointError(
            f"{path} does not describe a model of this version of ris: {where}: {problem['msg']}.", path=path
        ) from error
    if not record.files:
        raise CheckpointError(f"{path} names no files. Export the model again.", path=path)
    return record


def require_whole(folder: Path, record: ModelRecord) -> None:
    """Refuse files that are not those which config.json was written for.

    Raises:
        CheckpointError: one is missing, or another; or the tokenizer has one more.
    """
    for path in sorted((folder / TOKENIZER_NAME).rglob("*")):
        if not path.is_dir() and path.relative_to(folder).as_posix() not in record.files:
            raise CheckpointError(
                f"{path} is not among the files that {RECORD_NAME} names, and tokenizers read what lies in "
                "their folder. Remove it, or fetch or export the model again.",
                path=path,
            )
    for name, expected in record.files.items():
        path = folder / name
        if not path.is_file():
            raise CheckpointError(
                f"{path} is missing, which {RECORD_NAME} names. Fetch or export the model again.", path=path
            )
        found = sha256_file(path).sha256
        if found != expected:
            raise CheckpointError(
                f"{path} is not the file that {RECORD_NAME} describes (sha256 {found[:12]}, expected "
                f"{expected[:12]}): damaged, or of another model. Fetch or export the model again.",
                path=path,
                expected=expected,
                found=found,
            )


def render_card(record: ModelRecord, *, licence: str) -> str:
    """Write the model card in Markdown, with the hub's front matter.

    Args:
        record: of the model.
        licence: identifier as the hub lists them; `unknown` is a placeholder, and the card says so.
    """
    checkpoint = record.checkpoint
    config = checkpoint.config
    reads_category = config.model.sparse_prompt == "category"
    arithmetic = feature_arithmetic(checkpoint) or "not known"
    parts = [
        _front_matter(licence),
        f"# {record.name}\n",
        "Referring image segmentation: a mask for what an expression refers to, from frozen SAM and CLIP "
        f"features. Recipe `{config.recipe}`, step {checkpoint.step}, written by ris {record.ris_version}.\n",
        "## Use\n",
        _usage(record, reads_category=reads_category),
        "## What it rests on\n",
        _table(
            ["", "value"],
            [
                ["encoders", f"preset `{checkpoint.encoder_spec.preset}`"],
                *[[f"{role} weights", f"`{label}`"] for role, label in checkpoint.weight_labels.items()],
                ["cache fingerprint", f"`{checkpoint.fingerprint}`"],
                ["arithmetic of the features", arithmetic],
                ["category read", "of the target, as CLIP text" if reads_category else "none"],
                ["no-target head", "yes" if config.model.no_target_head else "no"],
                ["expressions read", f"`{config.data.text}`"],
            ],
        ),
        "The weights of SAM and CLIP are not in this repository; features of other weights are refused.\n",
        "## Training data\n",
        _trained_on(record.trained_on, config.train.overfit),
        "## Scores\n",
        _scores(record.scores, config.train.overfit),
        "## Licence\n",
        _licence(licence),
    ]
    return "\n".join(parts)


def _front_matter(licence: str) -> str:
    facts = {
        "library_name": LIBRARY_NAME,
        "pipeline_tag": PIPELINE_TAG,
        "license": licence,
        "tags": [*TAGS],
    }
    return f"---\n{yaml.safe_dump(facts, sort_keys=False)}---\n"


def _usage(record: ModelRecord, *, reads_category: bool) -> str:
    hint = "  # CLIP predicts the category, unless you name it: category=…" if reads_category else ""
    return "\n".join(
        [
            "```python",
            "from ris_train.live import Segmenter",
            "from ris_train.pretrained import RISModel",
            "",
            'model = RISModel.from_pretrained("path or owner/name")',
            "segmenter = Segmenter.load(model)",
            f'(found,) = segmenter("street.jpg", "the lady in the blue shirt"){hint}',
            "found.mask  # bool[H, W] in the image's own frame",
            "```",
            "",
        ]
    )


def _trained_on(parts: Sequence[TrainedOn], overfit: int | None) -> str:
    rows = [[f"`{part.selection}`", f"{part.expressions:,}", f"{part.images:,}"] for part in parts]
    table = _table(["split", "expressions", "images"], rows) if parts else NOT_RECORDED
    if overfit is None or 0 < sum(part.expressions for part in parts) <= overfit:
        return table
    only = f"**Only the first {overfit:,} expressions of the training set were used** (`train.overfit`)."
    return f"{only}\n\n{table}"


def _scores(scores: Sequence[ReportedScore], overfit: int | None) -> str:
    """One table per set of metrics, in percent, each row with all that its numbers mean."""
    if not scores:
        return "Not evaluated.\n"
    tables = []
    for metrics in dict.fromkeys(tuple(score.values) for score in scores):
        rows = [
            [
                f"`{score.split}`",
                score.rules,
                score.grid,
                str(score.threshold),
                f"{score.num_samples:,}",
                score.category_source,
                score.expressions,
                score.measured,
                *[_percent(score.values[metric]) for metric in metrics],
            ]
            for score in scores
            if tuple(score.values) == metrics
        ]
        terms = ["split", "rules", "grid", "threshold", "samples", "category", "expressions", "measured by"]
        tables.append(_table([*terms, *metrics], rows))
    trial = (
        "by which the run's best checkpoint was chosen, so it is no test."
        if overfit is None
        else "that it was trained on."
    )
    return "\n".join(
        [
            *tables,
            "In percent. The rules are those of `docs/metrics.md` in ris; the category is the one that the "
            "model was given: annotated, predicted by CLIP, or none. What was measured in training is on the "
            f"expressions {trial}\n",
        ]
    )


def _licence(licence: str) -> str:
    own = (
        "**Not chosen yet.** Choose one before others use the model: set `license` above and this line."
        if licence == UNKNOWN_LICENCE
        else f"`{licence}`"
    )
    return f"{own} The weights and data that it was trained from have terms of their own.\n"


def _table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join("| " + " | ".join(_cell(cell) for cell in line) + " |" for line in lines) + "\n"


def _cell(text: str) -> str:
    return " ".join(text.replace("|", "\\|").split())


def _percent(fraction: float | None) -> str:
    return "–" if fraction is None else f"{100 * fraction:.2f}"

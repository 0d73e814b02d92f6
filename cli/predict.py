"""`ris predict`: one image, one or several expressions, a mask each."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cli.options import (
    DEFAULT_RUNS,
    ClipWeightsOption,
    DeviceOption,
    JsonOption,
    RunOption,
    RunsOption,
    SamWeightsOption,
    choose_device,
)
from cli.render import print_json, print_table
from ris_cache.datasets.fields import is_storable, shown
from ris_cache.errors import ConfigError

if TYPE_CHECKING:
    import torch

    from ris_train.predict import Prediction
    from ris_train.pretrained import RISModel

_JUDGEMENTS = {None: "", True: "refers to nothing in the image", False: "refers to something"}


def predict(
    image: Annotated[Path, typer.Option("--image", help="Image file.")],
    text: Annotated[list[str], typer.Option("--text", help="What to look for; repeatable.")],
    out: Annotated[Path, typer.Option("--out", help="Directory for the masks and the overlays.")] = Path(),
    category: Annotated[
        str | None, typer.Option(help="Category of the target; predicted by CLIP if the model reads one.")
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(
            "--model",
            help="Instead of a run: a folder that `ris runs export` wrote, or owner/name on the Hugging Face "
            "hub.",
        ),
    ] = None,
    run: RunOption = None,
    runs: RunsOption = DEFAULT_RUNS,
    sam_weights: SamWeightsOption = None,
    clip_weights: ClipWeightsOption = None,
    device: DeviceOption = None,
    json: JsonOption = False,
) -> None:
    """Write the mask (PNG, 0 and 255) and an overlay of what each expression refers to.

    A model with a no-target head may find that it refers to nothing; the mask is empty then. Of several
    expressions, the files are numbered in their order.

    Example: ris predict --image street.jpg --text "the lady in the blue shirt" --text "the left bus"
    """
    if model is not None and run is not None:
        raise ConfigError("--model and --run each name a model; give one of them.")
    if any(not one.strip() for one in text):
        raise ConfigError("The expression is empty; say what to look for with --text.")
    for one in text:
        if not is_storable(one):  # bytes that are not UTF-8 arrive as lone surrogates
            raise ConfigError(f"The expression is no valid text: {shown(one)}. Write --text in UTF-8.")

    from ris_train.live import Segmenter
    from ris_train.predict import predict as run_prediction
    from ris_train.predict import save_prediction

    trained, used = _load(model, runs, run, choose_device(device))
    segmenter = Segmenter.load(trained, sam_weights=sam_weights, clip_weights=clip_weights)
    stems = [image.stem] if len(text) == 1 else [f"{image.stem}.{number + 1}" for number in range(len(text))]
    found = [
        _Written(one, prediction, *save_prediction(prediction, out, stem))
        for one, stem, prediction in zip(
            text, stems, run_prediction(image, text, segmenter, category=category), strict=True
        )
    ]
    labels = trained.metadata.weight_labels
    if json:
        if len(found) == 1:
            print_json({**found[0].document(), **used, "weights": labels})
        else:
            predictions = [{"text": one.text, **one.document()} for one in found]
            print_json({"predictions": predictions, **used, "weights": labels})
        return
    origin = {**used, **{f"{role} weights": label for role, label in labels.items()}}
    for written in found:
        _print(image, written, origin if written is found[-1] else {})


def _load(
    model: str | None, runs: Path, run: str | None, device: torch.device
) -> tuple[RISModel, dict[str, str | int]]:
    """Load the model that was named, or that of a run; also returns which it is, in words."""
    from ris_train.pretrained import RISModel
    from ris_train.run import find_run

    if model is not None:
        trained = RISModel.from_pretrained(model, device=device)
        return trained, {"model": model, "name": trained.record.name, "step": trained.metadata.step}
    found = find_run(runs, run)
    trained = RISModel.from_run(found, device=device)
    return trained, {"run": str(found.path), "checkpoint": "best", "step": trained.metadata.step}


@dataclass(frozen=True, slots=True)
class _Written:
    """A prediction and where its files are."""

    text: str
    prediction: Prediction
    mask_path: Path
    overlay_path: Path

    @property
    def share(self) -> float:
        return float(self.prediction.mask.mean())

    def document(self) -> dict[str, Any]:
        return {
            "mask": str(self.mask_path),
            "overlay": str(self.overlay_path),
            "share": self.share,
            "says_no_target": self.prediction.says_no_target,
            "category": self.prediction.category,
            "category_source": self.prediction.category_source,
        }


def _print(image: Path, written: _Written, origin: dict[str, Any]) -> None:
    """Show a prediction, and what it was made with."""
    prediction = written.prediction
    judgement = _JUDGEMENTS[prediction.says_no_target]
    print_table(
        f'{image.name}: "{written.text}"',
        ["what", "value"],
        [
            ["mask", str(written.mask_path)],
            ["overlay", str(written.overlay_path)],
            ["share of the image", f"{100 * written.share:.1f} %"],
            *([["the expression", judgement]] if judgement else []),
            ["category", f"{prediction.category or '-'} ({prediction.category_source})"],
            *[[name, str(value)] for name, value in origin.items()],
        ],
    )

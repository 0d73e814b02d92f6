"""`ris predict`: one image, one expression, one mask."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

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
from ris_cache.errors import ConfigError


def predict(
    image: Annotated[Path, typer.Option("--image", help="Image file.")],
    text: Annotated[str, typer.Option("--text", help="What to look for.")],
    out: Annotated[Path, typer.Option("--out", help="Directory for the mask and the overlay.")] = Path(),
    category: Annotated[
        str | None, typer.Option(help="Category of the target; predicted by CLIP if the model reads one.")
    ] = None,
    run: RunOption = None,
    runs: RunsOption = DEFAULT_RUNS,
    sam_weights: SamWeightsOption = None,
    clip_weights: ClipWeightsOption = None,
    device: DeviceOption = None,
    json: JsonOption = False,
) -> None:
    """Write the mask (PNG, 0 and 255) and an overlay of what the expression refers to.

    Example: ris predict --image street.jpg --text "the lady in the blue shirt"
    """
    if not text.strip():
        raise ConfigError("The expression is empty; say what to look for with --text.")

    from ris_train.predict import Predictor, save_prediction
    from ris_train.predict import predict as run_prediction
    from ris_train.run import find_run

    predictor = Predictor.load(
        find_run(runs, run),
        sam_weights=sam_weights,
        clip_weights=clip_weights,
        device=choose_device(device),
    )
    prediction = run_prediction(image, text, predictor, category=category)
    mask_path, overlay_path = save_prediction(prediction, out, image.stem)
    share = float(prediction.mask.mean())
    if json:
        print_json(
            {
                "mask": str(mask_path),
                "overlay": str(overlay_path),
                "share": share,
                "category": prediction.category,
                "category_source": prediction.category_source,
                "weights": predictor.metadata.weight_labels,
            }
        )
        return
    print_table(
        f'{image.name}: "{text}"',
        ["what", "value"],
        [
            ["mask", str(mask_path)],
            ["overlay", str(overlay_path)],
            ["share of the image", f"{100 * share:.1f} %"],
            ["category", f"{prediction.category or '-'} ({prediction.category_source})"],
            *[[f"{role} weights", label] for role, label in predictor.metadata.weight_labels.items()],
        ],
    )

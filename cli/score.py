"""`ris score`: scores of anybody's predictions."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from cli.evaluate import RulesOption
from cli.options import DEFAULT_CACHE, JsonOption
from cli.render import print_json
from cli.scores import print_results


def score(
    predictions: Annotated[
        Path, typer.Option("--predictions", help="A .json or .npz file, or a folder of PNGs.")
    ],
    split: Annotated[str, typer.Option("--split", help="What they are of: refcoco:val, or several splits.")],
    cache: Annotated[
        Path,
        typer.Option("--cache", help="Take the ground truth from this cache's tables.", envvar="RIS_CACHE"),
    ] = DEFAULT_CACHE,
    data: Annotated[
        Path | None,
        typer.Option("--data", help="Take it from the dataset's own files instead; no cache is needed then."),
    ] = None,
    rules: RulesOption = None,
    name: Annotated[
        str | None, typer.Option("--name", help="Name of the method; the file's by default.")
    ] = None,
    allow_missing: Annotated[
        bool, typer.Option("--allow-missing", help="Score samples without prediction as empty masks.")
    ] = False,
    out: Annotated[
        Path | None, typer.Option("--out", help="Where results go; beside the predictions by default.")
    ] = None,
    json: JsonOption = False,
) -> None:
    """Score predictions of any method, matched to samples by ref_id and sent_id.

    JSON: a list of {"ref_id", "sent_id", "segmentation": {"size": [H, W], "counts": COCO RLE}}, or an object
    with that list as "predictions"; optional "image_id", "no_target" (a head's decision), and "masks" with
    RLEs of other grids ("1024", "480", "original-p35"). Folder: <ref_id>_<sent_id>.png, non-zero is
    foreground. NPZ: arrays <ref_id>_<sent_id> of 0 and 1, optional <ref_id>_<sent_id>_no_target.

    Masks have the image's own size. What is missing, double, unknown or of another size is counted and named,
    and ends with exit code 3.

    Example: ris score --predictions lavt.json --split refcoco:val --data ./data --rules all
    """
    from ris_cache import FeatureCache
    from ris_cache.datasets import parse_selections
    from ris_train.annotated import AnnotatedSplits
    from ris_train.score_predictions import score_predictions
    from ris_train.scoring.prediction_files import open_predictions

    selections = parse_selections(split)
    file = open_predictions(predictions)
    text = "raw" if file.info.get("text") == "raw" else "sent"
    if data is not None:
        annotated = AnnotatedSplits.from_files(data, selections, text=text)
    else:
        annotated = AnnotatedSplits.from_cache(FeatureCache.open(cache), selections, text=text)
    scored = score_predictions(
        file,
        annotated,
        rules=rules,
        name=name or predictions.stem,
        allow_missing=allow_missing,
        show_progress=True,
    )
    written = scored.write(out or predictions.absolute().parent)
    if json:
        print_json(scored.as_dict() | {"files": [str(path) for path in written]})
        return
    print_results(scored.results, scored.weights)
    if scored.num_missing:
        typer.echo(f"note: {scored.num_missing} samples without a prediction scored as empty masks", err=True)
    if scored.num_other:
        typer.echo(f"note: {scored.num_other} predictions are of samples not asked for", err=True)

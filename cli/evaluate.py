"""`ris eval`: scores of a run."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated

import typer

from cli.options import (
    DEFAULT_CACHE,
    DEFAULT_RUNS,
    CacheOption,
    DeviceOption,
    JsonOption,
    RunOption,
    RunsOption,
    choose_device,
)
from cli.render import print_json
from cli.scores import print_results
from ris_cache.memory import keep_freed_memory

RulesOption = Annotated[
    str | None,
    typer.Option("--rules", help="Rule sets such as ris,dfam, or all; by default the dataset's own."),
]


class CategorySourceName(StrEnum):
    """Which category a model that reads one is given."""

    ANNOTATED = "annotated"
    PREDICTED = "predicted"
    NONE = "none"


class CheckpointName(StrEnum):
    """Which checkpoint of a run."""

    BEST = "best"
    LAST = "last"


def evaluate(
    cache: CacheOption = DEFAULT_CACHE,
    run: RunOption = None,
    runs: RunsOption = DEFAULT_RUNS,
    checkpoint: Annotated[CheckpointName, typer.Option(help="Which checkpoint of the run.")] = (
        CheckpointName.BEST
    ),
    split: Annotated[
        str | None,
        typer.Option("--split", help="Selection such as refcoco:val; all but train by default."),
    ] = None,
    rules: RulesOption = None,
    category: Annotated[
        CategorySourceName | None,
        typer.Option(help="Category source; annotated by default for models that read a category."),
    ] = None,
    shuffle_expressions: Annotated[
        bool,
        typer.Option(
            "--shuffle-expressions",
            help="Permute the expressions of each image: how much does the text decide?",
        ),
    ] = False,
    seed: Annotated[int, typer.Option(min=0, help="Seed of that permutation.")] = 0,
    save_predictions: Annotated[
        str | None,
        typer.Option(help="Also write the masks: .json, .npz, or a folder of PNGs, for `ris score`."),
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Expressions per forward pass.")] = 32,
    device: DeviceOption = None,
    json: JsonOption = False,
) -> None:
    """Score a run by one or many rule sets in one pass, a table per split.

    Example: ris eval --cache ./feats --split refcoco:val --rules all
    """
    from ris_cache.datasets import parse_selections
    from ris_train.evaluation_run import evaluate_run
    from ris_train.run import find_run

    chosen = choose_device(device)
    if chosen.type == "cpu":
        keep_freed_memory()
    found = evaluate_run(
        cache,
        find_run(runs, run),
        checkpoint=checkpoint.value,
        selections=parse_selections(split) if split is not None else None,
        category_source=category.value if category is not None else None,
        shuffle_seed=seed if shuffle_expressions else None,
        batch_size=batch_size,
        device=chosen,
        rules=rules,
        save_predictions=save_predictions,
        show_progress=True,
    )
    if json:
        print_json(found.as_dict())
        return
    evaluated = f"run {found.run}, checkpoint {found.checkpoint} of step {found.step}"
    print_results(found.results, found.weight_labels, evaluated=evaluated)
    for result in found.results:
        if result.quarantined or result.degenerate:
            typer.echo(
                f"note: {result.split}: {result.quarantined} expressions not scored (image unreadable at "
                f"extraction), {result.degenerate} scored against an empty annotation",
                err=True,
            )

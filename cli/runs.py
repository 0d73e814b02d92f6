"""`ris runs`: what was trained, how far it came, and what is kept of it."""

from __future__ import annotations

import math
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cli.guard import guarded
from cli.options import DEFAULT_RUNS, JsonOption, RunsOption
from cli.render import percent, print_json, print_table, printable, size

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from ris_train.run_details import CheckpointFile, EvaluationFile
    from ris_train.run_listing import BestScore, RunSummary

app = typer.Typer(help="Training runs.", no_args_is_help=True, rich_markup_mode=None)

_METRICS_TAIL = 5


def list_(runs: RunsOption = DEFAULT_RUNS, json: JsonOption = False) -> None:
    """List the runs of a directory, the latest first, with how far each came and its best score.

    Example: ris runs list --runs ./runs
    """
    from ris_train.run_listing import list_runs

    found = list_runs(runs)
    if json:
        print_json([run.as_dict() for run in found])
        return
    print_table(
        f"{len(found)} runs in {runs}",
        ["run", "recipe", "state", "best", "started", "fingerprint"],
        [
            [
                run.name,
                run.recipe or "-",
                _state(run),
                _best(run.best),
                _minute(run.started),
                (run.fingerprint or "-")[:12],
            ]
            for run in found
        ],
        left=("recipe", "state", "best"),
    )
    _print_problems([(run.name, problem) for run in found for problem in run.problems])


def show(
    name: Annotated[str, typer.Argument(help="Run by name or path.")],
    runs: RunsOption = DEFAULT_RUNS,
    tail: Annotated[int, typer.Option("--tail", min=0, help="Last lines of the metrics.")] = _METRICS_TAIL,
    json: JsonOption = False,
) -> None:
    """Show one run: where it leaves its recipe, its last metrics, its checkpoints and evaluations.

    Example: ris runs show tiny-20260101-120000
    """
    from ris_train.run_details import checkpoint_files, config_differences, evaluation_files
    from ris_train.run_listing import find_any_run, read_files, summarise

    run = find_any_run(runs, name)
    summary, files = summarise(run), read_files(run)
    differences = config_differences(files.config) if files.config is not None else None
    checkpoints, evaluations = checkpoint_files(run), evaluation_files(run)
    last = files.metrics[-tail:] if tail else ()
    if json:
        print_json(
            {
                **summary.as_dict(),
                "config_differences": _differences_document(differences),
                "facts": files.facts,
                "metrics": list(last),
                "checkpoints": [checkpoint.as_dict() for checkpoint in checkpoints],
                "evaluations": [evaluation.as_dict() for evaluation in evaluations],
            }
        )
        return
    _print_summary(summary, files.facts)
    if differences is not None:
        print_table(
            f"Where it leaves recipe {summary.recipe}"
            if differences
            else f"Recipe {summary.recipe} as it is",
            ["key", "recipe", "run"],
            [[key, str(expected), str(found)] for key, expected, found in differences],
            left=("recipe", "run"),
        )
    _print_metrics(last)
    _print_checkpoints(checkpoints)
    _print_evaluations(evaluations, summary.path)
    _print_problems([(run.path.name, problem) for problem in summary.problems])


def export(
    name: Annotated[str, typer.Argument(help="Run by name or path.")],
    out: Annotated[Path, typer.Option("--out", help="The folder to write; empty or not there yet.")],
    is_last: Annotated[
        bool, typer.Option("--last/--best", help="Its last checkpoint, or the best one on validation.")
    ] = False,
    licence: Annotated[
        str, typer.Option("--licence", help="For the model card, as the hub names licences: apache-2.0, …")
    ] = "unknown",
    runs: RunsOption = DEFAULT_RUNS,
    json: JsonOption = False,
) -> None:
    """Write a run's model as a folder to share: weights, tokenizer, what made it, and a model card.

    `ris predict --model` and RISModel.from_pretrained read it, from the disk or the hub. It is there whole
    or not at all.

    Example: ris runs export first --out ./first-model
    """
    from ris_train.pretrained import export as write_folder
    from ris_train.pretrained import read_record
    from ris_train.run import find_run

    checkpoint = "last" if is_last else "best"
    folder = write_folder(find_run(runs, name), checkpoint, out, licence=licence)
    record = read_record(folder)
    num_bytes = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    if json:
        print_json(
            {
                "folder": str(folder),
                "run": record.name,
                "checkpoint": checkpoint,
                "step": record.checkpoint.step,
                "num_bytes": num_bytes,
                "files": record.files,
            }
        )
        return
    print_table(
        f"Model of run {record.name}",
        ["what", "value"],
        [
            ["folder", str(folder)],
            ["checkpoint", f"{checkpoint}, step {record.checkpoint.step}"],
            ["size", size(num_bytes)],
            ["try it", f"ris predict --model {folder} --image FILE --text TEXT"],
        ],
        left=("value",),
    )


app.command("list")(guarded(list_))
app.command("show")(guarded(show))
app.command("export")(guarded(export))


def _print_summary(summary: RunSummary, facts: Mapping[str, Any]) -> None:
    weights = facts.get("weights")
    print_table(
        f"Run {summary.path}",
        ["what", "value"],
        [
            ["recipe", summary.recipe or "-"],
            ["state", _state(summary)],
            ["best", _best(summary.best)],
            ["started", summary.started or "-"],
            ["device", str(facts.get("device", "-"))],
            ["cache", str(facts.get("cache", "-"))],
            ["fingerprint", summary.fingerprint or "-"],
            *(
                [[f"{role} weights", str(label)] for role, label in weights.items()]
                if isinstance(weights, dict)
                else []
            ),
        ],
        left=("value",),
    )


def _print_metrics(lines: Sequence[Mapping[str, Any]]) -> None:
    """Print each line as it was logged: evaluations and losses have different columns."""
    if lines:
        print_table(
            "Last metrics",
            ["step", "values"],
            [
                [
                    str(line["step"]),
                    " ".join(f"{key}={_value(value)}" for key, value in line.items() if key != "step"),
                ]
                for line in lines
            ],
            left=("values",),
        )


def _print_checkpoints(checkpoints: Sequence[CheckpointFile]) -> None:
    print_table(
        "Checkpoints" if checkpoints else "No checkpoint yet",
        ["checkpoint", "step", "size", "written", "problem"],
        [
            [
                checkpoint.name,
                "-" if checkpoint.step is None else str(checkpoint.step),
                size(checkpoint.num_bytes),
                _minute(checkpoint.written),
                checkpoint.problem,
            ]
            for checkpoint in checkpoints
        ],
        left=("problem",),
    )


def _print_evaluations(evaluations: Sequence[EvaluationFile], path: Path) -> None:
    """Print scores; an asterisk marks those that are not of the checkpoint that is there now."""
    rows = [
        [
            evaluation.name + (" *" if evaluation.stale else ""),
            f"{evaluation.checkpoint or '-'} ({'-' if evaluation.step is None else evaluation.step})",
            score.split,
            score.rules,
            score.grid,
            str(score.num_samples),
            score.refused or f"{score.metric or '-'} {_percent(score.value)}",
        ]
        for evaluation in evaluations
        for score in evaluation.scores
    ]
    if rows:
        print_table(
            "Evaluations",
            ["evaluation", "checkpoint (step)", "split", "rules", "grid", "samples", "score"],
            rows,
            "\n".join(f"* {one.name}: {one.stale}" for one in evaluations if one.stale and not one.problem),
            left=("checkpoint (step)", "split", "rules", "grid"),
        )
    elif not evaluations:
        # A command to copy, so no table, which would break it.
        command = f"ris eval --run {shlex.quote(str(path))}"
        typer.echo(printable(f"Not evaluated yet: {command}", sys.stdout.encoding))
    _print_problems([(one.name, one.problem) for one in evaluations if one.problem])


def _print_problems(problems: Sequence[tuple[str, str]]) -> None:
    if problems:
        print_table("Damaged", ["name", "problem"], [list(row) for row in problems], left=("problem",))


def _differences_document(differences: Sequence[tuple[str, Any, Any]] | None) -> dict[str, Any] | None:
    if differences is None:
        return None
    return {key: {"recipe": expected, "run": found} for key, expected, found in differences}


def _state(run: RunSummary) -> str:
    if run.state == "damaged":
        return "damaged"
    if run.state == "finished":
        return f"finished, {run.step} steps"
    return f"{run.state} at step {run.step} of {'?' if run.steps is None else run.steps}"


def _best(best: BestScore | None) -> str:
    if best is None:
        return "-"
    return f"{best.metric} {_percent(best.value)} on {best.split}, rules {best.rules}, step {best.step}"


def _percent(value: float | None) -> str:
    return "–" if value is None or math.isnan(value) else percent(value)


def _minute(time: str | None) -> str:
    """An ISO 8601 time up to its minute."""
    return "-" if time is None else time[:16].replace("T", " ")


def _value(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else "–" if value is None else str(value)

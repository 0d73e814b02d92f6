"""What a run's files tell of one of its checkpoints: the data behind it and its scores, for a model card."""

from __future__ import annotations

import math

from pydantic import ValidationError

from ris_train.checkpoint import CheckpointMetadata
from ris_train.data.batch import default_category_source
from ris_train.model_card import ReportedScore, TrainedOn
from ris_train.run import RunDirectory
from ris_train.run_details import SplitScore, evaluation_files
from ris_train.run_listing import best_score, read_files
from ris_train.scoring import RULES


def trained_on(run: RunDirectory) -> tuple[TrainedOn, ...]:
    """Return the parts of the training set as env.json has them; none where it has none that can be read."""
    parts = read_files(run).facts.get("training_set")
    if not isinstance(parts, list):
        return ()
    wanted = TrainedOn.model_fields
    try:
        return tuple(
            TrainedOn.model_validate({name: part[name] for name in wanted if name in part}) for part in parts
        )
    except (ValidationError, TypeError):
        return ()


def reported_scores(
    run: RunDirectory, checkpoint: str, metadata: CheckpointMetadata
) -> tuple[ReportedScore, ...]:
    """Return the scores of these very weights: what chose them in training, then their evaluations.

    An evaluation counts if it has this file's digest: another checkpoint may have been of the same step, if
    the run then went on from an earlier state with other settings.
    """
    found = []
    best = best_score(line for line in read_files(run).metrics if line["step"] == metadata.step)
    if best is not None:
        view = RULES[best.rules].view
        found.append(
            ReportedScore(
                split=best.split,
                rules=best.rules,
                grid=view.grid,
                threshold=view.threshold,
                num_samples=best.num_samples,
                category_source=default_category_source(metadata.config),
                expressions="own",
                values={name: None if math.isnan(value) else value for name, value in best.values.items()},
                measured="training",
            )
        )
    for evaluation in evaluation_files(run):
        if evaluation.checkpoint == checkpoint and not evaluation.stale:
            found += [_reported(score) for score in evaluation.scores if not score.refused]
    return tuple(found)


def _reported(score: SplitScore) -> ReportedScore:
    return ReportedScore(
        split=score.split,
        rules=score.rules,
        grid=score.grid,
        threshold=score.threshold,
        num_samples=score.num_samples,
        category_source=score.category_source,
        expressions=score.expressions,
        values=score.values,
        measured="ris eval",
    )

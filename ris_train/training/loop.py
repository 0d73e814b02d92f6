"""The loop: step after step, lines of the log, evaluations, states; stopped at any step and gone on with."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass

from ris_cache.errors import NonFiniteError, RisError, StoppedError
from ris_train.data.batch import CategorySource, default_category_source
from ris_train.data.merge import TrainingSet
from ris_train.optim import build_optimiser, set_rate
from ris_train.run import RunDirectory
from ris_train.scoring import Scores
from ris_train.tracking import open_trackers
from ris_train.training.keeping import Keeper
from ris_train.training.progress import Progress
from ris_train.training.randomness import seed_step
from ris_train.training.resume import ResumePoint
from ris_train.training.setup import Setup
from ris_train.training.state import BestSoFar, RunState, restore
from ris_train.training.step import StepBatch, StepComputer
from ris_train.training.watch import broken_terms, stop_for


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingReport:
    """What a run came to.

    Attributes:
        best_step: step of the best checkpoint on the validation selection.
        best: its scores; `best.num_samples` may be fewer than the selection holds (`train.val_samples`).
        headline: the metric that it is best by.
        val_size: expressions of the validation selection.
        category_source: which category the model was given.
        val_label: what was validated on: `data.val`, or with `train.overfit` the expressions trained on.
        weights: labels of all weights that the scores rest on.
        seconds: of training, evaluations included, over all times that the run was resumed.
        training_set: what was trained on, and what was left out of it.
        resumed_from: step that the run went on from; None if it began here.
        is_main: whether this process speaks for the run.
    """

    run: RunDirectory
    best_step: int
    best: Scores
    headline: str
    val_size: int
    val_label: str
    category_source: CategorySource
    weights: dict[str, str]
    seconds: float
    training_set: TrainingSet
    resumed_from: int | None
    is_main: bool


class Loop:
    """Trains from a step to the last.

    Args:
        setup: what is trained on what.
        run: where rank 0 writes; its files are there.
        point: the state to go on from; None begins at step 0.
        told: hears how training goes.
        should_stop: asked after each step, and before each batch of an evaluation.
    """

    def __init__(
        self,
        setup: Setup,
        run: RunDirectory,
        point: ResumePoint | None,
        told: Progress,
        should_stop: Callable[[], bool],
    ) -> None:
        self._setup = setup
        self._config = setup.config.train
        self._ranks = setup.ranks
        self._run = run
        self._told = told
        self._should_stop = should_stop
        self._model = setup.model
        self._optimiser = build_optimiser(self._model, self._config)
        self._computer = StepComputer(self._model, setup.config, self._ranks)
        self._keeper = Keeper(
            run,
            self._model,
            self._optimiser,
            setup.metadata,
            cache_root=setup.cache.root,
            keep_last=self._config.keep_last,
        )
        self._resumed_from = None if point is None else point.state.step
        self._step = self._consumed = 0
        self._saved_step: int | None = None
        self._is_evaluation_due = False
        self._evaluated_step: int | None = None
        self._best: BestSoFar | None = None
        self._terms_since_log: list[dict[str, float]] = []
        self._seconds_before = 0.0
        self._started = time.monotonic()
        if point is not None:
            self._take_over(point)
        self._trackers = (
            open_trackers(self._config.trackers, run, setup.config, say=told.say)
            if self._ranks.is_main
            else None
        )

    def run_to_end(self) -> TrainingReport:
        """Train to the last step; a run that is complete already only reports."""
        self._told.start(total=self._config.steps, done=self._step)
        try:
            if self._step == 0:
                self._save_state()
            self._model.train()
            is_cut_here = self._step == self._config.steps and self._evaluated_step != self._step
            if self._is_evaluation_due or is_cut_here:
                self._evaluate()
                self._save_state()
            self._all_steps()
        finally:
            self._told.stop()
            if self._trackers is not None:
                self._trackers.close()
        return self._report()

    def _all_steps(self) -> None:
        with closing(self._setup.batches(self._consumed, self._step + 1)) as batches:
            while self._step < self._config.steps:
                asked = time.monotonic()
                batch = next(batches)
                waited = time.monotonic() - asked
                values, rate = self._take_step(batch)
                self._told.advance(
                    loss=values["loss"],
                    samples=len(batch.samples),
                    images=len({sample.image_id for sample in batch.samples}),
                    waited=waited,
                    seconds=time.monotonic() - asked,
                )
                self._look(rate)
                if self._ranks.any(self._should_stop()) and self._step < self._config.steps:
                    raise self._stopped()

    def _stopped(self) -> StoppedError:
        """Save the state, if that is not done; returns the error that says how to go on."""
        if self._saved_step != self._step:
            self._save_state()
        # A launcher ends all processes as soon as one has ended; rank 0 must have saved by then.
        self._ranks.collect(None)
        return StoppedError(
            f"{self._run.path} after step {self._step} of {self._config.steps}; its state is saved. "
            f"Go on with `{self._run.resume_command(self._setup.cache.root)}`.",
            step=self._step,
            path=self._run.path,
        )

    def _take_step(self, batch: StepBatch) -> tuple[dict[str, float], float]:
        """Take one optimiser step; returns its values and its learning rate."""
        seed_step(self._config.seed, batch.step)
        rate = set_rate(self._optimiser, batch.step - 1, self._config)
        try:
            values = self._computer.gradients(batch)
        except NonFiniteError as error:
            raise self._broken(batch, {}, ("matching",)) from error
        broken = broken_terms(values)
        may_be_scale = set(broken) <= {"grad_norm"} and self._computer.scale.may_overflow
        if broken and not may_be_scale:
            raise self._broken(batch, values, broken)
        if self._computer.scale.update(is_finite=not broken):
            self._optimiser.step()
        self._step = batch.step
        self._consumed += len(batch.samples)
        self._terms_since_log.append(values)
        return values, rate

    def _look(self, rate: float) -> None:
        """Log, evaluate and save what is due after a step."""
        is_last = self._step == self._config.steps
        if self._step % self._config.log_every == 0 or is_last:
            means = _means(self._terms_since_log)
            self._terms_since_log.clear()
            extra = {"scale": self._computer.scale.value} if self._computer.scale.as_dict() else {}
            self._log({"step": self._step, **means, "lr": rate, **extra, "seconds": round(self._seconds, 3)})
        is_to_be_evaluated = self._step % self._config.eval_every == 0 or is_last
        if is_to_be_evaluated:
            self._evaluate()
        every = self._config.checkpoint_every
        if is_last or (is_to_be_evaluated if every is None else self._step % every == 0):
            self._save_state()

    def _evaluate(self) -> None:
        validation = self._setup.validation
        self._is_evaluation_due = True
        try:
            scores = validation.score(self._model, self._ranks, should_stop=self._should_stop)
        except StoppedError:
            raise self._stopped() from None
        self._is_evaluation_due = False
        if self._evaluated_step != self._step:  # otherwise the log has it, and a checkpoint was another's
            fields = {"val": validation.label, "rules": scores.rules, "num_samples": scores.num_samples}
            self._log({"step": self._step, **fields, **scores.values})
        self._evaluated_step = self._step
        is_best = self._best is None or validation.is_better(scores, _scores(self._best))
        if is_best:
            self._best = BestSoFar(
                step=self._step,
                rules=scores.rules,
                num_samples=scores.num_samples,
                values=dict(scores.values),
            )
        if self._ranks.is_main:
            self._keeper.keep_evaluated(self._step, scores.values, is_best=is_best)
        values = ", ".join(f"{name} {100 * value:.2f}" for name, value in scores.values.items())
        self._told.say(
            f"step {self._step}: {validation.label} {values} (rules {scores.rules}, {scores.num_samples} "
            "expressions)"
        )

    def _log(self, record: dict[str, object]) -> None:
        if self._trackers is not None:
            self._run.log(record)
            self._trackers.log(self._step, record)

    def _save_state(self) -> None:
        is_saved = self._saved_step == self._step
        self._saved_step = self._step
        if not self._ranks.is_main:
            return
        state = RunState(
            step=self._step,
            consumed=self._consumed,
            is_evaluation_due=self._is_evaluation_due,
            evaluated_step=self._evaluated_step,
            best=self._best,
            scaler=self._computer.scale.as_dict(),
            terms_since_log=self._terms_since_log,
            seconds=self._seconds,
            training=self._setup.training_digest,
            validation=self._setup.validation_digest,
        )
        self._keeper.keep_state(state, is_saved=is_saved)

    def _take_over(self, point: ResumePoint) -> None:
        restore(point.path, self._model, self._optimiser)
        state = point.state
        self._step = self._saved_step = state.step
        self._consumed = state.consumed
        self._is_evaluation_due = state.is_evaluation_due
        self._evaluated_step = state.evaluated_step
        self._best = state.best
        self._computer.scale.load(state.scaler)
        self._terms_since_log = [dict(values) for values in state.terms_since_log]
        self._seconds_before = state.seconds

    @property
    def _seconds(self) -> float:
        return self._seconds_before + time.monotonic() - self._started

    def _broken(self, batch: StepBatch, values: dict[str, float], terms: tuple[str, ...]) -> RisError:
        return stop_for(
            self._run,
            self._model,
            batch,
            self._keeper.metadata(self._step),
            self._ranks,
            cache_root=self._setup.cache.root,
            values=values,
            terms=terms,
            scale=self._computer.scale.value,
        )

    def _report(self) -> TrainingReport:
        assert self._best is not None, "the last step evaluates"
        return TrainingReport(
            run=self._run,
            best_step=self._best.step,
            best=_scores(self._best),
            headline=self._setup.validation.rules.headline,
            val_size=self._setup.validation.size,
            val_label=self._setup.validation.label,
            category_source=default_category_source(self._setup.config),
            weights=self._setup.metadata.weight_labels,
            seconds=self._seconds,
            training_set=self._setup.training_set,
            resumed_from=self._resumed_from,
            is_main=self._ranks.is_main,
        )


def _means(records: list[dict[str, float]]) -> dict[str, float]:
    """Average each value over the steps; the norm of a gradient that overflowed in fp16 is left out."""
    found = {}
    for name in records[0]:
        values = [record[name] for record in records if math.isfinite(record[name])]
        found[name] = sum(values) / len(values) if values else math.nan
    return found


def _scores(best: BestSoFar) -> Scores:
    return Scores(rules=best.rules, values=best.values, num_samples=best.num_samples)

"""The watch over numbers: a loss, term or gradient that is none stops the run and can be reproduced."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, ValidationError

from ris_cache.errors import CheckpointError, NonFiniteError, RisError
from ris_cache.store.cache import FeatureCache
from ris_cache.store.files import write_atomically
from ris_train.checkpoint import CheckpointMetadata, build_from_metadata, load_weights, read_metadata
from ris_train.checkpoint import save_checkpoint as save_weights
from ris_train.data.samples import Sample
from ris_train.model.segmenter import RisModel
from ris_train.optim import freeze_untrained
from ris_train.ranks import OtherRankError, Ranks
from ris_train.run import RunDirectory
from ris_train.training.randomness import seed_step
from ris_train.training.setup import builder_of, load_tokenizer, load_usable, masks_of
from ris_train.training.step import StepBatch, StepComputer, build_step_batch

MAX_PARAMETERS = 20
"""Parameters with a broken gradient that are named."""


class SampleId(BaseModel):
    """What identifies an expression in a cache."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    table_name: str
    ref_id: int
    sent_id: int

    @classmethod
    def of(cls, sample: Sample) -> SampleId:
        """Take it from a sample."""
        return cls(table_name=sample.table_name, ref_id=sample.ref_id, sent_id=sample.sent_id)


class Reproduction(BaseModel):
    """How to take again the step in which a number broke.

    Attributes:
        step: counted from 1.
        seed: of the run; with the step it decides all random draws.
        terms: what was not finite, as `values` names it.
        values: the loss, its terms and the norm of the gradient; empty if no loss was come to.
        parameters: the first ones whose gradient was not finite.
        samples: of the whole batch, in its order.
        cache: where the features are.
        weights: file of the weights before the step, beside this one.
        world: processes that shared the batch; one reproduces it.
        device: where it happened.
        scale: of the fp16 loss, 1 in other precisions.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, ser_json_inf_nan="strings")

    format: Literal["ris-nonfinite"] = "ris-nonfinite"
    step: int
    seed: int
    terms: tuple[str, ...]
    values: dict[str, float]
    parameters: tuple[str, ...]
    samples: tuple[SampleId, ...]
    cache: Path
    weights: str
    world: int
    device: str
    scale: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Reproduced:
    """A step taken again, up to its gradients.

    Attributes:
        values: the loss, its terms and the norm of the gradient; empty if no loss was come to.
        terms: those that are not finite; `matching` if no loss was come to.
        model: with the weights before the step, and the gradients.
        batch: what it was given.
    """

    values: dict[str, float]
    terms: tuple[str, ...]
    model: RisModel
    batch: StepBatch


def broken_terms(values: Mapping[str, float]) -> tuple[str, ...]:
    """Names of the values that are not finite."""
    return tuple(name for name, value in values.items() if not math.isfinite(value))


def stop_for(
    run: RunDirectory,
    model: RisModel,
    batch: StepBatch,
    metadata: CheckpointMetadata,
    ranks: Ranks,
    *,
    cache_root: Path,
    values: dict[str, float],
    terms: tuple[str, ...],
    scale: float,
) -> RisError:
    """Write `nonfinite-<step>.json` and the weights beside it; returns the error to raise.

    The values of a step are the same on all processes, so that all come here: rank 0 writes and speaks. Where
    no loss was come to, this process may be the only one that knows. It writes and speaks, and the others end
    as its connections close. Weights, batch and configuration are those of every process.

    Args:
        run: gets the files.
        model: before its optimiser step.
        batch: in which a number broke.
        metadata: of the weights.
        ranks: the processes.
        cache_root: of the features.
        values: what was computed; empty if no loss was come to.
        terms: what of it is not finite.
        scale: of the loss.

    Returns:
        A NonFiniteError that tells all; OtherRankError where rank 0 tells.
    """
    is_known_to_all = bool(values)
    if is_known_to_all and not ranks.is_main:
        ranks.collect(None)
        return OtherRankError(0, NonFiniteError.exit_code)
    path = run.path / f"nonfinite-{batch.step}.json"
    record = Reproduction(
        step=batch.step,
        seed=metadata.config.train.seed,
        terms=terms,
        values=values,
        parameters=_broken_gradients(model)[:MAX_PARAMETERS],
        samples=tuple(SampleId.of(sample) for sample in batch.samples),
        cache=cache_root.resolve(),
        weights=path.with_suffix(".safetensors").name,
        world=ranks.world,
        device=str(ranks.device),
        scale=scale,
    )
    failure = _write(path, record, model, metadata)
    if is_known_to_all:  # a launcher ends all processes as soon as one has ended; by then all is written
        ranks.collect(None)
    return _error(record, path, failure, f"{run.resume_command(cache_root)} --set train.lr=…")


def _broken_gradients(model: RisModel) -> tuple[str, ...]:
    return tuple(
        name
        for name, parameter in model.named_parameters()
        if parameter.grad is not None and not torch.isfinite(parameter.grad).all()
    )


def _write(path: Path, record: Reproduction, model: RisModel, metadata: CheckpointMetadata) -> OSError | None:
    """Write the files; returns why that failed, since the number that broke must be told all the same."""
    try:
        save_weights(path.with_name(record.weights), model, metadata)
        write_atomically(path, (record.model_dump_json(indent=1) + "\n").encode())
    except OSError as error:
        return error
    return None


def _error(record: Reproduction, path: Path, failure: OSError | None, command: str) -> NonFiniteError:
    listed = ", ".join(f"{one.table_name} ref {one.ref_id} sent {one.sent_id}" for one in record.samples)
    where = f" First in the gradient of {record.parameters[0]}." if record.parameters else ""
    kept = (
        f"{path} holds the step; ris_train.training.reproduce takes it again."
        if failure is None
        else f"{path}, which would hold the step, could not be written: {failure.strerror or failure}."
    )
    return NonFiniteError(
        f"Step {record.step}: {', '.join(record.terms)} is not finite.{where} Go on from the last state at a "
        f"lower rate, `{command}`, or look at the samples: {listed}. {kept}",
        step=record.step,
        terms=record.terms,
        samples=[one.model_dump() for one in record.samples],
        sent_ids=[one.sent_id for one in record.samples],
        parameters=record.parameters,
        path=path if failure is None else None,
    )


def reproduce(
    path: Path, *, cache_root: Path | None = None, device: torch.device | None = None
) -> Reproduced:
    """Take again, up to its gradients, the step that a `nonfinite-<step>.json` tells of.

    Args:
        path: the file, with its weights beside it.
        cache_root: the cache, if it has moved.
        device: where to compute; the CPU by default.

    Raises:
        CheckpointError: the file or its weights cannot be read.
        CacheError: the cache is not there, or lacks one of the samples.
    """
    record = read_reproduction(path)
    metadata = read_metadata(path.with_name(record.weights))
    config = metadata.config
    ranks = Ranks(0, 1, device or torch.device("cpu"))
    cache = FeatureCache.open(cache_root or record.cache, integrity=config.data.integrity)
    training_set = load_usable(cache, config)
    by_id = {SampleId.of(sample): sample for sample in training_set.samples}
    if missing := [one for one in record.samples if one not in by_id]:
        raise CheckpointError(
            f"{cache.root} does not hold {missing[0]}, which {path} tells of. Name the cache that the run "
            "was trained from.",
            path=path,
        )
    tokenizer = load_tokenizer(config, RunDirectory(path.parent))
    builder = builder_of(cache, config, training_set, tokenizer, ranks.device)
    model = build_from_metadata(metadata)
    freeze_untrained(model, config.train)
    load_weights(model, path.with_name(record.weights))
    model.to(ranks.device).train()
    batch = build_step_batch(
        record.step,
        [by_id[one] for one in record.samples],
        builder,
        masks_of(cache, config, training_set),
        config,
        ranks,
    )
    computer = StepComputer(model, config, ranks)
    computer.scale.value = record.scale
    seed_step(record.seed, record.step)
    try:
        values = computer.gradients(batch)
    except NonFiniteError:
        return Reproduced(values={}, terms=("matching",), model=model, batch=batch)
    return Reproduced(values=values, terms=broken_terms(values), model=model, batch=batch)


def read_reproduction(path: Path) -> Reproduction:
    """Read what a `nonfinite-<step>.json` tells.

    Raises:
        CheckpointError: it cannot be read as such.
    """
    try:
        tree: Any = json.loads(path.read_bytes())
        return Reproduction.model_validate(tree)
    except FileNotFoundError as error:
        raise CheckpointError(f"There is no file {path}.", path=path) from error
    except (json.JSONDecodeError, UnicodeDecodeError, ValidationError) as error:
        raise CheckpointError(
            f"{path} is no nonfinite-<step>.json of this version of ris.", path=path
        ) from error

"""The state of a run: all that it needs to go on as if it had never stopped.

checkpoints/state-<step>/model.safetensors  optimiser.safetensors  state.json

The directory appears by one rename, so it is there whole or not at all. state.json holds the SHA-256 of the
other files and of itself. Plain tensors and JSON; nothing is pickled.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final, Literal

import torch
from pydantic import BaseModel, ConfigDict, ValidationError
from safetensors.torch import load, save
from torch.optim import AdamW

from ris_cache.errors import CheckpointError
from ris_cache.store.files import digest_of, make_directories, sha256_file, sync_directory, write_atomically
from ris_train.checkpoint import (
    CheckpointMetadata,
    OtherVersionError,
    checkpoint_bytes,
    load_weights,
    read_metadata,
)
from ris_train.model.segmenter import RisModel
from ris_train.run import RunDirectory
from ris_train.training.data_digest import DataDigest

MODEL_FILE: Final = "model.safetensors"
OPTIMISER_FILE: Final = "optimiser.safetensors"
STATE_FILE: Final = "state.json"
_NAME = re.compile(r"state-(\d+)")


class BestSoFar(BaseModel):
    """The step of the best checkpoint, and its scores."""

    model_config = ConfigDict(extra="forbid", frozen=True, ser_json_inf_nan="strings")

    step: int
    rules: str
    num_samples: int
    values: dict[str, float]


class RunState(BaseModel):
    """Where a run stands, beside weights and optimiser.

    Attributes:
        step: optimiser steps taken.
        consumed: samples consumed; the place in the order of samples.
        is_evaluation_due: whether the run was stopped within the evaluation that follows the step.
        evaluated_step: of the last evaluation that the log and the checkpoints hold; None before the first.
        best: the best evaluation so far, None before the first.
        scaler: state of the fp16 loss scaler, empty in other precisions.
        terms_since_log: values of the steps since the last line of the log.
        metrics_bytes: size of metrics.jsonl when the state was written; lines beyond it are of later steps.
        seconds: of training so far, evaluations included.
        training, validation: expressions trained and scored on; None in states of a ris that kept no record.
        files: SHA-256 of the other files.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, ser_json_inf_nan="strings")

    format: Literal["ris-state"] = "ris-state"
    format_version: Literal[1] = 1
    step: int
    consumed: int
    is_evaluation_due: bool = False
    evaluated_step: int | None = None
    best: BestSoFar | None
    scaler: dict[str, float]
    terms_since_log: list[dict[str, float]]
    metrics_bytes: int = 0
    seconds: float
    training: DataDigest | None = None
    validation: DataDigest | None = None
    files: dict[str, str] = {}


def state_path(run: RunDirectory, step: int) -> Path:
    """Directory of the state after a step."""
    return run.checkpoints_dir / f"state-{step}"


def saved_states(run: RunDirectory) -> list[Path]:
    """Directories of a run's states, the latest first; whether they are whole is not looked at."""
    found = [(int(match[1]), path) for path in run.checkpoints_dir.glob("state-*") if (match := _match(path))]
    return [path for _, path in sorted(found, reverse=True)]


def save_state(
    run: RunDirectory,
    state: RunState,
    model: RisModel,
    optimiser: AdamW,
    metadata: CheckpointMetadata,
    *,
    keep_last: int,
) -> Path:
    """Write a state and remove all but the latest `keep_last`.

    Raises:
        OSError: it cannot be written; the earlier states are as they were.
    """
    path = state_path(run, state.step)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    contents = {
        MODEL_FILE: checkpoint_bytes(model, metadata),
        OPTIMISER_FILE: save(optimiser_tensors(model, optimiser)),
    }
    files = {name: digest_of(content).sha256 for name, content in contents.items()}
    contents[STATE_FILE] = _signed(state.model_copy(update={"files": files}))
    make_directories(run.checkpoints_dir)
    shutil.rmtree(temporary, ignore_errors=True)  # of a process that was killed and had the same number
    try:
        temporary.mkdir()
        for name, content in contents.items():
            write_atomically(temporary / name, content)
        # A state of this step is a damaged one that an earlier one was used instead of.
        shutil.rmtree(path, ignore_errors=True)
        temporary.rename(path)
        sync_directory(run.checkpoints_dir)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    for old in saved_states(run)[keep_last:]:
        _remove(old)
    return path


def update_state(run: RunDirectory, state: RunState) -> None:
    """Say anew where a run stands whose weights and optimiser are saved and as they were.

    Raises:
        OSError: it cannot be written; the state is as it was.
    """
    path = state_path(run, state.step) / STATE_FILE
    write_atomically(path, _signed(state.model_copy(update={"files": _read_signed(path).files})))


def read_state(path: Path) -> tuple[RunState, CheckpointMetadata]:
    """Read where a run stood, after comparing every file with its digest.

    Raises:
        CheckpointError: a file is missing, torn or changed; it is named.
        OtherVersionError: it is whole, but another version of ris wrote it.
    """
    state = _read_signed(path / STATE_FILE)
    for name, expected in state.files.items():
        file = path / name
        if not file.is_file():
            raise _damaged(path, f"{name} is missing")
        if sha256_file(file).sha256 != expected:
            raise _damaged(path, f"{name} is not what was written")
    if missing := {MODEL_FILE, OPTIMISER_FILE} - set(state.files):
        raise _damaged(path, f"it does not name {', '.join(sorted(missing))}")
    return state, read_metadata(path / MODEL_FILE)


def latest_state(
    run: RunDirectory, say: Callable[[str], None]
) -> tuple[Path, RunState, CheckpointMetadata] | None:
    """Find the latest whole state of a run; None if it has none at all.

    Args:
        run: the run; it may be at work, and remove states that are about to be read.
        say: is told of every damaged state that is passed over.

    Raises:
        CheckpointError: there are states, but all are damaged.
        OtherVersionError: the latest whole one is of another version of ris; it is not passed over.
    """
    paths = saved_states(run)
    for path in paths:
        try:
            return path, *read_state(path)
        except OtherVersionError:
            raise
        except CheckpointError as error:
            if path.exists():
                say(f"{error} Trying the state before it.")
    if (now := saved_states(run)) and now != paths:
        return latest_state(run, say)
    if paths:
        raise CheckpointError(
            f"All {len(paths)} states of {run.path} are damaged. Train anew under another name with --run.",
            path=run.path,
        )
    return None


def restore(path: Path, model: RisModel, optimiser: AdamW) -> None:
    """Load weights and optimiser of a state that `read_state` has found whole."""
    load_weights(model, path / MODEL_FILE)
    tensors = load((path / OPTIMISER_FILE).read_bytes())
    names = _optimised_names(model, optimiser)
    moments: dict[int, dict[str, torch.Tensor]] = {}
    for key, tensor in tensors.items():
        name, _, kind = key.rpartition("/")
        moments.setdefault(names.index(name), {})[kind] = tensor
    now = optimiser.state_dict()
    optimiser.load_state_dict({"state": moments, "param_groups": now["param_groups"]})


def optimiser_tensors(model: RisModel, optimiser: AdamW) -> dict[str, torch.Tensor]:
    """Name the optimiser's tensors `<parameter>/<kind>`, kind being exp_avg, exp_avg_sq or step."""
    names = _optimised_names(model, optimiser)
    return {
        f"{names[index]}/{kind}": value.detach().cpu().contiguous()
        for index, moments in optimiser.state_dict()["state"].items()
        for kind, value in moments.items()
    }


def discard_later(run: RunDirectory, step: int) -> list[Path]:
    """Remove the states after a step, since the run goes on from there; returns what they were."""
    removed = [path for path in saved_states(run) if int(_NAME.fullmatch(path.name)[1]) > step]  # type: ignore[index]
    for path in removed:
        _remove(path)
    return removed


def _optimised_names(model: RisModel, optimiser: AdamW) -> list[str]:
    """Names of parameters in the order of the optimiser's groups."""
    names = {parameter: name for name, parameter in model.named_parameters()}
    return [names[parameter] for group in optimiser.param_groups for parameter in group["params"]]


def _match(path: Path) -> re.Match[str] | None:
    return _NAME.fullmatch(path.name)


def _remove(path: Path) -> None:
    """Remove a state so that half of one never looks like a whole one."""
    hidden = path.with_name(f".{path.name}.{os.getpid()}.removed.tmp")
    shutil.rmtree(hidden, ignore_errors=True)  # of a process that was killed and had the same number
    path.rename(hidden)
    shutil.rmtree(hidden, ignore_errors=True)


def _signed(state: RunState) -> bytes:
    body = state.model_dump_json()
    return json.dumps({"state": body, "sha256": hashlib.sha256(body.encode()).hexdigest()}).encode()


def _read_signed(path: Path) -> RunState:
    try:
        signed: Any = json.loads(path.read_bytes())
        body, expected = signed["state"], signed["sha256"]
        if hashlib.sha256(body.encode()).hexdigest() != expected:
            raise _damaged(path.parent, f"{path.name} is not what was written")
        return RunState.model_validate_json(body)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise _damaged(path.parent, f"{path.name} is missing") from error
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError, AttributeError) as error:
        raise _damaged(path.parent, f"{path.name} is torn") from error
    except ValidationError as error:
        problem = error.errors()[0]
        where = ".".join(map(str, problem["loc"]))
        raise OtherVersionError(
            f"The state {path.parent} was written by another version of ris ({where}: {problem['msg']}). Go "
            "on with that version, which env.json names in the run; or from another of its states, --resume "
            f"{path.parent.with_name('state-<step>')}; or train another run with --run.",
            path=path.parent,
        ) from error


def _damaged(path: Path, why: str) -> CheckpointError:
    return CheckpointError(f"The state {path} is damaged: {why}.", path=path)

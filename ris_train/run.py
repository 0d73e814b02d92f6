"""A run directory: configuration, environment, metrics, checkpoints, evaluations.

runs/<name>/config.yaml  env.json  metrics.jsonl  tokenizer/  eval/  .lock
            checkpoints/{best,last}.safetensors  checkpoints/state-<step>/
"""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import os
import platform
import shlex
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import yaml

from ris_cache.errors import CheckpointError, ConfigError
from ris_cache.store.files import LOCK_NAME, make_directories, write_atomically
from ris_train.config import RunConfig, parse_config
from ris_train.config.yaml_reading import read_yaml
from ris_train.json_reading import parse_object
from ris_train.run_lock import held_lock

LIBRARIES = ("ris", "torch", "transformers", "segment-anything", "open_clip_torch", "zarr", "numpy")


@dataclass(frozen=True, slots=True)
class RunDirectory:
    """Where one training run keeps its files."""

    path: Path

    @property
    def config_path(self) -> Path:
        """The resolved configuration."""
        return self.path / "config.yaml"

    @property
    def metrics_path(self) -> Path:
        """One JSON object per line, appended as training goes."""
        return self.path / "metrics.jsonl"

    @property
    def tokenizer_dir(self) -> Path:
        """The tokenizer that the run's model was trained with."""
        return self.path / "tokenizer"

    def checkpoint_path(self, name: str) -> Path:
        """Path of the checkpoint `best` or `last`."""
        return self.path / "checkpoints" / f"{name}.safetensors"

    def has_checkpoint(self, name: str) -> bool:
        """Whether there is the checkpoint `best` or `last`, in a directory that may be looked into."""
        try:
            return self.checkpoint_path(name).is_file()
        except OSError:
            return False

    @property
    def checkpoints_dir(self) -> Path:
        """Checkpoints, and the states that the run can be resumed from."""
        return self.path / "checkpoints"

    @classmethod
    def create(cls, path: Path, config: RunConfig, *, facts: Mapping[str, Any]) -> RunDirectory:
        """Make the directory and write what the run is made of.

        Args:
            path: must not hold a run yet.
            config: resolved.
            facts: what else to record in env.json: cache, fingerprint, labels of the weights, device.

        Raises:
            ConfigError: the directory holds a run already, or what is left of one.
        """
        run = cls(path)
        run.require_none()
        run.write_facts(facts)
        run.write_config(config)
        return run

    def require_none(self) -> None:
        """Refuse to begin a run here where there is one.

        Raises:
            ConfigError: the directory holds a run already, or what is left of one.
        """
        path = self.path
        if self.config_path.exists():
            raise ConfigError(
                f"{path} holds a run already. Go on with it (`ris train --run {path.name}`, without --resume "
                "never), name another one with --run, or remove it.",
                path=path,
            )
        if self.metrics_path.exists() or self.checkpoints_dir.exists():
            raise ConfigError(
                f"{path} holds metrics or checkpoints of a run, but no config.yaml. Put that back to go on, "
                "name another run with --run, or remove the directory.",
                path=path,
            )

    def resume_command(self, cache_root: Path) -> str:
        """The command that goes on with the run, for a shell."""
        words = ("--cache", cache_root, "--run", self.path.name, "--runs", self.path.parent)
        return f"ris train {shlex.join(map(str, words))}"

    def remove_unfinished(self) -> None:
        """Remove what a process that was killed had not finished writing; to be done under the lock."""
        states = self.checkpoints_dir.glob("state-*")
        for directory in (self.path, self.tokenizer_dir, self.checkpoints_dir, *states):
            for path in directory.glob(".*.tmp"):
                if path.is_dir():
                    shutil.rmtree(path, ignore_errors=True)
                else:
                    path.unlink(missing_ok=True)

    @property
    def facts_path(self) -> Path:
        """What the run was made of and on."""
        return self.path / "env.json"

    def write_facts(self, facts: Mapping[str, Any]) -> None:
        """Write env.json: what is given, the time, and the machine."""
        write_atomically(self.facts_path, _json_bytes({**facts, "started": _now(), **_machine()}))

    def add_resumption(self, facts: Mapping[str, Any], *, begun: Mapping[str, Any]) -> None:
        """Append to `resumed` in env.json that the run goes on: what is given, the time, and the machine.

        Args:
            facts: of this start.
            begun: for `write_facts`, should env.json be gone or unreadable.
        """
        content = self._read_facts()
        if not content:
            self.write_facts(begun)
            content = self._read_facts()
        resumed = content.get("resumed")
        earlier = resumed if isinstance(resumed, list) else []
        content["resumed"] = [*earlier, {**facts, "time": _now(), **_machine()}]
        write_atomically(self.facts_path, _json_bytes(content))

    def identity(self) -> str:
        """SHA-256 (lower-case hex) of env.json as it was when the run began, however often it goes on."""
        begun = {name: value for name, value in self._read_facts().items() if name != "resumed"}
        return hashlib.sha256(_json_bytes(begun)).hexdigest()

    def _read_facts(self) -> dict[str, Any]:
        """Content of env.json; empty if it is gone or unreadable."""
        try:
            return parse_object(self.facts_path.read_bytes())
        except (OSError, ValueError):
            return {}

    @property
    def started(self) -> str:
        """When the run began: ISO 8601, UTC; empty, so before all others, if that is not known."""
        found = self._read_facts().get("started")
        return found if isinstance(found, str) else ""

    @property
    def lock_path(self) -> Path:
        """Locked by the process that trains; the kernel drops the lock when it ends, however it ends."""
        return self.path / LOCK_NAME

    @contextmanager
    def held(self) -> Iterator[None]:
        """Hold the run's lock, which keeps a second training out and tells `ris runs list` of this one.

        Raises:
            CheckpointError: another process trains here; or the directory cannot be written to, or is on a
                file system without locks.
            ConfigError: it is a file.
        """
        _make_directories(self.path, self.path)
        with held_lock(self.path, self.lock_path):
            yield

    def write_config(self, config: RunConfig) -> None:
        """Write the resolved configuration, in place of an earlier one."""
        tree = yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False)
        write_atomically(self.config_path, tree.encode())

    def read_config(self) -> RunConfig:
        """Read the configuration that the run was made, or last resumed, with.

        Raises:
            CheckpointError: there is no run here.
            ConfigError: the file cannot be read as a configuration of this version.
        """
        if not self.config_path.is_file():
            raise CheckpointError(
                f"There is no run at {self.path}: it has no config.yaml. `ris runs list` shows "
                "those there are.",
                path=self.path,
            )
        what_to_do = "Put it back to go on, or train another run with --run."
        try:
            tree = read_yaml(self.config_path)
        except ConfigError as error:
            text = " ".join(str(error).split()).rstrip(".")
            raise ConfigError(f"{text}. {what_to_do}", path=self.config_path) from error
        if not tree:
            raise ConfigError(
                f"{self.config_path} holds no configuration. {what_to_do}", path=self.config_path
            )
        return parse_config(tree, origin=str(self.config_path))

    def log(self, record: Mapping[str, Any]) -> None:
        """Append one line to the metrics; a score over nothing (NaN) becomes null."""
        with self.metrics_path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(finite_or_null(dict(record)), allow_nan=False) + "\n")

    def sync_metrics(self) -> int:
        """Make the metrics survive a power cut; returns their size in bytes."""
        if not self.metrics_path.exists():
            return 0
        with self.metrics_path.open("ab") as file:
            os.fsync(file.fileno())
            return file.tell()

    def require_metrics(self, num_bytes: int) -> int:
        """Refuse metrics shorter than a size that `sync_metrics` returned; returns their size.

        Raises:
            CheckpointError: the file is shorter than that.
        """
        found = self.metrics_path.stat().st_size if self.metrics_path.exists() else 0
        if found < num_bytes:
            raise CheckpointError(
                f"{self.metrics_path} has {found} bytes, but had {num_bytes} when the run's state was saved: "
                "somebody shortened it. Put it back, go on from an earlier state (--resume "
                f"{self.checkpoints_dir}/state-<step>), or train another run with --run.",
                path=self.metrics_path,
            )
        return found

    def truncate_metrics(self, num_bytes: int) -> None:
        """Drop the lines beyond a size that `sync_metrics` returned; they are of steps taken anew.

        Raises:
            CheckpointError: the file is shorter than that.
        """
        if self.require_metrics(num_bytes) > num_bytes:
            os.truncate(self.metrics_path, num_bytes)

    def write_evaluation(self, name: str, results: Any) -> Path:
        """Keep an evaluation as JSON beside the run; returns the file."""
        path = self.path / "eval" / f"{name}.json"
        write_atomically(path, _json_bytes(results))
        return path


def new_run_path(runs_dir: Path, recipe: str) -> Path:
    """Path for a new run, named after the recipe and the time; `free_run` makes it one of its own."""
    return runs_dir / f"{recipe}-{datetime.now(UTC):%Y%m%d-%H%M%S}"


def free_run(path: Path) -> Path:
    """Make the directory of a new run whose name nobody chose: another process may have come to the same.

    Returns:
        `path`, or where that is there already, the first free one of `path-2`, `path-3`, ….

    Raises:
        ConfigError: it would lie in a file.
    """
    _make_directories(path.parent, path)
    for number in itertools.count(1):
        candidate = path if number == 1 else path.with_name(f"{path.name}-{number}")
        try:
            candidate.mkdir()
        except FileExistsError:
            continue
        return candidate
    raise AssertionError("there is always a free number")


def find_run(runs_dir: Path, name: str | None) -> RunDirectory:
    """Find a run by name or path, or the one with a checkpoint that was started last.

    That is the order of `ris runs list`; a run that goes on keeps its place in it.

    Raises:
        CheckpointError: there is none.
    """
    if name is not None:
        for candidate in (runs_dir / name, Path(name)):
            if RunDirectory(candidate).config_path.is_file():
                return RunDirectory(candidate)
        raise CheckpointError(
            f"There is no run {name!r} in {runs_dir}; there are {', '.join(_run_names(runs_dir)) or 'none'}.",
            name=name,
        )
    runs = [RunDirectory(path.parent) for path in sorted(runs_dir.glob("*/config.yaml"))]
    if not runs:
        raise CheckpointError(
            f"There is no run in {runs_dir}. Train one with `ris train`, or name another place with --runs.",
            path=runs_dir,
        )
    # A run that was stopped before its first evaluation has nothing to use; take the latest that has.
    usable = [run for run in runs if run.has_checkpoint("best")]
    return max(usable or runs, key=lambda run: run.started)


def _make_directories(path: Path, run_path: Path) -> None:
    try:
        make_directories(path)
    except (FileExistsError, NotADirectoryError) as error:
        raise ConfigError(
            f"{error.filename} is a file, so no run can be at {run_path}. Name another with --run.",
            path=run_path,
        ) from error


def _run_names(runs_dir: Path) -> list[str]:
    return sorted(path.parent.name for path in runs_dir.glob("*/config.yaml"))


def finite_or_null(value: Any) -> Any:
    """Replace NaN and infinities, which JSON cannot say, by None, at any depth of dicts and lists."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: finite_or_null(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite_or_null(item) for item in value]
    return value


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def _machine() -> dict[str, Any]:
    """What env.json says of the machine and its software."""
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "libraries": {name: version(name) for name in LIBRARIES},
    }


def _json_bytes(value: Any) -> bytes:
    return (json.dumps(finite_or_null(value), indent=1, allow_nan=False) + "\n").encode()

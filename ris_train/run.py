"""A run directory: configuration, environment, metrics, checkpoints, evaluations.

runs/<name>/config.yaml  env.json  metrics.jsonl  tokenizer/  eval/  .lock
            checkpoints/{best,last}.safetensors  checkpoints/state-<step>/
"""

from __future__ import annotations

import json
import math
import os
import platform
import socket
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any, Final

import yaml

from ris_cache.errors import CacheError, CheckpointError, ConfigError
from ris_cache.store.files import LOCK_NAME, make_directories, write_atomically
from ris_cache.store.locks import FileLock
from ris_train.config import RunConfig, parse_config

LIBRARIES = ("ris", "torch", "transformers", "segment-anything", "open_clip_torch", "zarr", "numpy")
LOCK_SECONDS: Final = 1.0
"""How long a lock that is held is asked for again: `ris runs list` holds it for an instant, to look."""
_LOCK_POLL_SECONDS = 0.02


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
        if run.config_path.exists():
            raise ConfigError(
                f"{path} holds a run already. Go on with it (`ris train --run {path.name}`, without --resume "
                "never), name another one with --run, or remove it.",
                path=path,
            )
        if run.metrics_path.exists() or run.checkpoints_dir.exists():
            raise ConfigError(
                f"{path} holds metrics or checkpoints of a run, but no config.yaml. Put that back to go on, "
                "name another run with --run, or remove the directory.",
                path=path,
            )
        run.write_facts(facts)
        run.write_config(config)
        return run

    @property
    def facts_path(self) -> Path:
        """What the run was made of and on."""
        return self.path / "env.json"

    def write_facts(self, facts: Mapping[str, Any]) -> None:
        """Write env.json: what is given, the time, and the machine."""
        content = {
            **facts,
            "started": datetime.now(UTC).isoformat(timespec="seconds"),
            "python": platform.python_version(),
            "platform": platform.platform(),
            "libraries": {name: version(name) for name in LIBRARIES},
        }
        write_atomically(self.facts_path, _json_bytes(content))

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
        try:
            make_directories(self.path)
        except (FileExistsError, NotADirectoryError) as error:
            raise ConfigError(
                f"{error.filename} is a file, so no run can be at {self.path}. Name another with --run.",
                path=self.path,
            ) from error
        lock = FileLock(self.lock_path)
        end = time.monotonic() + LOCK_SECONDS
        while not self._try(lock):
            if time.monotonic() > end:
                raise CheckpointError(
                    f"The run {self.path} is being trained by another process{self._holder()}. Wait for it "
                    "to end, stop it with SIGTERM, which saves its state, or train another run: --run NAME.",
                    path=self.path,
                )
            time.sleep(_LOCK_POLL_SECONDS)
        try:
            self.lock_path.write_text(f"{os.getpid()} {socket.gethostname()}\n", encoding="utf-8")
            yield
        finally:
            lock.release()

    def _try(self, lock: FileLock) -> bool:
        try:
            return lock.acquire(wait=False)
        except (CacheError, OSError) as error:
            cause = error.__cause__ if isinstance(error, CacheError) else error
            reason = cause.strerror if isinstance(cause, OSError) else str(error)
            raise CheckpointError(
                f"The run {self.path} cannot be locked, so a second training could not be kept out: "
                f"{reason}. Keep runs where you may write and where file locks work: --runs.",
                path=self.path,
            ) from error

    def _holder(self) -> str:
        """Who holds the lock, in words; empty if that cannot be read."""
        try:
            number, host = self.lock_path.read_text(encoding="utf-8").split()
        except (OSError, ValueError):
            return ""
        return f" (process {number} on {host})"

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
        try:
            tree = yaml.safe_load(self.config_path.read_text(encoding="utf-8"))
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            problem = f"is not YAML: {' '.join(str(error).split())}"
            raise ConfigError(self._damaged_config(problem), path=self.config_path) from error
        if not isinstance(tree, dict):
            raise ConfigError(self._damaged_config("holds no configuration"), path=self.config_path)
        return parse_config(tree, origin=str(self.config_path))

    def _damaged_config(self, problem: str) -> str:
        return f"{self.config_path} {problem}. Put it back to go on, or train another run with --run."

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

    def truncate_metrics(self, num_bytes: int) -> None:
        """Drop the lines beyond a size that `sync_metrics` returned; they are of steps taken anew.

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
        if found > num_bytes:
            os.truncate(self.metrics_path, num_bytes)

    def write_evaluation(self, name: str, results: Any) -> Path:
        """Keep an evaluation as JSON beside the run; returns the file."""
        path = self.path / "eval" / f"{name}.json"
        write_atomically(path, _json_bytes(results))
        return path


def new_run_path(runs_dir: Path, recipe: str) -> Path:
    """Path for a new run, named after the recipe and the time."""
    return runs_dir / f"{recipe}-{datetime.now(UTC):%Y%m%d-%H%M%S}"


def find_run(runs_dir: Path, name: str | None) -> RunDirectory:
    """Find a run by name or path, or the latest one that has a checkpoint.

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
    runs = [RunDirectory(path.parent) for path in runs_dir.glob("*/config.yaml")]
    if not runs:
        raise CheckpointError(
            f"There is no run in {runs_dir}. Train one with `ris train`, or name another place with --runs.",
            path=runs_dir,
        )
    # A run that was stopped before its first evaluation has nothing to use; take the latest that has.
    usable = [run for run in runs if run.checkpoint_path("best").is_file()]
    return max(usable or runs, key=lambda run: run.config_path.stat().st_mtime)


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


def _json_bytes(value: Any) -> bytes:
    return (json.dumps(finite_or_null(value), indent=1, allow_nan=False) + "\n").encode()

"""A run directory: configuration, environment, metrics, checkpoints, evaluations.

runs/<name>/config.yaml  env.json  metrics.jsonl  tokenizer/  eval/
            checkpoints/{best,last}.safetensors  checkpoints/state-<step>/
"""

from __future__ import annotations

import json
import math
import os
import platform
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import yaml

from ris_cache.errors import CheckpointError, ConfigError
from ris_cache.store.files import write_atomically
from ris_train.config import RunConfig, parse_config

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
            ConfigError: the directory holds a run already.
        """
        run = cls(path)
        if run.config_path.exists():
            raise ConfigError(
                f"{path} holds a run already. Go on with it (`ris train --run {path.name}`, without --resume "
                "never), name another one with --run, or remove it.",
                path=path,
            )
        write_atomically(
            path / "env.json",
            _json_bytes(
                {
                    **facts,
                    "started": datetime.now(UTC).isoformat(timespec="seconds"),
                    "python": platform.python_version(),
                    "platform": platform.platform(),
                    "libraries": {name: version(name) for name in LIBRARIES},
                }
            ),
        )
        run.write_config(config)
        return run

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
            raise ConfigError(f"{self.config_path} is not YAML: {error}", path=self.config_path) from error
        if not isinstance(tree, dict):
            raise ConfigError(f"{self.config_path} holds no configuration.", path=self.config_path)
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

    def truncate_metrics(self, num_bytes: int) -> None:
        """Drop the lines beyond a size that `sync_metrics` returned; they are of steps taken anew.

        Raises:
            CheckpointError: the file is shorter than that.
        """
        found = self.metrics_path.stat().st_size if self.metrics_path.exists() else 0
        if found < num_bytes:
            raise CheckpointError(
                f"{self.metrics_path} has {found} bytes, but had {num_bytes} when the run's state was saved: "
                "somebody shortened it. Put it back, or train anew under another name with --run.",
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

"""Drawn data, trials of extractions in processes of their own, and ways to compare what they leave."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from ris_cache.datasets.shapes import write_shapes_dataset
from ris_cache.encoders.frozen import FrozenEncoders
from ris_cache.encoders.spec import TINY
from ris_cache.encoders.weights import resolve_clip_weights, resolve_sam_weights
from ris_cache.store.cache import FeatureCache

SHARD_ROWS = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class Ending:
    """What became of a trial; `trials.py` says what each value is."""

    exit_code: int | None
    signal: int | None
    seconds: float
    timed_out: bool
    encoded: int | None = None
    calls: dict[str, int] | None = None
    added: int | None = None
    quarantined: dict[str, str] | None = None
    error: str | None = None
    message: str | None = None


class Trials:
    """The program `trials.py`, which forks extractions off."""

    def __init__(self, data: Path) -> None:
        self._data = data
        self._program = subprocess.Popen(
            [sys.executable, str(Path(__file__).with_name("trials.py"))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert self._program.stdout is not None
        assert self._program.stdout.readline() == "ready\n"

    def run(self, *trials: dict[str, Any]) -> list[Ending]:
        """Run trials side by side; none may take a minute."""
        assert self._program.stdin is not None
        assert self._program.stdout is not None
        self._program.stdin.write(json.dumps(trials) + "\n")
        self._program.stdin.flush()
        endings = [Ending(**ending) for ending in json.loads(self._program.stdout.readline())]
        assert not any(ending.timed_out for ending in endings)
        return endings

    def trial(
        self, cache: Path, split: str = "refcoco", *, options: dict[str, Any] | None = None, **terms: Any
    ) -> dict[str, Any]:
        """Describe an extraction of the drawn data into a cache."""
        extract = {"data": str(self._data), "cache": str(cache), "split": split, "shard_rows": SHARD_ROWS}
        return {"extract": extract | (options or {}), **terms}

    def command(self, cache: Path, split: str, *options: str, **terms: Any) -> dict[str, Any]:
        """Describe a run of `ris extract` on the drawn data; `data` names another data root."""
        data = terms.pop("data", self._data)
        argv = ["extract", "--split", split, "--data", str(data), "--cache", str(cache), "--batch-size", "4"]
        return {"argv": [*argv, "--workers", "1", "--shard-rows", str(SHARD_ROWS), *options], **terms}

    def extract(self, cache: Path, split: str = "refcoco", **terms: Any) -> Ending:
        """Run one extraction that must succeed."""
        (ending,) = self.run(self.trial(cache, split, **terms))
        assert ending.exit_code == 0, ending
        return ending

    def close(self) -> None:
        """End the program."""
        self._program.communicate()
        assert self._program.returncode == 0


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """The same number of threads everywhere gives the same bits; with one, tests beside others stay fast."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Data root with a drawn refcoco of 52 images (36 of them train, 8 val) and a refcoco+ of 12 others."""
    root = tmp_path_factory.mktemp("drawn") / "data"
    write_shapes_dataset(root, num_images={"train": 36, "val": 8, "testA": 4, "testB": 4}, seed=3)
    write_shapes_dataset(root, name="refcoco+", num_images={"train": 8, "val": 4}, seed=4)
    return root


@pytest.fixture(scope="session")
def trials(data: Path) -> Iterator[Trials]:
    """Runs extractions in processes that may be killed."""
    program = Trials(data)
    yield program
    program.close()


@pytest.fixture(scope="session")
def encoders() -> FrozenEncoders:
    """The tiny encoders with random weights, in this process."""
    return FrozenEncoders.load(
        TINY,
        sam_source=resolve_sam_weights(None, TINY.sam, random_seed=0),
        clip_source=resolve_clip_weights(None, TINY.clip, random_seed=0),
        arithmetic="float32",
    )


@pytest.fixture(scope="session")
def content() -> Callable[[Path], dict[str, Any]]:
    """Everything in a cache directory that must not depend on how it came about.

    The digest of each file by path, but for the lock; the manifest without its times and so without its digest.
    """

    def content(cache: Path) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for path in sorted(cache.rglob("*")):
            name = path.relative_to(cache).as_posix()
            if path.is_file() and name not in (".lock", "manifest.json"):
                found[name] = hashlib.sha256(path.read_bytes()).hexdigest()
            elif path.is_dir() and name.split("/")[0] == "extraction":
                found[name] = "a directory"
        manifest = json.loads((cache / "manifest.json").read_bytes())
        del manifest["recorded"], manifest["digest"]
        return {**found, "manifest.json": manifest}

    return content


@pytest.fixture(scope="session")
def read_everything() -> Callable[[Path], dict[str, Any]]:
    """Open a cache and read, with all checks, whatever it lists; returns it in a form that can be compared."""

    def read_everything(root: Path) -> dict[str, Any]:
        cache = FeatureCache.open(root, integrity="every-read")
        ids = sorted(cache.image_ids.tolist())
        stored = cache.read(ids).stored
        manifest = cache.manifest
        return {
            "features": {
                image_id: hashlib.sha256(
                    b"".join(array[i].tobytes() for array in stored.values())
                ).hexdigest()
                for i, image_id in enumerate(ids)
            },
            "expressions": {name: cache.expressions(name) for name in manifest.datasets},
            "instances": {name: cache.instances(name) for name in manifest.datasets},
            "categories": {
                name: (cache.categories(name).ids, cache.categories(name).embeddings.tobytes())
                for name in manifest.category_sets
            },
            "heads": {name: tensor.tobytes() for name, tensor in cache.sam_heads().items()},
        }

    return read_everything


@pytest.fixture(scope="session")
def committed() -> Callable[[Path], set[str]]:
    """The file names of the images whose shards an unfinished extraction has committed."""

    def committed(cache: Path) -> set[str]:
        directory = cache / "extraction"
        if not (directory / "plan.json").exists():
            return set()
        names = {
            i["image_id"]: i["file_name"]
            for i in json.loads((directory / "plan.json").read_bytes())["images"]
        }
        records = [json.loads(path.read_bytes()) for path in (directory / "shards").glob("*.json")]
        return {names[image["image_id"]] for record in records for image in record["images"]}

    return committed


@pytest.fixture(scope="session")
def straight(tmp_path_factory: pytest.TempPathFactory, trials: Trials) -> Callable[..., tuple[Path, Ending]]:
    """The caches that uninterrupted extractions make, each made once: by its splits, in their order."""
    made: dict[Any, tuple[Path, Ending]] = {}

    def straight(*splits: str, store: str = "zarr", limit: int | None = None) -> tuple[Path, Ending]:
        key = (splits, store, limit)
        if key not in made:
            cache = tmp_path_factory.mktemp("straight") / "feats"
            for split in splits:
                ending = trials.extract(cache, split, options={"store": store, "limit": limit})
            made[key] = cache, ending
        return made[key]

    return straight

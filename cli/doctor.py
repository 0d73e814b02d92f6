"""`ris doctor`: what is installed, which device is used, what is missing and how to mend it."""

from __future__ import annotations

import importlib.util
import logging
import os
import platform
import shutil
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Literal

import typer

from cli.options import (
    DEFAULT_CACHE,
    DEFAULT_DATA,
    CacheOption,
    DataOption,
    JsonOption,
)
from cli.render import print_json, print_table
from ris_cache.errors import RisError

PACKAGES = (
    "torch",
    "torchvision",
    "transformers",
    "segment-anything",
    "open_clip_torch",
    "h5py",
    "zarr",
    "pyarrow",
    "pycocotools",
    "safetensors",
    "google-crc32c",
    "pydantic",
    "pyyaml",
    "scipy",
    "pillow",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """One thing looked at; `mend` says what to do unless it is ok."""

    name: str
    state: Literal["ok", "note", "missing"]
    found: str
    mend: str = ""


def doctor(
    data: DataOption = DEFAULT_DATA, cache: CacheOption = DEFAULT_CACHE, json: JsonOption = False
) -> None:
    """Say what is installed, which device is used, what is missing and how to mend it.

    Exits with 1 if something that every command needs is missing.

    Example: ris doctor
    """
    findings = [*_packages(), _torchvision(), _device()]
    probes: tuple[tuple[str, Callable[[], Finding]], ...] = (
        ("SAM weights", _sam_weights),
        ("CLIP weights", _clip_weights),
        ("BERT weights", _bert_weights),
        ("data", lambda: _data(data)),
        ("cache", lambda: _cache(cache)),
    )
    for name, probe in probes:
        try:
            findings.append(probe())
        except ImportError as error:  # a package above is missing; its own line says so
            findings.append(Finding(name=name, state="note", found=f"not checked: {error}"))
    if json:
        print_json([asdict(finding) for finding in findings])
    else:
        print_table(
            f"ris {version('ris')} on Python {platform.python_version()}",
            ["what", "state", "found", "mend"],
            [[finding.name, finding.state, finding.found, finding.mend] for finding in findings],
            left=("state", "found", "mend"),
        )
    if any(finding.state == "missing" for finding in findings):
        raise typer.Exit(1)


def _packages() -> list[Finding]:
    findings = []
    for name in PACKAGES:
        try:
            findings.append(Finding(name=name, state="ok", found=version(name)))
        except PackageNotFoundError:
            mend = f"{Path(sys.executable).name} -m pip install {name}"
            findings.append(Finding(name=name, state="missing", found="not installed", mend=mend))
    return findings


def _torchvision() -> Finding:
    """Whether torchvision's compiled operators match torch."""
    if importlib.util.find_spec("torch") is None or importlib.util.find_spec("torchvision") is None:
        return Finding(name="torchvision operators", state="note", found="not checked")
    from ris_cache.vision_imports import ensure_torchvision, is_repaired

    logging.getLogger("ris_cache.vision_imports").setLevel(logging.ERROR)  # the table says it
    ensure_torchvision()
    if not is_repaired():
        return Finding(name="torchvision operators", state="ok", found="built for this torch")
    return Finding(
        name="torchvision operators",
        state="note",
        found="built for another torch; ris does not use them",
        mend="pip install --force-reinstall --no-deps torchvision, from the index that torch came from",
    )


def _device() -> Finding:
    if importlib.util.find_spec("torch") is None:
        return Finding(name="device", state="missing", found="no torch", mend="make install")
    import torch

    if torch.cuda.is_available():
        names = ", ".join(torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count()))
        return Finding(name="device", state="ok", found=f"cuda: {names}")
    if torch.version.cuda is None:
        mend = "fine for the demo; for real extraction install a CUDA build of torch"
    else:
        mend = "torch has CUDA but sees no device: check the driver (nvidia-smi)"
    return Finding(name="device", state="note", found=f"cpu, {os.cpu_count()} processors", mend=mend)


def _sam_weights() -> Finding:
    from ris_cache.encoders.spec import PAPER
    from ris_cache.encoders.weights import find_published_weights, weights_dir

    path, names = find_published_weights(PAPER.sam.name)
    if path is not None:
        return Finding(name="SAM weights", state="ok", found=str(path))
    mend = f"for preset paper, put {names[0]} there, or set $RIS_WEIGHTS"
    return Finding(name="SAM weights", state="note", found=f"none in {weights_dir()}", mend=mend)


def _clip_weights() -> Finding:
    from ris_cache.encoders.spec import PAPER
    from ris_cache.encoders.weights import find_published_weights, weights_dir

    path, names = find_published_weights(PAPER.clip.name)
    if path is not None:
        return Finding(name="CLIP weights", state="ok", found=str(path))
    mend = f"downloaded on first use (open_clip tag openai); without network put {names[0]} there"
    return Finding(name="CLIP weights", state="note", found=f"none in {weights_dir()}", mend=mend)


def _bert_weights() -> Finding:
    from huggingface_hub import try_to_load_from_cache

    from ris_train.config import BertConfig

    name = BertConfig().weights
    assert name is not None
    found = try_to_load_from_cache(name, "model.safetensors")
    if isinstance(found, str):
        return Finding(name="BERT weights", state="ok", found=found)
    return Finding(
        name="BERT weights",
        state="note",
        found=f"{name} not downloaded yet",
        mend="downloaded on first use; without network --set model.bert.weights=FOLDER",
    )


def _data(root: Path) -> Finding:
    found = sorted(path.parent.name for path in root.glob("*/instances.json"))
    if found:
        return Finding(name="data", state="ok", found=f"{root}: {', '.join(found)}")
    return Finding(
        name="data",
        state="note",
        found=f"no dataset in {root}",
        mend="set $RIS_DATA, or draw one: ris data synth",
    )


def _cache(root: Path) -> Finding:
    from ris_cache import FeatureCache

    try:
        manifest = FeatureCache.open(root).manifest
    except RisError as error:
        return Finding(name="cache", state="note", found=f"none usable in {root}", mend=str(error))
    free = shutil.disk_usage(root).free / 2**30
    found = f"{root}: {manifest.preset}, {manifest.images.ok} images, {free:.0f} GiB free"
    return Finding(name="cache", state="ok", found=found)

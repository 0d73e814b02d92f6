"""Options that several commands share, and the defaults that make the short forms work."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ris_cache.errors import ConfigError

if TYPE_CHECKING:
    import torch

DataOption = Annotated[
    Path, typer.Option("--data", help="Data root: annotation folders and images.", envvar="RIS_DATA")
]
CacheOption = Annotated[Path, typer.Option("--cache", help="Feature cache directory.", envvar="RIS_CACHE")]
RunsOption = Annotated[Path, typer.Option("--runs", help="Directory of training runs.", envvar="RIS_RUNS")]
RunOption = Annotated[
    str | None, typer.Option("--run", help="Run by name or path; by default the one started last.")
]
DeviceOption = Annotated[
    str | None, typer.Option("--device", help="cpu, cuda, cuda:1, …; by default cuda if there is one.")
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print the result as JSON on stdout.")]
PresetOption = Annotated[str, typer.Option("--preset", help="Encoder preset: paper or tiny.")]
SamWeightsOption = Annotated[
    str | None,
    typer.Option("--sam-weights", help="SAM checkpoint; by default searched in $RIS_WEIGHTS or ./weights."),
]
ClipWeightsOption = Annotated[
    str | None,
    typer.Option("--clip-weights", help="CLIP checkpoint, or an open_clip tag such as openai (default)."),
]

DEFAULT_DATA = Path("data")
DEFAULT_CACHE = Path("feats")
DEFAULT_RUNS = Path("runs")


def choose_device(name: str | None) -> torch.device:
    """The device asked for, or CUDA if there is one.

    Raises:
        ConfigError: it is neither the CPU nor a CUDA device of this machine.
    """
    import torch

    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    match = re.fullmatch(r"cpu|cuda(?::([0-9]{1,4}))?", name)
    if match is None:
        raise _no_device(name, "ris runs on cpu, cuda, or one of several such as cuda:1")
    if name == "cpu":
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise _no_device(name, "there is no CUDA device, or this torch was built without CUDA")
    index, count = int(match[1] or 0), torch.cuda.device_count()
    if index >= count:
        raise _no_device(name, f"the last of the CUDA devices here is cuda:{count - 1}")
    device = torch.device("cuda") if match[1] is None else torch.device("cuda", index)
    try:
        torch.empty(0, device=device)
    except RuntimeError as error:
        raise _no_device(name, str(error).splitlines()[0].rstrip(".")) from error
    return device


def _no_device(name: str, problem: str) -> ConfigError:
    return ConfigError(
        f"Device {name!r} cannot be used here: {problem}. `ris doctor` shows what is there.", device=name
    )

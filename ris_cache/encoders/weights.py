"""Where the frozen encoders' weights come from, and the record that says so.

Nothing is ever made up in silence: weights come from a file, or they are random because a seed was asked for.
Choosing and describing weights does not import torch; reading them does, inside the function.
"""

from __future__ import annotations

import hashlib
import os
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from ris_cache.encoders.spec import ClipSpec, SamSpec
from ris_cache.errors import ConfigError, WeightsError

if TYPE_CHECKING:
    import torch
    from torch import nn

# Public file names by architecture, in the order in which they are looked for.
_SAM_FILES: dict[str, tuple[str, ...]] = {"vit_b": ("sam_vit_b_01ec64.pth",)}
_CLIP_FILES: dict[str, tuple[str, ...]] = {
    "ViT-L-14-336-quickgelu": (
        "ViT-L-14-336px.pt",
        "ViT-L-14-336-quickgelu.safetensors",
        "open_clip_model.safetensors",
    )
}
_CLIP_TAG = "openai"
_NUM_NAMED = 4  # keys spelled out in a message; a wrong file has hundreds


@dataclass(frozen=True, slots=True)
class RandomWeights:
    """Weights drawn from a seed, for trials without downloads."""

    seed: int


@dataclass(frozen=True, slots=True)
class FileWeights:
    """Weights in a local file: .safetensors, a torch file of plain tensors, or OpenAI's CLIP archive."""

    path: Path


WeightsSource = RandomWeights | FileWeights


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightsRecord:
    """What a manifest says about one encoder's weights.

    Attributes:
        sha256: hex digest of the whole file; None for random weights.
        seed: None for a file.
        origin: where they were found, for people; another machine's path differs, so it is not hashed.
    """

    kind: Literal["file", "random"]
    sha256: str | None
    seed: int | None
    origin: str

    @property
    def label(self) -> str:
        """Short form for tables: `random(seed=0)` or `sam_vit_b_01ec64.pth sha256:ec2df62d`."""
        if self.sha256 is None:
            return f"random(seed={self.seed})"
        return f"{Path(self.origin).name} sha256:{self.sha256[:8]}"

    def as_dict(self) -> dict[str, str | int | None]:
        """What enters the fingerprint: everything that decides the numbers, and nothing else."""
        return {"kind": self.kind, "sha256": self.sha256, "seed": self.seed}


def describe_weights(source: WeightsSource) -> WeightsRecord:
    """Record a source; a file is read whole for its digest, but not loaded.

    Raises:
        WeightsError: the file cannot be read.
    """
    if isinstance(source, RandomWeights):
        return WeightsRecord(kind="random", sha256=None, seed=source.seed, origin="random")
    try:
        with source.path.open("rb") as stream:
            digest = hashlib.file_digest(stream, "sha256").hexdigest()
    except OSError as error:
        raise WeightsError(
            f"Weights file {source.path} cannot be read: {error.strerror}.", path=source.path
        ) from error
    return WeightsRecord(kind="file", sha256=digest, seed=None, origin=str(source.path))


def weights_dir() -> Path:
    """Folder searched for weights: `$RIS_WEIGHTS`, or `./weights`."""
    return Path(os.environ.get("RIS_WEIGHTS") or "weights")


def find_published_weights(architecture: str) -> tuple[Path | None, tuple[str, ...]]:
    """Look for an architecture's published weights in `weights_dir()`.

    Returns:
        The file, or None; and the names under which it was looked for.
    """
    names = (_SAM_FILES | _CLIP_FILES).get(architecture, ())
    return _search(weights_dir(), names), names


def resolve_sam_weights(argument: str | None, spec: SamSpec, *, random_seed: int | None) -> WeightsSource:
    """Decide which SAM weights to load.

    Args:
        argument: path of a file, or of a folder holding the published one; None searches `weights_dir()`.
        random_seed: ask for random weights; excludes `argument`.

    Raises:
        WeightsError: nothing was found; the message says what to download and where to put it.
        ConfigError: both arguments are given.
    """
    if random_seed is not None:
        return _random(argument, random_seed)
    names = _SAM_FILES.get(spec.name, ())
    if argument is not None:
        return _file_or_folder(Path(argument), names)
    _require_published(spec.name, names)
    folder = weights_dir()
    found = _search(folder, names)
    if found is not None:
        return FileWeights(found)
    raise WeightsError(
        f"No SAM {spec.name} weights: {' or '.join(names)} is not in {folder.absolute()}. Download that file "
        "from the model checkpoints listed by the segment-anything project and put it there, set "
        "$RIS_WEIGHTS to its folder, or give its path. For a trial without it, ask for --random-weights.",
        folder=folder,
        names=names,
    )


def resolve_clip_weights(argument: str | None, spec: ClipSpec, *, random_seed: int | None) -> WeightsSource:
    """Decide which CLIP weights to load, downloading them when only open_clip's tag is left to try.

    Args:
        argument: path of a file, of a folder holding a published one, or an open_clip pretrained tag; None
            searches `weights_dir()`, then tries the tag `openai`.
        random_seed: ask for random weights; excludes `argument`.

    Raises:
        WeightsError: nothing was found or the download failed; the message says what to do instead.
        ConfigError: both arguments are given.
    """
    if random_seed is not None:
        return _random(argument, random_seed)
    names = _CLIP_FILES.get(spec.name, ())
    if argument is not None:
        path = Path(argument)
        if path.exists() or path.suffix or len(path.parts) > 1:
            return _file_or_folder(path, names)
        return _download_tag(argument, spec)
    _require_published(spec.name, names)
    found = _search(weights_dir(), names)
    return FileWeights(found) if found is not None else _download_tag(_CLIP_TAG, spec)


def read_state_dict(path: Path) -> dict[str, torch.Tensor]:
    """Read a file of named tensors without running anything that is in it.

    A `state_dict` level and a `module.` prefix, as training programs add them, are taken off.

    Returns:
        Tensors on the CPU, in the file's dtypes.

    Raises:
        WeightsError: missing, unreadable, or more than named tensors; nothing in it was run.
    """
    import torch
    from safetensors.torch import load_file

    if not path.is_file():
        raise WeightsError(f"No weights file at {path}. Check the path.", path=path)
    if _is_torchscript(path):
        raise WeightsError(
            f"{path} is a TorchScript archive. Opening one can run code of its own, so only CLIP's published "
            "archive is, known by its digest. Save the model's state_dict to .safetensors and give that.",
            path=path,
        )
    try:
        if path.suffix == ".safetensors":
            content: object = load_file(path)
        else:
            content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # both readers raise whatever the first wrong byte leads them to
        # Their texts stay in the cause only: torch's suggests loading the file without protection.
        raise WeightsError(
            f"Weights file {path} cannot be read as plain tensors ({type(error).__name__}). Nothing in "
            "it was run. Check that it is the published file, downloaded whole.",
            path=path,
        ) from error
    return _named_tensors(content, path)


def load_strictly(module: nn.Module, state: Mapping[str, torch.Tensor], *, path: Path) -> None:
    """Copy tensors into a module when names and shapes agree to the last one.

    Args:
        state: any float dtype; converted to the module's.
        path: named in errors.

    Raises:
        WeightsError: missing or unexpected names, or other shapes; the first few are named.
    """
    own = module.state_dict()
    problems = {
        "missing": [name for name in own if name not in state],
        "unexpected": [name for name in state if name not in own],
        "of another shape": [
            f"{name} {list(state[name].shape)} instead of {list(tensor.shape)}"
            for name, tensor in own.items()
            if name in state and state[name].shape != tensor.shape
        ],
    }
    if any(problems.values()):
        listed = "; ".join(
            f"{len(names)} {what}: {_first_few(names)}" for what, names in problems.items() if names
        )
        raise WeightsError(
            f"Weights file {path} does not fit the architecture: {listed}. Give the weights of this "
            "architecture, or choose the preset that they belong to.",
            path=path,
            **{what.replace(" ", "_"): tuple(names) for what, names in problems.items()},
        )
    module.load_state_dict(dict(state), strict=True)


def _random(argument: str | None, seed: int) -> RandomWeights:
    if argument is not None:
        raise ConfigError(
            f"Weights {argument!r} and random weights (seed {seed}) were both asked for; choose one.",
            argument=argument,
            seed=seed,
        )
    return RandomWeights(seed)


def _require_published(name: str, names: Sequence[str]) -> None:
    if not names:
        raise WeightsError(
            f"Architecture {name!r} has no published weights. Ask for random ones by name with "
            "--random-weights, or give a file made for it.",
            architecture=name,
        )


def _file_or_folder(path: Path, names: Sequence[str]) -> FileWeights:
    if path.is_file():
        return FileWeights(path)
    found = _search(path, names)
    if found is not None:
        return FileWeights(found)
    wanted = f" with {' or '.join(names)}" if path.is_dir() and names else ""
    raise WeightsError(
        f"No weights file at {path.absolute()}{wanted}. Check the path.", path=path, names=names
    )


def _search(folder: Path, names: Sequence[str]) -> Path | None:
    return next((folder / name for name in names if (folder / name).is_file()), None)


def _download_tag(tag: str, spec: ClipSpec) -> FileWeights:
    """Fetch a tag's file through open_clip, which keeps it in its own download cache.

    The original host is preferred to the model hub: its file is the one that people also fetch by hand, so
    all of them share one digest, which open_clip checks. It also fails at once where there is no network.
    """
    from ris_cache.vision_imports import ensure_torchvision

    ensure_torchvision()
    import open_clip

    known = tuple(open_clip.list_pretrained_tags_by_model(spec.name))
    if tag not in known:
        raise WeightsError(
            f"{tag!r} is neither a file nor an open_clip tag of {spec.name}; known tags: "
            f"{', '.join(known) or 'none'}.",
            tag=tag,
            known=known,
        )
    try:
        target = open_clip.download_pretrained(
            open_clip.get_pretrained_cfg(spec.name, tag), prefer_hf_hub=False
        )
    except (OSError, RuntimeError) as error:
        folder = weights_dir().absolute()
        names = _CLIP_FILES.get(spec.name, ())
        raise WeightsError(
            f"No CLIP {spec.name} weights: {' or '.join(names)} is not in {folder}, and downloading "
            f"open_clip's tag {tag!r} failed ({type(error).__name__}). Fetch that tag's file on a machine "
            "with network access and put it there under one of these names, set $RIS_WEIGHTS to its folder, "
            "or give its path. For a trial without it, ask for --random-weights.",
            tag=tag,
            folder=folder,
            names=names,
        ) from error
    return FileWeights(Path(target))


def _is_torchscript(path: Path) -> bool:
    if not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:
        return any(name.endswith("/constants.pkl") for name in archive.namelist())


def _named_tensors(content: object, path: Path) -> dict[str, torch.Tensor]:
    import torch

    if isinstance(content, Mapping) and isinstance(content.get("state_dict"), Mapping):
        content = content["state_dict"]
    if not isinstance(content, Mapping) or not content:
        raise WeightsError(f"Weights file {path} holds no named tensors.", path=path)
    strangers = [str(name) for name, value in content.items() if not isinstance(value, torch.Tensor)]
    if strangers:
        raise WeightsError(
            f"Weights file {path} holds more than named tensors: {_first_few(strangers)}. Give a bare "
            "state_dict, not a training checkpoint.",
            path=path,
            names=tuple(strangers),
        )
    state = {str(name): value for name, value in content.items()}
    if all(name.startswith("module.") for name in state):
        state = {name.removeprefix("module."): value for name, value in state.items()}
    return state


def _first_few(names: Sequence[str]) -> str:
    more = len(names) - _NUM_NAMED
    return ", ".join(names[:_NUM_NAMED]) + (f" and {more} more" if more > 0 else "")

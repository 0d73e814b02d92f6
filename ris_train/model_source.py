"""Where a shared model comes from: a folder, or the hub, of which only the model's own files are fetched."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, Final

import huggingface_hub
import torch

from ris_cache.errors import CheckpointError, ConfigError
from ris_train.hub import hub_failures, quiet_hub, reason
from ris_train.model_card import CARD_NAME, RECORD_NAME, TOKENIZER_NAME, WEIGHTS_NAME

# No code: neither what a tokenizer may bring along, nor templates.
_TOKENIZER_PATTERNS: Final = (f"{TOKENIZER_NAME}/*.json", f"{TOKENIZER_NAME}/vocab.txt")
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?", re.ASCII)


def find_folder(path_or_hub_id: str | Path, revision: str | None, **fetching: Any) -> Path:
    """Return the folder of a model, fetched if it is on the hub.

    Args:
        path_or_hub_id: what exists as a folder is one; a `Path` is never a name on the hub.
        revision: on the hub.
        fetching: other keywords of the hub's `snapshot_download`.

    Raises:
        CheckpointError: neither a folder nor to be had from the hub.
        ConfigError: a revision of a local folder.
    """
    path = Path(path_or_hub_id)
    if path.is_dir():
        if revision is not None:
            raise ConfigError(
                f"{path} is a folder, which has no revisions; leave revision={revision!r} out.", path=path
            )
        return path
    is_hub_id = isinstance(path_or_hub_id, str) and _HUB_ID.fullmatch(path_or_hub_id) and not path.exists()
    if not is_hub_id:
        raise CheckpointError(
            f"There is no model at {path_or_hub_id}: give a folder with {RECORD_NAME}, or owner/name on the "
            "hub.",
            path=path,
        )
    return _download(str(path_or_hub_id), revision, **fetching)


def _download(repo_id: str, revision: str | None, **fetching: Any) -> Path:
    """Fetch what a model is loaded from into the hub's cache, and nothing else of the repository."""
    try:
        with quiet_hub():
            found = huggingface_hub.snapshot_download(
                repo_id,
                revision=revision,
                allow_patterns=[RECORD_NAME, WEIGHTS_NAME, CARD_NAME, *_TOKENIZER_PATTERNS],
                **fetching,
            )
    except hub_failures() as error:
        raise CheckpointError(
            f"There is no folder {repo_id}, and no model of that name could be had from the hub"
            f"{'' if revision is None else f' at {revision}'}: {reason(error)}.",
            repo_id=repo_id,
            revision=revision,
        ) from error
    return Path(str(found))


def usable_device(device: torch.device | str) -> torch.device:
    """Refuse a device before anything is fetched for it.

    Raises:
        ConfigError: it is not there, or torch knows none of that name.
    """
    try:
        chosen = torch.device(device)
        torch.empty(0, device=chosen)
    except (RuntimeError, AssertionError) as error:  # torch asserts that it was built with CUDA
        raise ConfigError(
            f"Device {str(device)!r} cannot be used here: {reason(error)}. `ris doctor` shows what is there.",
            device=str(device),
        ) from error
    return chosen

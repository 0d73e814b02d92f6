"""The files of a shared model: what a tokenizer's are, and which of a folder may be written over."""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory

from ris_cache.errors import ConfigError
from ris_train.data.text import Tokenizer
from ris_train.model_card import CARD_NAME, RECORD_NAME, TOKENIZER_NAME, WEIGHTS_NAME, read_record


def tokenizer_files(tokenizer: Tokenizer) -> dict[str, bytes]:
    """The tokenizer's files by path relative to the model's folder."""
    with TemporaryDirectory(prefix="ris-") as folder:
        tokenizer.save(Path(folder))
        return {f"{TOKENIZER_NAME}/{path.name}": path.read_bytes() for path in sorted(Path(folder).iterdir())}


def files_to_replace(folder: Path) -> set[str]:
    """Files of the model in a folder that another one is to be written into; none where there is no model.

    Raises:
        CheckpointError: the folder has a config.json of something else.
        ConfigError: files would be written over that are of no model, or be read as this model's.
    """
    has_model = (folder / RECORD_NAME).exists()
    files = set(read_record(folder).files) if has_model else set()
    tokenizer = {
        path.relative_to(folder).as_posix()
        for path in (folder / TOKENIZER_NAME).rglob("*")
        if not path.is_dir()
    }
    own = set() if has_model else {name for name in (WEIGHTS_NAME, CARD_NAME) if (folder / name).exists()}
    strangers = sorted(own | (tokenizer - files))
    if strangers:
        raise ConfigError(
            f"{folder} has files that belong to no model of ris: {', '.join(strangers[:3])}"
            + (f" and {len(strangers) - 3} more" if len(strangers) > 3 else "")
            + ". Name another folder, or remove them.",
            path=folder,
            files=tuple(strangers),
        )
    return files

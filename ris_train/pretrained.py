"""Trained models as folders that can be shared: written, read, fetched from the hub and put there.

<folder>/config.json  model.safetensors  tokenizer/  README.md

The first is written last and holds the digests of the others, so that half a download or a mixture of two
models is refused. Weights are safetensors; nothing that is read can run code.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from pydantic import ValidationError
from safetensors import SafetensorError
from safetensors.torch import save

from ris_cache.errors import CheckpointError, ConfigError, RisError
from ris_cache.store.files import digest_of, remove_files, sha256_file, write_atomically
from ris_train.checkpoint import CheckpointMetadata, build_from_metadata, load_checkpoint, load_weights
from ris_train.data.text import Tokenizer
from ris_train.model.segmenter import RisModel
from ris_train.model_card import (
    CARD_NAME,
    RECORD_NAME,
    TOKENIZER_NAME,
    UNKNOWN_LICENCE,
    WEIGHTS_NAME,
    ModelRecord,
    render_card,
)
from ris_train.run import RunDirectory
from ris_train.run_facts import reported_scores, trained_on

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?", re.ASCII)


@dataclass(frozen=True, slots=True, kw_only=True)
class RISModel:
    """A trained model together with what it takes to use and to describe it.

    Attributes:
        network: in evaluation mode, on its device.
        record: what is known of it; `record.files` is empty for a model that does not come from a folder.
        tokenizer: the one that it was trained with.
    """

    network: RisModel
    record: ModelRecord
    tokenizer: Tokenizer

    @property
    def metadata(self) -> CheckpointMetadata:
        """What its checkpoint says of itself."""
        return self.record.checkpoint

    @classmethod
    def from_pretrained(
        cls, path_or_hub_id: str | Path, *, device: torch.device | str = "cpu", revision: str | None = None
    ) -> RISModel:
        """Load a model from a folder that `save_pretrained` wrote, or from the hub.

        Args:
            path_or_hub_id: a folder, or `owner/name`; what exists as a folder is one.
            device: where the network goes.
            revision: branch, tag or commit on the hub; the default branch by default.

        Raises:
            CheckpointError: nothing is there, or a damaged model, or one of another version of ris.
            ConfigError: a revision of a local folder.
        """
        folder = _find_folder(path_or_hub_id, revision)
        record = _read_record(folder)
        _require_whole(folder, record)
        try:
            network = build_from_metadata(record.checkpoint)
            load_weights(network, folder / WEIGHTS_NAME)
        except SafetensorError as error:  # written so: its digest is right
            raise CheckpointError(
                f"{folder / WEIGHTS_NAME} is no safetensors file ({error}). Export the model again.",
                path=folder / WEIGHTS_NAME,
            ) from error
        config = record.checkpoint.config.model
        tokenizer = Tokenizer.from_folder(
            folder / TOKENIZER_NAME, config.max_tokens, keep_sep=config.keep_sep
        )
        return cls(network=network.to(torch.device(device)).eval(), record=record, tokenizer=tokenizer)

    @classmethod
    def from_run(
        cls, run: RunDirectory, checkpoint: str = "best", *, device: torch.device | str = "cpu"
    ) -> RISModel:
        """Load a checkpoint of a run, with the run's training data and the scores of this very checkpoint.

        Args:
            run: the run.
            checkpoint: `best` or `last`.
            device: where the network goes.

        Raises:
            CheckpointError: the run has no such checkpoint, or a damaged one.
        """
        path = run.checkpoint_path(checkpoint)
        network, metadata = load_checkpoint(path, device=torch.device(device))
        record = ModelRecord(
            name=run.path.resolve().name,
            ris_version=version("ris"),
            checkpoint=metadata,
            trained_on=trained_on(run),
            scores=reported_scores(run, checkpoint, metadata),
            files={},
        )
        tokenizer = Tokenizer.from_folder(
            run.tokenizer_dir, metadata.config.model.max_tokens, keep_sep=metadata.config.model.keep_sep
        )
        return cls(network=network, record=record, tokenizer=tokenizer)

    def save_pretrained(self, folder: str | Path, *, licence: str = UNKNOWN_LICENCE) -> Path:
        """Write the model into a folder, over one that is there; returns it.

        Args:
            folder: made if need be.
            licence: for the model card, as the hub names licences; `unknown` is a placeholder.

        Raises:
            CheckpointError: the folder has a config.json of something else.
            OSError: the folder cannot be written, or the disk is full.
        """
        folder = Path(folder)
        before = _read_record(folder).files if (folder / RECORD_NAME).exists() else {}
        tensors = self.network.state_dict().items()
        state = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors}
        contents = {WEIGHTS_NAME: save(state, metadata={"format": "pt"}), **_tokenizer_files(self.tokenizer)}
        for name, content in contents.items():
            write_atomically(folder / name, content)
        remove_files(folder, before.keys() - contents.keys())
        digests = {name: digest_of(content).sha256 for name, content in contents.items()}
        record = self.record.model_copy(update={"files": digests})
        write_atomically(folder / CARD_NAME, render_card(record, licence=licence).encode())
        write_atomically(folder / RECORD_NAME, (record.model_dump_json(indent=1) + "\n").encode())
        return folder

    def push_to_hub(
        self,
        repo_id: str,
        *,
        licence: str = UNKNOWN_LICENCE,
        private: bool = True,
        token: str | None = None,
        commit_message: str | None = None,
    ) -> str:
        """Upload the model as one commit; the repository is made if need be.

        Args:
            repo_id: `owner/name`.
            licence: as in `save_pretrained`. The card replaces one that is there.
            private: whether a repository that is made is private.
            token: by default the one that `hf auth login` keeps.
            commit_message: by default it names the run and the step.

        Returns:
            Where the commit can be seen.

        Raises:
            RisError: the hub refuses it or cannot be reached.
        """
        import huggingface_hub

        api = huggingface_hub.HfApi(token=token)
        with TemporaryDirectory(prefix="ris-") as folder:
            self.save_pretrained(folder, licence=licence)
            try:
                api.create_repo(repo_id, private=private, exist_ok=True)
                commit: Any = api.upload_folder(
                    repo_id=repo_id,
                    folder_path=folder,
                    commit_message=commit_message or f"{self.record.name}, step {self.metadata.step}",
                )
            except _hub_failures() as error:
                raise RisError(
                    f"The model could not be uploaded to {repo_id}: {_first_line(error)}. Check the name and "
                    "log in with `hf auth login`, or write a folder with save_pretrained and upload that.",
                    repo_id=repo_id,
                ) from error
        return str(commit.commit_url)


def export(
    run: RunDirectory,
    checkpoint: str = "best",
    folder: Path | None = None,
    *,
    licence: str = UNKNOWN_LICENCE,
) -> Path:
    """Write a checkpoint of a run as a folder to share.

    Args:
        run: the run.
        checkpoint: `best` or `last`.
        folder: by default `pretrained/<checkpoint>` within the run.
        licence: as in `RISModel.save_pretrained`.

    Returns:
        The folder.

    Raises:
        CheckpointError: as `RISModel.from_run`.
    """
    model = RISModel.from_run(run, checkpoint)
    return model.save_pretrained(folder or run.path / "pretrained" / checkpoint, licence=licence)


def _find_folder(path_or_hub_id: str | Path, revision: str | None) -> Path:
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
    return _download(str(path_or_hub_id), revision)


def _download(repo_id: str, revision: str | None) -> Path:
    """Fetch what a model is loaded from into the hub's own cache, and nothing else of the repository."""
    import huggingface_hub

    try:
        found = huggingface_hub.snapshot_download(
            repo_id,
            revision=revision,
            allow_patterns=[RECORD_NAME, WEIGHTS_NAME, CARD_NAME, f"{TOKENIZER_NAME}/*"],
        )
    except _hub_failures() as error:
        raise CheckpointError(
            f"There is no folder {repo_id}, and no model of that name could be had from the hub"
            f"{'' if revision is None else f' at {revision}'}: {_first_line(error)}.",
            repo_id=repo_id,
            revision=revision,
        ) from error
    return Path(str(found))


def _hub_failures() -> tuple[type[Exception], ...]:
    """What the hub raises: its own errors, and those of whichever HTTP client this version of it uses."""
    from huggingface_hub.errors import HfHubHTTPError

    return (OSError, ValueError, *HfHubHTTPError.__bases__)


def _tokenizer_files(tokenizer: Tokenizer) -> dict[str, bytes]:
    """The tokenizer's files by path relative to the model's folder."""
    with TemporaryDirectory(prefix="ris-") as folder:
        tokenizer.save(Path(folder))
        return {f"{TOKENIZER_NAME}/{path.name}": path.read_bytes() for path in sorted(Path(folder).iterdir())}


def _read_record(folder: Path) -> ModelRecord:
    path = folder / RECORD_NAME
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError as error:
        what = (
            f"{folder} is a training run. Write its model as a folder with ris_train.pretrained.export."
            if RunDirectory(folder).config_path.is_file()
            else f"{folder} has no {RECORD_NAME}, so it holds no model of ris."
        )
        raise CheckpointError(what, path=folder) from error
    except (OSError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path} cannot be read: {_first_line(error)}.", path=path) from error
    try:
        record = ModelRecord.model_validate_json(text)
    except ValidationError as error:
        problem = error.errors()[0]
        where = ".".join(str(part) for part in problem["loc"])
        raise CheckpointError(
            f"{path} does not describe a model of this version of ris: {where}: {problem['msg']}.", path=path
        ) from error
    if not record.files:
        raise CheckpointError(f"{path} names no files. Export the model again.", path=path)
    return record


def _require_whole(folder: Path, record: ModelRecord) -> None:
    """Refuse files that are not those which config.json was written for."""
    for name, expected in record.files.items():
        path = folder / name
        if not path.is_file():
            raise CheckpointError(
                f"{path} is missing, which {RECORD_NAME} names. Fetch or export the model again.", path=path
            )
        found = sha256_file(path).sha256
        if found != expected:
            raise CheckpointError(
                f"{path} is not the file that {RECORD_NAME} describes (sha256 {found[:12]}, expected "
                f"{expected[:12]}): damaged, or of another model. Fetch or export the model again.",
                path=path,
                expected=expected,
                found=found,
            )


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")

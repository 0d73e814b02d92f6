"""Trained models as folders that can be shared: written, read, fetched from the hub and put there.

<folder>/config.json  model.safetensors  tokenizer/  README.md

The first is written last and holds the digests of the others, so that half a download or a mixture of two
models is refused. Weights are safetensors; nothing that is read can run code. The hub's mixin gives the
interface that people know; the files are all ours.
"""

from __future__ import annotations

import inspect
import os
import shutil
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Final, Self

import huggingface_hub
import torch
from pydantic import ValidationError
from safetensors import SafetensorError
from safetensors.torch import save

from ris_cache.errors import CheckpointError, ConfigError, RisError
from ris_cache.store.files import (
    digest_of,
    make_directories,
    remove_files,
    sync_directory,
    write_atomically,
)
from ris_train.checkpoint import CheckpointMetadata, build_fitting, load_checkpoint, load_weights
from ris_train.data.text import Tokenizer
from ris_train.hub import hub_failures, quiet_hub, reason
from ris_train.model.segmenter import RisModel
from ris_train.model_card import (
    CARD_NAME,
    LIBRARY_NAME,
    PIPELINE_TAG,
    RECORD_NAME,
    TAGS,
    TOKENIZER_NAME,
    UNKNOWN_LICENCE,
    WEIGHTS_NAME,
    ModelRecord,
    render_card,
    require_whole,
)
from ris_train.model_card import read_record as read_record
from ris_train.model_files import files_to_replace, tokenizer_files
from ris_train.model_source import find_folder, usable_device
from ris_train.run import RunDirectory
from ris_train.run_facts import reported_scores, trained_on

_CONFIG_IS_OURS: Final = {"format": "ris-model"}


# Without slots: the mixin has none, and would meet the class that dataclass makes of them a second time.
@dataclass(frozen=True, kw_only=True)
class RISModel(
    huggingface_hub.ModelHubMixin, library_name=LIBRARY_NAME, pipeline_tag=PIPELINE_TAG, tags=[*TAGS]
):
    """A trained model together with what it takes to use and to describe it.

    Attributes:
        network: in evaluation mode, on its device.
        record: what is known of it; `record.files` is empty for a model that does not come from a folder.
        tokenizer: the one that it was trained with.
    """

    network: RisModel
    record: ModelRecord
    tokenizer: Tokenizer

    # The mixin gathers arguments of __init__ for config.json, and sets them, unless there is something.
    _hub_mixin_config = _CONFIG_IS_OURS

    @property
    def metadata(self) -> CheckpointMetadata:
        """What its checkpoint says of itself."""
        return self.record.checkpoint

    @classmethod
    def from_pretrained(  # type: ignore[override]  # takes no other keyword: a misspelt one is an error
        cls,
        path_or_hub_id: str | Path,
        *,
        device: torch.device | str = "cpu",
        revision: str | None = None,
        token: str | bool | None = None,
        cache_dir: str | Path | None = None,
        local_files_only: bool = False,
        force_download: bool = False,
    ) -> Self:
        """Load a model from a folder that `save_pretrained` wrote, or from the hub.

        Args:
            path_or_hub_id: a folder, or `owner/name`; what exists as a folder is one.
            device: where the network goes.
            revision: branch, tag or commit on the hub; the default branch by default.
            token: by default the one that `hf auth login` keeps; False sends none.
            cache_dir: where what is fetched is kept; by default the hub's own cache.
            local_files_only: take what was fetched before, and ask nobody.
            force_download: fetch it again.

        Raises:
            CheckpointError: nothing is there, or a damaged model, or one of another version of ris.
            ConfigError: a revision of a local folder, or a device that cannot be used here.
        """
        # The mixin's own would read config.json first, as arguments of __init__.
        return cls._from_pretrained(
            model_id=path_or_hub_id,
            revision=revision,
            cache_dir=cache_dir,
            force_download=force_download,
            local_files_only=local_files_only,
            token=token,
            device=device,
        )

    @classmethod
    def _from_pretrained(  # type: ignore[override]  # likewise
        cls,
        *,
        model_id: str | Path,
        revision: str | None,
        cache_dir: str | Path | None,
        force_download: bool,
        local_files_only: bool,
        token: str | bool | None,
        device: torch.device | str = "cpu",
        proxies: None = None,
        resume_download: None = None,
    ) -> Self:
        """As `from_pretrained`; the last two are what older mixins send besides."""
        where = usable_device(device)
        folder = find_folder(
            model_id,
            revision,
            token=token,
            cache_dir=cache_dir,
            local_files_only=local_files_only,
            force_download=force_download,
        )
        record = read_record(folder)
        require_whole(folder, record)
        try:
            network = build_fitting(record.checkpoint, folder / WEIGHTS_NAME)
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
        if tokenizer.vocab_size > network.language.bert.config.vocab_size:
            raise CheckpointError(
                f"{folder / TOKENIZER_NAME} has word pieces that the model does not know. Fetch or export "
                "the model again.",
                path=folder / TOKENIZER_NAME,
            )
        return cls(network=network.to(where).eval(), record=record, tokenizer=tokenizer)

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
            ConfigError: a device that cannot be used here.
        """
        path = run.checkpoint_path(checkpoint)
        network, metadata = load_checkpoint(path, device=usable_device(device))
        try:
            record = ModelRecord(
                name=run.path.resolve().name,
                ris_version=version("ris"),
                checkpoint=metadata,
                trained_on=trained_on(run),
                scores=reported_scores(run, checkpoint, metadata),
                files={},
            )
        except ValidationError as error:
            raise CheckpointError(
                f"Checkpoint {path} does not describe itself as ris writes it: {error.errors()[0]['msg']}. "
                "Use another one of the same run.",
                path=path,
            ) from error
        tokenizer = Tokenizer.from_folder(
            run.tokenizer_dir, metadata.config.model.max_tokens, keep_sep=metadata.config.model.keep_sep
        )
        return cls(network=network, record=record, tokenizer=tokenizer)

    def save_pretrained(  # type: ignore[override]  # what config.json says is not the caller's to give
        self,
        folder: str | Path,
        *,
        licence: str = UNKNOWN_LICENCE,
        push_to_hub: bool = False,
        repo_id: str | None = None,
        **upload: Any,
    ) -> Path | str:
        """Write the model into a folder, over one that is there; returns it, or what `push_to_hub` returns.

        Args:
            folder: made if need be.
            licence: for the model card, as the hub names licences; `unknown` is a placeholder.
            push_to_hub: upload the model as well; the folder's other files stay here.
            repo_id: where to; by default the folder's name, among your own.
            upload: other keywords of `push_to_hub`.

        Raises:
            CheckpointError: the folder has a config.json of something else.
            ConfigError: it has files of no model that would be written over, or a tokenizer's that would
                belong to this one.
            OSError: the folder cannot be written, or the disk is full; a model that was not there before
                leaves no file behind.
            RisError: the hub refuses the upload or cannot be reached; the folder is written.
        """
        folder = Path(folder)
        repo_id = repo_id or folder.resolve().name
        inspect.signature(self.push_to_hub).bind(repo_id, licence=licence, **upload)  # before all is written
        self._save_pretrained(folder, licence=licence)
        return self.push_to_hub(repo_id, licence=licence, **upload) if push_to_hub else folder

    def _save_pretrained(self, save_directory: Path, *, licence: str = UNKNOWN_LICENCE) -> None:
        before = files_to_replace(save_directory)
        tensors = self.network.state_dict().items()
        state = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors}
        contents = {WEIGHTS_NAME: save(state, metadata={"format": "pt"}), **tokenizer_files(self.tokenizer)}
        digests = {name: digest_of(content).sha256 for name, content in contents.items()}
        record = self.record.model_copy(update={"files": digests})
        try:
            for name, content in contents.items():
                write_atomically(save_directory / name, content)
            remove_files(save_directory, before - contents.keys())
            card = self.generate_model_card(licence=licence)
            write_atomically(save_directory / CARD_NAME, str(card).encode())
            document = record.model_dump_json(indent=1) + "\n"
            write_atomically(save_directory / RECORD_NAME, document.encode())
        except BaseException:
            if not before:  # then none of these was there
                remove_files(save_directory, (*contents, CARD_NAME, RECORD_NAME))
            raise

    def generate_model_card(self, *, licence: str = UNKNOWN_LICENCE) -> huggingface_hub.ModelCard:
        """The card that is saved beside the weights, as the hub reads it."""
        return huggingface_hub.ModelCard(render_card(self.record, licence=licence))

    def push_to_hub(  # type: ignore[override]  # a part of a model is none: no allow_patterns
        self,
        repo_id: str,
        *,
        licence: str = UNKNOWN_LICENCE,
        private: bool = True,
        token: str | bool | None = None,
        commit_message: str | None = None,
        branch: str | None = None,
        create_pr: bool = False,
        delete_patterns: list[str] | str | None = None,
    ) -> str:
        """Upload the model as one commit; the repository is made if need be.

        Args:
            repo_id: `owner/name`, or a name among your own.
            licence: as in `save_pretrained`. The card replaces one that is there.
            private: whether a repository that is made is private.
            token: by default the one that `hf auth login` keeps.
            commit_message: by default it names the run and the step.
            branch: one that is there; the default branch by default.
            create_pr: propose the commit as a pull request.
            delete_patterns: other files of the repository that the commit removes; those of a tokenizer
                that was there before always go.

        Returns:
            Where the commit can be seen.

        Raises:
            RisError: the hub refuses it or cannot be reached.
        """
        patterns = [delete_patterns] if isinstance(delete_patterns, str) else delete_patterns or []
        api = huggingface_hub.HfApi(token=token)
        with TemporaryDirectory(prefix="ris-") as folder:
            self._save_pretrained(Path(folder), licence=licence)
            try:
                with quiet_hub():
                    repository = api.create_repo(repo_id, private=private, exist_ok=True)
                    commit: Any = api.upload_folder(
                        repo_id=repository.repo_id,
                        folder_path=folder,
                        commit_message=commit_message or f"{self.record.name}, step {self.metadata.step}",
                        revision=branch,
                        create_pr=create_pr,
                        delete_patterns=[f"{TOKENIZER_NAME}/*", *patterns],
                    )
            except hub_failures() as error:
                raise RisError(
                    f"The model could not be uploaded to {repo_id}: {reason(error)}. Check the name and "
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
    """Write a checkpoint of a run as a folder to share. A new one is there whole or not at all.

    Args:
        run: the run.
        checkpoint: `best` or `last`.
        folder: empty or not there; by default `pretrained/<checkpoint>` within the run. An empty one is
            filled, config.json last.
        licence: as in `RISModel.save_pretrained`.

    Returns:
        The folder.

    Raises:
        CheckpointError: as `RISModel.from_run`.
        ConfigError: the folder holds something.
        OSError: it cannot be written, or the disk is full; nothing is left of it.
    """
    folder = folder or run.path / "pretrained" / checkpoint
    if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        what = "is not empty" if folder.is_dir() else "is a file"
        raise ConfigError(f"{folder} {what}. Name a new folder, or remove this one.", path=folder)
    model = RISModel.from_run(run, checkpoint)
    target = folder.resolve()
    make_directories(target.parent)
    if target.is_dir():  # filled, not replaced: a shell may be in it, or it may be a mount
        model.save_pretrained(target, licence=licence)
        return folder
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    try:
        model.save_pretrained(temporary, licence=licence)
        temporary.rename(target)
        sync_directory(target.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return folder

"""What a run keeps as it goes: the checkpoints `last` and `best`, then the state that says so.

A run may be killed between any two writes. The state comes last: as long as it says nothing of an evaluation,
that evaluation is taken again, and writes the same once more.
"""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from torch.optim import AdamW

from ris_cache.errors import DiskFullError
from ris_cache.store.files import write_atomically
from ris_train.checkpoint import CheckpointMetadata, checkpoint_bytes
from ris_train.model.segmenter import RisModel
from ris_train.run import RunDirectory
from ris_train.training.state import RunState, save_state, state_path, update_state

_FULL: Final = (errno.ENOSPC, errno.EDQUOT)


class Keeper:
    """Writes checkpoints and states of one run, on rank 0.

    Args:
        run: gets the files.
        model: whose weights are kept.
        optimiser: of the model.
        metadata: of the run's checkpoints, at whatever step.
        cache_root: of the features, for the command that goes on.
        keep_last: how many states.
    """

    def __init__(
        self,
        run: RunDirectory,
        model: RisModel,
        optimiser: AdamW,
        metadata: CheckpointMetadata,
        *,
        cache_root: Path,
        keep_last: int,
    ) -> None:
        self._run = run
        self._model = model
        self._optimiser = optimiser
        self._metadata = metadata
        self._cache_root = cache_root
        self._keep_last = keep_last

    def metadata(self, step: int, values: dict[str, float] | None = None) -> CheckpointMetadata:
        """What a checkpoint of a step says of itself, with the scores of its evaluation if there are any."""
        return self._metadata.model_copy(update={"step": step, "val": values or {}})

    def keep_evaluated(self, step: int, values: dict[str, float], *, is_best: bool) -> None:
        """Write the weights that were evaluated as `last` and, if they are the best so far, as `best`.

        Raises:
            DiskFullError: no space is left; the files that were there are as they were.
        """
        content = checkpoint_bytes(self._model, self.metadata(step, values))
        for name in ("last", "best") if is_best else ("last",):
            path = self._run.checkpoint_path(name)
            with self._said_if_full(path):
                write_atomically(path, content)

    def keep_state(self, state: RunState, *, is_saved: bool) -> None:
        """Write a state, after the log.

        Args:
            state: where the run stands; the length of the log is filled in.
            is_saved: whether weights and optimiser of this step are saved already, and only what is said of
                them is new.

        Raises:
            DiskFullError: no space is left; the earlier states are as they were.
        """
        with self._said_if_full(state_path(self._run, state.step)):
            state = state.model_copy(update={"metrics_bytes": self._run.sync_metrics()})
            if is_saved:
                update_state(self._run, state)
                return
            save_state(
                self._run,
                state,
                self._model,
                self._optimiser,
                self.metadata(state.step),
                keep_last=self._keep_last,
            )

    @contextmanager
    def _said_if_full(self, path: Path) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            if error.errno not in _FULL:
                raise
            raise DiskFullError(
                f"No space is left to write {path} ({error.strerror}). What was saved before is whole: make "
                f"room and go on with `{self._run.resume_command(self._cache_root)}`, or keep fewer states "
                "(train.keep_last).",
                path=path,
            ) from error

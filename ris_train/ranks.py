"""The processes that train together, as `torchrun` starts them; one process alone is rank 0 of 1.

Each computes a slice of the same batch. Gradients are added up once per step, over the whole batch, since
the losses of the slices add up to those of the batch.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from ris_cache.errors import RisError

T = TypeVar("T")
_BUCKET_ELEMENTS = 1 << 24  # 64 MiB of float32, so that gradients are never held twice


class RankError(RisError):
    """Another process of the same run ended, so this one cannot go on."""


class OtherRankError(RankError):
    """Another process of the same run failed and says why itself; this one ends with its exit code."""

    def __init__(self, rank: int, exit_code: int) -> None:
        super().__init__(f"Process {rank} of this training failed; its own message says why.", rank=rank)
        self.exit_code = exit_code


@dataclass(frozen=True, slots=True)
class Ranks:
    """This process among those of the run.

    Attributes:
        rank: from 0; rank 0 alone writes.
        world: number of processes.
        device: where this one trains.
    """

    rank: int
    world: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        """Whether this process writes files and speaks."""
        return self.rank == 0

    def slice_of(self, count: int) -> range:
        """The part of `count` samples that this process computes; parts differ by one at most."""
        return range(self.rank * count // self.world, (self.rank + 1) * count // self.world)

    def add_up(self, tensors: Iterable[Tensor]) -> None:
        """Replace tensors of one dtype by their sums over all processes, in place."""
        if self.world == 1:
            return
        with _explained():
            for bucket in _buckets(tensors):
                flat = torch.cat([tensor.reshape(-1) for tensor in bucket])
                dist.all_reduce(flat)
                parts = torch.split(flat, [tensor.numel() for tensor in bucket])
                for tensor, part in zip(bucket, parts, strict=True):
                    tensor.copy_(part.view_as(tensor))

    def collect_rows(self, rows: Tensor, counts: Sequence[int]) -> Tensor:
        """Lay the rows of all processes one after another; no gradient passes.

        Args:
            rows: [counts[rank], …].
            counts: rows of each process.
        """
        if self.world == 1:
            return rows.detach()
        longest = max(counts)
        padded = rows.new_zeros(longest, *rows.shape[1:])
        padded[: len(rows)] = rows.detach()
        parts = [torch.empty_like(padded) for _ in counts]
        with _explained():
            dist.all_gather(parts, padded)
        return torch.cat([part[:count] for part, count in zip(parts, counts, strict=True)])

    def collect(self, value: T) -> list[T]:
        """Bring the plain values of all processes to each, by rank."""
        if self.world == 1:
            return [value]
        found: list[Any] = [None] * self.world
        with _explained():
            dist.all_gather_object(found, value)
        return found

    def from_main(self, value: T) -> T:
        """Bring rank 0's plain value to each process; the others' is not looked at."""
        return self.collect(value if self.is_main else None)[0]  # type: ignore[return-value]

    def together(self, work: Callable[[], T]) -> T:
        """Do what may fail on some of the processes; if it does, all stop, and the first of them says why.

        Args:
            work: does not speak with the other processes, since it may end at any point.

        Raises:
            OtherRankError: it failed on another process, of a lower rank where it failed on this one too.
        """
        if self.world == 1:
            return work()
        try:
            done = work()
        except Exception as error:  # whatever it is, the others wait to hear of it; it is raised below
            first, exit_code = self._first_failure(getattr(error, "exit_code", 1))
            if first == self.rank:
                raise
            raise OtherRankError(first, exit_code) from error
        first, exit_code = self._first_failure(0)
        if exit_code:
            raise OtherRankError(first, exit_code)
        return done

    def _first_failure(self, exit_code: int) -> tuple[int, int]:
        """The lowest rank whose exit code is not 0, and the code; all give theirs."""
        failures = [(rank, code) for rank, code in enumerate(self.collect(exit_code)) if code]
        return failures[0] if failures else (self.rank, 0)

    def any(self, flag: bool) -> bool:
        """Whether one of the processes says so."""
        if self.world == 1:
            return flag
        flags = torch.tensor(float(flag), device=self.device)
        self.add_up([flags])
        return bool(flags.item() > 0)


def join_ranks(device: torch.device) -> Ranks:
    """Join the processes that `torchrun` started; alone, where there are no others.

    Args:
        device: where to train; of several CUDA devices, each process takes the one of its local rank.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return Ranks(0, 1, device)
    from accelerate import PartialState

    state = PartialState(cpu=device.type == "cpu")
    chosen = device if device.type == "cpu" else state.device
    return Ranks(state.process_index, state.num_processes, chosen)


def leave_ranks() -> None:
    """End what `join_ranks` joined, when all processes are done with each other.

    Threads of a connection that is left open may abort a process while it exits, after all its work.
    """
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()


@contextmanager
def _explained() -> Iterator[None]:
    """Turn the failure of a connection into words."""
    try:
        yield
    except RuntimeError as error:  # DistBackendError and gloo's closed connections alike
        raise RankError(
            "Another process of this training ended, so this one stops too "
            f"({str(error).splitlines()[0]}). Its own message says why; start all again to go on from the "
            "last state."
        ) from error


def _buckets(tensors: Iterable[Tensor]) -> Iterator[list[Tensor]]:
    bucket: list[Tensor] = []
    size = 0
    for tensor in tensors:
        if bucket and size + tensor.numel() > _BUCKET_ELEMENTS:
            yield bucket
            bucket, size = [], 0
        bucket.append(tensor)
        size += tensor.numel()
    if bucket:
        yield bucket

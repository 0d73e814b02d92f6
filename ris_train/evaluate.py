"""Evaluation: a mask for every expression, counted on the pixels of several views in one pass.

B samples of a batch, n of them on one grid, S side of the logits' grid, h and w the size of a grid, V views.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Generator, Sequence
from contextlib import closing
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from tqdm import tqdm

from ris_cache.ahead import run_ahead
from ris_cache.errors import StoppedError
from ris_cache.store.batch import FeatureBatch
from ris_train.data.batch import BatchBuilder
from ris_train.data.samples import Sample
from ris_train.frames import logit_of, to_grid
from ris_train.model.segmenter import ModelInputs, RisModel
from ris_train.scoring import RULES, Counts, Scores
from ris_train.scoring.predictions import mask_name
from ris_train.scoring.results import EvaluationResult
from ris_train.scoring.views import View
from ris_train.sharding import image_batches
from ris_train.truth import GroundTruth, truth_key

__all__ = ["EvaluationResult", "GroundTruth", "KeepMask", "count_samples", "score"]

_GROUP_PIXELS = {"cpu": 1 << 20, "cuda": 1 << 26}
"""Pixels of logits resized at once: on the CPU as many as stay in its caches, on a GPU 256 MiB of float32."""

KeepMask = Callable[[Sample, str, npt.NDArray[np.bool_]], None]
"""Receives a sample, the name of a mask (`original`, `1024`, …) and the predicted mask bool[h, w]."""


@torch.no_grad()
def count_samples(
    model: RisModel,
    samples: Sequence[Sample],
    builder: BatchBuilder,
    truth: GroundTruth,
    *,
    views: Sequence[View],
    batch_size: int,
    show_progress: bool = False,
    keep_mask: KeepMask | None = None,
    should_stop: Callable[[], bool] = lambda: False,
) -> dict[str, Counts]:
    """Predict every sample once and count its pixels on each view.

    Features are read once per image for all its expressions; logits are resized once per grid. A model
    without a no-target head runs without DFAM, on which its masks do not depend.

    Args:
        model: put into evaluation mode meanwhile, and back after.
        samples: of any tables whose instances `truth` has, in any order.
        builder: makes their batches.
        truth: their annotated masks.
        views: on which pixels to count.
        batch_size: samples per forward pass at most. Sums are rounded differently in another batch, which may
            move a pixel whose logit is at the threshold; nothing else changes but speed and memory.
        show_progress: whether to draw a bar on stderr.
        keep_mask: called once per sample and predicted mask, in any order of samples.
        should_stop: asked before each batch.

    Returns:
        Counts of all samples in their order, by name of the view.

    Raises:
        StoppedError: `should_stop` said so.
    """
    with_dfam = model.has_no_target_head
    pixels = np.zeros((len(samples), len(views), 3), dtype=np.int64)
    says_no_target = np.zeros(len(samples), dtype=np.bool_)
    was_training = model.training
    model.eval()
    try:
        prepared = _prepare_all(samples, builder, truth, views, batch_size)
        with (
            closing(run_ahead(prepared, depth=2)) as batches,
            tqdm(
                total=len(samples), unit="expr", desc="evaluate", leave=False, disable=not show_progress
            ) as bar,
        ):
            for batch in batches:
                if should_stop():
                    raise StoppedError(f"The evaluation of {len(samples)} expressions was stopped.")
                outputs = model(batch.inputs, with_dfam=with_dfam)
                found = _count_batch(outputs.mask_logits, batch, views, keep_mask)
                flags = outputs.says_no_target if with_dfam else None
                if flags is not None:
                    found = torch.cat([found, flags.to(found.dtype)[:, None]], dim=1)
                rows = found.cpu().numpy()  # the only wait for the device
                pixels[batch.indices] = rows[:, : 3 * len(views)].reshape(-1, len(views), 3)
                if flags is not None:
                    says_no_target[batch.indices] = rows[:, -1] != 0
                bar.update(len(batch.samples))
    finally:
        model.train(was_training)
    is_no_target = np.array([not sample.ann_ids for sample in samples], dtype=np.bool_)
    return {
        view.name: Counts(
            intersection=pixels[:, index, 0].copy(),
            predicted=pixels[:, index, 1].copy(),
            annotated=pixels[:, index, 2].copy(),
            is_no_target=is_no_target,
            says_no_target=says_no_target,
            has_head=with_dfam,
        )
        for index, view in enumerate(views)
    }


def score(counts: Counts, rules: str = "ris") -> Scores:
    """Apply a rule set by name to counts on its view."""
    return RULES[rules].score(counts)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Group:
    """Samples of a batch that meet their ground truth on grids of one size.

    Attributes:
        rows: of the batch.
        size: (h, w).
        views: positions of the views that count there.
        truths: uint8[n, ⌈h·w / 8⌉] on the device, packed masks by `truth_key`.
    """

    rows: list[int]
    size: tuple[int, int]
    views: list[int]
    truths: dict[tuple[str, str, str], Tensor]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Prepared:
    """A batch with all that counting it needs; row i of it is samples[i], number indices[i] of all."""

    indices: list[int]
    samples: list[Sample]
    inputs: ModelInputs
    groups: list[_Group]


def _prepare_all(
    samples: Sequence[Sample],
    builder: BatchBuilder,
    truth: GroundTruth,
    views: Sequence[View],
    batch_size: int,
) -> Generator[_Prepared, None, None]:
    """Build all batches; runs on a thread of its own, ahead of the model."""
    image_ids = [sample.image_id for sample in samples]
    current, coming = itertools.tee(
        (indices, [samples[index] for index in indices]) for indices in image_batches(image_ids, batch_size)
    )
    parts = (chosen for _, chosen in coming)
    with closing(builder.read_ahead(parts, is_grouped=True)) as features:
        for indices, chosen in current:
            yield _prepare(indices, chosen, builder, truth, views, next(features))


def _prepare(
    indices: list[int],
    samples: list[Sample],
    builder: BatchBuilder,
    truth: GroundTruth,
    views: Sequence[View],
    features: FeatureBatch,
) -> _Prepared:
    inputs = builder.grouped_inputs(samples, features)
    device = inputs.token_ids.device
    group_pixels = _GROUP_PIXELS["cuda" if device.type == "cuda" else "cpu"]
    members: dict[tuple[str, tuple[int, int]], list[int]] = {}
    for any_view in {view.grid: view for view in views}.values():
        for row, sample in enumerate(samples):
            members.setdefault((any_view.grid, truth.grid_size(sample, any_view)), []).append(row)
    groups = []
    for (grid, size), rows in members.items():
        own = [index for index, view in enumerate(views) if view.grid == grid]
        at_once = max(1, group_pixels // (size[0] * size[1]))
        for start in range(0, len(rows), at_once):
            part = rows[start : start + at_once]
            packed = {
                truth_key(views[index]): np.stack([truth.packed(samples[row], views[index]) for row in part])
                for index in own
            }
            truths = {key: torch.from_numpy(bits).to(device) for key, bits in packed.items()}
            groups.append(_Group(rows=part, size=size, views=own, truths=truths))
    return _Prepared(indices=indices, samples=samples, inputs=inputs, groups=groups)


def _count_batch(
    mask_logits: Tensor, batch: _Prepared, views: Sequence[View], keep_mask: KeepMask | None
) -> Tensor:
    """I, P and G of every sample on every view: int64[B, V·3] on the device of the logits."""
    counts = torch.zeros((len(batch.samples), 3 * len(views)), dtype=torch.int64, device=mask_logits.device)
    for group in batch.groups:
        rows = torch.tensor(group.rows, device=mask_logits.device)
        resized = to_grid(mask_logits[rows], group.size)
        truths = {key: _unpack(bits, group.size) for key, bits in group.truths.items()}
        annotated = {key: _count(mask) for key, mask in truths.items()}
        by_threshold: dict[float, tuple[Tensor, Tensor]] = {}
        for index in group.views:
            view = views[index]
            if view.threshold not in by_threshold:
                # A probability above the threshold is a logit above the threshold's.
                mask = resized > logit_of(view.threshold)
                by_threshold[view.threshold] = (mask, _count(mask))
                if keep_mask is not None:
                    for row, one in zip(group.rows, mask.cpu().numpy(), strict=True):
                        keep_mask(batch.samples[row], mask_name(view), one)
            predicted, num_predicted = by_threshold[view.threshold]
            key = truth_key(view)
            columns = torch.stack([_count(predicted & truths[key]), num_predicted, annotated[key]], dim=1)
            counts[rows, 3 * index : 3 * index + 3] = columns
    return counts


def _unpack(bits: Tensor, size: tuple[int, int]) -> Tensor:
    """uint8[n, ⌈h·w / 8⌉] → bool[n, h, w], on the device of the bits."""
    num_pixels = size[0] * size[1]
    if bits.device.type == "cpu":
        pixels = torch.from_numpy(np.unpackbits(bits.numpy(), axis=1, count=num_pixels).view(np.bool_))
    else:
        pixels = _unpack_by_shifts(bits)[:, :num_pixels]
    return pixels.reshape(-1, *size)


def _unpack_by_shifts(bits: Tensor) -> Tensor:
    """uint8[n, k] → bool[n, 8·k], highest bit first: what numpy's unpackbits does, for any device."""
    shifts = torch.arange(7, -1, -1, dtype=torch.uint8, device=bits.device)
    return (bits[..., None] >> shifts & 1).bool().flatten(1)


def _count(mask: Tensor) -> Tensor:
    """True pixels of each mask: bool[n, h, w] → int64[n], on the device of the mask."""
    if mask.device.type == "cpu":
        # torch sums booleans on the CPU a hundred times slower than numpy counts them.
        return torch.tensor([np.count_nonzero(one) for one in mask.numpy()], dtype=torch.int64)
    return mask.flatten(1).sum(dim=1)

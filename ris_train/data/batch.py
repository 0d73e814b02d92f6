"""Batches: cached features, word pieces and targets of several samples, built ahead of their use.

B samples, S side of the loss grid; the other letters as in `ModelInputs` and `Targets`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ris_cache.store.cache import CategorySet, FeatureBatch, FeatureCache
from ris_train.config import RunConfig
from ris_train.data.masks import TargetMasks
from ris_train.data.samples import Sample
from ris_train.data.text import Tokenizer
from ris_train.losses import Targets, related_pairs
from ris_train.model.segmenter import ModelInputs

CategorySource = Literal["annotated", "predicted", "none"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """Several samples, ready for the model.

    Attributes:
        samples: the B samples, row i of every tensor belongs to samples[i].
        inputs: what the model sees.
        targets: what it should say; None in evaluation, which compares in the original frame instead.
    """

    samples: tuple[Sample, ...]
    inputs: ModelInputs
    targets: Targets | None


def default_category_source(config: RunConfig) -> CategorySource:
    """`annotated` for models that read a category (the paper's numbers), `none` for those that do not."""
    return "annotated" if config.model.sparse_prompt == "category" else "none"


class BatchBuilder:
    """Turns samples into batches on a device.

    Args:
        cache: where features come from.
        tokenizer: cuts the expressions.
        categories: CLIP-T embeddings; needed unless `category_source` is none.
        category_source: which category the model is given.
        device: where tensors go.
    """

    def __init__(
        self,
        cache: FeatureCache,
        tokenizer: Tokenizer,
        *,
        categories: CategorySet,
        category_source: CategorySource,
        device: torch.device,
    ) -> None:
        self._cache = cache
        self._tokenizer = tokenizer
        self._category_row = {category_id: row for row, category_id in enumerate(categories.ids)}
        self._category_embeddings = torch.from_numpy(categories.embeddings)
        self._category_source = category_source
        self._device = device

    def inputs(self, samples: Sequence[Sample]) -> ModelInputs:
        """Read the features of the samples and cut their expressions."""
        features = self._cache.read([sample.image_id for sample in samples])
        decoded = self._decoded(features)
        token_ids, text_mask = self._tokenizer.encode([sample.text for sample in samples])
        return ModelInputs(
            image_embeddings=decoded["sam"],
            clip_features=decoded["clip"],
            token_ids=self._move(token_ids),
            text_mask=self._move(text_mask),
            category_embeddings=self._categories(samples),
        )

    def training_batch(self, samples: Sequence[Sample], masks: TargetMasks, *, vl_exclude: str) -> Batch:
        """Build a batch with targets; every sample must have at least one target."""
        instance_masks, instance_samples, unions = [], [], []
        for row, sample in enumerate(samples):
            own = [masks.of(ann_id) for ann_id in sample.ann_ids]
            instance_masks += own
            instance_samples += [row] * len(own)
            unions.append(np.logical_or.reduce(own))
        targets = Targets(
            masks=self._float(np.stack(unions)),
            instance_masks=self._float(np.stack(instance_masks)),
            instance_samples=self._move(torch.tensor(instance_samples)),
            is_related=self._move(
                related_pairs(
                    [sample.image_id for sample in samples],
                    [frozenset(sample.ann_ids) for sample in samples],
                    [sample.category_id for sample in samples],
                    exclude=vl_exclude,
                )
            ),
        )
        return Batch(samples=tuple(samples), inputs=self.inputs(samples), targets=targets)

    def evaluation_batch(self, samples: Sequence[Sample]) -> Batch:
        """Build a batch without targets."""
        return Batch(samples=tuple(samples), inputs=self.inputs(samples), targets=None)

    def _categories(self, samples: Sequence[Sample]) -> Tensor | None:
        if self._category_source == "none":
            return None
        ids = [
            sample.category_id if self._category_source == "annotated" else sample.clip_category_id
            for sample in samples
        ]
        rows = [self._category_row[category_id] for category_id in ids]
        return self._move(self._category_embeddings[rows])

    def _decoded(self, features: FeatureBatch) -> dict[str, Tensor]:
        """Decode features to float32 on the device: on the CPU with numpy, as `_float` explains."""
        if self._device.type == "cpu":
            return {name: torch.from_numpy(array) for name, array in features.decoded().items()}
        return features.to(self._device)

    def _float(self, array: npt.NDArray[Any]) -> Tensor:
        """Make a float32 tensor on the device.

        Batches are built on a thread of their own. There torch would start a second team of OpenMP threads,
        which costs the training thread half its speed; so on the CPU numpy converts.
        """
        if self._device.type == "cpu":
            return torch.from_numpy(array.astype(np.float32))
        return self._move(torch.from_numpy(array)).float()

    def _move(self, tensor: Tensor) -> Tensor:
        return tensor.to(self._device, non_blocking=True)

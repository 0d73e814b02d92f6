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

from ris_cache.errors import ConfigError
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
        """Read the features of the samples, one row per sample, and cut their expressions.

        Raises:
            ConfigError: a sample lacks the category that the model is to be given.
        """
        return self._build(samples, [sample.image_id for sample in samples], image_index=None)

    def grouped_inputs(self, samples: Sequence[Sample]) -> ModelInputs:
        """Read the features of each image once, one row per image, and cut the expressions.

        Images come in the order of their first sample; `image_index` says which one each sample is of.

        Raises:
            ConfigError: as `inputs`.
        """
        rows: dict[int, int] = {}
        index = [rows.setdefault(sample.image_id, len(rows)) for sample in samples]
        return self._build(
            samples, list(rows), image_index=self._move(torch.tensor(index, dtype=torch.int64))
        )

    def _build(
        self, samples: Sequence[Sample], image_ids: Sequence[int], *, image_index: Tensor | None
    ) -> ModelInputs:
        decoded = self._decoded(self._cache.read(image_ids))
        token_ids, text_mask = self.tokens(samples)
        return ModelInputs(
            image_embeddings=decoded["sam"],
            clip_features=decoded["clip"],
            token_ids=token_ids,
            text_mask=text_mask,
            category_embeddings=self._categories(samples),
            image_index=image_index,
        )

    def training_batch(
        self,
        samples: Sequence[Sample],
        masks: TargetMasks,
        *,
        vl_exclude: str,
        is_grouped: bool = False,
        batch: Sequence[Sample] | None = None,
        first: int = 0,
    ) -> Batch:
        """Build a batch, or a part of one, with targets.

        A sample that refers to nothing has an empty mask and no instance.

        Args:
            samples: the B samples of the part.
            masks: rasterises their instances.
            vl_exclude: see `LossConfig`.
            is_grouped: whether the features of an image are read once for all its samples.
            batch: the E samples of the whole batch, with whose expressions these are compared; `samples`
                itself by default.
            first: place of the part's first sample in `batch`.
        """
        batch = samples if batch is None else batch
        owners = [row for row, sample in enumerate(samples) for _ in sample.ann_ids]
        instance_masks = np.zeros((len(owners), masks.size, masks.size), dtype=bool)
        unions = np.zeros((len(samples), masks.size, masks.size), dtype=bool)
        wanted = [(sample.table_name, ann_id) for sample in samples for ann_id in sample.ann_ids]
        for position, (row, key) in enumerate(zip(owners, wanted, strict=True)):
            instance_masks[position] = masks.of(*key)
            unions[row] |= instance_masks[position]
        targets = Targets(
            masks=self._float(unions),
            instance_masks=self._float(instance_masks),
            instance_samples=self._move(torch.tensor(owners, dtype=torch.int64)),
            is_related=self._move(
                related_pairs(
                    [sample.image_id for sample in batch],
                    [frozenset(sample.ann_ids) for sample in batch],
                    [sample.category_id for sample in batch],
                    exclude=vl_exclude,
                )[first : first + len(samples)]
            ),
        )
        inputs = self.grouped_inputs(samples) if is_grouped else self.inputs(samples)
        return Batch(samples=tuple(samples), inputs=inputs, targets=targets)

    def tokens(self, samples: Sequence[Sample]) -> tuple[Tensor, Tensor]:
        """Cut the expressions of samples: token_ids int64[B, L] and text_mask bool[B, L]."""
        token_ids, text_mask = self._tokenizer.encode([sample.text for sample in samples])
        return self._move(token_ids), self._move(text_mask)

    def evaluation_batch(self, samples: Sequence[Sample]) -> Batch:
        """Build a batch without targets."""
        return Batch(samples=tuple(samples), inputs=self.inputs(samples), targets=None)

    def require_categories(self, samples: Sequence[Sample]) -> None:
        """Refuse samples without the category that the model is to be given.

        Raises:
            ConfigError: naming the first of them.
        """
        if self._category_source == "none":
            return
        missing = [sample for sample in samples if self._category_id(sample) not in self._category_row]
        if missing:
            raise ConfigError(
                f"{len(missing)} expressions have no {self._category_source} category, which this model "
                f"reads; the first is {missing[0].text!r} (sent_id {missing[0].sent_id} of "
                f"{missing[0].table_name}). Expressions that refer to nothing never have an annotated one: "
                "use --category predicted in `ris eval`, or train with model.sparse_prompt=cls.",
                category_source=self._category_source,
                sent_ids=[sample.sent_id for sample in missing],
            )

    def _category_id(self, sample: Sample) -> int:
        return sample.category_id if self._category_source == "annotated" else sample.clip_category_id

    def _categories(self, samples: Sequence[Sample]) -> Tensor | None:
        if self._category_source == "none":
            return None
        self.require_categories(samples)
        rows = [self._category_row[self._category_id(sample)] for sample in samples]
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

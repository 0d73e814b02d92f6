"""Batches: cached features, word pieces and targets of several samples, built ahead of their use.

B samples, S side of the loss grid; the other letters as in `ModelInputs` and `Targets`.
"""

from __future__ import annotations

from collections.abc import Generator, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Final, Literal

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
_SMALL_IMAGE_BYTES: Final = 1 << 18
"""Features of an image that several threads read no faster than one, as those of preset tiny (57 KiB)."""


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

    def read_ahead(
        self, parts: Iterable[Sequence[Sample]], *, is_grouped: bool
    ) -> Generator[FeatureBatch, None, None]:
        """Read the features of coming parts of batches on threads, into buffers that are used again.

        Memory is three times the features of the largest part; `FeatureCache.prefetch` says the rest.

        Args:
            parts: samples of each part, in order; may be endless, is asked a few parts ahead.
            is_grouped: whether the features of an image are read once for all its samples of a part.

        Yields:
            What `inputs` or `grouped_inputs` takes for each part, valid until the next is asked for.

        Raises:
            CacheMissError, CorruptShardError: where the part would have come.
        """
        coming = (_grouped_ids(part)[0] if is_grouped else _image_ids(part) for part in parts)
        image_bytes = sum(array.row_bytes for array in self._cache.manifest.stored_arrays())
        yield from self._cache.prefetch(
            coming,
            threads=1 if image_bytes < _SMALL_IMAGE_BYTES else 4,
            pinned=self._device.type == "cuda",
        )

    def inputs(
        self,
        samples: Sequence[Sample],
        features: FeatureBatch | None = None,
        tokens: tuple[Tensor, Tensor] | None = None,
    ) -> ModelInputs:
        """Take the features of the samples, one row per sample, and cut their expressions.

        Args:
            samples: any.
            features: of the image of each, from `read_ahead`; read now by default.
            tokens: their expressions, from `tokens`; cut now by default.

        Raises:
            ConfigError: a sample lacks the category that the model is to be given.
        """
        return self._build(samples, _image_ids(samples), features, image_index=None, tokens=tokens)

    def grouped_inputs(
        self,
        samples: Sequence[Sample],
        features: FeatureBatch | None = None,
        tokens: tuple[Tensor, Tensor] | None = None,
    ) -> ModelInputs:
        """Take the features of each image once, one row per image, and cut the expressions.

        Images come in the order of their first sample; `image_index` says which one each sample is of.

        Args:
            samples: any.
            features: of these images, from `read_ahead`; read now by default.
            tokens: the expressions of the samples, from `tokens`; cut now by default.

        Raises:
            ConfigError: as `inputs`.
        """
        image_ids, index = _grouped_ids(samples)
        return self._build(
            samples,
            image_ids,
            features,
            image_index=self._move(torch.tensor(index, dtype=torch.int64)),
            tokens=tokens,
        )

    def _build(
        self,
        samples: Sequence[Sample],
        image_ids: list[int],
        features: FeatureBatch | None,
        *,
        image_index: Tensor | None,
        tokens: tuple[Tensor, Tensor] | None,
    ) -> ModelInputs:
        if features is None:
            features = self._cache.read(image_ids)
        assert features.image_ids.tolist() == image_ids, "features of other samples"
        decoded = self._decoded(features)
        token_ids, text_mask = tokens or self.tokens(samples)
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
        features: FeatureBatch | None = None,
        tokens: tuple[Tensor, Tensor] | None = None,
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
            features: of the part, from `read_ahead`; read now by default.
            tokens: of the part, from `tokens`; cut now by default.
        """
        batch = samples if batch is None else batch
        is_related = related_pairs(
            [sample.image_id for sample in batch],
            [frozenset(sample.ann_ids) for sample in batch],
            [sample.category_id for sample in batch],
            exclude=vl_exclude,
        )[first : first + len(samples)]
        build = self.grouped_inputs if is_grouped else self.inputs
        return Batch(
            samples=tuple(samples),
            inputs=build(samples, features, tokens),
            targets=self._targets(samples, masks, is_related),
        )

    def _targets(self, samples: Sequence[Sample], masks: TargetMasks, is_related: Tensor) -> Targets:
        counts = np.array([len(sample.ann_ids) for sample in samples], dtype=np.int64)
        wanted = [(sample.table_name, ann_id) for sample in samples for ann_id in sample.ann_ids]
        instances = masks.many(wanted)
        instance_masks = self._float(instances)
        # Where each sample has one instance, as in RefCOCO, the unions are the instances.
        is_one_each = bool((counts == 1).all())
        return Targets(
            masks=instance_masks if is_one_each else self._float(_unions(instances, counts)),
            instance_masks=instance_masks,
            instance_samples=self._move(torch.from_numpy(np.repeat(np.arange(len(samples)), counts))),
            is_related=self._move(is_related),
        )

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
        """Decode features to float32 on the device: on the CPU with numpy, as `_float` explains.

        The result shares no memory with the features, whose buffers are used again.
        """
        if self._device.type != "cpu":
            # A thread begins on the first GPU, where nobody would wait for a copy to another one.
            with torch.cuda.device(self._device):
                return features.to(self._device)
        decoded = features.decoded()
        if features.dtype == "float32":  # decoding copies all others
            decoded = {name: array.copy() for name, array in decoded.items()}
        return {name: torch.from_numpy(array) for name, array in decoded.items()}

    def _float(self, array: npt.NDArray[Any]) -> Tensor:
        """Make a float32 tensor on the device.

        Batches are built on a thread of their own. There torch would start a second team of OpenMP threads,
        which costs the training thread half its speed; so on the CPU numpy converts.
        """
        if self._device.type == "cpu":
            return torch.from_numpy(array.astype(np.float32))
        return self._move(torch.from_numpy(array)).float()

    def _move(self, tensor: Tensor) -> Tensor:
        """Copy to the device: to a GPU from page-locked memory, so that nothing waits for the copy."""
        if self._device.type == "cuda":
            # torch gives the locked memory out again only once the copy is done.
            tensor = tensor.pin_memory()
        return tensor.to(self._device, non_blocking=True)


def _image_ids(samples: Sequence[Sample]) -> list[int]:
    return [sample.image_id for sample in samples]


def _grouped_ids(samples: Sequence[Sample]) -> tuple[list[int], list[int]]:
    """Each image once, in the order of its first sample, and which of them each sample is of."""
    rows: dict[int, int] = {}
    index = [rows.setdefault(sample.image_id, len(rows)) for sample in samples]
    return list(rows), index


def _unions(instances: npt.NDArray[np.bool_], counts: npt.NDArray[np.int64]) -> npt.NDArray[np.bool_]:
    """Union of the instances of each sample: the first of each laid over the empty mask, then the second, ….

    Args:
        instances: bool[n, S, S], those of a sample next to each other.
        counts: int64[B], instances of each sample; their sum is n.

    Returns:
        bool[B, S, S].
    """
    unions = np.zeros((len(counts), *instances.shape[1:]), dtype=np.bool_)
    starts = np.cumsum(counts) - counts
    for index in range(counts.max(initial=0)):
        rows = np.flatnonzero(counts > index)
        unions[rows] |= instances[starts[rows] + index]
    return unions

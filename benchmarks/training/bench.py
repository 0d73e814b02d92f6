"""What a training step needs: a drawn cache, a model with random weights, and batches built ahead."""

from __future__ import annotations

import itertools
from collections.abc import Generator, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from ris_cache import FeatureCache
from ris_cache.ahead import run_ahead
from ris_cache.datasets import Selection
from ris_cache.datasets.shapes import write_shapes_dataset
from ris_cache.encoders.frozen import FrozenEncoders
from ris_cache.encoders.spec import PRESETS
from ris_cache.encoders.weights import resolve_clip_weights, resolve_sam_weights
from ris_cache.extraction.run import extract
from ris_train.config import RunConfig, load_config
from ris_train.data.batch import Batch, BatchBuilder, default_category_source
from ris_train.data.masks import TargetMasks
from ris_train.data.sampler import SampleOrder
from ris_train.data.samples import Sample, load_samples
from ris_train.data.text import TINY_VOCABULARY, Tokenizer
from ris_train.model.segmenter import RisModel
from ris_train.training.building import build_model

SELECTION = Selection(dataset="refcoco", split_by="unc", split="train")
_DEPTH = 2
"""Batches built ahead."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Bench:
    """What every way to train has in common.

    Attributes:
        encoders: the frozen ones that made the cache, for the way that runs them in every step.
    """

    cache: FeatureCache
    config: RunConfig
    samples: Sequence[Sample]
    tokenizer: Tokenizer
    encoders: FrozenEncoders
    device: torch.device


class LoopedMaskDecoder(nn.Module):
    """The same mask decoder, sample after sample.

    Args:
        decoder: takes a batch.
    """

    def __init__(self, decoder: nn.Module) -> None:
        super().__init__()
        self.decoder = decoder

    def forward(self, image_embeddings: Tensor, sparse_prompt: Tensor, dense_prompt: Tensor) -> Tensor:
        """Decode as the decoder itself does."""
        masks = [
            self.decoder(*one)
            for one in zip(
                image_embeddings.split(1), sparse_prompt.split(1), dense_prompt.split(1), strict=True
            )
        ]
        return torch.cat(masks)


def load_encoders(preset: str, device: torch.device) -> FrozenEncoders:
    """Load encoders with random weights."""
    spec = PRESETS[preset]
    return FrozenEncoders.load(
        spec,
        sam_source=resolve_sam_weights(None, spec.sam, random_seed=0),
        clip_source=resolve_clip_weights(None, spec.clip, random_seed=0),
        device=device,
    )


def draw_cache(encoders: FrozenEncoders, root: Path, num_images: int) -> Path:
    """Draw training images below a directory and extract their features; returns the cache's directory."""
    write_shapes_dataset(root / "data", num_images={"train": num_images}, seed=0)
    extract([SELECTION], data_root=root / "data", cache_root=root / "feats", encoders=encoders)
    return root / "feats"


def prepare(preset: str, root: Path, *, num_images: int, batch_size: int, device: torch.device) -> Bench:
    """Draw images and extract their features with random encoders."""
    encoders = load_encoders(preset, device)
    cache = FeatureCache.open(draw_cache(encoders, root, num_images))
    config = load_config(
        recipe=preset if preset == "tiny" else "paper-refcoco",
        overrides=[f"model.bert.vocabulary={TINY_VOCABULARY}", f"train.batch_size={batch_size}"],
    )
    return Bench(
        cache=cache,
        config=config,
        samples=load_samples(cache, SELECTION, text="sent").samples,
        tokenizer=Tokenizer.load(config.model.bert, config.model.max_tokens),
        encoders=encoders,
        device=device,
    )


def make_model(bench: Bench) -> RisModel:
    """Build the model with random weights, always the same, ready to train."""
    torch.manual_seed(0)
    model, _ = build_model(bench.cache, bench.config, bench.tokenizer, random_seed=0)
    return model.to(bench.device).train()


def batches(
    bench: Bench, *, expressions_per_image: int = 1, is_grouped: bool = False
) -> Generator[Batch, None, None]:
    """Yield endless batches in the sampler's order, read and built ahead of their use as `ris train` does.

    Args:
        expressions_per_image: k of the image-grouped order.
        is_grouped: whether features of an image are read and moved once for all its expressions.
    """
    table_name = SELECTION.table_name
    categories = bench.cache.categories(bench.cache.manifest.datasets[table_name].category_set)
    builder = BatchBuilder(
        bench.cache,
        bench.tokenizer,
        categories=categories,
        category_source=default_category_source(bench.config),
        device=bench.device,
    )
    masks = TargetMasks(
        {table_name: bench.cache.instances(table_name)}, bench.cache.sizes, bench.config.loss.mask_size
    )
    order = SampleOrder(
        np.array([sample.image_id for sample in bench.samples]),
        seed=0,
        fingerprint=bench.cache.fingerprint.digest,
        selection="train",
        expressions_per_image=expressions_per_image,
    )
    current, coming = itertools.tee(_chosen(bench, order))

    def build() -> Generator[Batch, None, None]:
        with closing(builder.read_ahead(coming, is_grouped=is_grouped)) as features:
            for samples in current:
                yield builder.training_batch(
                    samples,
                    masks,
                    vl_exclude=bench.config.loss.vl_exclude,
                    is_grouped=is_grouped,
                    features=next(features),
                )

    return run_ahead(build(), depth=_DEPTH)


def _chosen(bench: Bench, order: SampleOrder) -> Iterator[list[Sample]]:
    size = bench.config.train.batch_size
    for consumed in itertools.count(step=size):
        yield [bench.samples[index] for index in order.take(consumed, size).tolist()]


def live_batch(bench: Bench, batch: Batch, pixels: tuple[Tensor, Tensor]) -> Batch:
    """Replace the cached features of a batch by those that the encoders compute now, one image a sample."""
    encoded = bench.encoders.encode(*pixels)
    inputs = replace(
        batch.inputs, image_embeddings=encoded["sam"], clip_features=encoded["clip"], image_index=None
    )
    return replace(batch, inputs=inputs)

"""A tiny model with random weights, and random inputs that fit it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Literal

import pytest
import torch

from ris_cache.encoders.spec import TINY
from ris_train.config import BertConfig, ModelConfig
from ris_train.model.bert import random_bert
from ris_train.model.segmenter import ModelInputs, RisModel

VOCAB_SIZE = 50
LENGTHS = (6, 3, 4, 2)
"""Real tokens of each expression of the random inputs; the batch is padded to the longest."""


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> Iterator[None]:
    """At these sizes, handing work to a second thread costs more than it saves."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def build_model() -> Callable[..., RisModel]:
    """Build a tiny model in evaluation mode, the same weights for the same kind of prompt."""

    def build(sparse_prompt: Literal["category", "cls"], *, no_target_head: bool = False) -> RisModel:
        config = ModelConfig(
            sparse_prompt=sparse_prompt,
            no_target_head=no_target_head,
            num_queries=7,
            num_heads=4,
            ffn_dim=96,
            pixel_decoder_layers=2,
            norm_groups=8,
            bert=BertConfig(weights=None, hidden_size=48, num_layers=2, num_heads=4, ffn_dim=96),
        )
        bert, _ = random_bert(config.bert, vocab_size=VOCAB_SIZE, seed=3)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(5)
            return RisModel(config, TINY, bert).eval()

    return build


@pytest.fixture(scope="session")
def tiny_model(build_model: Callable[[Literal["category", "cls"]], RisModel]) -> RisModel:
    """Share one model that reads the category; tests must not change it."""
    return build_model("category").requires_grad_(False)


@pytest.fixture
def inputs() -> ModelInputs:
    """Random features of four different images and expressions of different lengths."""
    generator = torch.Generator().manual_seed(11)
    shapes = TINY.feature_shapes()
    batch_size, length = len(LENGTHS), max(LENGTHS)
    return ModelInputs(
        image_embeddings=torch.randn(batch_size, *shapes["sam"], generator=generator),
        clip_features=torch.randn(batch_size, *shapes["clip"], generator=generator),
        token_ids=torch.randint(VOCAB_SIZE, (batch_size, length), generator=generator),
        text_mask=torch.arange(length) < torch.tensor(LENGTHS)[:, None],
        category_embeddings=torch.randn(batch_size, *shapes["clip_pooled"], generator=generator),
    )

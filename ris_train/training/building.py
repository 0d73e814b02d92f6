"""The model of a run, built for a cache."""

from __future__ import annotations

from ris_cache.encoders.spec import spec_from_dict
from ris_cache.encoders.weights import WeightsRecord
from ris_cache.errors import ConfigError
from ris_cache.store.cache import FeatureCache
from ris_train.config import ModelConfig, RunConfig
from ris_train.data.text import Tokenizer
from ris_train.model.bert import load_bert
from ris_train.model.mask_decoder import load_sam_heads
from ris_train.model.segmenter import RisModel
from ris_train.optim import freeze_untrained


def build_model(
    cache: FeatureCache, config: RunConfig, tokenizer: Tokenizer, *, random_seed: int | None
) -> tuple[RisModel, WeightsRecord]:
    """Build the model for a cache: BERT as configured, SAM's heads from the cache, the rest from the seed.

    Returns:
        The model with `requires_grad` set, and where BERT's weights came from.

    Raises:
        ConfigError: widths that do not divide, or more tokens than BERT has positions.
    """
    encoders = spec_from_dict(cache.fingerprint.fields["encoders"])
    _require_widths_that_divide(config.model, encoders.sam.out_channels)
    bert, record = load_bert(config.model.bert, vocab_size=tokenizer.vocab_size, random_seed=random_seed)
    if config.model.max_tokens > bert.config.max_position_embeddings:
        raise ConfigError(
            f"model.max_tokens is {config.model.max_tokens}, but BERT has only "
            f"{bert.config.max_position_embeddings} positions."
        )
    model = RisModel(config.model, encoders, bert)
    load_sam_heads(model.mask_decoder, cache.sam_heads())
    freeze_untrained(model, config.train)
    return model, record


def _require_widths_that_divide(config: ModelConfig, channels: int) -> None:
    problems = [
        f"{name}={divisor} does not divide {what} {width}"
        for name, divisor, what, width in (
            ("model.num_heads", config.num_heads, "the cache's channels", channels),
            ("model.norm_groups", config.norm_groups, "the cache's channels", channels),
            (
                "model.bert.num_heads",
                config.bert.num_heads,
                "model.bert.hidden_size",
                config.bert.hidden_size,
            ),
        )
        if width % divisor
    ]
    if problems:
        raise ConfigError("; ".join(problems) + ".", problems=problems)

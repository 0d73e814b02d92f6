"""BERT from pretrained weights, or random where that is asked for by name."""

from __future__ import annotations

import json
import math
from pathlib import Path
from pickle import UnpicklingError
from typing import Annotated, Any, Literal, Self

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from safetensors import SafetensorError

from ris_cache.encoders.weights import WeightsRecord
from ris_cache.errors import CheckpointError, WeightsError
from ris_cache.store.files import sha256_file
from ris_cache.vision_imports import ensure_torchvision
from ris_train.config import BertConfig
from ris_train.hub import hub_problem, quiet_hub

ensure_torchvision()

from transformers import BertConfig as TransformersBertConfig  # noqa: E402
from transformers import BertModel  # noqa: E402
from transformers.utils.hub import cached_file  # noqa: E402

WEIGHT_FILES = ("model.safetensors", "pytorch_model.bin")
_Size = Annotated[int, Field(gt=0, strict=True)]
_Share = Annotated[float, Field(ge=0, le=1)]


class _Architecture(BaseModel):
    """What is read of a BERT configuration in transformers' words: what decides shapes and numbers.

    The rest of such a file is ignored on purpose. It may name code, attention kernels that are fetched from
    the hub, precisions and quantisations. By default the sizes are those of BERT-base.
    """

    model_config = ConfigDict(extra="ignore", frozen=True, allow_inf_nan=False)

    vocab_size: _Size = 30522
    hidden_size: _Size = 768
    num_hidden_layers: _Size = 12
    num_attention_heads: _Size = 12
    intermediate_size: _Size = 3072
    hidden_act: Literal["gelu", "gelu_new", "gelu_pytorch_tanh", "relu", "silu", "swish"] = "gelu"
    hidden_dropout_prob: _Share = 0.1
    attention_probs_dropout_prob: _Share = 0.1
    max_position_embeddings: _Size = 512
    type_vocab_size: _Size = 2
    initializer_range: Annotated[float, Field(gt=0)] = 0.02
    layer_norm_eps: Annotated[float, Field(gt=0)] = 1e-12
    pad_token_id: Annotated[int, Field(ge=0, strict=True)] | None = 0
    position_embedding_type: Literal["absolute"] = "absolute"
    is_decoder: Literal[False] = False
    add_cross_attention: Literal[False] = False

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        if self.hidden_size % self.num_attention_heads:
            raise ValueError("num_attention_heads does not divide hidden_size")
        if self.pad_token_id is not None and self.pad_token_id >= self.vocab_size:
            raise ValueError("pad_token_id is not below vocab_size")
        return self

    def configuration(self, **changes: float) -> TransformersBertConfig:
        """In transformers' class, with other values for some fields."""
        fields: dict[str, Any] = self.model_dump(exclude={"position_embedding_type"})
        return TransformersBertConfig(**{**fields, **changes, "attn_implementation": "sdpa"})


def load_bert(
    config: BertConfig, *, vocab_size: int, random_seed: int | None
) -> tuple[BertModel, WeightsRecord]:
    """Build BERT without its pooler.

    Args:
        config: names the weights, or the sizes where they are random.
        vocab_size: word pieces of the tokenizer that goes with it.
        random_seed: seed of random weights, if those were asked for; None to load `config.weights`.

    Raises:
        WeightsError: weights are missing, of another architecture, or made for another vocabulary.
    """
    if random_seed is not None:
        return random_bert(config, vocab_size=vocab_size, seed=random_seed)
    if config.weights is None:
        raise WeightsError(
            "This recipe's BERT is of a size without published weights. Name a folder or hub name "
            "(--set model.bert.weights=…), or ask for random weights: --random-weights."
        )
    path = _weight_file(config.weights)
    try:
        fields = json.loads((path.parent / "config.json").read_text(encoding="utf-8"))
        sizes = _Architecture.model_validate(fields)
        loaded: Any = BertModel.from_pretrained(
            str(path.parent),
            config=sizes.configuration(
                hidden_dropout_prob=config.dropout, attention_probs_dropout_prob=config.dropout
            ),
            add_pooling_layer=False,
            output_loading_info=True,
            dtype=torch.float32,
        )
    except ValidationError as error:
        raise WeightsError(
            f"BERT weights at {path} cannot be loaded: config.json is of no BERT that can be used here: "
            f"{_first_problem(error)}.",
            path=path,
        ) from error
    except (OSError, ValueError, RuntimeError, SafetensorError, UnpicklingError) as error:
        raise WeightsError(f"BERT weights at {path} cannot be loaded: {error}", path=path) from error
    bert, report = loaded
    if report["missing_keys"]:
        raise WeightsError(
            f"BERT weights at {path} lack {sorted(report['missing_keys'])[:3]}: not a BERT encoder.",
            path=path,
        )
    if bert.config.vocab_size < vocab_size:
        raise WeightsError(
            f"The tokenizer has {vocab_size} word pieces, BERT at {path} only {bert.config.vocab_size}. "
            "Leave model.bert.vocabulary empty to use the tokenizer that lies beside the weights.",
            path=path,
        )
    return bert, WeightsRecord(
        kind="file", sha256=sha256_file(path).sha256, seed=None, origin=f"{config.weights}/{path.name}"
    )


def random_bert(config: BertConfig, *, vocab_size: int, seed: int) -> tuple[BertModel, WeightsRecord]:
    """Build BERT with random weights; the global random state is left as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        sizes = TransformersBertConfig(
            vocab_size=vocab_size,
            hidden_size=config.hidden_size,
            num_hidden_layers=config.num_layers,
            num_attention_heads=config.num_heads,
            intermediate_size=config.ffn_dim,
            hidden_dropout_prob=config.dropout,
            attention_probs_dropout_prob=config.dropout,
            # BERT draws with 0.02 at width 768; narrower layers need more to pass as much on.
            initializer_range=0.02 * math.sqrt(768 / config.hidden_size),
        )
        bert = BertModel(sizes, add_pooling_layer=False)
    return bert, WeightsRecord(kind="random", sha256=None, seed=seed, origin="random")


def bert_from_dict(fields: dict[str, Any]) -> BertModel:
    """Build the BERT that `bert.config.to_diff_dict()` describes; its weights are still to come.

    Raises:
        CheckpointError: it cannot be built here.
    """
    try:
        sizes = _Architecture.model_validate(fields)
    except ValidationError as error:
        raise CheckpointError(
            f"The BERT of this model cannot be built here: {_first_problem(error)}. The file is damaged, or "
            "was not written by ris."
        ) from error
    return BertModel(sizes.configuration(), add_pooling_layer=False)


def _first_problem(error: ValidationError) -> str:
    problem = error.errors()[0]
    return ": ".join([*map(str, problem["loc"]), problem["msg"]])


def _weight_file(source: str) -> Path:
    """Find the weights of a folder or a hub name on this disk, downloading them if the hub is in reach."""
    if Path(source).is_dir():
        for name in WEIGHT_FILES:
            if (Path(source) / name).is_file():
                return Path(source) / name
        raise WeightsError(f"Folder {source} holds none of {', '.join(WEIGHT_FILES)}.", path=source)
    problem = hub_problem(source)
    for name in WEIGHT_FILES:
        try:
            with quiet_hub():
                found = cached_file(source, name, local_files_only=bool(problem))
                if found is not None:
                    # The configuration lies in the same snapshot folder once it is fetched.
                    cached_file(source, "config.json", local_files_only=bool(problem))
        except OSError:
            continue
        if found is not None:
            return Path(found)
    raise WeightsError(
        f"BERT weights {source!r} are neither a folder nor to be had from the hub{problem}. "
        f"Download {source} (config.json, vocab.txt, model.safetensors) on a machine that can, and name the "
        "folder: --set model.bert.weights=FOLDER. To try things out without: --random-weights.",
        source=source,
    )

"""The switches of recipe authors-code: each does what its name says, and none of them touches what it leaves off."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor

from ris_cache.encoders.spec import TINY
from ris_cache.errors import ConfigError
from ris_train.config import BertConfig, LossConfig, ModelConfig, TrainConfig, load_config, resolve_config
from ris_train.data.batch import default_category_source
from ris_train.losses import Targets, related_pairs, total_loss
from ris_train.model.bert import random_bert
from ris_train.model.dfam import DfamPrediction
from ris_train.model.segmenter import ModelInputs, ModelOutputs, RisModel
from ris_train.model.sparse_prompt import SparsePrompt
from ris_train.optim import build_optimiser, freeze_untrained, trainable_groups

BERT = "language.bert."


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    """At these sizes, handing work to a second thread costs more than it saves."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def build(**switches: Any) -> RisModel:
    config = ModelConfig(
        num_queries=5,
        num_heads=4,
        ffn_dim=64,
        pixel_decoder_layers=1,
        norm_groups=8,
        max_tokens=9,
        bert=BertConfig(weights=None, hidden_size=32, num_layers=3, num_heads=2, ffn_dim=64),
        **switches,
    )
    bert, _ = random_bert(config.bert, vocab_size=30, seed=0)
    torch.manual_seed(7)
    return RisModel(config, TINY, bert).eval()


def inputs(lengths: tuple[int, ...], *, width: int) -> ModelInputs:
    generator = torch.Generator().manual_seed(1)
    shapes, size = TINY.feature_shapes(), len(lengths)
    text_mask = torch.arange(width) < torch.tensor(lengths)[:, None]
    token_ids = torch.randint(1, 30, (size, 9), generator=generator)[:, :width]
    return ModelInputs(
        image_embeddings=torch.randn(size, *shapes["sam"], generator=generator),
        clip_features=torch.randn(size, *shapes["clip"], generator=generator),
        token_ids=token_ids.masked_fill(~text_mask, 0),
        text_mask=text_mask,
        category_embeddings=torch.randn(size, *shapes["clip_pooled"], generator=generator),
    )


@torch.no_grad()
def mask_logits(model: RisModel, batch: ModelInputs) -> Tensor:
    return model(batch, with_dfam=False).mask_logits


def test_the_recipe_turns_every_switch_and_records_that_it_did() -> None:
    resolved = resolve_config(recipe="authors-code")
    config, origins = resolved.config, resolved.origins
    assert (config.loss.mask_dice, config.loss.mask_bce) == (0.5, 2.0)
    assert (config.model.sparse_prompt_ffn, config.model.sparse_prompt_padding) == (True, True)
    assert config.model.dense_prompt_resize == "bicubic"
    assert (config.loss.mask_average, config.loss.vl_exclude, config.loss.dfam_vl) == ("all", "category", 1.0)
    assert config.loss.no_target_weights == (0.9, 1.1)
    train = config.train
    assert (train.batch_size, train.lr, train.steps, train.milestones) == (64, 5e-5, 100_000, (0.6, 0.9))
    assert (train.bert_layers, train.bert_embeddings, train.precision) == (10, False, "fp16")
    assert config.data.rules == "dfam"
    for key in ("loss.mask_dice", "model.sparse_prompt_ffn", "train.bert_layers"):
        assert origins[key] == "recipe authors-code"


def test_the_annotated_category_is_what_the_model_is_told() -> None:
    assert default_category_source(load_config(recipe="authors-code")) == "annotated"
    found = load_config(recipe="authors-code", overrides=["model.sparse_prompt=cls"])
    assert default_category_source(found) == "none"


@pytest.mark.parametrize(
    "switch",
    [
        {"sparse_prompt_ffn": True},
        {"sparse_prompt_padding": True},
        {"dense_prompt_resize": "bicubic"},
    ],
    ids=lambda switch: next(iter(switch)),
)
def test_each_switch_of_the_model_changes_the_mask(switch: dict[str, Any]) -> None:
    batch = inputs((7, 3), width=7)
    plain, switched = build(), build(**switch)
    # What both have starts alike, so that the difference is the switch's own.
    switched.load_state_dict(plain.state_dict(), strict=False)
    assert not torch.allclose(mask_logits(plain, batch), mask_logits(switched, batch))


def test_a_model_without_the_block_has_none_of_its_weights() -> None:
    added = build(sparse_prompt_ffn=True).state_dict().keys() - build().state_dict().keys()
    parts = ("ffn.0", "ffn.2", "ffn_norm")
    assert added == {f"sparse_prompt.{part}.{kind}" for part in parts for kind in ("weight", "bias")}
    assert not build().state_dict().keys() - build(sparse_prompt_ffn=True).state_dict().keys()


def test_the_block_is_a_residual_one_after_the_norm() -> None:
    torch.manual_seed(0)
    prompt = SparsePrompt(16, 4, ffn_dim=32)
    query, words, mask = torch.randn(2, 16), torch.randn(2, 5, 16), torch.ones(2, 5, dtype=torch.bool)
    plain = SparsePrompt(16, 4)
    plain.load_state_dict(prompt.state_dict(), strict=False)
    before = plain(query, words, mask)
    assert prompt.ffn is not None
    hidden = F.relu(before @ prompt.ffn[0].weight.T + prompt.ffn[0].bias)
    expected = F.layer_norm(before + hidden @ prompt.ffn[2].weight.T + prompt.ffn[2].bias, (16,))
    torch.testing.assert_close(prompt(query, words, mask), expected)


def test_padding_is_read_as_words_by_the_sparse_prompt() -> None:
    torch.manual_seed(0)
    prompt = SparsePrompt(16, 4, reads_padding=True)
    query, words = torch.randn(1, 16), torch.randn(1, 5, 16)
    masked, unmasked = torch.tensor([[True, True, False, False, False]]), torch.ones(1, 5, dtype=torch.bool)
    assert torch.equal(prompt(query, words, masked), prompt(query, words, unmasked))


def test_where_padding_is_read_the_other_expressions_of_a_batch_still_decide_nothing() -> None:
    """Each expression is padded to `max_tokens`, as in the released code, not to the longest of its batch."""
    model = build(sparse_prompt_padding=True)
    short = mask_logits(model, inputs((4, 3), width=4))
    torch.testing.assert_close(short, mask_logits(model, inputs((4, 3), width=8)), rtol=1e-4, atol=1e-4)


def test_the_dense_prompt_is_resized_as_configured(monkeypatch: pytest.MonkeyPatch) -> None:
    modes: list[str] = []
    resize = F.interpolate

    def noted(*arguments: Any, **options: Any) -> Tensor:
        modes.append(options["mode"])
        return resize(*arguments, **options)

    monkeypatch.setattr("ris_train.model.segmenter.F.interpolate", noted)
    for mode in ("bilinear", "bicubic"):
        modes.clear()
        mask_logits(build(dense_prompt_resize=mode), inputs((3,), width=3))
        assert modes[-1] == mode


@pytest.mark.parametrize("layers", [0, 2, 3, "all"])
@pytest.mark.parametrize("embeddings", [True, False])
def test_of_bert_the_first_layers_train_and_the_others_never_move(layers: Any, embeddings: bool) -> None:
    model, config = build(), TrainConfig(bert_layers=layers, bert_embeddings=embeddings)
    everything = {name for names in trainable_groups(model).values() for name in names}
    found = {name for names in trainable_groups(model, config).values() for name in names}
    frozen = tuple(f"{BERT}encoder.layer.{index}." for index in range(3 if layers == "all" else layers, 3))
    frozen += () if embeddings else (f"{BERT}embeddings.",)
    assert everything - found == {name for name in everything if name.startswith(frozen)}
    freeze_untrained(model, config)
    requiring = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    held = {
        id(parameter)
        for group in build_optimiser(model, config).param_groups
        for parameter in group["params"]
    }
    assert (
        found == requiring == {name for name, parameter in model.named_parameters() if id(parameter) in held}
    )


def test_more_layers_than_bert_has_are_refused() -> None:
    with pytest.raises(
        ConfigError, match=r"train\.bert_layers is 10, but BERT has 3 layers; set it to at most"
    ):
        trainable_groups(build(), TrainConfig(bert_layers=10))


def losses_of(targeted: int, size: int, **options: Any) -> dict[str, Tensor]:
    """Terms of a batch in which the first so many samples refer to something."""
    torch.manual_seed(0)
    masks = (torch.rand(size, 8, 8) < 0.5).float()
    masks[targeted:] = 0
    outputs = ModelOutputs(
        mask_logits=torch.randn(size, 8, 8),
        dfam=[
            DfamPrediction(torch.randn(size, 3, 4, 4), torch.randn(size, 3, size), torch.randn(size, 3, 2))
        ],
    )
    targets = Targets(
        masks=masks,
        instance_masks=masks[:targeted],
        instance_samples=torch.arange(targeted),
        is_related=torch.zeros(size, size, dtype=torch.bool),
    )
    return total_loss(outputs, targets, LossConfig(num_points=16, mask_size=8, **options))[1]


@pytest.mark.parametrize(("targeted", "size"), [(3, 4), (4, 4), (0, 2)])
def test_samples_without_a_target_count_in_the_mean_of_the_mask_losses(targeted: int, size: int) -> None:
    plain, all_counted = losses_of(targeted, size), losses_of(targeted, size, mask_average="all")
    for name in plain:
        share = targeted / size if name in ("mask_dice", "mask_bce") else 1.0
        torch.testing.assert_close(all_counted[name], plain[name] * share)


def test_with_none_every_other_expression_is_a_negative() -> None:
    """Two sentences of one referent, and a third of the same category."""
    ids, targets = [1, 1, 2], [frozenset({5}), frozenset({5}), frozenset({6})]
    found = {
        exclude: int(related_pairs(ids, targets, [3, 3, 3], exclude=exclude).sum())
        for exclude in ("none", "referent", "category")
    }
    assert found == {"none": 0, "referent": 2, "category": 6}


@pytest.mark.parametrize(("layers", "moving"), [(1, "encoder.layer.0."), (0, None)])
def test_a_run_with_every_switch_trains_and_leaves_the_rest_of_bert_alone(
    layers: int, moving: str | None, ris: Callable[..., Any], tiny_cache: Path, tmp_path: Path
) -> None:
    """Two steps of the tiny model, two layers deep in BERT, in two parts each."""
    settings = {
        key: value
        for key, value, origin in resolve_config(recipe="authors-code").settings()
        if origin == "recipe authors-code" and key.partition(".")[0] in ("model", "loss")
    }
    settings |= {"model.max_tokens": 20, "train.bert_layers": layers, "train.bert_embeddings": False}
    settings |= {"train.steps": 2, "train.batch_size": 4, "train.accumulate": 2, "data.rules": "dfam"}
    result = ris(
        "train", "--cache", tiny_cache, "--runs", tmp_path, "--run", "run", "--random-weights", "--device", "cpu",
        *(part for key, value in settings.items() for part in ("--set", f"{key}={value}")),
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    checkpoints = tmp_path / "run" / "checkpoints"
    before, after = (load_file(checkpoints / f"state-{step}" / "model.safetensors") for step in (0, 2))
    moved = {name.removeprefix(BERT) for name in before if not torch.equal(before[name], after[name])}
    of_bert = {name for name in moved if name.startswith(("encoder.", "embeddings."))}
    assert "language.projection.weight" in moved
    assert all(moving is not None and name.startswith(moving) for name in of_bert)
    assert bool(of_bert) == (moving is not None)

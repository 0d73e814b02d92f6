"""One step of training: what gets a gradient, what moves, and what cannot."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import pytest
import torch
from torch import Tensor

from ris_train.config import LossConfig, TrainConfig
from ris_train.losses import Targets, total_loss
from ris_train.model.segmenter import ModelInputs, RisModel
from ris_train.optim import build_optimiser, freeze_untrained, trainable_groups

Build = Callable[[Literal["category", "cls"]], RisModel]
LOSS = LossConfig(mask_size=32, num_points=64)

# Adding b to every key adds q·b to all scores of a query, which a softmax does not see.
KEY_BIASES = (
    *(f"language.bert.encoder.layer.{layer}.attention.self.key.bias" for layer in range(2)),
    "pwam.key.bias",
    *(
        f"dfam.{branch}_layers.{layer}.{block}_attention.k_proj.bias"
        for branch in ("sam", "clip")
        for layer in range(3)
        for block in ("cross", "self")
    ),
    "sparse_prompt.cross_attention.k_proj.bias",
    *(
        f"mask_decoder.decoder.transformer.layers.{layer}.{block}.k_proj.bias"
        for layer in range(2)
        for block in ("self_attn", "cross_attn_token_to_image", "cross_attn_image_to_token")
    ),
    "mask_decoder.decoder.transformer.final_attn_token_to_image.k_proj.bias",
)
# Instance norm takes the mean of a channel away, and with it any constant. The bias of the values is such a
# constant too: attention weights sum to 1, and a linear layer follows.
NORMED_BIASES = ("pwam.query.bias", "pwam.value.bias", "pwam.attended.bias")
INVARIANT_BIASES = frozenset(KEY_BIASES + NORMED_BIASES)
# Part of the queries of deformable attention, whose offsets and weights do not read the query at first.
SILENT_AT_FIRST = "pixel_decoder.level_embed"


@pytest.fixture
def targets() -> Targets:
    """Five rectangles; sample 0 has two targets, and samples 1 and 2 describe the same one."""
    instance_masks = torch.zeros(5, 32, 32)
    for index, (top, left, height, width) in enumerate(
        [(2, 3, 9, 12), (20, 18, 8, 10), (5, 5, 20, 9), (5, 5, 20, 9), (12, 1, 15, 28)]
    ):
        instance_masks[index, top : top + height, left : left + width] = 1
    instance_samples = torch.tensor([0, 0, 1, 2, 3])
    is_related = torch.zeros(4, 4, dtype=torch.bool)
    is_related[1, 2] = is_related[2, 1] = True
    masks = torch.stack([instance_masks[instance_samples == row].amax(dim=0) for row in range(4)])
    return Targets(
        masks=masks,
        instance_masks=instance_masks,
        instance_samples=instance_samples,
        is_related=is_related,
    )


def backward(model: RisModel, inputs: ModelInputs, targets: Targets) -> dict[str, Tensor | None]:
    """Run one forward and backward; return the gradients by name."""
    model.zero_grad()
    loss, _ = total_loss(model(inputs), targets, LOSS)
    assert loss.isfinite()
    loss.backward()
    return {name: parameter.grad for name, parameter in model.named_parameters()}


def trained_names(model: RisModel) -> set[str]:
    return {name for names in trainable_groups(model).values() for name in names}


@pytest.mark.parametrize("kind", ["category", "cls"])
def test_every_trainable_parameter_gets_a_gradient(
    build_model: Build, inputs: ModelInputs, targets: Targets, kind: Literal["category", "cls"]
) -> None:
    model = build_model(kind)
    freeze_untrained(model)
    trained = trained_names(model)
    optimiser = build_optimiser(model, TrainConfig(lr=1e-3))
    exempt = INVARIANT_BIASES | {SILENT_AT_FIRST}
    for _ in range(2):
        gradients = backward(model, inputs, targets)
        for name in trained - exempt:
            gradient = gradients[name]
            assert gradient is not None, name
            assert gradient.isfinite().all(), name
            assert gradient.abs().max() > 1e-7, name
        optimiser.step()
        # From the second step on, the level embeddings learn as well.
        exempt = INVARIANT_BIASES


@pytest.mark.parametrize("kind", ["category", "cls"])
def test_what_is_frozen_gets_no_gradient(
    build_model: Build, inputs: ModelInputs, targets: Targets, kind: Literal["category", "cls"]
) -> None:
    model = build_model(kind)
    freeze_untrained(model)
    gradients = backward(model, inputs, targets)
    frozen = gradients.keys() - trained_names(model)
    assert frozen
    assert all(gradients[name] is None for name in frozen)


def test_the_level_embeddings_are_silent_in_the_first_step_alone(
    build_model: Build, inputs: ModelInputs, targets: Targets
) -> None:
    model = build_model("category")
    first = backward(model, inputs, targets)[SILENT_AT_FIRST]
    assert first is not None
    assert not first.any()


@pytest.mark.parametrize("kind", ["category", "cls"])
def test_the_exempt_biases_change_no_prediction(
    build_model: Build, inputs: ModelInputs, kind: Literal["category", "cls"]
) -> None:
    """Each is shifted by random values of size 1; double precision tells invariance from smallness."""
    model = build_model(kind).double()
    # segment_anything computes its grid in float32, whatever the precision of the rest.
    model.mask_decoder.positions.float()
    doubled = ModelInputs(
        image_embeddings=inputs.image_embeddings.double(),
        clip_features=inputs.clip_features.double(),
        token_ids=inputs.token_ids,
        text_mask=inputs.text_mask,
        category_embeddings=None if kind == "cls" else inputs.category_embeddings.double(),
    )
    parameters = dict(model.named_parameters())
    assert parameters.keys() >= INVARIANT_BIASES
    with torch.no_grad():
        before = model(doubled)
        for name in sorted(INVARIANT_BIASES):
            parameters[name] += torch.randn_like(parameters[name])
        after = model(doubled)
        assert before.dfam is not None
        assert after.dfam is not None
        torch.testing.assert_close(after.mask_logits, before.mask_logits, rtol=0, atol=1e-9)
        for first, second in zip(before.dfam, after.dfam, strict=True):
            for first_part, second_part in zip(first, second, strict=True):
                torch.testing.assert_close(second_part, first_part, rtol=0, atol=1e-9)
        # The same shift of a bias that is not exempt is seen.
        parameters["pwam.gate.bias"] += torch.randn_like(parameters["pwam.gate.bias"])
        assert (model(doubled).mask_logits - before.mask_logits).abs().max() > 1e-4


def test_the_exempt_biases_get_no_gradient_beyond_rounding(
    build_model: Build, inputs: ModelInputs, targets: Targets
) -> None:
    model = build_model("category")
    gradients = backward(model, inputs, targets)
    for name in INVARIANT_BIASES:
        bias, weight = gradients[name], gradients[name.removesuffix("bias") + "weight"]
        assert bias is not None
        assert weight is not None
        assert bias.abs().max() < 1e-4 * weight.abs().max(), name


@pytest.mark.parametrize("kind", ["category", "cls"])
def test_a_step_moves_what_trains_and_nothing_else(
    build_model: Build, inputs: ModelInputs, targets: Targets, kind: Literal["category", "cls"]
) -> None:
    """Two steps, since the level embeddings are silent in the first; decay alone is not counted as moving."""
    model = build_model(kind).train()
    freeze_untrained(model)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    optimiser = build_optimiser(model, TrainConfig(lr=1e-3, weight_decay=0))
    for _ in range(2):
        backward(model, inputs, targets)
        optimiser.step()
    moved = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    trained = trained_names(model)
    assert moved <= trained
    assert trained - moved <= INVARIANT_BIASES


def test_a_few_steps_lower_the_loss(build_model: Build, inputs: ModelInputs, targets: Targets) -> None:
    model = build_model("category")
    freeze_untrained(model)
    optimiser = build_optimiser(model, TrainConfig(lr=1e-3))
    losses = []
    for _ in range(12):
        torch.manual_seed(0)
        loss, _ = total_loss(model(inputs), targets, LOSS)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]


@pytest.mark.parametrize("targeted", [(), (2,), (0, 1, 3), (0, 1, 2, 3)], ids=str)
def test_a_model_with_a_head_trains_on_any_mix_of_targeted_and_other_samples(
    build_model: Callable[..., RisModel], inputs: ModelInputs, targets: Targets, targeted: tuple[int, ...]
) -> None:
    """Every gradient is finite, the head and BERT always learn, and SAM's decoder where there is a mask."""
    model = build_model("cls", no_target_head=True)
    freeze_untrained(model)
    kept = torch.tensor([int(owner) in targeted for owner in targets.instance_samples])
    masks = targets.masks.clone()
    masks[[row for row in range(4) if row not in targeted]] = 0
    mixed = Targets(
        masks=masks,
        instance_masks=targets.instance_masks[kept],
        instance_samples=targets.instance_samples[kept],
        is_related=targets.is_related,
    )
    gradients = backward(model, inputs, mixed)
    found = {name: gradient for name, gradient in gradients.items() if gradient is not None}
    assert all(gradient.isfinite().all() for gradient in found.values())
    for name in ("no_target.layers.0.weight", "no_target.layers.2.bias", "language.projection.weight"):
        assert found[name].abs().max() > 0, name
    decoder = [name for name in found if name.startswith("mask_decoder.")]
    assert any(found[name].any() for name in decoder) == bool(targeted)

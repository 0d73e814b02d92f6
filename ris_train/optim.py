"""What trains, in which group, and at what rate (method Sec. 4).

`trainable_groups` is the one place that decides; everything it does not name is frozen.
"""

from __future__ import annotations

from torch import nn
from torch.optim import AdamW
from torch.optim.lr_scheduler import LambdaLR

from ris_train.config import TrainConfig

# Of SAM's decoder, the IoU head is frozen. The hypernetworks of masks 1 to 3 have no path to a loss, since
# the first mask alone is used; freezing them says so, and keeps weight decay from eroding them.
FROZEN_PREFIXES = (
    "mask_decoder.decoder.iou_prediction_head.",
    "mask_decoder.decoder.output_hypernetworks_mlps.1.",
    "mask_decoder.decoder.output_hypernetworks_mlps.2.",
    "mask_decoder.decoder.output_hypernetworks_mlps.3.",
)
# Learned vectors that are embeddings in all but class.
EMBEDDING_NAMES = ("pixel_decoder.level_embed", "dfam.logit_scale", "dfam.logit_bias")
NORM_CLASSES = (nn.LayerNorm, nn.GroupNorm)


def trainable_groups(model: nn.Module) -> dict[str, list[str]]:
    """Name the parameters that train, by optimiser group.

    Returns:
        `decayed` (weights and biases) and `undecayed` (norms, embeddings, learned scalars), each in the
        order of `named_parameters`.
    """
    undecayed = set(EMBEDDING_NAMES)
    for module_name, module in model.named_modules():
        is_norm = isinstance(module, NORM_CLASSES) or type(module).__name__ == "LayerNorm2d"
        if is_norm or isinstance(module, nn.Embedding):
            undecayed |= {f"{module_name}.{name}" for name, _ in module.named_parameters(recurse=False)}
    trained = [name for name, _ in model.named_parameters() if not name.startswith(FROZEN_PREFIXES)]
    return {
        "decayed": [name for name in trained if name not in undecayed],
        "undecayed": [name for name in trained if name in undecayed],
    }


def freeze_untrained(model: nn.Module) -> None:
    """Set `requires_grad` of every parameter as `trainable_groups` decides."""
    trained = {name for names in trainable_groups(model).values() for name in names}
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in trained)


def build_optimiser(model: nn.Module, config: TrainConfig) -> AdamW:
    """AdamW over the trainable groups."""
    parameters = dict(model.named_parameters())
    groups = trainable_groups(model)
    return AdamW(
        [
            {
                "params": [parameters[name] for name in groups["decayed"]],
                "weight_decay": config.weight_decay,
            },
            {"params": [parameters[name] for name in groups["undecayed"]], "weight_decay": 0.0},
        ],
        lr=config.lr,
    )


def build_schedule(optimiser: AdamW, config: TrainConfig) -> LambdaLR:
    """Linear warm-up, then the rate times 0.1 at each milestone."""
    return LambdaLR(optimiser, lambda step: rate_factor(step, config))


def rate_factor(step: int, config: TrainConfig) -> float:
    """Factor on the learning rate at a step, counted from 0."""
    passed = sum(step >= milestone * config.steps for milestone in config.milestones)
    warmup = min(1.0, (step + 1) / config.warmup_steps) if config.warmup_steps else 1.0
    return float(warmup * 0.1**passed)

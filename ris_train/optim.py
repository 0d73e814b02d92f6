"""What trains, in which group, and at what rate (method Sec. 4).

`trainable_groups` is the one place that decides; everything it does not name is frozen.
"""

from __future__ import annotations

from torch import nn
from torch.optim import AdamW

from ris_cache.errors import ConfigError
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
# Where torch computes AdamW of all parameters at once (CPUs since 2.4), in a third of the time.
FUSED_DEVICES = ("cpu", "cuda")
BERT_LAYERS = "language.bert.encoder.layer."
BERT_EMBEDDINGS = "language.bert.embeddings."


def trainable_groups(model: nn.Module, config: TrainConfig | None = None) -> dict[str, list[str]]:
    """Name the parameters that train, by optimiser group.

    Args:
        model: the whole model.
        config: says how much of BERT trains; all of it by default.

    Returns:
        `decayed` (weights and biases) and `undecayed` (norms, embeddings, learned scalars), each in the
        order of `named_parameters`.

    Raises:
        ConfigError: `train.bert_layers` is more than BERT has.
    """
    undecayed = set(EMBEDDING_NAMES)
    for module_name, module in model.named_modules():
        is_norm = isinstance(module, NORM_CLASSES) or type(module).__name__ == "LayerNorm2d"
        if is_norm or isinstance(module, nn.Embedding):
            undecayed |= {f"{module_name}.{name}" for name, _ in module.named_parameters(recurse=False)}
    frozen = (*FROZEN_PREFIXES, *_frozen_of_bert(model, config or TrainConfig()))
    trained = [name for name, _ in model.named_parameters() if not name.startswith(frozen)]
    return {
        "decayed": [name for name in trained if name not in undecayed],
        "undecayed": [name for name in trained if name in undecayed],
    }


def _frozen_of_bert(model: nn.Module, config: TrainConfig) -> list[str]:
    """Prefixes of the parameters of BERT that `train.bert_layers` and `train.bert_embeddings` freeze."""
    prefixes = [] if config.bert_embeddings else [BERT_EMBEDDINGS]
    if config.bert_layers == "all":
        return prefixes
    names = (name for name, _ in model.named_parameters() if name.startswith(BERT_LAYERS))
    num_layers = len({name.removeprefix(BERT_LAYERS).partition(".")[0] for name in names})
    if config.bert_layers > num_layers:
        raise ConfigError(
            f"train.bert_layers is {config.bert_layers}, but BERT has {num_layers} layers; set it to at most "
            "that, or to all.",
            found=config.bert_layers,
            num_layers=num_layers,
        )
    return prefixes + [f"{BERT_LAYERS}{index}." for index in range(config.bert_layers, num_layers)]


def freeze_untrained(model: nn.Module, config: TrainConfig | None = None) -> None:
    """Set `requires_grad` of every parameter as `trainable_groups` decides."""
    trained = {name for names in trainable_groups(model, config).values() for name in names}
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in trained)


def build_optimiser(model: nn.Module, config: TrainConfig) -> AdamW:
    """AdamW over the trainable groups, as one kernel where torch has it."""
    parameters = dict(model.named_parameters())
    groups = trainable_groups(model, config)
    is_fused = all(
        parameters[name].device.type in FUSED_DEVICES and parameters[name].is_floating_point()
        for names in groups.values()
        for name in names
    )
    return AdamW(
        [
            {
                "params": [parameters[name] for name in groups["decayed"]],
                "weight_decay": config.weight_decay,
            },
            {"params": [parameters[name] for name in groups["undecayed"]], "weight_decay": 0.0},
        ],
        lr=config.lr,
        fused=is_fused,
    )


def set_rate(optimiser: AdamW, step: int, config: TrainConfig) -> float:
    """Set the learning rate of a step, counted from 0, in all groups; returns it.

    The rate is a function of the step alone, so the schedule has no state to save.
    """
    rate = config.lr * rate_factor(step, config)
    for group in optimiser.param_groups:
        group["lr"] = rate
    return rate


def rate_factor(step: int, config: TrainConfig) -> float:
    """Factor on the learning rate at a step, counted from 0: linear warm-up, then 0.1 at each milestone."""
    passed = sum(step >= milestone * config.steps for milestone in config.milestones)
    warmup = min(1.0, (step + 1) / config.warmup_steps) if config.warmup_steps else 1.0
    return float(warmup * 0.1**passed)

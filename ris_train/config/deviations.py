"""Where the released code leaves the paper's supplement, and what `ris` does; a table of the docs.

What has a switch is read off the recipes `authors-code` and `paper-refcoco`, so that the table cannot say
anything else than they do. What has none is stated here, with the reason.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final


@dataclass(frozen=True, slots=True, kw_only=True)
class Switched:
    """A difference that settings decide.

    Attributes:
        subject: what differs.
        supplement: what the supplement says of it.
        keys: the settings.
        text: says what their values mean, given in the order of `keys`.
    """

    subject: str
    supplement: str
    keys: tuple[str, ...]
    text: Callable[..., str]


@dataclass(frozen=True, slots=True, kw_only=True)
class Unswitched:
    """A difference without a switch.

    Attributes:
        why: what speaks against one.
    """

    subject: str
    supplement: str
    authors: str
    ours: str
    why: str


NOT_SAID: Final = "not said"


def _number(value: float) -> str:
    return f"{value:g}".replace("e-0", "e-")


def _numbers(*values: float) -> str:
    return ", ".join(_number(value) for value in values)


def _category(prompt: str) -> str:
    told = "annotated one, in training and at test" if prompt == "category" else "none: the sentence's [CLS]"
    return f"{told} (`{prompt}`)"


def _negatives(exclude: str) -> str:
    left_out = {
        "none": "none: other sentences of the same object count as negatives",
        "referent": "same object, or overlapping targets in one image",
        "category": "same category, for RefCOCO alone; with us also same object or overlapping targets",
    }
    return f"{left_out[exclude]} (`{exclude}`)"


def _bert(layers: int | str, embeddings: bool) -> str:
    part = "all layers" if layers == "all" else f"the first {layers} layers"
    return f"{part} {'and' if embeddings else 'without'} the embeddings"


def _rules(name: str | None) -> str:
    return "the rules of the dataset, `ris` for RefCOCO/+/g" if name is None else f"`{name}`"


def _schedule(steps: int, milestones: list[float]) -> str:
    return f"{steps:,} steps, × 0.1 at {' and '.join(f'{milestone:.0%}' for milestone in milestones)}"


def _no_target(weight: float, classes: list[float]) -> str:
    return f"{_number(weight)}; classes {_numbers(*classes)}"


SWITCHED: Final = (
    Switched(
        subject="λ_Dice, λ_BCE of the mask",
        supplement="2, 0.5",
        keys=("loss.mask_dice", "loss.mask_bce"),
        text=_numbers,
    ),
    Switched(
        subject="λ_DFAM, and λ_Dice, λ_BCE, λ_VL of each of its layers",
        supplement="1, 5, 5, 1",
        keys=("loss.dfam", "loss.dfam_dice", "loss.dfam_bce", "loss.dfam_vl"),
        text=_numbers,
    ),
    Switched(
        subject="Grid on which the mask is compared",
        supplement=NOT_SAID,
        keys=("loss.mask_size",),
        text=lambda side: f"{side} × {side}",
    ),
    Switched(
        subject="Points on which DFAM's masks are compared",
        supplement=NOT_SAID,
        keys=("loss.num_points", "loss.oversample", "loss.importance_ratio"),
        text=lambda count, oversample, share: (
            f"{count:,}, {share:.0%} of them the least certain of {_number(oversample)} times as many"
        ),
    ),
    Switched(
        subject="Category given to the model",
        supplement="CLIP feature of the class; [CLS] for GRES",
        keys=("model.sparse_prompt",),
        text=_category,
    ),
    Switched(
        subject="Sparse prompt, after its attention",
        supplement="add, LayerNorm",
        keys=("model.sparse_prompt_ffn",),
        text=lambda ffn: "add, LayerNorm" + (", then a feed-forward block" if ffn else ""),
    ),
    Switched(
        subject="Padding in the sparse prompt's attention",
        supplement=NOT_SAID,
        keys=("model.sparse_prompt_padding",),
        text=lambda is_read: "read as if it were words" if is_read else "masked",
    ),
    Switched(
        subject="Dense prompt, resized to SAM's grid",
        supplement="2D interpolation",
        keys=("model.dense_prompt_resize",),
        text=str,
    ),
    Switched(
        subject="Word pieces of an expression",
        supplement=NOT_SAID,
        keys=("model.max_tokens", "model.keep_sep"),
        text=lambda count, keeps: f"at most {count}, [SEP] {'kept' if keeps else 'lost'} where cut",
    ),
    Switched(
        subject="What of BERT trains",
        supplement="all of it, 108.9 M",
        keys=("train.bert_layers", "train.bert_embeddings"),
        text=_bert,
    ),
    Switched(
        subject="Pairs that are no negatives of the text loss",
        supplement=NOT_SAID,
        keys=("loss.vl_exclude",),
        text=_negatives,
    ),
    Switched(
        subject="λ_nt and class weights of the no-target head",
        supplement="0.1; no weights named",
        keys=("loss.no_target", "loss.no_target_weights"),
        text=_no_target,
    ),
    Switched(
        subject="Mean of the mask losses",
        supplement=NOT_SAID,
        keys=("loss.mask_average",),
        text=lambda over: "over all samples" if over == "all" else "over those with a target",
    ),
    Switched(
        subject="Batch, learning rate",
        supplement="32, 5e-5",
        keys=("train.batch_size", "train.lr"),
        text=_numbers,
    ),
    Switched(
        subject="Schedule",
        supplement=NOT_SAID,
        keys=("train.steps", "train.milestones"),
        text=_schedule,
    ),
    Switched(
        subject="Weight decay, bound on the gradient's norm",
        supplement=NOT_SAID,
        keys=("train.weight_decay", "train.clip_grad_norm"),
        text=_numbers,
    ),
    Switched(subject="Precision", supplement=NOT_SAID, keys=("train.precision",), text=str),
    Switched(
        subject="Rules of evaluation (docs/metrics.md)",
        supplement="for GRES, those of each work compared with",
        keys=("data.rules",),
        text=_rules,
    ),
)

UNSWITCHED: Final = (
    Unswitched(
        subject="Mean of the text loss",
        supplement=NOT_SAID,
        authors="not known to us",
        ours="over matched queries (`loss.vl_average`; `pairs`: over all pairs)",
        why="So are sigmoid losses between images and texts averaged (SigLIP). It weighs about 100 times the "
        "batch size as much as a mean over all pairs would, and at first its gradient is the largest.",
    ),
    Unswitched(
        subject="CLIP's input",
        supplement="the image, resized to 336²",
        authors="the image squashed to 1024² in 8 bits, then to 336², bicubic",
        ours="the image, squashed to 336² in one step",
        why="Decided when features are extracted; one resampling loses less than two.",
    ),
    Unswitched(
        subject="Features on disk",
        supplement="pickle files",
        authors="SAM's, if asked for: a pickle of float32 per image",
        ours="SAM's and CLIP's in a cache, float16",
        why="Decided when features are extracted: `ris extract --dtype float32`.",
    ),
    Unswitched(
        subject="Size of PWAM",
        supplement="7.88 M (Table 2)",
        authors="0.788 M",
        ours="0.788 M",
        why="Table 2 is ten times what the layers hold; `ris params` shows both.",
    ),
    Unswitched(
        subject="Text loss on CLIP's sentence feature",
        supplement="the expression through CLIP's text tower",
        authors="weight 2, on the start-of-text token: the same vector for every sentence",
        ours="none; the text loss is BERT's alone",
        why="Not reproduced: it needs CLIP's text tower for every expression, which a cache does not hold, "
        "and what the code compares tells no sentence from another.",
    ),
    Unswitched(
        subject="Text logits",
        supplement=NOT_SAID,
        authors="similarity of query and sentence",
        ours="scaled similarity after a projection each, and a learned bias",
        why="Nearly every pair is a negative; the bias starts where they cost little (SigLIP).",
    ),
    Unswitched(
        subject="No-target head",
        supplement="a linear layer",
        authors="two layers, maximum over queries",
        ours="two layers, maximum over queries",
        why="Ours is the code's.",
    ),
    Unswitched(
        subject="What of SAM's decoder trains",
        supplement="all of it, 4.06 M",
        authors="all but the IoU head",
        ours="all but the IoU head and the networks of masks 1 to 3",
        why="Only mask 0 has a loss; the others would only decay.",
    ),
    Unswitched(
        subject="SAM's width",
        supplement="1024",
        authors="256, after the neck",
        ours="256, after the neck",
        why="ViT-B, which Table 2 counts, has no 1024.",
    ),
    Unswitched(
        subject="Mask that is M_SAM",
        supplement="the first of three",
        authors="index 0 of SAM's four, the one for unambiguous prompts",
        ours="index 0 of SAM's four",
        why="Ours is the code's.",
    ),
    Unswitched(
        subject="Mask decoding",
        supplement=NOT_SAID,
        authors="one sample after the other",
        ours="the batch at once",
        why="The same numbers; a test compares them.",
    ),
    Unswitched(
        subject="Category of gRefCOCO",
        supplement="none: [CLS]",
        authors="constant `background`, which nothing reads",
        ours="none",
        why="Nothing to reproduce.",
    ),
    Unswitched(
        subject="Learning rate as released",
        supplement="5e-5",
        authors="5e-4 in the configuration, 5e-5 in the README's command",
        ours="5e-5",
        why="`authors-code` follows the command; `--set train.lr=5e-4` follows the file.",
    ),
)


def value_of(tree: Any, key: str) -> Any:
    """Read a dotted key in a tree of plain values."""
    for part in key.split("."):
        tree = tree[part]
    return tree

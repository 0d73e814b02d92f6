"""The schema: every setting of a training run, typed, with its default and its bounds."""

from __future__ import annotations

from typing import Annotated, Any, Final, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

MAX_WHOLE: Final = 2**53 - 1
"""Of a whole number: what JSON carries exactly."""


def _whole(value: Any) -> Any:
    """Take 1e5 and 5.0 for the whole numbers that they are, as JSON Schema does."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


# Strict: `true`, and numbers in quotes, are no numbers, neither here nor by the JSON Schema.
Positive = Annotated[int, Field(gt=0, le=MAX_WHOLE, strict=True), BeforeValidator(_whole)]
NonNegative = Annotated[int, Field(ge=0, le=MAX_WHOLE, strict=True), BeforeValidator(_whole)]
PositiveRate = Annotated[float, Field(gt=0, strict=True)]
Weight = Annotated[float, Field(ge=0, strict=True)]
Share = Annotated[float, Field(ge=0, le=1, strict=True)]
Switch = Annotated[bool, Field(strict=True)]
Tracker = Literal["tensorboard", "wandb", "trackio"]


class _Section(BaseModel):
    # YAML can spell .inf and .nan, which no setting means and JSON cannot hold.
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class BertConfig(_Section):
    """The language model.

    Attributes:
        weights: hub name or folder of pretrained weights; null only together with random weights.
        vocabulary: `package:tiny` for the small vocabulary that ships with ris, or a folder or hub name of a
            tokenizer; null takes the tokenizer that lies beside the weights.
        hidden_size, num_layers, num_heads, ffn_dim: sizes, used where no pretrained weights state them.
        vocab_size: word pieces, for `ris params`; a model that is built takes its tokenizer's.
        dropout: of hidden states and attention, while training.
    """

    weights: str | None = "bert-base-uncased"
    vocabulary: str | None = None
    hidden_size: Positive = 768
    num_layers: Positive = 12
    num_heads: Positive = 12
    ffn_dim: Positive = 3072
    vocab_size: Positive = 30522
    dropout: Annotated[Share, Field(lt=1)] = 0.1


class ModelConfig(_Section):
    """Sizes of the trainable parts; widths that the cache decides are not repeated here.

    Attributes:
        sparse_prompt: `category` reads the target's category, `cls` the sentence alone (supplement Sec. 2).
        no_target_head: whether the model judges if an expression refers to anything at all (supplement
            Eq. 1). Expressions that refer to nothing are trained on with it, and left out without it. They
            have no category, so it goes with `cls`.
        sparse_prompt_ffn: whether a feed-forward block of `ffn_dim` follows the sparse prompt's attention.
        sparse_prompt_padding: whether the sparse prompt's attention reads padding as if it were words.
        dense_prompt_resize: how the pixel decoder's output is brought to SAM's grid.
        num_queries: of DFAM.
        num_heads: of attention, in DFAM, the pixel decoder and the sparse prompt.
        ffn_dim: hidden width of the feed-forward blocks.
        pixel_decoder_layers: of deformable attention.
        num_deformable_points: points that each of its heads reads of each level.
        norm_groups: of the pixel decoder's group norms.
        max_tokens: word pieces that an expression is cut to, [CLS] and [SEP] among them.
        keep_sep: whether an expression that is cut still ends with [SEP].
        bert: the language model.
    """

    sparse_prompt: Literal["category", "cls"] = "category"
    no_target_head: Switch = False
    sparse_prompt_ffn: Switch = False
    sparse_prompt_padding: Switch = False
    dense_prompt_resize: Literal["bilinear", "bicubic"] = "bilinear"
    num_queries: Positive = 100
    num_heads: Positive = 8
    ffn_dim: Positive = 1024
    pixel_decoder_layers: Positive = 6
    num_deformable_points: Positive = 4
    norm_groups: Positive = 32
    max_tokens: Annotated[int, Field(ge=3, le=MAX_WHOLE, strict=True), BeforeValidator(_whole)] = 35
    keep_sep: Switch = True
    bert: BertConfig = BertConfig()


class LossConfig(_Section):
    """Weights λ of the losses (supplement, "Implementations") and how their points are drawn.

    Attributes:
        mask_dice, mask_bce: λ_Dice and λ_BCE of M_SAM.
        dfam: λ_DFAM of all that DFAM is compared by.
        dfam_dice, dfam_bce, dfam_vl: λ_Dice,l, λ_BCE,l and λ_VL,l of each of its layers.
        no_target: λ_nt of the no-target head's cross-entropy (supplement Eq. 2).
        no_target_weights: weights of its two classes: refers to something, refers to nothing.
        mask_size: side of the square grid on which M_SAM is compared with its target.
        num_points: points per mask for matching and DFAM's losses.
        oversample: candidates drawn per point before the most uncertain are kept (PointRend).
        importance_ratio: share of the points chosen by uncertainty.
        mask_average: what the losses of M_SAM are averaged over: the samples with a target, or all of them,
            where one without a target adds nothing but counts.
        vl_exclude: pairs of expressions that are not counted as negatives: those of the same referent or of
            overlapping targets in one image (`referent`), in addition those of the same category
            (`category`), or none at all (`none`).
        vl_average: what the text loss is averaged over: the matched queries (`matched`), each of which meets
            all expressions, or all pairs of a query and an expression (`pairs`), about 100 times the batch
            size as many.
    """

    mask_dice: Weight = 2.0
    mask_bce: Weight = 0.5
    dfam: Weight = 1.0
    dfam_dice: Weight = 5.0
    dfam_bce: Weight = 5.0
    dfam_vl: Weight = 1.0
    no_target: Weight = 0.1
    no_target_weights: tuple[PositiveRate, PositiveRate] = (0.9, 1.1)
    mask_size: Positive = 1024
    num_points: Positive = 12544
    oversample: Annotated[float, Field(ge=1, strict=True)] = 3.0
    importance_ratio: Share = 0.75
    mask_average: Literal["targeted", "all"] = "targeted"
    vl_exclude: Literal["referent", "category", "none"] = "referent"
    vl_average: Literal["matched", "pairs"] = "matched"


class DataConfig(_Section):
    """Which expressions are read.

    Attributes:
        train: split to train on, such as `refcoco:train`, or a comma list of splits to merge.
        val: split that chooses the best checkpoint.
        text: `raw` as the annotator typed it (the habit of this line of work), or the cleaned `sent`.
        rules: rule set that scores `val`, one of `ris eval --rules`; null for the one of its dataset.
        leakage: what a merge does with training images that are in a validation or test split of any
            dataset of the cache: `exclude` leaves them out, `keep` trains on them and counts them. A single
            split is never filtered.
        integrity: when features are compared with their checksums: each image once (`first-open`), always
            (`every-read`), or never (`off`).
    """

    train: str = "refcoco:train"
    val: str = "refcoco:val"
    text: Literal["raw", "sent"] = "raw"
    rules: str | None = None
    leakage: Literal["exclude", "keep"] = "exclude"
    integrity: Literal["off", "first-open", "every-read"] = "first-open"


class TrainConfig(_Section):
    """The optimiser, its schedule, how it computes, and when to look.

    Attributes:
        steps: of the optimiser.
        batch_size: expressions of one optimiser step, over all ranks and accumulation steps.
        accumulate: parts that a batch is computed in, one after another; less memory, the same step.
        lr: learning rate of AdamW after the warm-up.
        weight_decay: of weights and biases; norms and embeddings have none.
        clip_grad_norm: bound on the gradients' norm over all that trains.
        milestones: shares of `steps` at which the learning rate is multiplied by 0.1.
        warmup_steps: over which the rate rises from 0 in a line.
        bert_layers: layers of BERT that train, counted from its input, or `all`; the others stay frozen.
        bert_embeddings: whether BERT's embeddings train.
        precision: of the forward and backward pass; weights, losses and the optimiser stay in fp32.
        compile: whether `torch.compile` compiles the model.
        deterministic: whether operations are chosen that repeat themselves; of one that has no such form the
            CPU makes an error, CUDA a warning.
        expressions_per_image: expressions of one image that follow each other in the order of samples, so
            that what depends on the image alone is read and computed once for them.
        overfit: train and evaluate on the first so many usable expressions alone; null for the selections.
        eval_every: steps between evaluations of `data.val`; the last step always evaluates.
        val_samples: at most so many expressions, evenly spread, in those evaluations; null for all.
        checkpoint_every: steps between the states that a run can be resumed from; null for each evaluation.
        keep_last: how many of those states are kept.
        log_every: steps between lines of the log.
        trackers: where the log goes besides its own file: `tensorboard`, `wandb`, `trackio`.
        seed: of everything that is drawn: the new weights, the order of samples, dropout, points.
    """

    steps: Positive = 100_000
    batch_size: Positive = 32
    accumulate: Positive = 1
    lr: PositiveRate = 5e-5
    weight_decay: Weight = 0.05
    clip_grad_norm: PositiveRate = 0.01
    milestones: tuple[Share, ...] = (0.6, 0.9)
    warmup_steps: NonNegative = 0
    bert_layers: Literal["all"] | NonNegative = "all"
    bert_embeddings: Switch = True
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    compile: Switch = False
    deterministic: Switch = False
    expressions_per_image: Positive = 1
    overfit: Positive | None = None
    eval_every: Positive = 5_000
    val_samples: Positive | None = None
    checkpoint_every: Positive | None = None
    keep_last: Positive = 2
    log_every: Positive = 50
    trackers: tuple[Tracker, ...] = ()
    seed: NonNegative = 0


class RunConfig(_Section):
    """Everything that decides what a training run computes.

    Attributes:
        recipe: the shipped recipe that the other settings started from.
        model: sizes and switches of the model.
        loss: weights of the losses, and how they are taken.
        data: which expressions are read.
        train: the optimiser, its schedule, how it computes, and when to look.
    """

    recipe: str = "paper"
    model: ModelConfig = ModelConfig()
    loss: LossConfig = LossConfig()
    data: DataConfig = DataConfig()
    train: TrainConfig = TrainConfig()

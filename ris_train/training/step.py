"""One optimiser step: forward and backward of a batch, in one part or in several, on one process or several.

All expressions of the batch are encoded first, since each is a negative of every query in the text loss. The
parts then compare with all of them, so a batch computed in parts is the same batch. The gradient of the
encoded expressions is gathered over the parts and processes, and BERT's backward pass is done once.

B samples of the batch, b of this process, D_text width of BERT.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Final

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ris_cache.store.batch import FeatureBatch
from ris_train.config import RunConfig
from ris_train.data.batch import Batch, BatchBuilder
from ris_train.data.masks import TargetMasks
from ris_train.data.samples import Sample
from ris_train.losses import Part, total_loss
from ris_train.matching import at_least_float32
from ris_train.model.dfam import DfamPrediction
from ris_train.model.language import TextFeatures
from ris_train.model.segmenter import ModelOutputs, RisModel
from ris_train.ranks import Ranks
from ris_train.training.dropout import BatchDropout
from ris_train.training.half_weights import HalfWeights
from ris_train.training.randomness import dropout_generator, points_generator

DTYPES: Final = {"bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True, slots=True, kw_only=True)
class StepBatch:
    """What one process computes of one batch.

    Attributes:
        step: counted from 1.
        samples: the B samples of the whole batch.
        parts: its own samples, in parts that follow each other.
        token_ids: int64[b, L] of its own samples; L is that of the batch's longest expression.
        text_mask: bool[b, L].
        first: place of its first sample in the batch.
    """

    step: int
    samples: tuple[Sample, ...]
    parts: tuple[Batch, ...]
    token_ids: Tensor
    text_mask: Tensor
    first: int


def part_slices(count: int, config: RunConfig, ranks: Ranks) -> list[slice]:
    """Places in a batch of `count` samples that this process computes, part after part."""
    own = ranks.slice_of(count)
    num_parts = min(config.train.accumulate, len(own))
    borders = [own.start + index * len(own) // num_parts for index in range(num_parts + 1)]
    return [slice(start, stop) for start, stop in pairwise(borders)]


def build_step_batch(
    step: int,
    samples: Sequence[Sample],
    builder: BatchBuilder,
    masks: TargetMasks,
    config: RunConfig,
    ranks: Ranks,
    features: Iterator[FeatureBatch] | None = None,
) -> StepBatch:
    """Build what this process computes of a batch.

    Args:
        step: counted from 1.
        samples: of the whole batch.
        builder: makes the parts.
        masks: rasterises their targets.
        config: the whole configuration.
        ranks: the processes that share the batch.
        features: of its parts in their order, from `BatchBuilder.read_ahead`; read now by default.
    """
    places = part_slices(len(samples), config, ranks)
    # As long as the longest expression of the batch on every process, so that all draw the same dropout.
    token_ids, text_mask = builder.tokens(samples)
    if config.train.compile:  # each length of its own would be compiled anew
        missing = (0, config.model.max_tokens - token_ids.shape[1])
        token_ids, text_mask = F.pad(token_ids, missing), F.pad(text_mask, missing)
    parts = [
        builder.training_batch(
            samples[place],
            masks,
            vl_exclude=config.loss.vl_exclude,
            is_grouped=is_grouped(config),
            batch=samples,
            first=place.start,
            features=None if features is None else next(features),
            tokens=(token_ids[place], text_mask[place]),
        )
        for place in places
    ]
    own = slice(places[0].start, places[-1].stop)
    return StepBatch(
        step=step,
        samples=tuple(samples),
        parts=tuple(parts),
        token_ids=token_ids[own],
        text_mask=text_mask[own],
        first=own.start,
    )


def is_grouped(config: RunConfig) -> bool:
    """Whether the features of an image are read once for all its samples of a part."""
    return config.train.expressions_per_image > 1


@dataclass(slots=True, kw_only=True)
class LossScale:
    """Factor on the loss that keeps small fp16 gradients from vanishing (Micikevicius et al. 2018).

    Attributes:
        value: halved when a gradient overflows, doubled after `interval` steps in which none did.
        good_steps: steps since it last changed.
        interval: see `value`.
        is_fixed: whether it stays as it is, as in other precisions.
    """

    value: float = 65536.0
    good_steps: int = 0
    interval: int = 2000
    is_fixed: bool = False

    def update(self, *, is_finite: bool) -> bool:
        """Take note of a step's gradients.

        Returns:
            Whether the step may go on: an overflow costs the step, and below a scale of 1 it is none of the
            scale's making.
        """
        if self.is_fixed:
            return is_finite
        if not is_finite:
            self.value, self.good_steps = self.value / 2, 0
            return False
        self.good_steps += 1
        if self.good_steps == self.interval:
            self.value, self.good_steps = self.value * 2, 0
        return True

    @property
    def may_overflow(self) -> bool:
        """Whether infinite gradients may be the scale's doing, rather than the model's."""
        return not self.is_fixed and self.value > 1

    def as_dict(self) -> dict[str, float]:
        """What a state keeps; empty where the scale is fixed."""
        return {} if self.is_fixed else {"value": self.value, "good_steps": self.good_steps}

    def load(self, kept: dict[str, float]) -> None:
        """Take over what a state kept."""
        if kept and not self.is_fixed:
            self.value, self.good_steps = kept["value"], int(kept["good_steps"])


class StepComputer:
    """Computes the gradients of a batch.

    Args:
        model: in training mode.
        config: the loss, the precision, and whether to compile.
        ranks: the processes that share a batch.
    """

    def __init__(self, model: RisModel, config: RunConfig, ranks: Ranks) -> None:
        self._model = model
        self._config = config
        self._ranks = ranks
        compiled: Callable[..., ModelOutputs] = torch.compile(model) if config.train.compile else model
        self._forward = compiled
        self._trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        dtype = DTYPES.get(config.train.precision)
        self._halves = None if dtype is None else HalfWeights(model, dtype)
        self.scale = LossScale() if config.train.precision == "fp16" else LossScale(value=1.0, is_fixed=True)

    def gradients(self, batch: StepBatch) -> dict[str, float]:
        """Compute the gradients of the whole batch, unscaled and clipped, in the parameters' `grad`.

        Returns:
            The loss, its terms before weighting, and `grad_norm` before clipping.

        Raises:
            NonFiniteError: the model's outputs have diverged so far that nothing can be matched.
        """
        for parameter in self._trained:
            parameter.grad = None
        if self._halves is not None:
            self._halves.refresh()
        text, sentences = self._encode_text(batch)
        words = text.words.detach().requires_grad_()
        all_sentences = self._ranks.collect_rows(sentences, self._counts(batch)).requires_grad_()
        summed: dict[str, Tensor] = {}
        done = 0
        for part in batch.parts:
            rows = slice(done, done + len(part.samples))
            loss, terms = self._part_loss(batch, part, rows, words, all_sentences)
            self._backward(loss)
            for name, value in {"loss": loss.detach(), **terms}.items():
                summed[name] = summed[name] + value if name in summed else value
            done = rows.stop
        self._backward_text(batch, text.words, sentences, words, all_sentences)
        values = torch.stack([value.double() for value in summed.values()])
        self._ranks.add_up([values])
        norm = self._finish_gradients()
        # The second and last time that the host waits for the device; matching is the first.
        found = torch.cat([values, norm.double().unsqueeze(0)]).tolist()
        return dict(zip([*summed, "grad_norm"], found, strict=True))

    def _encode_text(self, batch: StepBatch) -> tuple[TextFeatures, Tensor]:
        """Words and sentences of this process's expressions, with gradient; sentences in float32."""
        inputs = replace(batch.parts[0].inputs, token_ids=batch.token_ids, text_mask=batch.text_mask)
        generator = dropout_generator(self._config.train.seed, batch.step, self._ranks.device)
        with self._in_precision(), BatchDropout(generator, first=batch.first, total=len(batch.samples)):
            text = self._model.encode_text(inputs)
        return text, at_least_float32(text.raw_sentence)

    def _part_loss(
        self, batch: StepBatch, part: Batch, rows: slice, words: Tensor, sentences: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        assert part.targets is not None
        own_words = words[rows]
        first = batch.first + rows.start
        text = TextFeatures(
            words=own_words,
            sentence=own_words[:, 0],
            raw_sentence=sentences[first : first + len(part.samples)],
        )
        with self._in_precision():
            outputs = self._forward(part.inputs, text=text, sentences=sentences)
        instances = [len(sample.ann_ids) for sample in batch.samples]
        return total_loss(
            _in_float32(outputs),
            part.targets,
            self._config.loss,
            part=Part.cut(instances, first, num_queries=self._config.model.num_queries),
            generator=points_generator(self._config.train.seed, batch.step, self._ranks.device),
        )

    def _backward(self, loss: Tensor) -> None:
        (loss * self.scale.value).backward()  # type: ignore[no-untyped-call]
        self._take_gradients()

    def _backward_text(
        self, batch: StepBatch, words: Tensor, sentences: Tensor, leaf: Tensor, sentence_leaf: Tensor
    ) -> None:
        """Carry the gradients of the encoded expressions, of all parts and processes, on into BERT."""
        assert leaf.grad is not None
        assert sentence_leaf.grad is not None
        self._ranks.add_up([sentence_leaf.grad])
        own = sentence_leaf.grad[batch.first : batch.first + len(sentences)]
        # Where all of BERT is frozen, its sentences lead nowhere; the words lead to their projection.
        roots = [pair for pair in ((words, leaf.grad), (sentences, own)) if pair[0].requires_grad]
        torch.autograd.backward([tensor for tensor, _ in roots], [gradient for _, gradient in roots])
        self._take_gradients()

    def _take_gradients(self) -> None:
        if self._halves is not None:
            self._halves.take_gradients()

    def _finish_gradients(self) -> Tensor:
        """Add up the gradients of all processes, undo the scale, clip; returns the norm before clipping."""
        # A parameter without a gradient has no path to a loss, which is so on every process.
        gradients = [parameter.grad for parameter in self._trained if parameter.grad is not None]
        self._ranks.add_up(gradients)
        if self.scale.value != 1:
            torch._foreach_div_(gradients, self.scale.value)
        return nn.utils.clip_grad_norm_(self._trained, self._config.train.clip_grad_norm)

    def _counts(self, batch: StepBatch) -> list[int]:
        total = len(batch.samples)
        return [len(replace(self._ranks, rank=rank).slice_of(total)) for rank in range(self._ranks.world)]

    @contextmanager
    def _in_precision(self) -> Iterator[None]:
        """Compute forward in the precision of the configuration while entered."""
        if self._halves is None:
            yield
            return
        dtype = DTYPES[self._config.train.precision]
        with torch.autocast(self._ranks.device.type, dtype=dtype), self._halves.in_place():
            yield


def _in_float32(outputs: ModelOutputs) -> ModelOutputs:
    """The losses are computed in float32 even where the model was not."""
    assert outputs.dfam is not None
    logits = outputs.no_target_logits
    return ModelOutputs(
        mask_logits=at_least_float32(outputs.mask_logits),
        dfam=[
            DfamPrediction(*(at_least_float32(tensor) for tensor in prediction))
            for prediction in outputs.dfam
        ],
        no_target_logits=None if logits is None else at_least_float32(logits),
    )

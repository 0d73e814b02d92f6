"""Parameter counts beside Table 2 of the supplement."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from ris_cache.encoders.clip import build_clip
from ris_cache.encoders.sam import build_sam
from ris_cache.encoders.spec import EncoderSpec
from ris_train.config import ModelConfig
from ris_train.model.bert import random_bert
from ris_train.model.segmenter import RisModel

# Supplement, Table 2, in millions, as printed.
PAPER_MILLIONS = {
    "CLIP ViT": "304.3",
    "SAM ViT": "89.67",
    "frozen": "394.0",
    "SAM decoder": "4.06",
    "BERT": "108.9",
    "DFAM": "6.90",
    "PWAM": "7.88",
    "trainable": "130.0",
}
NOTES = {
    "PWAM": "the paper's figure is ten times what the layers it names hold",
    "SAM decoder": "counted whole; its IoU head and the heads of masks 1-3 do not train",
    "SAM pyramid": "the one part beyond the paper's total, which the others add up to",
    "DFAM": "its text head projects BERT's [CLS] itself, with a learned scale and bias",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class ParameterRow:
    """One line of the table; `paper` is empty where Table 2 has no such figure."""

    name: str
    count: int
    is_frozen: bool
    paper: str = ""
    note: str = ""

    @property
    def millions(self) -> str:
        """In millions, with as many decimals as the paper prints, or three."""
        decimals = len(self.paper.partition(".")[2]) if self.paper else 3
        # 787,968 would print as 0.79 beside 7.88, which hides that the digits are the same.
        if self.name == "PWAM":
            decimals = 3
        return f"{self.count / 1e6:.{decimals}f}"


def count_parameters(encoders: EncoderSpec, config: ModelConfig) -> list[ParameterRow]:
    """Count every part without allocating weights (on the meta device).

    The last rows are `trainable`, all trainable parts together, and `without SAM pyramid`.
    """
    with torch.device("meta"):
        clip = build_clip(encoders.clip).visual
        sam = build_sam(encoders.sam).image_encoder
        bert, _ = random_bert(config.bert, vocab_size=config.bert.vocab_size, seed=0)
        model = RisModel(config, encoders, bert)

    frozen = {"CLIP ViT": _size(clip), "SAM ViT": _size(sam)}
    trainable = {
        "BERT": _size(model.language.bert),
        "PWAM": _size(model.pwam),
        "DFAM": _size(model.dfam),
        "SAM decoder": _size(model.mask_decoder),
        "pixel decoder": _size(model.pixel_decoder),
        "CLIP pyramid": _size(model.clip_pyramid),
        "SAM pyramid": _size(model.sam_pyramid),
        "sparse prompt": _size(model.sparse_prompt),
        "input projections": _size(model.language.projection) + _size(model.category_projection),
    }
    if model.no_target is not None:
        trainable["no-target head"] = _size(model.no_target)
    total = sum(trainable.values())
    assert total == _size(model), "every part of the model must be in the table"
    rows = [_row(name, count, is_frozen=True, encoders=encoders) for name, count in frozen.items()]
    rows.append(_row("frozen", sum(frozen.values()), is_frozen=True, encoders=encoders))
    rows += [_row(name, count, is_frozen=False, encoders=encoders) for name, count in trainable.items()]
    rows.append(_row("trainable", total, is_frozen=False, encoders=encoders))
    rows.append(
        ParameterRow(
            name="trainable without SAM pyramid",
            count=total - trainable["SAM pyramid"],
            is_frozen=False,
            paper=PAPER_MILLIONS["trainable"] if encoders.preset == "paper" else "",
            note="what Table 2 counts" if encoders.preset == "paper" else "",
        )
    )
    return rows


def _row(name: str, count: int, *, is_frozen: bool, encoders: EncoderSpec) -> ParameterRow:
    is_paper = encoders.preset == "paper"
    return ParameterRow(
        name=name,
        count=count,
        is_frozen=is_frozen,
        paper=PAPER_MILLIONS.get(name, "") if is_paper else "",
        note=NOTES.get(name, "") if is_paper else "",
    )


def _size(module: nn.Module | None) -> int:
    return sum(parameter.numel() for parameter in module.parameters()) if module is not None else 0

"""Parameter counts against Table 2 of the supplement, digit by digit."""

from __future__ import annotations

import time

import pytest
import torch

from ris_cache.encoders.spec import PAPER, TINY
from ris_train.config import load_config
from ris_train.data.text import Tokenizer
from ris_train.model.bert import random_bert
from ris_train.model.segmenter import RisModel
from ris_train.params import ParameterRow, count_parameters

PARTS = {
    "BERT",
    "PWAM",
    "DFAM",
    "SAM decoder",
    "pixel decoder",
    "CLIP pyramid",
    "SAM pyramid",
    "sparse prompt",
    "input projections",
}


@pytest.fixture(scope="module")
def paper() -> dict[str, ParameterRow]:
    """Rows of the paper's preset, by name."""
    return {row.name: row for row in count_parameters(PAPER, load_config(recipe="paper").model)}


@pytest.mark.parametrize(
    ("name", "printed"),
    [
        ("CLIP ViT", "304.3"),
        ("SAM ViT", "89.67"),
        ("frozen", "394.0"),
        ("SAM decoder", "4.06"),
        ("BERT", "108.9"),
        ("DFAM", "6.90"),
        ("trainable without SAM pyramid", "130.0"),
    ],
)
def test_our_figure_is_the_papers_digit_by_digit(
    paper: dict[str, ParameterRow], name: str, printed: str
) -> None:
    assert (paper[name].millions, paper[name].paper) == (printed, printed)


def test_pwam_stands_beside_the_papers_figure_with_the_same_digits(paper: dict[str, ParameterRow]) -> None:
    """The paper prints ten times as much; three decimals show that only the point is elsewhere."""
    row = paper["PWAM"]
    assert (row.count, row.millions, row.paper) == (787_968, "0.788", "7.88")
    assert row.note


def test_the_totals_are_exact(paper: dict[str, ParameterRow]) -> None:
    assert paper["trainable"].count == 131_959_846
    assert paper["trainable without SAM pyramid"].count == 129_990_694


def test_the_rows_add_up(paper: dict[str, ParameterRow]) -> None:
    assert paper["frozen"].count == paper["CLIP ViT"].count + paper["SAM ViT"].count
    assert sum(paper[name].count for name in PARTS) == paper["trainable"].count
    assert (
        paper["trainable"].count - paper["SAM pyramid"].count == paper["trainable without SAM pyramid"].count
    )


def test_every_row_says_whether_it_trains(paper: dict[str, ParameterRow]) -> None:
    frozen = {name for name, row in paper.items() if row.is_frozen}
    assert frozen == {"CLIP ViT", "SAM ViT", "frozen"}
    assert set(paper) == frozen | PARTS | {"trainable", "trainable without SAM pyramid"}


def test_the_tiny_preset_counts_what_its_model_holds_and_claims_no_paper() -> None:
    config = load_config(recipe="tiny").model
    rows = {row.name: row for row in count_parameters(TINY, config)}
    tokenizer = Tokenizer.load(config.bert, config.max_tokens)
    bert, _ = random_bert(config.bert, vocab_size=tokenizer.vocab_size, seed=0)
    model = RisModel(config, TINY, bert)
    assert rows["trainable"].count == sum(parameter.numel() for parameter in model.parameters())
    assert rows["BERT"].count == sum(parameter.numel() for parameter in bert.parameters())
    assert not any(row.paper or row.note for row in rows.values())


def test_a_no_target_head_is_a_row_of_its_own(paper: dict[str, ParameterRow]) -> None:
    """Two layers of 256·256 + 256 and 256·2 + 2; without the category's projection of 768·256 + 256."""
    rows = {row.name: row for row in count_parameters(PAPER, load_config(recipe="gres").model)}
    assert rows["no-target head"].count == 66_306
    assert rows["trainable"].count == paper["trainable"].count + 66_306 - 196_864
    assert "no-target head" not in paper


def test_nothing_is_allocated(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every tensor of the counted modules lies on the meta device; at full size they would fill 2 GiB."""
    devices: set[str] = set()
    register = torch.nn.Module.register_parameter

    def watch(self: torch.nn.Module, name: str, parameter: torch.nn.Parameter | None) -> None:
        if parameter is not None:
            devices.add(parameter.device.type)
        register(self, name, parameter)

    monkeypatch.setattr(torch.nn.Module, "register_parameter", watch)
    started = time.monotonic()
    count_parameters(PAPER, load_config(recipe="paper").model)
    assert devices == {"meta"}
    assert time.monotonic() - started < 30

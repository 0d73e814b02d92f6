"""Samples tables of made-up evaluations: one truth, as many methods as wanted."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import pytest

from ris_train.scoring.samples import SampleTable

MakeTable = Callable[..., SampleTable]

META = {
    "method": "made up",
    "checkpoint": "best",
    "step": 100,
    "weights": {"sam": "random(seed=0)"},
    "category_source": "none",
    "text": "raw",
    "expressions": "own",
    "fingerprint": "f" * 8,
    "source": "run",
}
IDS = ("ref_id", "sent_id", "image_id")
FLAGS = ("is_no_target", "says_no_target", "is_degenerate", "has_position_word", "has_head")
NUMBERS = ("num_targets", "num_same_category", "num_words")
ORDER = (
    "table", "split", *IDS, "text", "is_no_target", "says_no_target", "is_degenerate", *NUMBERS,
    "has_position_word", "has_head",
)  # fmt: skip


def _make(
    seed: int = 0,
    splits: Mapping[tuple[str, str], int] | None = None,
    *,
    quality: float = 0.7,
    views: tuple[str, ...] = ("original",),
    no_target: float = 0.0,
    has_head: bool = False,
    **metadata: Any,
) -> SampleTable:
    """Make a table: the truth depends on `splits` alone, the predictions on `seed` and `quality`."""
    truth, model = np.random.default_rng(11), np.random.default_rng(seed)
    rows: list[dict[str, Any]] = []
    for (table, split), num_images in (splits or {("refcoco.unc", "val"): 12}).items():
        for image in range(num_images):
            for sentence in range(int(truth.integers(1, 5))):
                rows.append(
                    _row(truth, model, (table, split, image, sentence), quality, views, no_target, has_head)
                )
    columns: dict[str, Any] = {name: [row[name] for row in rows] for name in ORDER}
    columns |= {name: np.array(columns[name], dtype=np.int64) for name in IDS}
    columns |= {name: np.array(columns[name], dtype=np.bool_) for name in FLAGS}
    columns |= {name: np.array(columns[name], dtype=np.int32) for name in NUMBERS}
    for view in views:
        for letter in "IPG":
            columns[f"{letter}:{view}"] = np.array([row[f"{letter}:{view}"] for row in rows], dtype=np.int64)
    return SampleTable(columns=columns, views=views, metadata=META | metadata)


def _row(truth, model, where, quality, views, no_target, has_head) -> dict[str, Any]:
    table, split, image, sentence = where
    is_no_target = bool(truth.random() < no_target)
    area, num_words, num_objects = (
        int(np.exp(truth.uniform(4, 11))),
        int(truth.integers(0, 14)),
        int(truth.integers(1, 7)),
    )
    has_position_word = bool(truth.random() < 0.4)
    says_no_target = has_head and bool(model.random() < (0.8 if is_no_target else 0.1))
    row = {
        "table": table, "split": split, "ref_id": 10 * image + sentence // 2, "sent_id": 10 * image + sentence,
        "image_id": 1000 + image, "text": "word " * num_words, "is_no_target": is_no_target,
        "says_no_target": says_no_target, "is_degenerate": False, "num_targets": int(not is_no_target),
        "num_same_category": 0 if is_no_target else num_objects, "num_words": num_words,
        "has_position_word": has_position_word, "has_head": has_head,
    }  # fmt: skip
    for view in views:
        annotated = 0 if is_no_target else area
        predicted = int(model.integers(0, 2)) * int(area * model.uniform(0.5, 1.5))
        intersection = (
            0 if is_no_target else int(min(annotated, predicted) * model.beta(9 * quality, 9 * (1 - quality)))
        )
        row |= {f"I:{view}": intersection, f"P:{view}": predicted, f"G:{view}": annotated}
    return row


@pytest.fixture(scope="session")
def make_table() -> MakeTable:
    """Make a samples table; see `_make`."""
    return _make


@pytest.fixture(scope="session")
def method_of() -> Callable[..., Any]:
    """Make a method of a table, as `find_methods` does of a file."""
    from ris_train.compare.methods import Method

    def build(name: str, table: SampleTable, **labels: Any) -> Method:
        keys = dict.fromkeys(zip(table.columns["table"], table.columns["split"], strict=True))
        splits = {
            key: table.select(np.array([found[:2] == key for found in table.key], dtype=np.bool_))
            for key in keys
        }
        fields = {"origin": f"{name}.parquet", "category_source": "none", "text": "raw"} | labels
        return Method(name=name, splits=splits, **fields)

    return build

"""Ground truth per view: drawn as the view says, once, kept packed within bounds, from the sample's own table."""

from __future__ import annotations

import numpy as np
import pytest

import ris_train.truth
from ris_cache.datasets.records import InstanceRecord, Segmentation
from ris_train.data.samples import Sample
from ris_train.scoring import VIEWS, truth_mask
from ris_train.truth import GroundTruth

SIZES = {1: (8, 16), 2: (12, 5)}


def box(left: float, top: float, right: float, bottom: float) -> tuple[float, ...]:
    return (left, top, right, top, right, bottom, left, bottom)


def instance(ann_id: int, image_id: int, *parts: tuple[float, ...]) -> InstanceRecord:
    segmentation: Segmentation = parts
    return InstanceRecord(
        ann_id=ann_id, image_id=image_id, category_id=1, segmentation=segmentation, is_crowd=False
    )


def sample(table_name: str, image_id: int, *ann_ids: int, sent_id: int = 0) -> Sample:
    return Sample(
        table_name=table_name, split="val", ref_id=0, sent_id=sent_id, image_id=image_id, text="",
        ann_ids=ann_ids, category_id=1, clip_category_id=1, is_degenerate=False,
    )  # fmt: skip


TABLES = {
    "refcoco.unc": {1: instance(1, 1, box(0, 0, 4, 4), box(2, 2, 6, 8)), 2: instance(2, 2, box(0, 0, 5, 6))},
    "refcocog.umd": {1: instance(1, 1, box(8, 0, 16, 8))},
}


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the views that were drawn, in order."""
    names: list[str] = []

    def recording(segmentations, view, *, frame_size):  # type: ignore[no-untyped-def]
        names.append(view.name)
        return truth_mask(segmentations, view, frame_size=frame_size)

    monkeypatch.setattr(ris_train.truth, "truth_mask", recording)
    return names


@pytest.mark.parametrize("view", list(VIEWS.values()), ids=list(VIEWS))
@pytest.mark.parametrize(
    "asked", [sample("refcoco.unc", 1, 1), sample("refcoco.unc", 2, 2), sample("refcoco.unc", 2)]
)
def test_a_mask_is_what_the_view_draws_the_first_time_and_the_next(asked: Sample, view) -> None:  # type: ignore[no-untyped-def]
    truth = GroundTruth(TABLES, SIZES)
    segmentations = [TABLES[asked.table_name][ann_id].segmentation for ann_id in asked.ann_ids]
    expected = truth_mask(segmentations, view, frame_size=SIZES[asked.image_id])
    for _ in range(2):
        assert np.array_equal(truth.of(asked, view), expected)
    assert truth.grid_size(asked, view) == expected.shape
    assert truth.packed(asked, view).nbytes == -(-expected.size // 8)


def test_instances_come_from_the_samples_own_table() -> None:
    """Both tables have an instance 1 in image 1, of other pixels."""
    truth = GroundTruth(TABLES, SIZES)
    first, second = (truth.of(sample(name, 1, 1), VIEWS["original"]) for name in TABLES)
    assert first.sum() == 16 + 24 - 4
    assert second.sum() == 64
    assert not (first & second).any()


def test_a_mask_is_drawn_once_for_all_expressions_and_thresholds(drawn: list[str]) -> None:
    truth = GroundTruth(TABLES, SIZES)
    for sent_id in range(3):
        for name in ("original", "original-p35", "original-one", "1024"):
            truth.of(sample("refcoco.unc", 1, 1, sent_id=sent_id), VIEWS[name])
    assert drawn == ["original", "original-one", "1024"]


def test_the_oldest_masks_make_room(drawn: list[str]) -> None:
    """A mask of 8 × 16 pixels takes 16 bytes, one of 12 × 5 takes 8: two of the former and the latter do not fit."""
    truth = GroundTruth(TABLES, SIZES, max_bytes=24)
    first, second, third = (
        sample("refcoco.unc", 1, 1),
        sample("refcoco.unc", 2, 2),
        sample("refcocog.umd", 1, 1),
    )
    view = VIEWS["original"]
    for asked in (first, second, first, third, first):
        truth.of(asked, view)
    assert len(drawn) == 4  # the third pushed out the second and the first, which was drawn again
    for asked in (first, second, third):
        expected = [TABLES[asked.table_name][ann_id].segmentation for ann_id in asked.ann_ids]
        found = truth.of(asked, view)
        assert np.array_equal(found, truth_mask(expected, view, frame_size=SIZES[asked.image_id]))

"""Scoring saved predictions: matched by (ref_id, sent_id), counted as an evaluation counts, mismatches named."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from ris_cache.datasets.records import InstanceRecord
from ris_cache.datasets.segmentation import resize_nearest
from ris_cache.datasets.selection import parse_selections
from ris_cache.errors import CacheMissError, ConfigError, DataError
from ris_cache.store.cache import FeatureCache
from ris_train.annotated import AnnotatedSplits, holds_whole
from ris_train.data.samples import Sample
from ris_train.score_predictions import ScoredPredictions, score_predictions
from ris_train.scoring import RULES, VIEWS, collect, count_pixels, truth_mask
from ris_train.scoring.prediction_files import open_predictions
from ris_train.scoring.predictions import encode
from ris_train.scoring.samples import SampleTable

TABLE = "grefcoco.unc"
SIZES = {1: (20, 30), 2: (25, 16)}


def instance(
    ann_id: int, image_id: int, left: float, top: float, right: float, bottom: float
) -> InstanceRecord:
    return InstanceRecord(
        ann_id=ann_id,
        image_id=image_id,
        category_id=1,
        segmentation=((left, top, right, top, right, bottom, left, bottom),),
        is_crowd=False,
    )


INSTANCES = {
    10: instance(10, 1, 2, 3, 12, 18),
    11: instance(11, 1, 8, 1, 25, 9),
    20: instance(20, 2, 1, 1, 9, 20),
}


def sample(sent_id: int, image_id: int, *ann_ids: int, split: str = "val") -> Sample:
    return Sample(
        table_name=TABLE, split=split, ref_id=100 + sent_id, sent_id=sent_id, image_id=image_id,
        text="the one", ann_ids=ann_ids, category_id=1, clip_category_id=-1, is_degenerate=False,
    )  # fmt: skip


VAL = (sample(0, 1, 10), sample(1, 1, 10, 11), sample(2, 2, 20), sample(3, 2))
TEST = (sample(4, 1, 11, split="testA"),)
ANNOTATED = AnnotatedSplits(
    table_name=TABLE,
    splits={"val": VAL, "testA": TEST},
    quarantined={"val": 0, "testA": 2},
    is_whole={"val": True, "testA": False},
    known=frozenset((one.ref_id, one.sent_id) for one in (*VAL, *TEST, sample(9, 1))),
    instances=INSTANCES,
    sizes=SIZES,
)


def mask(sent_id: int, size: tuple[int, int]) -> np.ndarray:
    return np.random.default_rng(sent_id).random(size) > 0.6


def entry(one: Sample, **changes: Any) -> dict[str, Any]:
    rle = encode(mask(one.sent_id, SIZES[one.image_id]))
    segmentation = {"size": list(rle.size), "counts": rle.counts}
    return {"ref_id": one.ref_id, "sent_id": one.sent_id, "segmentation": segmentation} | changes


def saved(tmp_path: Path, entries: list[dict[str, Any]], info: Mapping[str, Any] | None = None) -> Path:
    path = tmp_path / "p.json"
    path.write_text(json.dumps({"predictions": entries, "info": dict(info or {})}))
    return path


def scored(path: Path, *, rules: str | None = None, allow_missing: bool = False) -> ScoredPredictions:
    return score_predictions(
        open_predictions(path), ANNOTATED, rules=rules, name="theirs", allow_missing=allow_missing
    )


ALL = [entry(one) for one in (*VAL, *TEST)]


def test_every_rule_set_scores_what_a_plain_loop_counts(tmp_path: Path) -> None:
    """Squashed grids get the original mask resized by nearest, and each number that rests on that says so."""
    found = scored(saved(tmp_path, ALL[::-1]), rules="all")
    for result, samples in zip(found.results, (VAL, TEST), strict=True):
        for name, scores in result.scores.items():
            view, rows = RULES[name].view, []
            for one in samples:
                size = SIZES[one.image_id]
                truth = truth_mask([INSTANCES[i].segmentation for i in one.ann_ids], view, frame_size=size)
                predicted = resize_nearest(mask(one.sent_id, size), view.grid_size(size))
                rows.append(count_pixels(predicted, truth, is_no_target=not one.ann_ids))
            assert repr(scores) == repr(RULES[name].score(collect(rows)))
            is_resized = view.grid != "original"
            assert ("resized by nearest" in result.notes.get(name, "")) is is_resized
    assert set(found.results[0].refused) == {
        name for name, rules in RULES.items() if not rules.takes_no_target
    }
    assert found.results[1].refused == {}
    assert found.results[1].quarantined == 2
    assert "of another threshold perhaps" in found.results[0].notes["cris"]


def test_masks_of_other_grids_are_taken_from_the_file_where_it_has_them(tmp_path: Path) -> None:
    masks = {one.sent_id: mask(50 + one.sent_id, (480, 480)) for one in (*VAL, *TEST)}
    entries = []
    for one in (*VAL, *TEST):
        rle = encode(masks[one.sent_id])
        entries.append(entry(one, masks={"480": {"size": [480, 480], "counts": rle.counts}}))
    found = scored(saved(tmp_path, entries, {"thresholds": {"480": 0.5}}), rules="gres@480,gres")
    counts = found.samples.counts("480")
    assert counts.predicted.tolist() == [int(masks[one.sent_id].sum()) for one in (*VAL, *TEST)]
    assert found.results[0].notes == {}
    assert found.results[0].thresholds == {"gres@480": 0.5, "gres": None}
    assert found.results[0].as_dict()["scores"]["gres"]["threshold"] == "as predicted"


def test_the_own_rule_set_of_the_dataset_is_the_default(tmp_path: Path) -> None:
    found = scored(saved(tmp_path, ALL))
    assert [result.rules for result in found.results] == ["gres", "gres"]
    assert [result.split for result in found.results] == [f"{TABLE}:val", f"{TABLE}:testA"]


def test_decisions_of_a_head_are_used_and_without_any_the_mask_decides(tmp_path: Path) -> None:
    decided = [entry(one, no_target=not one.ann_ids) for one in (*VAL, *TEST)]
    with_head = scored(saved(tmp_path, decided))
    assert with_head.results[0].scores["gres"].values["N-acc"] == 1
    assert with_head.samples.counts("original").has_head
    without = scored(saved(tmp_path, ALL))
    assert without.results[0].scores["gres"].values["N-acc"] == 0
    assert not without.samples.counts("original").has_head


@pytest.mark.parametrize(
    ("splits", "asked", "is_whole"),
    [
        ({"val": True, "testA": True, "testB": True}, "refcoco:test", True),
        ({"val": True, "testA": True}, "refcoco:test", False),
        ({"val": True, "testA": True}, "refcoco:testA", True),
        ({"val": False, "testA": True}, "refcoco:val", False),
        ({"train": False, "val": True}, "refcoco:val", True),
        ({"train": False}, "custom/b:train", False),
        ({"hold": True}, "custom/b:hold", True),
    ],
)
def test_a_cache_holds_a_split_whole_if_all_of_every_label_was_extracted(
    splits: dict[str, bool], asked: str, is_whole: bool
) -> None:
    (selection,) = parse_selections(asked)
    entry = SimpleNamespace(
        splits={name: SimpleNamespace(is_complete=complete) for name, complete in splits.items()}
    )
    manifest = SimpleNamespace(datasets={selection.table_name: entry})
    cache: Any = SimpleNamespace(manifest=manifest)
    assert holds_whole(cache, selection) is is_whole


def test_a_split_of_which_the_cache_holds_a_part_says_so(tmp_path: Path) -> None:
    assert [result.as_dict()["is_whole"] for result in scored(saved(tmp_path, ALL)).results] == [True, False]


def test_what_a_file_says_of_itself_may_be_hostile(tmp_path: Path) -> None:
    """Text that UTF-8 cannot hold, and a list whose whole text would take more frames than Python has."""
    nested = "[" * 900 + "]" * 900
    entries = json.dumps(ALL)
    info = f'{{"category_source": "\\ud800", "weights": {{"sam": {nested}, "\\udcff": "[/]"}}}}'
    path = tmp_path / "p.json"
    path.write_text(f'{{"info": {info}, "predictions": {entries}}}')
    _, samples = scored(path).write(tmp_path)
    found = SampleTable.read(samples).metadata
    assert found["category_source"] == "\ud800"
    assert found["weights"] == {"sam": "[[[...]]]", "\udcff": "[/]"}


def test_decisions_of_some_predictions_alone_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="1 of 5 predictions state no_target"):
        scored(saved(tmp_path, [entry(VAL[0], no_target=False), *ALL[1:]]))


@pytest.mark.parametrize(
    ("entries", "message", "facts"),
    [
        (ALL[1:], r"1 missing \(\(100, 0\)\)\. .*--allow-missing scores", {"missing": 1}),
        ([*ALL, ALL[2]], r"1 duplicate \(\(102, 2\)\)", {"duplicate": 1}),
        ([*ALL, entry(sample(77, 1))], r"1 unknown \(\(177, 77\)\).*into it, --data every split",
         {"unknown": 1}),
        ([*ALL[1:], entry(sample(9, 1))], r"1 missing .*\. 1 predictions are of the dataset's other expr",
         {"missing": 1}),
        ([*ALL[:4], entry(TEST[0], segmentation={"size": [[[[1]] * 50] * 50] * 50})],
         r"found \[\[\[\.\.\.\], .{1,80}, expected \(20, 30\)\)\. Correct", {"wrong_size": 1}),
        ([*ALL[:4], entry(TEST[0], image_id=2)], r"1 wrong image_id \(\(104, 4\): found 2, expected 1\)",
         {"wrong_image_id": 1}),
        ([*ALL[:4], entry(TEST[0], segmentation=entry(VAL[2])["segmentation"])],
         r"1 wrong size \(\(104, 4\): found \[25, 16\], expected \(20, 30\)\)", {"wrong_size": 1}),
        ([], r"5 missing \(\(100, 0\); .*\(104, 4\)\)", {"missing": 5}),
        ([*ALL[1:], entry(sample(77, 1))], r"1 missing .*, 1 unknown ", {"missing": 1, "unknown": 1}),
    ],
)  # fmt: skip
def test_what_does_not_match_is_counted_and_named(
    tmp_path: Path, entries: list[dict[str, Any]], message: str, facts: dict[str, int]
) -> None:
    with pytest.raises(DataError, match=message) as caught:
        scored(saved(tmp_path, entries))
    assert caught.value.exit_code == 3
    assert {key: value for key, value in caught.value.facts.items() if key != "path"} == facts


def test_at_most_five_examples_are_given(tmp_path: Path) -> None:
    unknown = [entry(sample(number, 1)) for number in range(70, 80)]
    with pytest.raises(DataError, match=r"10 unknown \((\(\d+, \d+\); ){5}…\)"):
        scored(saved(tmp_path, [*ALL, *unknown]))


def test_missing_predictions_are_empty_masks_only_if_that_is_allowed(tmp_path: Path) -> None:
    found = scored(saved(tmp_path, ALL[1:]), allow_missing=True)
    assert found.num_missing == 1
    assert found.samples.counts("original").predicted[0] == 0
    assert "1 samples without a prediction are scored as empty masks" in found.results[0].notes["gres"]
    with pytest.raises(DataError, match="1 unknown"):  # nothing else is forgiven
        scored(saved(tmp_path, [*ALL[1:], entry(sample(77, 1))]), allow_missing=True)


def test_predictions_of_other_splits_are_left_alone_and_counted(tmp_path: Path) -> None:
    assert scored(saved(tmp_path, [*ALL, entry(sample(9, 1))])).num_other == 1


def test_results_and_samples_are_written_beside_each_other(tmp_path: Path) -> None:
    info = {"weights": {"sam": "x"}, "category_source": "annotated", "text": "raw", "fingerprint": 3}
    found = scored(saved(tmp_path, ALL, info))
    scores, samples = found.write(tmp_path / "out")
    assert (scores.name, samples.name) == ("theirs.scores.json", "theirs.samples.parquet")
    document = json.loads(scores.read_text())
    assert [result["split"] for result in document["results"]] == [f"{TABLE}:val", f"{TABLE}:testA"]
    table = SampleTable.read(samples)
    assert table.metadata == {key: value for key, value in document.items() if key in table.metadata}
    assert table.metadata["source"] == "predictions"
    assert table.metadata["category_source"] == document["results"][0]["category_source"] == "annotated"
    assert table.metadata["fingerprint"] == "not stated"  # what is no text is not taken over
    assert len(table) == 5


def test_a_method_cannot_write_elsewhere_by_its_name(tmp_path: Path) -> None:
    found = score_predictions(
        open_predictions(saved(tmp_path, ALL)), ANNOTATED, rules=None, name="../a b/ours", allow_missing=False
    )
    scores, _ = found.write(tmp_path / "out")
    assert scores.parent == tmp_path / "out"
    assert found.samples.metadata["method"] == "../a b/ours"


@pytest.mark.parametrize("selection", ["refcoco:val", "refcoco", "refcoco:val,refcoco:test"])
def test_a_cache_and_the_files_it_was_made_from_give_the_same_samples(
    tiny_cache: Path, drawn_data: Path, selection: str
) -> None:
    selections = parse_selections(selection)
    one = AnnotatedSplits.from_cache(FeatureCache.open(tiny_cache), selections, text="sent")
    other = AnnotatedSplits.from_files(drawn_data, selections, text="sent")
    assert list(one.splits) == list(other.splits)
    assert "train" not in one.splits
    for split, samples in one.splits.items():
        assert [(s.ref_id, s.sent_id, s.ann_ids, s.text) for s in samples] == [
            (s.ref_id, s.sent_id, s.ann_ids, s.text) for s in other.splits[split]
        ]
    assert one.known == other.known
    for samples in one.splits.values():
        for found in samples:
            assert one.sizes[found.image_id] == other.sizes[found.image_id]
            for view in (VIEWS["original"], VIEWS["480"]):
                masks = [
                    truth_mask(
                        [source.instances[ann_id].segmentation for ann_id in found.ann_ids],
                        view,
                        frame_size=source.sizes[found.image_id],
                    )
                    for source in (one, other)
                ]
                assert np.array_equal(*masks)


def test_one_file_is_scored_against_one_dataset(tiny_cache: Path, drawn_data: Path) -> None:
    selections = parse_selections("refcoco:val,refcoco+:val")
    with pytest.raises(ConfigError, match=r"belongs to one dataset, not to refcoco\.unc, refcoco\+\.unc"):
        AnnotatedSplits.from_files(drawn_data, selections, text="sent")
    for selection in ("refcocog:val", "refcocog"):
        with pytest.raises(CacheMissError, match=r"holds no expressions of refcocog\.umd.*with --data"):
            AnnotatedSplits.from_cache(
                FeatureCache.open(tiny_cache), parse_selections(selection), text="sent"
            )

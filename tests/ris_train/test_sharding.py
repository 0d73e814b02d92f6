"""Batches of whole images and shards for processes: each sample once, and the same scores from any number."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ris_train.scoring import RULES, Counts
from ris_train.sharding import gather, image_batches, shard

IMAGE_IDS = st.lists(st.integers(1, 6), max_size=40)


@given(image_ids=IMAGE_IDS, batch_size=st.integers(1, 12))
def test_batches_hold_each_sample_once_and_whole_images_where_they_fit(
    image_ids: list[int], batch_size: int
) -> None:
    batches = list(image_batches(image_ids, batch_size))
    assert sorted(index for batch in batches for index in batch) == list(range(len(image_ids)))
    assert all(0 < len(batch) <= batch_size for batch in batches)
    for image_id in set(image_ids):
        number = sum(image_id in {image_ids[index] for index in batch} for batch in batches)
        size = image_ids.count(image_id)
        assert number == 1 or size > batch_size


def test_images_come_in_the_order_of_their_first_sample() -> None:
    assert list(image_batches([7, 3, 7, 5, 3], 4)) == [[0, 2, 1, 4], [3]]


@given(image_ids=IMAGE_IDS, world=st.integers(1, 5))
def test_shards_hold_each_sample_once_and_no_image_twice(image_ids: list[int], world: int) -> None:
    shards = [shard(image_ids, rank, world).tolist() for rank in range(world)]
    assert sorted(index for one in shards for index in one) == list(range(len(image_ids)))
    images = [{image_ids[index] for index in one} for one in shards]
    assert sum(map(len, images)) == len(set().union(*images))
    largest = max((image_ids.count(image_id) for image_id in image_ids), default=0)
    assert max(map(len, shards)) - min(map(len, shards)) <= largest


@pytest.mark.parametrize("rank", [-1, 2])
def test_a_rank_beyond_the_processes_is_refused(rank: int) -> None:
    with pytest.raises(ValueError, match=f"Rank {rank} is not one of 2 processes"):
        shard([1, 2, 3], rank, 2)


def counts_of(rows: list[tuple[int, int, int, bool, bool]]) -> Counts:
    """From (I, P − I, G − I, e, n); a no-target sample has no ground truth."""
    values = np.array([(i, p, g) if not e else (0, i + p, 0) for i, p, g, e, _ in rows], dtype=np.int64)
    values = values.reshape(-1, 3)
    return Counts(
        intersection=values[:, 0],
        predicted=values[:, 0] + values[:, 1],
        annotated=values[:, 0] + values[:, 2],
        is_no_target=np.array([row[3] for row in rows], dtype=bool),
        says_no_target=np.array([row[4] for row in rows], dtype=bool),
        has_head=True,
    )


PIXELS = st.integers(0, 300_000)
ROWS = st.lists(
    st.tuples(st.integers(1, 5), st.tuples(PIXELS, PIXELS, PIXELS, st.booleans(), st.booleans())), max_size=30
)


@given(rows=ROWS, world=st.integers(1, 3))
def test_scores_of_any_number_of_processes_are_those_of_one_to_the_last_digit(
    rows: list[tuple[int, Any]], world: int
) -> None:
    image_ids = [image_id for image_id, _ in rows]
    whole = {"original": counts_of([row for _, row in rows])}
    parts = [
        {"original": counts_of([rows[index][1] for index in shard(image_ids, rank, world)])}
        for rank in range(world)
    ]
    gathered = gather(image_ids, parts)
    for name in ("intersection", "predicted", "annotated", "is_no_target", "says_no_target"):
        assert np.array_equal(getattr(gathered["original"], name), getattr(whole["original"], name))
    for rules in ("gres", "rela", "dfam", "zom", "lisa"):
        one, several = (RULES[rules].score(found["original"]).values for found in (whole, gathered))
        assert repr(one) == repr(several)

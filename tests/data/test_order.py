"""Batches of one bucket each: every item once an epoch, the same over any number of processes, from any step on."""

from collections import Counter
from itertools import islice

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rsm_guidance.core.errors import UsageError
from rsm_guidance.data.order import epoch_batches
from rsm_guidance.training import Batches


@given(groups=st.lists(st.integers(0, 3), min_size=1, max_size=40), size=st.integers(1, 5), epoch=st.integers(0, 3))
def test_an_epoch_gives_every_item_once_in_batches_of_one_group(groups: list[int], size: int, epoch: int) -> None:
    batches = epoch_batches(groups, size, 7, epoch)
    assert sorted(i for batch in batches for i in batch) == list(range(len(groups)))
    assert all(len({groups[i] for i in batch}) == 1 and 0 < len(batch) <= size for batch in batches)
    assert len(batches) == len(epoch_batches(groups, size, 7, epoch + 1))


@given(counts=st.lists(st.integers(3, 20), min_size=1, max_size=4), size=st.integers(1, 3))
def test_three_processes_share_what_one_would_see(counts: list[int], size: int) -> None:
    groups = [group for group, count in enumerate(counts) for _ in range(count)]
    parts = [epoch_batches(groups, size, 7, 0, 3, process) for process in range(3)]
    together = [sorted(sum(step, [])) for step in zip(*parts, strict=True)]
    assert sorted(sum(together, [])) == list(range(len(groups)))
    for step in zip(*parts, strict=True):
        assert max(map(len, step)) - min(map(len, step)) <= 1 and all(step)
        assert len({groups[i] for batch in step for i in batch}) == 1
    if all(count % (3 * size) in (0, *range(3, 3 * size)) for count in counts):
        assert together == [sorted(batch) for batch in epoch_batches(groups, 3 * size, 7, 0)]


def test_groups_too_small_for_the_processes_are_refused() -> None:
    with pytest.raises(UsageError, match="1 items of bucket 5 cannot be shared by 2 processes"):
        epoch_batches([0, 0, 5], 2, 0, 0, processes=2)
    for wrong in ({"groups": []}, {"size": 0}, {"process": 1}):
        with pytest.raises(UsageError, match="batches need items and a size"):
            epoch_batches(**{"groups": [0], "size": 1, "seed": 0, "epoch": 0} | wrong)


def test_seven_pairs_in_batches_of_two_give_twenty_steps() -> None:
    batches = Batches(range(7), 2, seed=0, groups=[0] * 7)
    steps = [batch.tolist() for batch in islice(batches.start(0), 20)]
    assert Counter(i for step in steps for i in step) == dict.fromkeys(range(7), 5)
    for first in (1, 3, 4, 5, 18):
        assert [b.tolist() for b in islice(batches.start(first), 20 - first)] == steps[first:]
    with pytest.raises(ValueError, match="every item needs a group"):
        Batches(range(7), 2, seed=0, groups=[0])

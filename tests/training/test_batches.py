"""Batches: every epoch is a permutation, and any step can be the first."""

from itertools import islice

import pytest
import torch

from rsm_guidance.training import Batches


def drawn(batches: Batches, first: int, count: int) -> list[list[int]]:
    return [batch.tolist() for batch in islice(batches.start(first), count)]


def test_an_epoch_is_without_replacement_and_the_next_in_another_order() -> None:
    whole = drawn(Batches(range(10), 3, seed=1), 0, 9)
    epochs = [sum(whole[i : i + 3], []) for i in (0, 3, 6)]
    assert all(len(set(epoch)) == 9 and set(epoch) <= set(range(10)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 3
    assert whole != drawn(Batches(range(10), 3, seed=2), 0, 9)


@pytest.mark.parametrize("first", [1, 2, 3, 4, 8, 9])
def test_starting_at_a_step_gives_what_the_whole_run_gives_there(first: int) -> None:
    batches = Batches(range(10), 3, seed=1)
    assert drawn(batches, first, 6) == drawn(batches, 0, first + 6)[first:]


def test_the_order_does_not_depend_on_global_random_numbers_nor_on_workers() -> None:
    before = drawn(Batches(range(6), 2, seed=0), 1, 4)
    torch.manual_seed(123)
    assert drawn(Batches(range(6), 2, seed=0), 1, 4) == before
    assert drawn(Batches(range(6), 2, seed=0, workers=1), 1, 4) == before


def test_a_data_set_smaller_than_a_batch_gives_all_of_it() -> None:
    assert [sorted(b) for b in drawn(Batches(range(2), 5, seed=0), 0, 2)] == [[0, 1], [0, 1]]
    for data, size in ((range(0), 3), (range(3), 0)):
        with pytest.raises(ValueError, match="batches need a size and data"):
            Batches(data, size, seed=0)

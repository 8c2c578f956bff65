"""Advantages by hand-computed numbers and by their invariances."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rsm_guidance.training.alignment.advantages import absolute, advantages, diversity, group_by, optimality

TWO = torch.tensor([0, 0, 1, 1])


def test_hand_computed() -> None:
    rewards = torch.tensor([1.0, 3.0, 2.0, 8.0])
    group = advantages(rewards, TWO, clip=None).values
    assert group.tolist() == pytest.approx([-1 / 1.0001, 1 / 1.0001, -3 / 3.0001, 3 / 3.0001])
    whole = advantages(rewards, TWO, deviation="global", clip=None).values  # centred -1, 1, -3, 3: deviation sqrt(5)
    assert whole.tolist() == pytest.approx([x / (5**0.5 + 1e-4) for x in (-1, 1, -3, 3)])
    assert advantages(rewards, TWO, deviation="none", clip=2.0).values.tolist() == [-1, 1, -2, 2]


def test_equal_groups_are_dropped_even_where_means_round() -> None:
    third = 0.1 + 0.2
    found = advantages(torch.tensor([third, third, third, 1.0, 2.0, 2.5]), torch.tensor([0, 0, 0, 1, 1, 1]))
    assert found.values[:3].tolist() == [0, 0, 0]
    assert found.kept.tolist() == [False] * 3 + [True] * 3
    assert (found.groups, found.dropped) == (2, 1)


def test_filters_by_deviation_and_mean() -> None:
    rewards = torch.tensor([0.50, 0.52, 0.1, 0.9, 0.92, 1.0])
    found = advantages(rewards, torch.tensor([0, 0, 1, 1, 2, 2]), min_std=0.02, max_mean=0.9)
    assert found.kept.tolist() == [False, False, True, True, False, False]


def test_several_rewards_count_alike_whatever_their_scale() -> None:
    generator = torch.Generator().manual_seed(0)
    rewards = torch.rand(64, 2, generator=generator) * torch.tensor([1.0, 100.0])
    groups = torch.arange(64) // 8
    both = advantages(rewards, groups, clip=None).values
    alone = [advantages(rewards[:, i], groups, clip=None).values for i in (0, 1)]
    assert torch.allclose(both, alone[0] + alone[1])
    assert float(alone[0].var() / alone[1].var()) == pytest.approx(1, rel=1e-2)


def test_the_absolute_anchor_survives_equal_groups() -> None:
    rewards = torch.tensor([1.0, 1.0, 5.0, 5.0])
    found = advantages(rewards, TWO, anchor=absolute(rewards, 0.5))
    assert found.values.tolist() == [-1, -1, 1, 1]
    assert found.dropped == 0


def test_diversity_lifts_only_the_good() -> None:
    found = diversity(
        torch.tensor([1.0, 1.0, -1.0, -1.0]), torch.tensor([1.0, 3.0, 1.0, 3.0]), torch.tensor([0, 0, 0, 0])
    )
    assert found.tolist() == [0.5, 1.5, -1, -1]


def test_optimality() -> None:
    assert optimality(torch.tensor([-9.0, -5.0, 0.0, 2.5, 5.0])).tolist() == [0, 0, 0.5, 0.75, 1]


def test_groups_by_several_keys() -> None:
    groups = group_by(torch.tensor([7, 7, 3, 3, 7]), torch.tensor([0, 1, 0, 0, 0]))
    assert groups[0] == groups[4] and groups[2] == groups[3] and len(set(groups.tolist())) == 3


@pytest.mark.parametrize(
    ("rewards", "groups", "says"),
    [([1.0, float("nan")], [0, 0], "finite"), ([1.0, 2.0, 3.0], [0, 0, 1], "group of one")],
)
def test_bad_input(rewards: list[float], groups: list[int], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        advantages(torch.tensor(rewards), torch.tensor(groups))


floats = st.floats(-10, 10, width=32)


@settings(max_examples=40, deadline=None)
@given(st.lists(floats, min_size=8, max_size=8), st.permutations(range(8)), floats, st.floats(0.5, 20))
def test_invariances(values: list[float], order: list[int], shift: float, scale: float) -> None:
    rewards, groups = (
        torch.tensor(values, dtype=torch.float64).round(decimals=2),
        torch.tensor([0, 0, 0, 1, 1, 1, 2, 2]),
    )
    for deviation in ("group", "global", "none"):
        base = advantages(rewards, groups, deviation=deviation, clip=None)  # type: ignore[arg-type]
        mixed = advantages(rewards[order], groups[order], deviation=deviation, clip=None)  # type: ignore[arg-type]
        assert torch.allclose(mixed.values, base.values[order], atol=1e-9)
        assert (mixed.groups, mixed.dropped) == (base.groups, base.dropped)
        moved = advantages(rewards + round(shift), groups, deviation=deviation, clip=None)  # type: ignore[arg-type]
        assert torch.allclose(moved.values, base.values, atol=1e-6)
    unit = advantages(rewards, groups, clip=None).values
    grown = advantages(rewards * scale, groups, clip=None).values
    assert torch.allclose(grown, unit, atol=0.02)  # up to EPS beside deviations of at least 0.005
    assert torch.allclose(advantages(rewards * scale, groups, deviation="none", clip=None).values,
                          scale * advantages(rewards, groups, deviation="none", clip=None).values)  # fmt: skip

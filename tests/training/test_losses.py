"""Bradley-Terry over groups, against closed forms."""

import math

import pytest
import torch

from rsm_guidance.training.reward_model.losses import MIN_PREFERENCE, bradley_terry_loss, pairs_won

SCORES = torch.tensor([[1.0, 0.0, 3.0]])
TARGETS = torch.tensor([[1.0, 0.0, 1.01]])  # 1 and 1.01 are no preference
EXPECTED = (math.log1p(math.exp(-1.0)) + math.log1p(math.exp(-3.0))) / 2


def test_the_loss_is_the_mean_over_pairs_of_all_groups() -> None:
    assert bradley_terry_loss(SCORES, TARGETS).item() == pytest.approx(EXPECTED, rel=1e-6)
    other = torch.tensor([[0.0, 2.0, 2.0]]), torch.tensor([[0.0, 0.0, 0.5]])  # two pairs: margins 2 and 0
    both = bradley_terry_loss(torch.cat([SCORES, other[0]]), torch.cat([TARGETS, other[1]])).item()
    assert both == pytest.approx((2 * EXPECTED + math.log1p(math.exp(-2.0)) + math.log(2)) / 4, rel=1e-6)


def test_only_differences_within_a_group_count() -> None:
    assert bradley_terry_loss(SCORES + 5, TARGETS).item() == pytest.approx(EXPECTED, rel=1e-5)
    assert pairs_won(SCORES + 5, TARGETS) == pairs_won(SCORES, TARGETS) == (2.0, 2)


def test_groups_without_preferences_give_no_loss_and_no_pairs() -> None:
    scores = SCORES.clone().requires_grad_()
    loss = bradley_terry_loss(scores, torch.full((1, 3), 0.5))
    loss.backward()
    assert loss.item() == 0 and scores.grad is not None and not scores.grad.any()
    assert pairs_won(SCORES, torch.full((1, 3), 0.5)) == (0.0, 0)


def test_differences_up_to_the_least_preference_are_none() -> None:
    scores = torch.tensor([[0.0, 1.0]])
    assert pairs_won(scores, torch.tensor([[0.0, 0.99 * MIN_PREFERENCE]])) == (0.0, 0)
    assert pairs_won(scores, torch.tensor([[0.0, 1.01 * MIN_PREFERENCE]])) == (1.0, 1)


def test_ties_count_half() -> None:
    assert pairs_won(torch.zeros(1, 3), TARGETS) == (1.0, 2)


def test_the_gradient_pulls_the_preferred_sample_up_by_the_probability_of_an_error() -> None:
    scores = torch.tensor([[0.3, -0.4]], requires_grad=True)
    bradley_terry_loss(scores, torch.tensor([[1.0, 0.0]])).backward()
    error = 1 / (1 + math.exp(0.7))
    assert scores.grad is not None and scores.grad.tolist()[0] == pytest.approx([-error, error])

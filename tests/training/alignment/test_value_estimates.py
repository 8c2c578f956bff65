"""Estimators: small numbers by hand, and bias and variance against exact guidance on a mixture."""

import pytest
import torch
from torch import Tensor

from rsm_guidance.core.schedule import NoiseSchedule, Prediction
from rsm_guidance.core.transitions import ODE, FlowSDE
from rsm_guidance.oracles.mixture import (
    GaussianMixture,
    GaussianMixtureDenoiser,
    QuadraticReward,
    expected_reward,
    posterior,
)
from rsm_guidance.training.alignment.estimators import (
    ESTIMATORS,
    balance,
    estimate,
    gains,
    node_values,
    process_value,
    turning_point_credit,
    turning_points,
    value_ratio,
)
from rsm_guidance.training.alignment.levels import geometry

PATH = torch.tensor([[1.0, 0.5, 2.0, 1.5, 3.0]])
"""Values of five states; gains -0.5, 1.5, -0.5, 1.5."""


def test_by_hand() -> None:
    assert gains(PATH).tolist() == [[-0.5, 1.5, -0.5, 1.5]]
    assert process_value(PATH, 0.5).tolist() == [[0.5 + 1.0 + 0.375 + 0.375, 2.0 + 0.75 + 0.75, 1.5 + 1.5, 3.0]]
    assert float(value_ratio(process_value(PATH, 0.5)).mean()) == pytest.approx(1)
    assert estimate("terminal", torch.tensor([2.0, 3.0]), steps=2).tolist() == [[2, 2], [3, 3]]
    assert estimate("branch-group", torch.tensor([2.0, 3.0])).tolist() == [[2], [3]]


def test_gains_add_up() -> None:
    values = torch.randn(7, 6, generator=torch.Generator().manual_seed(0))
    for name in ("completion-difference", "tweedie-difference"):
        assert torch.allclose(ESTIMATORS[name].credit(values).sum(1), values[:, -1] - values[:, 0])


def test_turning_points() -> None:
    assert turning_points(PATH).tolist() == [[False, True, False, True]]
    assert turning_point_credit(PATH).tolist() == [[-0.5, 2.5, -0.5, 1.5]]
    assert turning_point_credit(PATH, "code").tolist() == [[-0.5, 3.5, -0.5, 3.5]]  # R_S - R_0 = 2
    rising = torch.tensor([[0.0, 1.0, 2.0]])
    assert turning_points(rising).tolist() == [[True, False]]
    assert turning_points(rising, first=False).tolist() == [[False, False]]


def test_values_of_nodes() -> None:
    leaves, lineage = torch.tensor([1.0, 3.0, 5.0]), torch.tensor([0, 0, 1])
    assert node_values(leaves, lineage).tolist() == [2, 5]
    weighted = node_values(leaves, lineage, torch.tensor([0.0, 1000.0, -1000.0]))
    assert weighted.tolist() == [3, 5]


def test_steps_with_more_branches_count_no_more() -> None:
    weights = balance(torch.tensor([6, 6, 8, 10, 0]))
    assert weights.tolist() == pytest.approx([7.5 / 6, 7.5 / 6, 7.5 / 8, 7.5 / 10, 0])


def test_a_ratio_of_values_of_mixed_sign_is_refused() -> None:
    with pytest.raises(ValueError, match="one sign"):
        value_ratio(torch.tensor([[1.0, -1.0]]))


MIXTURE = GaussianMixture.from_weights([1.0, 1.0, 1.0], [[-2.0, 0.0], [2.0, 0.5], [0.0, 2.0]], 0.2)
REWARD = QuadraticReward.around([1.5, 1.0], 0.4)
SCHEDULE = NoiseSchedule.flow(20)
START = torch.tensor([[0.3, 0.4]], dtype=torch.float64)


class OneStep:
    """Children of one state, drawn by the flow SDE, and what estimators say of them."""

    def __init__(self, level: int, count: int) -> None:
        self.level, self.generator = level, torch.Generator().manual_seed(level)
        self.denoiser = GaussianMixtureDenoiser(MIXTURE, SCHEDULE, ["a"])
        self.step = geometry(FlowSDE(0.7), SCHEDULE, level, level + 1)
        law = FlowSDE(0.7)(self.denoiser.predict(START, level), SCHEDULE, level, level + 1)
        self.noise = torch.randn(count, 2, generator=self.generator, dtype=torch.float64)
        self.children = law.sample(self.noise)

    def exact_value(self, x: Tensor) -> Tensor:
        """E[r(x0) | x] of the next level."""
        return expected_reward(posterior(MIXTURE, x, *SCHEDULE.coefficients(self.level + 1)), REWARD)

    def exact_guidance(self) -> Tensor:
        """grad V at the next level, averaged over the children: what Stein's identity says E[V e] / S is."""
        x = self.children.clone().requires_grad_()
        return torch.autograd.grad(self.exact_value(x).sum(), x)[0].mean(0)

    def full(self) -> Tensor:
        """Rewards of completions drawn from the exact posterior, as a perfect full SDE run draws them."""
        law = posterior(MIXTURE, self.children, *SCHEDULE.coefficients(self.level + 1))
        return REWARD(law.sample(1, self.generator)[:, 0])

    def completed(self) -> Tensor:
        """Rewards of ODE completions."""
        x = self.children
        for level in range(self.level + 1, SCHEDULE.steps):
            x = ODE()(self.denoiser.predict(x, level), SCHEDULE, level, level + 1).center
        return REWARD(x)

    def tweedie(self) -> Tensor:
        p: Prediction = self.denoiser.predict(self.children, self.level + 1)
        return REWARD(p.x0)

    def guidance(self, rewards: Tensor, centred: bool = True) -> tuple[Tensor, Tensor]:
        """A e / S: its mean over children and the standard error of that, [2] each."""
        a = rewards - rewards.mean() if centred else rewards
        each = a[:, None] * self.noise / self.step.std
        return each.mean(0), each.std(0) / len(each) ** 0.5


def test_full_rollouts_are_unbiased() -> None:
    for level in (4, 10, 16):
        world = OneStep(level, 20_000)
        mean, error = world.guidance(world.full())
        assert ((mean - world.exact_guidance()).abs() < 4 * error).all()


def test_centring_takes_variance_away() -> None:
    world = OneStep(10, 5_000)
    rewards = world.full() + 10.0
    assert (world.guidance(rewards, centred=False)[1] > 3 * world.guidance(rewards)[1]).all()


def test_ode_completions_vary_less_than_full_rollouts() -> None:
    world = OneStep(6, 5_000)
    assert (world.guidance(world.completed())[1] < 0.8 * world.guidance(world.full())[1]).all()


def test_tweedie_is_biased_at_high_noise_and_good_at_low() -> None:
    def bias(level: int) -> float:
        world = OneStep(level, 20_000)
        exact = world.exact_guidance()
        # the same noise for both, so that what is left is bias and not the noise of the estimate
        gap = world.guidance(world.tweedie())[0] - world.guidance(world.exact_value(world.children))[0]
        return float(gap.norm() / exact.norm())

    assert bias(4) > 0.15
    assert bias(18) < 0.05
    assert bias(4) > 4 * bias(18)


def test_rewards_do_not_matter_where_steps_draw_nothing_that_they_see() -> None:
    """A reward that is constant gives no guidance at all once it is centred."""
    world = OneStep(8, 100)
    assert world.guidance(torch.full((100,), 3.0, dtype=torch.float64))[0].abs().max() == 0

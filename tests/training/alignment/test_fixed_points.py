"""Where Reinforce Adjoint Matching comes to rest, by exact quadrature on one Gaussian.

With p_ref = N(0, 1) and a policy whose law is N(m, S), its velocity at level t is affine in x_t.  RAM rests where the gradient
by both coefficients is 0 under the policy's own samples.
"""

import numpy as np
import pytest
import torch
from torch import Tensor

from rsm_guidance.training.alignment.forms.forward import forward_match, ram
from rsm_guidance.training.alignment.trust_regions import velocity_penalty


def velocity(x: Tensor, t: float, mean: float, variance: float) -> Tensor:
    """E[eps - x0 | x_t] for x0 ~ N(mean, variance)."""
    gain = (1 - t) * variance / ((1 - t) ** 2 * variance + t**2)
    x0 = mean + gain * (x - (1 - t) * mean)
    return (x - (1 - t) * x0) / t - x0 if t > 0 else -x0


def pull_at(reward, t: float, mean: float, variance: float) -> Tensor:
    """Gradient [2] of RAM's loss by offset and slope of the velocity, at the policy N(mean, variance)."""
    nodes, weights = (torch.from_numpy(x) for x in np.polynomial.hermite_e.hermegauss(12))
    weights = weights / weights.sum()
    x0 = (mean + variance**0.5 * nodes)[:, None].expand(-1, len(nodes)).reshape(-1, 1)
    eps = nodes[None, :].expand(len(nodes), -1).reshape(-1, 1)
    share = (weights[:, None] * weights[None, :]).flatten()
    x, u = (1 - t) * x0 + t * eps, eps - x0
    change = torch.zeros(2, dtype=torch.float64, requires_grad=True)
    v = velocity(x, t, mean, variance) + change[0] + change[1] * x
    pull = ram(reward(x0).flatten(), torch.zeros(len(x0), dtype=torch.int64), 1.0, baseline=False)
    loss = forward_match((v - u).square().mean(1), None, pull, velocity_penalty(v, velocity(x, t, 0.0, 1.0)))
    return torch.autograd.grad((share * loss).sum(), change)[0]


def resting_variance(a: float, t: float) -> float:
    low, high = 0.05, 1.0
    for _ in range(50):
        middle = (low + high) / 2
        down = float(pull_at(lambda x: -a * x.square() / 2, t, 0.0, middle)[1])
        low, high = (low, middle) if down < 0 else (middle, high)
    return (low + high) / 2


@pytest.mark.parametrize("t", [0.05, 0.3, 0.7, 0.95])
def test_linear_rewards_are_tilted_exactly_at_every_level(t: float) -> None:
    def reward(x: Tensor) -> Tensor:
        return 0.8 * x

    assert pull_at(reward, t, 0.8, 1.0).abs().max() < 1e-9  # p exp(b x) = N(b, 1)
    assert pull_at(reward, t, 0.0, 1.0).abs().max() > 1e-2


@pytest.mark.parametrize(
    ("a", "t", "expected"),
    [(1, 0.1, 0.503), (1, 0.3, 0.532), (1, 0.5, 0.577), (1, 0.7, 0.607), (1, 0.999, 0.618), (3, 0.999, 0.434), (3, 0.01, 0.25)],
)  # fmt: skip
def test_quadratic_rewards_are_under_tilted_at_high_noise(a: float, t: float, expected: float) -> None:
    """r = -a x^2 / 2 asks for the variance 1 / (1 + a)."""
    assert resting_variance(a, t) == pytest.approx(expected, abs=1.5e-3)
    assert expected >= 1 / (1 + a)

"""Sequential Monte Carlo against the exact tilted posterior of Gaussian mixtures, and the published bugs it avoids."""

import math

import pytest
import torch
from torch import Tensor

from rsm_guidance.core.ledger import Budget, Ledger
from rsm_guidance.core.mixture import (
    GaussianMixture,
    GaussianMixtureDenoiser,
    QuadraticReward,
    expected_reward,
    tilt,
    value,
)
from rsm_guidance.core.random import RandomStreams
from rsm_guidance.core.schedule import NoiseSchedule, Prediction
from rsm_guidance.core.transitions import Transition
from rsm_guidance.samplers import FKSteering, Problem, SamplerOutput

ANCESTRAL = Transition("ddim", 1.0)
GRID = [
    [-4.0, -4.0],
    [-4.0, 0.0],
    [-4.0, 4.0],
    [0.0, -4.0],
    [0.0, 0.0],
    [0.0, 4.0],
    [4.0, -4.0],
    [4.0, 0.0],
    [4.0, 4.0],
]
RING = [[4 * math.cos(k * math.pi / 4), 4 * math.sin(k * math.pi / 4)] for k in range(8)]
CASES = {
    "grid": (GaussianMixture.from_weights([1 / 9] * 9, GRID, 0.3), QuadraticReward.around([0.0, 0.0], [0.01, 1.0])),
    "ring": (GaussianMixture.from_weights([1 / 8] * 8, RING, 0.3), QuadraticReward.around([0.0, 1.0], [1.0, 0.1])),
    "linear": (
        GaussianMixture.from_weights([0.5, 0.5], [[-2.0], [2.0]], 0.25),
        QuadraticReward(torch.tensor([1.0]), torch.tensor([0.0])),
    ),
}
SCHEDULES = {"flow": NoiseSchedule.flow(100), "vp": NoiseSchedule.variance_preserving(100)}


class CaseValue:
    """V in closed form, or the reward of the posterior mean, which is what Tweedie's estimate gives."""

    reward_calls_per_row = 0

    def __init__(self, case: str, schedule: NoiseSchedule, ledger: Ledger, exact: bool) -> None:
        self.mixture, self.reward = CASES[case]
        self.schedule, self.ledger, self.exact = schedule, ledger, exact
        self.evaluations_per_row = 0.5

    def __call__(self, x: Tensor, level: int, rows: Tensor, prediction: Prediction | None = None) -> Tensor:
        self.ledger.charge_value(len(x), 0.5)
        alpha, sigma = self.schedule.coefficients(level)
        if self.exact or level == self.schedule.steps:
            return value(self.mixture, self.reward, x.double(), alpha, sigma)
        return self.reward(GaussianMixtureDenoiser(self.mixture, self.schedule, []).predict(x, level).x0)


def problem(
    case: str, schedule: NoiseSchedule, count: int, exact: bool = True, seed: int = 0, **caps: float
) -> Problem:
    prompts = [f"point {i}" for i in range(count)]
    mixture, reward = CASES[case]
    ledger = Ledger(Budget(**caps), images=count)
    judge = CaseValue(case, schedule, ledger, exact)
    denoiser = GaussianMixtureDenoiser(mixture, schedule, prompts, seed)
    streams = RandomStreams.for_prompts(seed, prompts)
    return Problem(denoiser, streams, ledger, reward=lambda x, p: reward(x), value=judge)


def weighted_reward(output: SamplerOutput) -> tuple[float, float]:
    """Self-normalised estimate of E*[r] and its standard error over prompts."""
    rewards = torch.tensor(output.trace["candidates"]["rewards"], dtype=torch.float64)
    weights = torch.tensor(output.trace["candidates"]["log_weights"], dtype=torch.float64).exp()
    means = (weights * rewards).sum(1)
    return float(means.mean()), float(means.std() / len(means) ** 0.5)


def mean_normalizer(output: SamplerOutput) -> tuple[float, float]:
    """Mean of the estimates of Z over prompts, and its standard error."""
    assert output.log_normalizer is not None
    z = output.log_normalizer.exp()
    return float(z.mean()), float(z.std() / len(z) ** 0.5)


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("potential", ["difference", "max", "sum"])
def test_fk_steering_finds_the_tilted_posterior(case: str, name: str, potential: str) -> None:
    mixture, reward = CASES[case]
    posterior, log_z = tilt(mixture, reward)
    exact = float(expected_reward(posterior, reward))
    schedule, errors = SCHEDULES[name], []
    for particles in (8, 128):
        sampler = FKSteering(particles, potential=potential, transition=ANCESTRAL)  # type: ignore[arg-type]
        mean, error = weighted_reward(sampler.sample(problem(case, schedule, 60, exact=potential == "difference")))
        errors.append(abs(mean - exact))
    assert errors[-1] < 3 * error + 0.05

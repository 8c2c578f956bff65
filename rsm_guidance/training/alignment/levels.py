"""How a transition answers to its model: the geometry that time weights are written in.

For a step from level i to j with mean mu and standard deviation S, all numbers:

    response  |dmu / dv|  of flow schedules, |dmu / deps| of all others
    W = response / S, the weight of a change of the prediction in the log-ratio: log ratio = <s, e> - 1/2 |s|^2 with s = dmu / S
    gamma = S^2 / |dmu / ds|, the strength of guidance that a policy gradient asks for (RSM, 2604.17415)

For the flow SDE with diffusion a sqrt(t / (1 - t)) and step D: response = D (1 + a^2 / 2), W = sqrt(D) / sigma (1 + a^2 / 2)
and gamma = a^2 / (1 + a^2 / 2) at every t < 1: 1 for the memoryless a = sqrt(2).
"""

import math
from dataclasses import dataclass

import torch

from rsm_guidance.core.schedule import NoiseSchedule, Prediction
from rsm_guidance.core.transitions import GaussianTransition


@dataclass(frozen=True)
class StepGeometry:
    """One stochastic step.

    Attributes:
        alpha, sigma: coefficients of the level where it starts.
        drop: sigma of that level less sigma of the next, D.
        std: standard deviation S > 0 of the next latents.
        response: see the module.
        flow: whether the schedule is a rectified flow.
    """

    alpha: float
    sigma: float
    drop: float
    std: float
    response: float
    flow: bool

    @property
    def diffusion(self) -> float:
        """S / sqrt(D), the sigma of an SDE."""
        return self.std / math.sqrt(self.drop)

    @property
    def weight(self) -> float:
        """W = response / S."""
        return self.response / self.std

    @property
    def gamma(self) -> float:
        """S^2 / |dmu / ds|, where s = -eps / sigma; 0 at a flow's pure noise, where the model does not tell the score."""
        prediction = self.sigma / (self.alpha if self.flow else 1.0) if self.alpha else math.inf  # of a unit of score
        return self.std**2 / (self.response * prediction)


def geometry(transition: GaussianTransition, schedule: NoiseSchedule, level: int, target: int) -> StepGeometry:
    """The geometry of a step.  Transitions are affine in their prediction, so the response is read off one of unit size.

    Raises:
        ValueError: for a step that draws no noise.
    """
    alpha, sigma = schedule.coefficients(level)
    one, zero = torch.ones(1, 1, dtype=torch.float64), torch.zeros(1, 1, dtype=torch.float64)
    if schedule.is_flow:
        unit = Prediction(zero, -sigma * one, (1 - sigma) * one, one)
    else:
        unit = Prediction(zero, -sigma / alpha * one, one, None)
    law = transition(unit, schedule, level, target)
    if law.std == 0:
        raise ValueError(f"the step {level} -> {target} of {transition} draws no noise, so it has no log-ratio")
    drop = sigma - schedule.coefficients(target)[1]
    return StepGeometry(alpha, sigma, drop, law.std, abs(float(law.mean)), schedule.is_flow)

"""Mixtures with rewards whose tilted posteriors are known, and their values; for tests and for the exactness benchmark."""

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from rsm_guidance.core.contracts import Denoiser
from rsm_guidance.core.schedule import Prediction
from rsm_guidance.oracles.mixture import GaussianMixture, QuadraticReward, value


def _ring(count: int, radius: float) -> list[list[float]]:
    angles = [2 * math.pi * k / count for k in range(count)]
    return [[radius * math.cos(a), radius * math.sin(a)] for a in angles]


def _random(seed: int, modes: int = 5, dimension: int = 3) -> tuple[GaussianMixture, QuadraticReward]:
    generator = torch.Generator().manual_seed(seed)
    means = 3 * torch.randn(modes, dimension, generator=generator, dtype=torch.float64)
    weights = torch.rand(modes, generator=generator, dtype=torch.float64) + 0.1
    center = torch.randn(dimension, generator=generator, dtype=torch.float64)
    return GaussianMixture(weights.log(), means, torch.tensor(0.4)), QuadraticReward.around(center, 0.15)


CASES: dict[str, tuple[GaussianMixture, QuadraticReward]] = {
    "grid": (
        GaussianMixture.from_weights([1 / 9] * 9, [[x, y] for x in (-4.0, 0.0, 4.0) for y in (-4.0, 0.0, 4.0)], 0.3),
        QuadraticReward.around([0.0, 0.0], [0.01, 1.0]),
    ),
    "ring": (
        GaussianMixture.from_weights([1 / 8] * 8, _ring(8, 4.0), 0.3),
        QuadraticReward.around([0.0, 1.0], [1.0, 0.1]),
    ),
    "linear": (
        GaussianMixture.from_weights([0.5, 0.5], [[-2.0], [2.0]], 0.25),
        QuadraticReward(torch.tensor([1.0]), torch.tensor([0.0])),
    ),
    "random": _random(0),
}

HELD_OUT: dict[str, tuple[GaussianMixture, QuadraticReward]] = {
    "skewed": (
        GaussianMixture.from_weights([0.6, 0.3, 0.1], [[-2.5], [0.5], [3.5]], [[0.5], [0.15], [0.3]]),
        QuadraticReward.around([2.5], 0.3),
    ),
    "anisotropic": (
        GaussianMixture.from_weights(
            [0.4, 0.1, 0.2, 0.3],
            [[-3.0, -1.0], [3.0, 2.0], [0.0, 3.0], [1.0, -3.0]],
            [[1.0, 0.1], [0.2, 0.8], [0.3, 0.3], [0.1, 1.2]],
        ),
        QuadraticReward(torch.tensor([0.7, 0.5]), torch.tensor([0.0, 0.1])),
    ),
    "spiral": (
        GaussianMixture.from_weights(
            [1.0 + k % 3 for k in range(10)],
            [[(1 + 0.4 * k) * math.cos(0.9 * k), (1 + 0.4 * k) * math.sin(0.9 * k)] for k in range(10)],
            0.2,
        ),
        QuadraticReward.around([-2.0, 1.0], [0.3, 0.5]),
    ),
    "six": _random(6, 6, 6),
}
"""Mixtures that no test uses, for the exactness benchmark."""


@dataclass(frozen=True)
class MixtureValue:
    """V(x_t) = log E[exp(r(x0)) | x_t] of a mixture in closed form, or the reward of the posterior mean (Tweedie); a `Value`.

    Attributes:
        mixture: the law of clean data.
        reward: of clean points.
        denoiser: of the mixture; its schedule says what a level is.
        exact: the closed form; else Tweedie's estimate.
        share: denoiser evaluations that one value is said to cost.
    """

    mixture: GaussianMixture
    reward: QuadraticReward
    denoiser: Denoiser
    exact: bool = True
    share: float = 0.0
    name: ClassVar[str] = "mixture value"
    reward_calls_per_row: ClassVar[int] = 0

    @property
    def reads_prediction(self) -> bool:
        return not self.exact

    @property
    def evaluations_per_row(self) -> float:
        return self.share + (0.0 if self.exact else self.denoiser.evaluations_per_row)

    def __call__(self, x: Tensor, level: int, rows: Tensor, prediction: Prediction | None = None) -> Tensor:
        denoiser = self.denoiser
        if self.exact:
            return value(self.mixture, self.reward, x.double(), *denoiser.schedule.coefficients(level))
        if level == denoiser.steps:
            return self.reward(x)
        return self.reward((prediction or denoiser.predict(x, level, rows)).x0)

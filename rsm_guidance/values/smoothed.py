"""The reward averaged over a Gaussian around the posterior mean (loss-guided diffusion, LGD, ICML 2023).

The Gaussian has the spread sigma / sqrt(alpha^2 + sigma^2) that standard normal data would have, scaled by `spread`.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from rsm_guidance.core.contracts import Denoiser
from rsm_guidance.core.random import Purpose, RandomStreams
from rsm_guidance.core.schedule import Prediction
from rsm_guidance.rewards import RowReward
from rsm_guidance.values.base import EstimatedValue


@dataclass(frozen=True)
class Smoothed:
    """The posterior mean and `samples` - 1 Gaussian neighbours: one denoiser evaluation and `samples` decodes per latent.

    Attributes:
        samples: points in all, >= 2; candidates of one image share their offsets.
        spread: factor on the standard deviation, > 0.
        temperature: lambda > 0 of the mean of exp(r / lambda); infinity takes the plain mean.
    """

    samples: int = 4
    spread: float = 1.0
    temperature: float = math.inf

    def __post_init__(self) -> None:
        if self.samples < 2:
            raise ValueError(f"samples must be at least 2 (one is the mean itself: Tweedie); got {self.samples}")
        for name in ("spread", "temperature"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be positive; got {getattr(self, name)}")

    def value(self, denoiser: Denoiser, reward: RowReward, streams: RandomStreams) -> "SmoothedValue":
        return SmoothedValue(denoiser, reward, self, streams)


@dataclass(frozen=True)
class SmoothedValue(EstimatedValue):
    """lambda log mean over neighbours of exp(r / lambda)."""

    config: Smoothed
    streams: RandomStreams

    @property
    def reward_calls_per_row(self) -> int:
        return self.config.samples

    def _estimate(self, x: Tensor, level: int, rows: Tensor, prediction: Prediction | None) -> Tensor:
        mean, config = (prediction or self.denoiser.predict(x, level, rows)).x0, self.config
        alpha, sigma = self.denoiser.schedule.coefficients(level)
        width = config.spread * sigma / math.hypot(alpha, sigma)
        points = [mean]
        for i in range(1, config.samples):
            unique, place = rows.unique(return_inverse=True)
            offsets = self.streams.normals(unique.tolist(), mean.shape[1:], [(Purpose.SMOOTH, level, i)] * len(unique))
            points.append(mean + width * offsets[place.cpu()].to(mean))
        scores = self._score(torch.cat(points), level, rows.repeat(config.samples)).view(config.samples, len(mean))
        if math.isinf(config.temperature):
            return scores.mean(0)
        tilted = (scores.double() / config.temperature).logsumexp(0) - math.log(config.samples)
        return config.temperature * tilted

"""The reward of the posterior mean: free where the denoiser's prediction is at hand, biased where the mean is a blur."""

from dataclasses import dataclass

from torch import Tensor

from rsm_guidance.core.contracts import Denoiser
from rsm_guidance.core.random import RandomStreams
from rsm_guidance.core.schedule import Prediction
from rsm_guidance.rewards import RowReward
from rsm_guidance.values.base import EstimatedValue


@dataclass(frozen=True)
class Tweedie:
    """The posterior mean: one denoiser evaluation and one decode per latent."""

    def value(self, denoiser: Denoiser, reward: RowReward, streams: RandomStreams) -> "TweedieValue":
        return TweedieValue(denoiser, reward)


@dataclass(frozen=True)
class TweedieValue(EstimatedValue):
    """V(x_t) = r(E[x0 | x_t])."""

    def _estimate(self, x: Tensor, level: int, rows: Tensor, prediction: Prediction | None) -> Tensor:
        return self._score((prediction or self.denoiser.predict(x, level, rows)).x0, level, rows)

"""What values made of a reward of clean images share: they decode an estimate of the clean latents and score it.

V(x_t) = lambda log E[exp(r(x0) / lambda) | x_t] is what guidance needs; each estimator replaces p(x0 | x_t).
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass

from torch import Tensor
from torch.utils.checkpoint import checkpoint

from rsm_guidance.core.contracts import Denoiser
from rsm_guidance.core.schedule import Prediction
from rsm_guidance.rewards import RowReward


@dataclass(frozen=True)
class EstimatedValue(ABC):
    """A reward of estimated clean latents; a `Value`.

    Attributes:
        denoiser: the model that is guided.
        reward: of images.
    """

    denoiser: Denoiser
    reward: RowReward

    @property
    def name(self) -> str:
        return self.reward.name

    @property
    def share(self) -> float:
        return 0.0

    @property
    def reads_prediction(self) -> bool:
        return True

    @property
    def evaluations_per_row(self) -> float:
        return self.denoiser.evaluations_per_row

    @property
    def reward_calls_per_row(self) -> int:
        return 1

    def __call__(self, x: Tensor, level: int, rows: Tensor, prediction: Prediction | None = None) -> Tensor:
        if level == self.denoiser.steps:
            return self._score(x, level, rows)
        return self._estimate(x, level, rows, prediction)

    @abstractmethod
    def _estimate(self, x: Tensor, level: int, rows: Tensor, prediction: Prediction | None) -> Tensor:
        """Scores [R] of noisy latents."""

    def _score(self, x0: Tensor, level: int, rows: Tensor) -> Tensor:
        """Scores [R] of clean latents, by what of the reward counts at a level."""
        reward = self.reward.at(level / self.denoiser.steps)
        images = self.denoiser.decode(x0, rows)
        if self.denoiser.checkpointing and images.requires_grad:
            kept: Tensor = checkpoint(reward, images, rows, use_reentrant=False)
            return kept
        return reward(images, rows)

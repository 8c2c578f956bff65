"""`DRMValue`: a diffusion reward model as the value of noisy latents."""

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from rsm_guidance.core.contracts import Denoiser
from rsm_guidance.core.schedule import NoiseSchedule, Prediction


class LatentReward(Protocol):
    """What the value needs of a diffusion reward model."""

    @property
    def name(self) -> str:
        """In messages and reports."""
        ...

    @property
    def latent_share(self) -> float:
        """Denoiser evaluations of scoring one latent."""
        ...

    def score_at_level(
        self, latents: Tensor, level: int, prompts: list[str], schedule: NoiseSchedule, grid: tuple[int, int] | None
    ) -> Tensor:
        """Scores [R] of latents [R, ...] at a level of a schedule."""
        ...


@dataclass(frozen=True)
class DRMValue:
    """The score of latents at their own noise level; a `core.contracts.Value`.

    Attributes:
        drm: the reward model.
        denoiser: the model that is guided; it supplies prompts and levels.
        grid: rows and columns of packed latents; None where latents are planes.
    """

    drm: LatentReward
    denoiser: Denoiser
    grid: tuple[int, int] | None = None
    reads_prediction = False
    reward_calls_per_row = 0

    @property
    def name(self) -> str:
        return self.drm.name

    @property
    def share(self) -> float:
        return self.drm.latent_share

    @property
    def evaluations_per_row(self) -> float:
        return self.drm.latent_share

    def __call__(self, x: Tensor, level: int, rows: Tensor, prediction: Prediction | None = None) -> Tensor:
        """Scores [R] of latents x [R, ...] of rows [R] at a level in 0..N."""
        prompts = [self.denoiser.prompts[r] for r in rows.tolist()]
        return self.drm.score_at_level(x, level, prompts, self.denoiser.schedule, self.grid)

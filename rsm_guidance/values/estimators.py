"""Value estimators V(x_t, t, prompt) for samplers, each fulfilling `core.denoiser.Value`."""

from dataclasses import dataclass

from torch import Tensor

from rsm_guidance.core.denoiser import Denoiser, Reward
from rsm_guidance.core.ledger import Ledger
from rsm_guidance.core.schedule import Prediction
from rsm_guidance.rewards import name_of
from rsm_guidance.values.drm import DiffusionRewardModel


@dataclass(frozen=True)
class DRMValue:
    """A diffusion reward model at the noise level of the latents; costs its share of the denoiser's depth.

    `grid` has the rows and columns of packed latents, where they are packed.
    """

    drm: DiffusionRewardModel
    denoiser: Denoiser
    ledger: Ledger
    grid: tuple[int, int] | None = None
    reward_calls_per_row = 0
    reads_prediction = False

    @property
    def evaluations_per_row(self) -> float:
        return self.drm.depth_share

    @property
    def name(self) -> str:
        return self.drm.name

    def __call__(self, x: Tensor, level: int, rows: Tensor, prediction: Prediction | None = None) -> Tensor:
        self.ledger.charge_value(len(x), self.drm.depth_share)
        prompts = [self.denoiser.prompts[r] for r in rows.tolist()]
        if level == self.denoiser.steps:  # clean, whatever the scheduler
            return self.drm.score(x, 0.0, prompts, grid=self.grid)
        return self.drm.score(x, level, prompts, self.denoiser.schedule, self.grid)


@dataclass(frozen=True)
class TweedieValue:
    """The reward of the decoded posterior mean r(decode(x0_hat(x_t))): a denoiser evaluation and a decode per latent.

    Biased at noisy levels, where the posterior mean is a blur.
    """

    denoiser: Denoiser
    reward: Reward
    ledger: Ledger
    reward_calls_per_row = 1
    reads_prediction = True

    @property
    def evaluations_per_row(self) -> float:
        return self.denoiser.evaluations_per_row

    @property
    def name(self) -> str:
        return name_of(self.reward)

    def __call__(self, x: Tensor, level: int, rows: Tensor, prediction: Prediction | None = None) -> Tensor:
        x0 = x
        if level < self.denoiser.steps:
            x0 = (prediction or self.denoiser.predict(x, level, rows)).x0
        self.ledger.reward_calls += len(x)
        return self.reward(self.denoiser.decode(x0, rows), [self.denoiser.prompts[r] for r in rows.tolist()])

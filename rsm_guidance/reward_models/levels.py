"""The noise levels that a generator's scheduler was trained with."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rsm_guidance.core.contracts import UsageError
from rsm_guidance.core.rows import per_row


@dataclass(frozen=True)
class LevelTable:
    """The levels, noisiest first; x = alpha x0 + sigma eps is what the denoiser sees.

    Attributes:
        alpha, sigma: float64 [N], in [0, 1].
        timesteps: float64 [N], in [0, 1000], what `DiffusionRewardModel.score` is told.
    """

    alpha: Tensor
    sigma: Tensor
    timesteps: Tensor

    def __len__(self) -> int:
        return len(self.sigma)

    def at(self, index: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """alpha, sigma and timesteps [B] of levels [B], float32."""
        return self.alpha[index].float(), self.sigma[index].float(), self.timesteps[index].float()

    def nearest(self, sigma: Tensor) -> Tensor:
        """Indices of the levels nearest to sigma [B]."""
        return (self.sigma - sigma.double()[:, None]).abs().argmin(1)


def level_table(scheduler: Any) -> LevelTable:
    """The table of a diffusers scheduler: its flow levels with their shift, or its cumulative alphas.

    Where the shift depends on the size of the image (FLUX) the levels are not shifted.

    Raises:
        UsageError: for a scheduler that has neither.
    """
    config, cumulative = scheduler.config, getattr(scheduler, "alphas_cumprod", None)
    if config.get("use_flow_sigmas") or config.get("prediction_type") == "flow_prediction":
        return _flow(_shifted(int(config["num_train_timesteps"]), float(config.get("flow_shift") or 1.0)))
    if cumulative is not None:
        signal = torch.as_tensor(cumulative).double().cpu().flip(0)
        steps = torch.arange(len(signal) - 1, -1, -1, dtype=torch.float64)
        return LevelTable(signal.sqrt(), (1 - signal).sqrt(), steps)
    fresh = type(scheduler).from_config(config)  # a pipeline's own may have been set to few steps
    sigma = getattr(fresh, "sigmas", None)
    if sigma is None or not 0 < float(torch.as_tensor(sigma).max()) <= 1:
        raise UsageError(
            f"{type(scheduler).__name__} has no table of training levels; give the pipeline the scheduler that it was "
            "published with"
        )
    sigma = torch.as_tensor(sigma).double().cpu()
    return _flow(sigma[sigma > 0].sort(descending=True).values)


def _shifted(count: int, shift: float) -> Tensor:
    sigma = torch.linspace(1, 1 / count, count, dtype=torch.float64)
    return shift * sigma / (1 + (shift - 1) * sigma)


def _flow(sigma: Tensor) -> LevelTable:
    return LevelTable(1 - sigma, sigma, 1000 * sigma)


def noised(x0: Tensor, indices: Tensor, table: LevelTable, noise: Tensor) -> Tensor:
    """alpha x0 + sigma eps for clean latents x0 [B, ...] at levels [B], in float32 and x0's dtype after."""
    alpha, sigma = (per_row(v[indices].float(), x0) for v in (table.alpha, table.sigma))
    return (alpha * x0.float() + sigma * noise.to(x0.device).float()).to(x0.dtype)

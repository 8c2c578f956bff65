"""The noise levels on which a model was trained, in the scale of the denoiser's input."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class NoiseTable:
    """The levels on which a model was trained, in the scale of the denoiser's input: x = alpha x0 + sigma eps.

    Attributes:
        alpha, sigma, timesteps: float64 [N], sigma rising.
    """

    alpha: Tensor
    sigma: Tensor
    timesteps: Tensor

    @staticmethod
    def of(scheduler: Any) -> "NoiseTable":
        """The table of a diffusers scheduler."""
        fresh = type(scheduler).from_config(scheduler.config)
        kept = getattr(fresh, "alphas_cumprod", None)
        flow = scheduler.config.get("prediction_type") == "flow_prediction" or scheduler.config.get("use_flow_sigmas")
        if isinstance(kept, Tensor) and not flow:
            kept = kept.double().cpu()
            return NoiseTable(kept.sqrt(), (1 - kept).sqrt(), torch.arange(len(kept), dtype=torch.float64))
        count = int(scheduler.config.get("num_train_timesteps") or 1000)
        sigma = getattr(fresh, "sigmas", None)
        if not isinstance(sigma, Tensor) or len(sigma) != count or float(sigma.max()) > 1:
            sigma = torch.arange(1, count + 1) / count
        sigma = sigma.double().cpu().sort().values
        return NoiseTable(1 - sigma, sigma, 1000 * sigma)

    def at(self, index: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """alpha, sigma and timesteps [B] of entries [B], float32."""
        return self.alpha[index].float(), self.sigma[index].float(), self.timesteps[index].float()

    def nearest(self, sigma: float) -> int:
        """The entry whose sigma is nearest; 0 is the cleanest one."""
        return int((self.sigma - sigma).abs().argmin())

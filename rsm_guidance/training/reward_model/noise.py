"""Noise levels of pairs, and noise that is named by what it is for.

A level is an entry of the scheduler's own training table: of flow models sigma with its shift, of others (alpha, sigma) of the
cumulative products.  The noise of an image belongs to (seed, epoch, pair), so that it depends neither on the batch nor on the
number of processes.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rsm_guidance.core.random import RandomStreams
from rsm_guidance.core.rows import per_row
from rsm_guidance.training.reward_model.config import NoiseConfig


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


def drawn_levels(config: NoiseConfig, table: NoiseTable, seed: int, epoch: int, pairs: list[int]) -> Tensor:
    """Entries [B] of the table for pairs [B] in an epoch, each from a stream of its own."""
    streams = RandomStreams(seed, tuple(("pair", pair) for pair in pairs))
    if config.law == "uniform":
        u = torch.cat([streams.uniforms(row, 1, "level", epoch) for row in range(len(pairs))])
    else:
        z = streams.normals(range(len(pairs)), (), [("level", epoch)] * len(pairs)).double()
        u = (config.mean + config.deviation * z).sigmoid()
    return (u * len(table.sigma)).long().clamp(0, len(table.sigma) - 1)


def noised(first: Tensor, second: Tensor, alpha: Tensor, sigma: Tensor, noise: Tensor) -> Tensor:
    """Both latents of pairs [B, ...] at levels [B], with noise [B, 2, ...], as [B, 2, ...]."""
    x0 = torch.stack([first, second], 1)
    return per_row(alpha, x0) * x0 + per_row(sigma, x0) * noise


def pair_noise(
    seed: int, name: str, epoch: int, pairs: list[int], shape: tuple[int, ...], same: bool = False
) -> Tensor:
    """Standard normal noise [B, 2, ...] for the latents, each of `shape`, of pairs [B]."""
    streams = RandomStreams(seed, tuple((name, pair) for pair in pairs))
    sides = [0] if same else [0, 1]
    rows = range(len(pairs))
    drawn = [streams.normals(rows, shape, [("noise", epoch, side)] * len(pairs)) for side in sides]
    return torch.stack(drawn * (2 // len(sides)), 1)

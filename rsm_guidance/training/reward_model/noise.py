"""Noise levels of pairs, and noise that is named by what it is for.

A level is an entry of the scheduler's own training table: of flow models sigma with its shift, of others (alpha, sigma) of the
cumulative products.  The noise of an image belongs to (seed, epoch, pair), so that it depends neither on the batch nor on the
number of processes.
"""

import torch
from torch import Tensor

from rsm_guidance.core.random import RandomStreams
from rsm_guidance.core.rows import per_row
from rsm_guidance.reward_models.noise_table import NoiseTable
from rsm_guidance.training.reward_model.config import NoiseConfig


def drawn_levels(config: NoiseConfig, table: NoiseTable, seed: int, epoch: int, pairs: list[int]) -> Tensor:
    """Entries [B] of the table for pairs [B] in an epoch, each from a stream of its own."""
    streams = RandomStreams(seed, tuple(("pair", pair) for pair in pairs))
    if config.law == "uniform":
        u = torch.cat([streams.uniforms(row, 1, "level", epoch) for row in range(len(pairs))])
    elif config.law == "beta":
        drawn = [streams.beta(row, config.a, config.b, "level", epoch) for row in range(len(pairs))]
        u = torch.tensor(drawn, dtype=torch.float64)
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

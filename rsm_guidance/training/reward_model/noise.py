"""Noise levels of pairs, and noise, that are named by what they are for.

Both belong to (seed, epoch, pair), so that they depend neither on the batch nor on the number of processes.
"""

import torch
from torch import Tensor

from rsm_guidance.core.random import RandomStreams
from rsm_guidance.reward_models.levels import LevelTable
from rsm_guidance.training.reward_model.config import NoiseConfig
from rsm_guidance.training.reward_model.levels import LEVEL_LAWS


def drawn_levels(config: NoiseConfig, table: LevelTable, seed: int, epoch: int, pairs: list[int]) -> Tensor:
    """Entries [B] of the table for pairs [B] in an epoch, each from a stream of its own."""
    streams = RandomStreams(seed, tuple(("pair", pair) for pair in pairs))
    u = torch.cat([streams.uniforms(row, 1, "level", epoch) for row in range(len(pairs))])
    return LEVEL_LAWS[config.law](u.double(), table, **config.constants)


def pair_noise(
    seed: int, name: str, epoch: int, pairs: list[int], shape: tuple[int, ...], same: bool = False
) -> Tensor:
    """Standard normal noise [B, 2, ...] for the latents, each of `shape`, of pairs [B]."""
    streams = RandomStreams(seed, tuple((name, pair) for pair in pairs))
    sides = [0] if same else [0, 1]
    rows = range(len(pairs))
    drawn = [streams.normals(rows, shape, [("noise", epoch, side)] * len(pairs)) for side in sides]
    return torch.stack(drawn * (2 // len(sides)), 1)

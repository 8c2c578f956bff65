"""Noise ensembling: clean latents are judged at one or more noise levels (DiNa-LRM, arXiv 2602.11146)."""

from dataclasses import dataclass

import torch
from torch import Tensor

from rsm_guidance.core.contracts import UsageError
from rsm_guidance.reward_models.levels import LevelTable, noised


@dataclass(frozen=True)
class NoiseEnsemble:
    """Where and how often clean latents are noised.

    Attributes:
        levels: noise levels sigma in [0, 1], each taken to the nearest of the generator's scheduler; none for clean latents.
        draws: noises per level.
        seed: of the noises.
    """

    levels: tuple[float, ...] = ()
    draws: int = 1
    seed: int = 0

    def __post_init__(self) -> None:
        object.__setattr__(self, "levels", tuple(self.levels))
        if self.draws < 1 or not all(0 <= level <= 1 for level in self.levels):
            raise UsageError(
                f"noise levels lie in [0, 1], with a noise each or more; got {list(self.levels)} and {self.draws}"
            )

    def noises(self, shape: torch.Size, table: LevelTable) -> list[tuple[Tensor, Tensor]]:
        """Index of a level and noise of a `shape`, for every noise; all latents of a batch are to get the same ones."""
        generator = torch.Generator().manual_seed(self.seed)
        indices = table.nearest(torch.tensor(self.levels)).repeat_interleave(self.draws)
        return [(index, torch.randn(shape, generator=generator)) for index in indices]


def shown(x0: Tensor, noises: list[tuple[Tensor, Tensor]], table: LevelTable) -> list[tuple[Tensor, float]]:
    """Latents x0 [B, ...] with each of the noises, and their timesteps."""
    return [
        (noised(x0, index.expand(len(x0)), table, noise.expand_as(x0)), float(table.timesteps[index]))
        for index, noise in noises
    ]

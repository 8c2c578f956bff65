"""Trunk and head of a diffusion reward model: the module that is trained."""

from typing import Any

import torch
from torch import Tensor, nn

from rsm_guidance.reward_models.blocks import Grid
from rsm_guidance.reward_models.heads import Features, Head
from rsm_guidance.reward_models.trunk import Trunk


class LatentScorer(nn.Module):
    """Trunk and head of a DRM: the module that is trained, and that DDP wraps.

    Parameters that the last tap does not depend on get no gradient (the text stream of a last joint block, say), so DDP needs
    `find_unused_parameters=True` where the trunk is trained whole.
    """

    def __init__(self, trunk: Trunk, head: Head) -> None:
        super().__init__()
        self.trunk, self.head = trunk, head

    def read(self, arguments: dict[str, Any], grid: Grid) -> Features:
        """What the head reads, in its precision."""
        features: Features = self.trunk(arguments, grid)
        return features.to(next(self.head.parameters()).dtype)

    def forward(self, arguments: dict[str, Any], grid: Grid) -> Tensor:
        """Raw numbers, [B] of a scalar output and [B, channels] of others, from what `DiffusionRewardModel.inputs` returns.

        Under autocast the head computes in its own precision: it costs little, and bfloat16 would make ties of close scores.
        """
        read = self.read(arguments, grid)
        with torch.autocast(read.tokens.device.type, enabled=False):
            return _squeezed(self.head(*read))

    def together(self, shown: list[tuple[dict[str, Any], Grid]]) -> list[Tensor]:
        """Raw numbers of the same samples at several noise levels: one answer for each, or a single one for all."""
        read = [self.read(*inputs) for inputs in shown]
        with torch.autocast(read[0].tokens.device.type, enabled=False):
            return [_squeezed(raw) for raw in self.head.together(read)]


def _squeezed(raw: Tensor) -> Tensor:
    return raw.squeeze(-1) if raw.shape[-1] == 1 else raw

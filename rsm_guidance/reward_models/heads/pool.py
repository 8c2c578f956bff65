"""Tokens of each tap, averaged and joined, through a small network (as DiT-Reward does, arXiv 2606.23626).

There: SD3.5-Large, after blocks 15, 23, 28 and 37 of 38.  The LayerNorm, the one hidden layer and its width are ours.
"""

from torch import Tensor, nn

from rsm_guidance.reward_models.config import DRMConfig
from rsm_guidance.reward_models.heads.base import Head, Widths


class PoolHead(Head):
    """Visual tokens [B, N, dim] to [B, channels]."""

    def __init__(self, widths: Widths, config: DRMConfig) -> None:
        super().__init__(widths, config)
        self.mlp = nn.Sequential(
            nn.LayerNorm(widths.dim),
            nn.Linear(widths.dim, config.head_width),
            nn.SiLU(),
            nn.Linear(config.head_width, config.channels),
        )

    @staticmethod
    def default_width(widths: Widths) -> int:
        return 512

    def forward(
        self, tokens: Tensor, grid: tuple[int, int], text: tuple[Tensor, ...] = (), embedding: Tensor | None = None
    ) -> Tensor:
        """Numbers [B, channels]; where a token stands does not matter."""
        raw: Tensor = self.mlp(tokens.mean(1))
        return raw

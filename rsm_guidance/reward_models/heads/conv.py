"""The head that the text of arXiv 2605.25661, section 3, describes.

f_p = MLP1(f_v) per token;  s = MLP2(Pool(Conv(Reshape2D(f_p)))).  The text gives no widths, kernel, pooling or
activation; these (3x3, SiLU, mean and maximum) and the LayerNorm before MLP1 are ours.  What its authors released is
`heads.drm`.
"""

import torch
from torch import Tensor, nn

from rsm_guidance.reward_models.config import DRMConfig
from rsm_guidance.reward_models.heads.base import Head, Widths


class ConvHead(Head):
    """Visual tokens [B, H * W, dim] to [B, channels]."""

    def __init__(self, widths: Widths, config: DRMConfig) -> None:
        super().__init__(widths, config)
        width = config.head_width
        self.token_mlp = nn.Sequential(
            nn.LayerNorm(widths.dim), nn.Linear(widths.dim, width), nn.SiLU(), nn.Linear(width, width)
        )
        self.conv = nn.Sequential(
            nn.Conv2d(width, width, 3, padding=1), nn.SiLU(), nn.Conv2d(width, width, 3, padding=1)
        )
        self.score_mlp = nn.Sequential(nn.Linear(2 * width, width), nn.SiLU(), nn.Linear(width, config.channels))

    @staticmethod
    def default_width(widths: Widths) -> int:
        return 64

    def forward(
        self, tokens: Tensor, grid: tuple[int, int], text: tuple[Tensor, ...] = (), embedding: Tensor | None = None
    ) -> Tensor:
        """Numbers [B, channels] of tokens laid out on a grid (rows, columns)."""
        per_token = self.token_mlp(tokens)
        plane = per_token.transpose(1, 2).unflatten(2, grid)
        plane = plane + self.conv(plane)
        pooled = torch.cat([plane.mean((2, 3)), plane.amax((2, 3))], -1)
        raw: Tensor = self.score_mlp(pooled)
        return raw

"""The head of the DRM's own code (arXiv 2605.25661): convolutions over what the cut denoiser puts out.

The hidden states of the last block kept go through the denoiser's own `norm_out` and `proj_out`, and are read as a plane
of the latents' size.  Three 3x3 convolutions of stride 2, each with GroupNorm and ReLU, lead to `head_width`, twice it and
twice it channels (256, 512, 512 there), then mean, Linear, ReLU, dropout (.1 there), Linear.
"""

import math

from torch import Tensor, nn

from rsm_guidance.reward_models.config import DRMConfig
from rsm_guidance.reward_models.heads.base import Head, Widths

_GROUPS = 32


class DRMHead(Head):
    """The denoiser's output as tokens [B, H * W, C] to [B, channels]."""

    reads_output = True

    def __init__(self, widths: Widths, config: DRMConfig) -> None:
        super().__init__(widths, config)
        sizes = [widths.dim, config.head_width, 2 * config.head_width, 2 * config.head_width]
        layers: list[nn.Module] = []
        for before, after in zip(sizes, sizes[1:], strict=False):
            layers += [
                nn.Conv2d(before, after, 3, stride=2, padding=1),
                nn.GroupNorm(math.gcd(_GROUPS, after), after),
                nn.ReLU(),
            ]
        self.conv = nn.Sequential(*layers)
        wide = sizes[-1]
        self.score_mlp = nn.Sequential(
            nn.Linear(wide, wide), nn.ReLU(), nn.Dropout(config.dropout), nn.Linear(wide, config.channels)
        )

    @staticmethod
    def default_width(widths: Widths) -> int:
        return 256

    def forward(
        self, tokens: Tensor, grid: tuple[int, int], text: tuple[Tensor, ...] = (), embedding: Tensor | None = None
    ) -> Tensor:
        """Numbers [B, channels] of outputs laid out on a grid (rows, columns)."""
        plane = tokens.transpose(1, 2).unflatten(2, grid)
        raw: Tensor = self.score_mlp(self.conv(plane).mean((2, 3)))
        return raw

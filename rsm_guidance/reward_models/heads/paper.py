"""The reward head of the DRM paper, as its released code has it (arXiv 2605.25661).

It reads what the cut backbone would predict: the last kept block's tokens through the model's own output layers, laid out as
latents.  Three strided convolutions with group normalisation and ReLU lead to an average over the plane and two linear layers; at
`width` 512 their channels are 256, 512, 512, as in the code.
"""

import math

from torch import Tensor, nn

_GROUPS = 32
_LEAST = 8  # channels of a group, where a narrow head has fewer
_DROPOUT = 0.1


class PaperHead(nn.Module):
    """Predicted latents [B, rows * columns, dim] to outputs [B, N].

    Args:
        dim: channels of the latents.
        width: channels of the convolutions, at least 2.
        outputs: N.
    """

    reads_prediction = True

    def __init__(self, dim: int, width: int, outputs: int = 1) -> None:
        super().__init__()
        channels = (dim, max(width // 2, 1), width, width)
        layers: list[nn.Module] = []
        for before, after in zip(channels, channels[1:], strict=False):
            norm = nn.GroupNorm(math.gcd(_GROUPS, max(after // _LEAST, 1)), after)
            layers += [nn.Conv2d(before, after, 3, stride=2, padding=1), norm, nn.ReLU()]
        self.convs = nn.Sequential(*layers)
        self.score_mlp = nn.Sequential(
            nn.Linear(width, width), nn.ReLU(), nn.Dropout(_DROPOUT), nn.Linear(width, outputs)
        )

    def forward(self, tokens: Tensor, grid: tuple[int, int]) -> Tensor:
        """Outputs [B, N] of latents laid out on a grid (rows, columns)."""
        scores: Tensor = self.score_mlp(self.convs(tokens.transpose(1, 2).unflatten(2, grid)).mean((2, 3)))
        return scores

"""The reward head of the diffusion reward model (arXiv 2605.25661, section 3).

f_p = MLP1(f_v) per token;  s = MLP2(Pool(Conv(Reshape2D(f_p)))).  The paper gives no widths, kernel, pooling or
activation; these (3x3, SiLU, mean and maximum) and the LayerNorm before MLP1 are ours.
"""

import torch
from torch import Tensor, nn


class ConvHead(nn.Module):
    """Visual tokens [B, rows * columns, dim] to outputs [B, N].

    Args:
        dim: width of the backbone's tokens, of all taps together.
        width: width of the head.
        outputs: N.
    """

    reads_prediction = False

    def __init__(self, dim: int, width: int, outputs: int = 1) -> None:
        super().__init__()
        self.token_mlp = nn.Sequential(nn.LayerNorm(dim), nn.Linear(dim, width), nn.SiLU(), nn.Linear(width, width))
        self.conv = nn.Sequential(
            nn.Conv2d(width, width, 3, padding=1), nn.SiLU(), nn.Conv2d(width, width, 3, padding=1)
        )
        self.score_mlp = nn.Sequential(nn.Linear(2 * width, width), nn.SiLU(), nn.Linear(width, outputs))

    def forward(self, tokens: Tensor, grid: tuple[int, int]) -> Tensor:
        """Outputs [B, N] of tokens laid out on a grid (rows, columns)."""
        per_token = self.token_mlp(tokens)
        plane = per_token.transpose(1, 2).unflatten(2, grid)
        plane = plane + self.conv(plane)
        pooled = torch.cat([plane.mean((2, 3)), plane.amax((2, 3))], -1)
        scores: Tensor = self.score_mlp(pooled)
        return scores

"""A reward head that averages tokens: what a linear probe sees, and DiT-Reward's over several depths (arXiv 2606.23626)."""

from torch import Tensor, nn


class PoolHead(nn.Module):
    """Visual tokens [B, rows * columns, dim] to outputs [B, N]: the mean over tokens through an MLP of one hidden layer.

    Args:
        dim: width of the tokens, of all taps together.
        width: of the hidden layer.
        outputs: N.
    """

    reads_prediction = False

    def __init__(self, dim: int, width: int, outputs: int = 1) -> None:
        super().__init__()
        self.score_mlp = nn.Sequential(nn.LayerNorm(dim), nn.Linear(dim, width), nn.SiLU(), nn.Linear(width, outputs))

    def forward(self, tokens: Tensor, grid: tuple[int, int]) -> Tensor:
        """Outputs [B, N]; the grid (rows, columns) does not matter."""
        scores: Tensor = self.score_mlp(tokens.mean(1))
        return scores

"""A reward head of learned queries that attend to visual tokens, in the manner of DiNa-LRM (arXiv 2602.11146).

Two attentions and a feed-forward layer with residuals, RMS norms before them, and the mean of the queries' outputs.  Of the original
it leaves out the taps of the text stream, the modulation by the timestep (tokens of a denoiser know both) and the gates; tokens
of all taps stand side by side.  The norms' eps is fixed, so that half precision changes scores by rounding alone.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

_QUERIES = 4
_EPS = 1e-6


class _Attention(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm = nn.RMSNorm(width, eps=_EPS)
        self.to_q, self.to_out = nn.Linear(width, width), nn.Linear(width, width)
        self.to_kv = nn.Linear(width, 2 * width)

    def forward(self, queries: Tensor, tokens: Tensor) -> Tensor:
        q = self.to_q(self.norm(queries))
        k, v = self.to_kv(tokens).chunk(2, -1)
        parts = [x.unflatten(-1, (self.heads, -1)).transpose(1, 2) for x in (q, k, v)]
        attended: Tensor = self.to_out(F.scaled_dot_product_attention(*parts).transpose(1, 2).flatten(2))
        return queries + attended


class QueryHead(nn.Module):
    """Visual tokens [B, rows * columns, dim] to outputs [B, N].

    Args:
        dim: width of the tokens, of all taps together.
        width: of the head; a multiple of 8 has 8 attention heads, others have one.
        outputs: N.
    """

    reads_prediction = False

    def __init__(self, dim: int, width: int, outputs: int = 1) -> None:
        super().__init__()
        heads = 8 if width % 8 == 0 else 1
        self.tokens = nn.Sequential(nn.RMSNorm(dim, eps=_EPS), nn.Linear(dim, width), nn.RMSNorm(width, eps=_EPS))
        self.queries = nn.Parameter(0.02 * torch.randn(_QUERIES, width))
        self.attentions = nn.ModuleList([_Attention(width, heads) for _ in range(2)])
        self.mlp = nn.Sequential(
            nn.RMSNorm(width, eps=_EPS), nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        )
        self.out = nn.Linear(width, outputs)

    def forward(self, tokens: Tensor, grid: tuple[int, int]) -> Tensor:
        """Outputs [B, N]; of the grid (rows, columns) it knows what tokens say of their places."""
        seen, queries = self.tokens(tokens), self.queries.expand(len(tokens), -1, -1)
        for attention in self.attentions:
            queries = attention(queries, seen)
        scores: Tensor = self.out(queries + self.mlp(queries)).mean(1)
        return scores

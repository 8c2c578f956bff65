"""The head of DiNa-LRM (arXiv 2602.11146): learned queries attend to the tokens of several blocks.

Per tap: FiLM by the denoiser's embedding of its level, x (1 + gamma) + beta, plus a learned vector, then a quarter of the
width; the taps are joined and brought back to the width.  The queries attend to image and to text tokens, whose values are
gated token by token, and the two results are added; then once more to the image; then a feed-forward layer.  The score is
the mean over queries.  Parameters have the names of the released weights.

Keys, values and gates all read the normalised tokens.  The RMSNorms there take their epsilon from the dtype (2^-7 in the
bfloat16 of training); here it is written down (`norm_eps`), so that precision changes scores by rounding alone.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rsm_guidance.core.contracts import UsageError
from rsm_guidance.reward_models.config import DRMConfig
from rsm_guidance.reward_models.heads.base import Features, Head, Widths


class LayerAdapter(nn.Module):
    """Tokens [B, N, dim] of one tap, modulated by an embedding [B, E], to [B, N, width / 4]."""

    def __init__(self, dim: int, embedding: int, width: int) -> None:
        super().__init__()
        self.proj_in = nn.Identity() if dim == width else nn.Linear(dim, width)
        self.layer_embed = nn.Parameter(0.02 * torch.randn(1, 1, width))
        self.cond_mlp = nn.Sequential(
            nn.Linear(embedding, 2 * width), nn.SiLU(), _zero(nn.Linear(2 * width, 2 * width))
        )
        self.proj = nn.Linear(width, width // 4)

    def forward(self, tokens: Tensor, embedding: Tensor) -> Tensor:
        gamma, beta = self.cond_mlp(embedding)[:, None].chunk(2, -1)
        projected: Tensor = self.proj(self.proj_in(tokens) * (1 + gamma) + beta + self.layer_embed)
        return projected


class CrossAttention(nn.Module):
    """Queries [B, Q, width] that attend to image tokens and, apart from them, to text tokens; residual."""

    def __init__(self, config: DRMConfig, text: bool, gated: bool) -> None:
        super().__init__()
        width, eps = config.head_width, config.norm_eps
        self.heads = config.attention_heads
        self.norm_q, self.norm_v = nn.RMSNorm(width, eps), nn.RMSNorm(width, eps)
        self.to_q, self.to_k_vis, self.to_v_vis = (nn.Linear(width, width) for _ in range(3))
        self.gate_vis = _gate(width) if gated else None
        self.norm_t = nn.RMSNorm(width, eps) if text else None
        self.to_k_text = nn.Linear(width, width) if text else None
        self.to_v_text = nn.Linear(width, width) if text else None
        self.gate_text = _gate(width) if text and gated else None
        self.to_out = nn.Sequential(nn.Linear(width, width), nn.Dropout(config.dropout))

    def forward(self, queries: Tensor, image: Tensor, text: Tensor | None = None) -> Tensor:
        q, image = self.to_q(self.norm_q(queries)), self.norm_v(image)
        seen = self._attend(q, self.to_k_vis(image), self.to_v_vis(image), image, self.gate_vis)
        if text is not None and self.norm_t is not None and self.to_k_text is not None and self.to_v_text is not None:
            text = self.norm_t(text)
            seen = seen + self._attend(q, self.to_k_text(text), self.to_v_text(text), text, self.gate_text)
        return queries + self.to_out(seen)

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, tokens: Tensor, gate: nn.Module | None) -> Tensor:
        if gate is not None:
            v = v * gate(tokens).sigmoid()
        split = [x.unflatten(-1, (self.heads, -1)).transpose(1, 2) for x in (q, k, v)]
        return F.scaled_dot_product_attention(*split).transpose(1, 2).flatten(2)


class QueryHead(Head):
    """Tokens of image and text, and the level's embedding, to [B, channels]."""

    reads_embedding = True

    def __init__(self, widths: Widths, config: DRMConfig) -> None:
        super().__init__(widths, config)
        width, heads = config.head_width, config.attention_heads
        if width % heads or width % 4:
            raise UsageError(f"a head 'query' of width {width} splits neither into {heads} attention heads nor in four")
        self.image_widths = widths.image

        def adapters(dims: tuple[int, ...]) -> nn.ModuleList:
            return nn.ModuleList(LayerAdapter(dim, widths.embedding, width) for dim in dims)

        self.layer_adapters_visual, self.layer_adapters_text = adapters(widths.image), adapters(widths.text)
        self.agg_visual = nn.Linear(len(widths.image) * (width // 4), width)
        self.agg_text = nn.Linear(len(widths.text) * (width // 4), width) if widths.text else None
        self.query_tokens = nn.Parameter(0.02 * torch.randn(1, config.queries, width))
        self.attn1 = CrossAttention(config, text=bool(widths.text), gated=True)
        self.attn2 = CrossAttention(config, text=False, gated=False)
        self.norm_ff = nn.RMSNorm(width, config.norm_eps)
        self.ff = nn.Sequential(
            nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width), nn.Dropout(config.dropout)
        )
        self.head = nn.Linear(width, config.channels)

    @staticmethod
    def default_width(widths: Widths) -> int:
        return max(widths.image)

    def forward(
        self, tokens: Tensor, grid: tuple[int, int], text: tuple[Tensor, ...] = (), embedding: Tensor | None = None
    ) -> Tensor:
        """Numbers [B, channels]."""
        return self.answer([self.gather(tokens, text, embedding)])

    def together(self, levels: list[Features]) -> list[Tensor]:
        """One answer [B, channels] to the tokens of all levels, side by side."""
        return [self.answer([self.gather(f.tokens, f.text, f.embedding) for f in levels])]

    def gather(
        self, tokens: Tensor, text: tuple[Tensor, ...], embedding: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """Tokens [B, N, width] of the image, and [B, T, width] of the text where it is read, at one noise level."""
        if embedding is None:
            raise UsageError("the head 'query' needs the embedding of the noise level")
        per_tap = tokens.split(list(self.image_widths), -1)
        image = [adapter(x, embedding) for adapter, x in zip(self.layer_adapters_visual, per_tap, strict=True)]
        seen: Tensor = self.agg_visual(torch.cat(image, -1))
        if self.agg_text is None:
            return seen, None
        words = [adapter(x, embedding) for adapter, x in zip(self.layer_adapters_text, text, strict=True)]
        return seen, self.agg_text(torch.cat(words, -1))

    def answer(self, gathered: list[tuple[Tensor, Tensor | None]]) -> Tensor:
        """Numbers [B, channels] from the tokens of one or more noise levels, side by side."""
        image = torch.cat([seen for seen, _ in gathered], 1)
        words = [read for _, read in gathered if read is not None]
        queries = self.query_tokens.expand(len(image), -1, -1)
        queries = self.attn1(queries, image, torch.cat(words, 1) if words else None)
        queries = self.attn2(queries, image)
        queries = queries + self.ff(self.norm_ff(queries))
        raw: Tensor = self.head(queries).mean(1)
        return raw


def _zero(layer: nn.Linear) -> nn.Linear:
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer


def _gate(width: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(width, width), nn.SiLU(), _zero(nn.Linear(width, 1)))

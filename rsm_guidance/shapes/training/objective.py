"""What the shapes world's reward model is trained for.

Loss: Bradley-Terry, -log sigmoid(s_win - s_lose), both images of a pair noised to the same random level (arXiv 2605.25661,
section 3).  Beside these re-noised pairs there are sibling pairs, rendered hard negatives, and a prediction per token of
what the finished image holds (`training.objects`); those are ours, as is the choice of independent noise for the two
images of a pair.
"""

import torch
from torch import Tensor, nn

from rsm_guidance.core.rows import per_row
from rsm_guidance.reward_models import DiffusionRewardModel
from rsm_guidance.shapes.training.groups import BranchGroups
from rsm_guidance.shapes.training.hard_negatives import Renders
from rsm_guidance.shapes.training.objects import ObjectHead
from rsm_guidance.training.reward_model.losses import bradley_terry_loss

_RENDERED_WEIGHT = 0.5


def renoise(x0: Tensor, sigma: Tensor, generator: torch.Generator) -> Tensor:
    """(1 - sigma) x0 + sigma eps for groups x0 [G, K, ...] at one level per group, sigma [G]; fresh noise for each."""
    s = per_row(sigma, x0)
    return (1 - s) * x0 + s * torch.randn(x0.shape, generator=generator)


class Preferences(nn.Module):
    """The objective: numbers [B] of branch groups to losses, in one forward pass of the reward model.

    Attributes:
        drm: what is trained.
        objects: predicts what a token shows, or None.
    """

    def __init__(
        self,
        drm: DiffusionRewardModel,
        groups: BranchGroups,
        renders: Renders,
        sibling_weight: float,
        object_weight: float,
    ) -> None:
        super().__init__()
        self.drm = drm
        self.objects = ObjectHead(drm.trunk.dim).to(drm.pipe.device) if object_weight else None
        self.groups, self.renders = groups, renders
        self.sibling_weight, self.object_weight = sibling_weight, object_weight

    def forward(self, rows: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
        """Losses: "renoised", "siblings", "rendered", and "objects" where they are predicted."""
        k = self.groups.finals.shape[1]
        latents, sigma = self._noised(rows, generator)
        scores, tokens = self._scored(latents, sigma, [self.groups.prompts[row] for row in rows.tolist()])
        targets = self.groups.scores[rows].to(scores.device)
        first_is_best = torch.zeros_like(scores[:, 2 * k :])
        first_is_best[:, 0] = 1
        losses = {
            "renoised": bradley_terry_loss(scores[:, :k], targets),
            "siblings": bradley_terry_loss(scores[:, k : 2 * k], targets),
            "rendered": bradley_terry_loss(scores[:, 2 * k :], first_is_best),
        }
        loss = losses["renoised"] + self.sibling_weight * losses["siblings"] + _RENDERED_WEIGHT * losses["rendered"]
        if self.objects is not None:
            seen = self.groups.labels[rows].repeat(1, 2, 1, 1)  # siblings are to foresee it
            labels = torch.cat([seen, self.renders.labels[rows]], 1).to(scores.device)
            losses["objects"] = self.objects.loss(tokens, labels)
            loss = loss + self.object_weight * losses["objects"]
        return {"loss": loss, **losses}

    def _noised(self, rows: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Latents [B, N, ...] of finals, children and renders, and their noise levels [B, N]."""
        groups, b = self.groups, len(rows)
        level = torch.rand(b, generator=generator) ** 0.75 * 0.98 + 0.01  # noisier than even, as sampling schedules are
        render_level = torch.rand(b, generator=generator) * 0.85
        parts = [
            (renoise(groups.finals[rows].float(), level, generator), level),
            (groups.children[rows].float(), groups.sigma[rows]),
            (renoise(self.renders.latents[rows].float(), render_level, generator), render_level),
        ]
        return torch.cat([x for x, _ in parts], 1), torch.cat([s[:, None].expand(x.shape[:2]) for x, s in parts], 1)

    def _scored(self, latents: Tensor, sigma: Tensor, prompts: list[str]) -> tuple[Tensor, Tensor]:
        """Scores [B, N] and tokens [B, N, tokens, dim] of latents [B, N, ...] at levels [B, N] of a flow model."""
        b, n = sigma.shape
        device = next(self.drm.head.parameters()).device
        x, timestep = latents.flatten(0, 1).to(device), 1000 * sigma.flatten().to(device)
        tokens, grid = self.drm.features(x, timestep, [p for p in prompts for _ in range(n)], self.drm.grid(x))
        scores: Tensor = self.drm.head(tokens, grid)
        return scores.view(b, n), tokens.unflatten(0, (b, n))

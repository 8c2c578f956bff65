"""What the shapes world's reward model is trained for.

Bradley-Terry, -log sigmoid(s_win - s_lose), on both images of a pair noised to the same random level (arXiv 2605.25661,
section 3), on siblings on their way, and on rendered hard negatives.  It orders candidates of one prompt and says nothing
across prompts.  So an ordinal model also learns the *value*: a distribution over the score that a latent ends in, by its
cross-entropy, for finished samples and for every latent of the recorded paths.  Beside both there is a prediction per token of
what the finished image holds (`training.objects`).  All but the first are ours, as is the choice of independent noise for the
two images of a pair.
"""

import torch
from torch import Tensor, nn

from rsm_guidance.core.rows import per_row
from rsm_guidance.reward_models import DiffusionRewardModel, RewardOutput
from rsm_guidance.shapes.training.groups import BranchGroups
from rsm_guidance.shapes.training.hard_negatives import Renders
from rsm_guidance.shapes.training.objects import ObjectHead
from rsm_guidance.training.reward_model.losses import bradley_terry_loss, rating_distribution

RATINGS = (0.0, 0.25, 0.5, 0.75, 1.0, 1.25)
"""Classes of an ordinal model: the verifier's score, and 0.25 more where all is right."""

_RENDERED_WEIGHT = 0.5
_RENDERED = 2  # per group: the correct one and a hard negative
_RATING_SCALE = 10.0  # a difference of 0.25 in the score of an ordinal model is odds of 12 to 1


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
        value_weight: float,
        completions: int | None = None,
    ) -> None:
        super().__init__()
        self.drm = drm
        self.objects = ObjectHead(drm.trunk.widths.image[-1]).to(drm.pipe.device) if object_weight else None
        self.groups, self.renders = groups, renders
        self.sibling_weight, self.object_weight, self.value_weight = sibling_weight, object_weight, value_weight
        self.completions = completions

    def forward(self, rows: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
        """Losses: "renoised", "siblings", "rendered", and "values" and "objects" where they are learnt."""
        k = self.groups.finals.shape[1]
        latents, sigma, targets, labels = self._examples(rows, generator)
        said, tokens = self._judged(latents, sigma, [self.groups.prompts[row] for row in rows.tolist()])
        targets = targets.to(said.mean.device)
        scores = said.mean.view(sigma.shape) * (1.0 if said.log_probs is None else _RATING_SCALE)
        losses = {
            "renoised": bradley_terry_loss(scores[:, :k], targets[:, :k]),
            "siblings": bradley_terry_loss(scores[:, k : 2 * k], targets[:, k : 2 * k]),
            "rendered": bradley_terry_loss(scores[:, -_RENDERED:], targets[:, -_RENDERED:]),
        }
        loss = losses["renoised"] + self.sibling_weight * losses["siblings"] + _RENDERED_WEIGHT * losses["rendered"]
        if self.value_weight:
            assert said.log_probs is not None and said.ratings is not None
            wanted = rating_distribution(targets.flatten(), said.ratings)
            losses["values"] = -(wanted * said.log_probs).sum(-1).mean()
            loss = loss + self.value_weight * losses["values"]
        if self.objects is not None:
            losses["objects"] = self.objects.loss(tokens, labels.to(tokens.device))
            loss = loss + self.object_weight * losses["objects"]
        return {"loss": loss, **losses}

    def _examples(self, rows: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Latents [B, N, ...] of finals, siblings, one before the branching, and renders.

        Beside them noise levels [B, N], what they became [B, N], and what their images hold [B, N, 64, 4].
        """
        groups, b = self.groups, len(rows)
        k, steps = groups.paths.shape[1:3]
        u = torch.rand(6, b, generator=generator)
        final_level = u[0] ** 1.5 * 0.98 + 0.01  # cleaner than even: paths are noisy enough
        render_level = u[1] * 0.85
        branched = groups.branched[rows]
        later = branched + (u[2] * (steps - branched)).long()
        # half of the siblings as they are chosen among, half further on
        step = torch.where(u[3] < 0.5, branched, later)
        earlier = (u[4] * branched.clamp(min=1)).long()  # of those that branch at level 0 one of K initial noises
        wrong = 1 + (u[5] * (self.renders.latents.shape[1] - 1)).long()
        renders = torch.stack([torch.zeros_like(wrong), wrong], 1)
        stem_score = groups.outcomes(rows, earlier, self.completions)[:, :1]
        seen, shown = groups.labels[rows], self.renders.labels[rows[:, None], renders]
        parts = [
            (renoise(groups.finals[rows].float(), final_level, generator), final_level, groups.scores[rows], seen),
            (groups.paths[rows, :, step].float(), groups.sigmas[rows, step], groups.outcomes(rows, step), seen),
            (groups.paths[rows, 0, earlier][:, None].float(), groups.sigmas[rows, earlier], stem_score, seen[:, :1]),
            (
                renoise(self.renders.latents[rows[:, None], renders].float(), render_level, generator),
                render_level,
                self.renders.scores[rows[:, None], renders],
                shown,
            ),
        ]
        return (
            torch.cat([x for x, *_ in parts], 1),
            torch.cat([level[:, None].expand(x.shape[:2]) for x, level, *_ in parts], 1),
            torch.cat([score for *_, score, _ in parts], 1).float(),
            torch.cat([label for *_, label in parts], 1),
        )

    def _judged(self, latents: Tensor, sigma: Tensor, prompts: list[str]) -> tuple[RewardOutput, Tensor]:
        """What the model says of latents [B, N, ...] at levels [B, N] of a flow model, and tokens [B, N, tokens, dim]."""
        b, n = sigma.shape
        device = next(self.drm.head.parameters()).device
        x, timestep = latents.flatten(0, 1).to(device), 1000 * sigma.flatten().to(device)
        read = self.drm.scorer.read(*self.drm.inputs(x, timestep, [p for p in prompts for _ in range(n)]))
        dim = self.drm.trunk.widths.image[-1]
        return self.drm.read(self.drm.head(*read)), read.tokens[..., -dim:].unflatten(0, (b, n))

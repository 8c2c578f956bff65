"""Forward matching: one family of regressions on finished samples that are noised again.

A finished sample x0 is noised to x_t with fresh eps, and u = eps - x0 is what flow matching would teach there.  All methods
here have the gradient of

    c_i * cost(v; u) + q_i * mean ||v - v_anchor||^2

with a coefficient c_i and a proximal weight q_i that are numbers, no gradient flows through them:

| method | c | q | anchor | source |
|---|---|---|---|---|
| RWR | exp((r - max r) / tau), mean 1 in a group | 0 | - | Flow-RWR, 2501.13918 |
| RAFT, GRAFT | 1 for the best of a group, else 0 | 0 | - | 2510.02692; P-GRAFT at noisy levels alone |
| ORW | exp(tau r) | alpha | reference | ORW-CFM-W2, 2510.18072 |
| AWM | A * ratio, 0 where clipped | ema_beta | EMA | 2509.25050 |
| NFT | A_max (r / w+ - (1 - r) / w-) | A_max b (r / w+ + (1 - r) / w-) - c | old | DiffusionNFT, 2509.16117 |
| CRD | 2 A_max (R - beta T) | 0 | - | 2603.14128 |
| DGPO | sigmoid(S_G) A | 0 | - | 2510.08425 |
| RAM | (r - b) / lambda | 1 | reference | Reinforce Adjoint Matching, 2605.10759 |
| RVM | A | free | old, reference | Reward-based velocity matching, 2026; the family itself |

NFT's two branches v+- = v_old +- b (v - v_old) expand, with e = v_old - u and d = v - v_old, to
(1/b) [r ||e + b d||^2 + (1 - r) ||e - b d||^2] = ||e||^2 / b + 2 (2 r - 1) <e, d> + b ||d||^2 without its own weights w: since
||v - u||^2 = ||e||^2 + 2 <e, d> + ||d||^2 it is in the family.  RAM's regression of v on sg(v_ref + R (u - v)) has the gradient
2 (v - v_ref) + 2 R (v - u), and is, too.

At v = v_old all of them but RWR, RAFT and ORW move v along sum_i A_i (u_i - v) up to a factor; these three add a step of
flow matching on the policy's own samples, which has expectation 0.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from rsm_guidance.training.alignment.advantages import group_mean


@dataclass(frozen=True)
class Pull:
    """Coefficient c [R] and proximal weight q [R] of a batch, both without gradient."""

    coefficient: Tensor
    proximal: Tensor


def squared_distance(velocity: Tensor, anchor: Tensor) -> Tensor:
    """mean ||v - v_anchor||^2 [R]; no gradient flows into the anchor."""
    return (velocity - anchor.detach().to(velocity)).square().flatten(1).mean(1)


def forward_match(cost: Tensor, old_cost: Tensor | None, pull: Pull, distance: Tensor | None = None) -> Tensor:
    """Loss [R]: c (cost - old_cost) + q distance.

    Args:
        cost: of the velocities against u [R].
        old_cost: that of the policy that sampled, subtracted so that the loss is 0 where nothing has moved; or None.
        pull: c and q.
        distance: `squared_distance` from the anchor [R]; it may be left out where q is 0.
    """
    moved = cost if old_cost is None else cost - old_cost.detach()
    loss = pull.coefficient.detach().to(cost) * moved
    return loss if distance is None else loss + pull.proximal.detach().to(cost) * distance


def plain(coefficient: Tensor, proximal: float = 0.0) -> Pull:
    """A pull of one proximal weight for all; RVM with advantages as coefficients."""
    return Pull(coefficient, torch.full_like(coefficient, proximal))


def rwr(rewards: Tensor, groups: Tensor, temperature: float) -> Pull:
    """Reward-weighted regression.  Dividing by the group's mean weight is ours, so that `temperature` leaves the step's size."""
    r = rewards.double()
    top = torch.full((int(groups.max()) + 1,), -torch.inf, dtype=r.dtype).scatter_reduce(0, groups, r, "amax")[groups]
    weights = ((r - top) / temperature).exp()
    return plain(weights / group_mean(weights, groups))


def raft(rewards: Tensor, groups: Tensor, keep: int = 1) -> Pull:
    """The `keep` best of every group count 1, in case of ties the earlier ones; all others 0."""
    order = torch.argsort(rewards.double(), descending=True, stable=True)
    order = order[torch.argsort(groups[order], stable=True)]
    sizes = torch.bincount(groups)
    starts = torch.cumsum(sizes, 0) - sizes
    rank = torch.empty_like(order)
    rank[order] = torch.arange(len(order)) - starts[groups[order]]
    return plain((rank < keep).double())


def orw(rewards: Tensor, strength: float, alpha: float) -> Pull:
    """exp(tau r), held to the reference by alpha; without it the policy collapses onto the best sample."""
    return plain((strength * rewards.double()).exp(), alpha)


def awm(advantage: Tensor, cost: Tensor, old_cost: Tensor, clip: float | None = None) -> Pull:
    """A * ratio with log ratio = -(cost - old cost), 0 where PPO's clip takes the gradient away."""
    ratio = (old_cost - cost).detach().exp()
    if clip is None:
        return plain(advantage * ratio)
    outside = torch.where(advantage > 0, ratio > 1 + clip, ratio < 1 - clip)
    return plain(torch.where(outside, 0.0, advantage * ratio))


def nft(good: Tensor, strength: float, largest: float, weights: tuple[Tensor, Tensor] | None = None) -> Pull:
    """DiffusionNFT for probabilities r [R] that a sample is good (`advantages.optimality`) and its b, `strength`.

    `weights` are (w+, w-) [R], each branch's own error, mean abs(x0hat - x0); its cost is then t2.  None for 1.
    """
    up, down = weights or (torch.ones_like(good), torch.ones_like(good))
    toward, away = good / up, (1 - good) / down
    return Pull(largest * (toward - away), largest * (strength * (toward + away) - (toward - away)))


def nft_weights(velocity: Tensor, old: Tensor, target: Tensor, sigma: Tensor, strength: float) -> tuple[Tensor, Tensor]:
    """(w+, w-) [R] of `nft`: mean abs(x0hat - x0) = sigma mean abs(v+- - u), at least 1e-5."""
    step = strength * (velocity.detach() - old)
    branches = ((old + step - target), (old - step - target))
    up, down = ((sigma.to(e) * e.abs().flatten(1).mean(1)).clamp(min=1e-5) for e in branches)
    return up, down


def crd(good: Tensor, cost: Tensor, old_cost: Tensor, groups: Tensor, strength: float, largest: float) -> Pull:
    """Centred reward distillation: the gradient of A_max / beta (beta T - R)^2, both centred in the group.

    T is the implicit reward -(cost - old cost), of the cost `adaptive`; R the probability that the sample is good.
    """
    implied = (old_cost - cost).detach().double()
    gap = good.double() - group_mean(good.double(), groups)
    return plain(2 * largest * (gap - strength * (implied - group_mean(implied, groups))))


def dgpo(advantage: Tensor, cost: Tensor, reference_cost: Tensor, groups: Tensor, strength: float) -> Pull:
    """sigmoid(S_G) A with S_G = mean_G A beta (cost - reference cost); noise and level must be shared within a group."""
    preferred = group_mean(advantage.double() * strength * (cost - reference_cost).detach().double(), groups)
    return plain(preferred.sigmoid() * advantage)


def ram(rewards: Tensor, groups: Tensor, temperature: float, baseline: bool = True) -> Pull:
    """(r - b) / lambda, held to the reference with weight 1.

    b is the group's mean: on policy E[u - v | x_t] = 0, so it leaves the expectation and takes variance away.  The fixed
    point v - v_ref = Cov(R, u | x_t) is the exact tilt for linear rewards; quadratic ones are under-tilted at high noise.
    """
    r = rewards.double()
    return plain((r - group_mean(r, groups) if baseline else r) / temperature, 1.0)

"""Implicit rewards: pairs and groups whose model-implied rewards should order as the given ones do.

A flow or diffusion model implies the reward s_i = -beta (l_i - l_ref,i), l the flow-matching error of sample i noised with a
level and noise that all members of the pair or group share; a path implies the sum of its steps' log-ratios to the reference.

- DPO (Diffusion-DPO, 2311.12908; Flow-DPO, 2501.13918): -log sigmoid((s_w - s_l) / 2), log 2 at the reference.
- GDRO (2601.02036): with items by falling reward, sum_{i<k} (logsumexp_{m>=i} s_m - sum_{j>=i} q_i(j) s_j), q_i the softmax of
  r / tau over items i..k; two items and tau -> 0 are DPO of twice the beta.
- PRDP (2402.08714): (rhat_a - rhat_b - (r_a - r_b) / beta)^2 over all pairs of a prompt, the larger of it and its clipped form.
- LPO (2502.01051): -log sigmoid(beta (log r_w - log r_l)) of one step, r its ratio to the reference, clamped to 1 +- eps.
"""

import torch
from torch import Tensor
from torch.nn import functional as F


def implicit_reward(error: Tensor, reference_error: Tensor, strength: float) -> Tensor:
    """s = -beta (l - l_ref), for errors of any shape."""
    return -strength * (error - reference_error.detach())


def dpo(winner: Tensor, loser: Tensor) -> Tensor:
    """Loss [P] of pairs of implicit rewards [P]."""
    return -F.logsigmoid((winner - loser) / 2)


def gdro(implied: Tensor, rewards: Tensor, temperature: float) -> Tensor:
    """Loss [G] of groups of k implicit rewards and rewards [G, k], in any order within a group."""
    order = rewards.argsort(dim=1, descending=True, stable=True)
    s, r = implied.gather(1, order), rewards.gather(1, order).to(implied) / temperature
    losses = [
        s[:, i:].logsumexp(1) - (r[:, i:].softmax(1) * s[:, i:]).sum(1)  # cross-entropy of the items that are left
        for i in range(s.shape[1] - 1)
    ]
    return torch.stack(losses).sum(0)


def prdp(implied: Tensor, rewards: Tensor, strength: float, clipped: Tensor | None = None) -> Tensor:
    """Loss [G] of groups of path log-ratios [G, k] and rewards [G, k], the mean over pairs.

    Args:
        implied: sum over steps of log p / p_ref.
        rewards: of the paths.
        strength: beta.
        clipped: the same with every step's log-ratio clipped around the old policy's, see `clip_path`.
    """
    first, second = torch.triu_indices(implied.shape[1], implied.shape[1], 1)
    wanted = (rewards[:, first] - rewards[:, second]).to(implied) / strength

    def miss(of: Tensor) -> Tensor:
        return (of[:, first] - of[:, second] - wanted).square()

    loss = miss(implied) if clipped is None else torch.maximum(miss(implied), miss(clipped))
    return loss.mean(1)


def clip_path(steps: Tensor, old: Tensor, clip: float) -> Tensor:
    """Sum over steps [..., S] of log-ratios to the reference, each kept within `clip` of the old policy's."""
    return (old + (steps - old).clamp(-clip, clip)).sum(-1)


def lpo(winner: Tensor, loser: Tensor, strength: float, clip: float) -> Tensor:
    """Loss [P] of pairs of log-ratios of one step to the reference [P], whose ratios are clamped to 1 +- clip."""
    best, worst = (x.exp().clamp(1 - clip, 1 + clip).log() for x in (winner, loser))
    return -F.logsigmoid(strength * (best - worst))


def lpo_gate(scores: Tensor, sigma: float, low: float, high: float) -> Tensor:
    """Whether [G] the best and worst of candidates' scores [G, K] differ enough in probability to be a pair.

    The threshold rises linearly from `low` at sigma = 0 to `high` at sigma = 1 (0.35 to 0.5 for SD1.5).
    """
    best, worst = scores.max(1).values, scores.min(1).values
    share = torch.stack([best, worst], 1).softmax(1)
    return share[:, 0] - share[:, 1] > low + (high - low) * sigma

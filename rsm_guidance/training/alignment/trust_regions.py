"""Trust regions: what keeps the policy near the one that sampled, the reference, or data.

On the log-ratio of reverse matching, with advantage A and L = log ratio (scaled by the time weight's `inner`):

- `ratio_clip` (PPO; DDPO, Flow-GRPO): max(-A e^L, -A clip(e^L, 1 - c, 1 + c)).
- `hinge` (RSM, 2604.17415): max(c |A| - A L, 0), the same region without the exponential.
- `kl_mask` (Flow-DPPO, 2606.11025): -A e^L, without rows whose exact divergence ||mu - mu_old||^2 / (2 S^2) exceeds c while A
  drives the ratio further from 1.

On velocities or means: `velocity_penalty`, `mean_penalty` with its denominator named, `norm_hinge` (NormGuard, 2606.27771).
Published coefficients differ by 1e4 for want of that name, so there is no bare "kl" here.
"""

from typing import Literal

import torch
from torch import Tensor

from rsm_guidance.training.alignment.levels import StepGeometry

Denominator = Literal["variance", "diffusion", "one"]


def ratio_clip(log_ratio: Tensor, advantage: Tensor, clip: float) -> Tensor:
    """PPO's clipped loss [R]."""
    ratio = log_ratio.exp()
    return torch.maximum(-advantage * ratio, -advantage * ratio.clamp(1 - clip, 1 + clip))


def hinge(log_ratio: Tensor, advantage: Tensor, clip: float) -> Tensor:
    """RSM's one-sided hinge [R]; its gradient at log_ratio = 0 is that of -A log_ratio."""
    return (clip * advantage.abs() - advantage * log_ratio).clamp(min=0)


def kl_mask(log_ratio: Tensor, advantage: Tensor, divergence: Tensor, limit: float) -> Tensor:
    """The unclipped loss [R], 0 where a step has gone beyond `limit` and is being driven further."""
    drifting = (divergence.detach() > limit) & (advantage * log_ratio.detach() > 0)
    return torch.where(drifting, 0.0, -advantage * log_ratio.exp())


def clipped(log_ratio: Tensor, advantage: Tensor, clip: float) -> Tensor:
    """Whether [R] a row's gradient is 0 by the clip; of `ratio_clip` and, to first order, of `hinge`."""
    return torch.where(advantage > 0, log_ratio > clip, log_ratio < -clip) & (advantage != 0)


def denominator(name: Denominator, step: StepGeometry) -> float:
    """What a squared distance of means is divided by, beside 2: S^2 (the exact divergence), sigma^2 = S^2 / D, or 1."""
    return {"variance": step.std**2, "diffusion": step.diffusion**2, "one": 1.0}[name]


def mean_penalty(mean: Tensor, reference: Tensor, step: StepGeometry, name: Denominator) -> Tensor:
    """mean ||mu - mu_ref||^2 / (2 denominator) [R], over dimensions."""
    gap = (mean - reference.detach().to(mean)).square().flatten(1).mean(1)
    return gap / (2 * denominator(name, step))


def velocity_penalty(velocity: Tensor, reference: Tensor) -> Tensor:
    """mean ||v - v_ref||^2 [R], over dimensions: the reference may be the base model, the old policy or an average."""
    return (velocity - reference.detach().to(velocity)).square().flatten(1).mean(1)


def norm_hinge(velocity: Tensor, reference: Tensor, margin: float = 0.0) -> Tensor:
    """max(||v|| - (1 + margin) ||v_ref||, 0)^2 [R] of root mean squares; the square is ours, the published power is unknown."""
    size, allowed = (x.square().flatten(1).mean(1).sqrt() for x in (velocity, reference.detach().to(velocity)))
    return (size - (1 + margin) * allowed).clamp(min=0).square()


def uncertain(main: Tensor, others: Tensor, share: float) -> Tensor:
    """Rows [R] that the main reward ranks above what other rewards [R, M] do: those held to the reference by GARDO (2512.24138).

    With ranks that rise with the reward, u = rank(main) - mean rank(others); rows of positive u above the (1 - share) quantile
    of positive u.  The published program ranks downwards and reads the difference the other way round.
    """

    def rank(x: Tensor) -> Tensor:
        return x.argsort(dim=0, stable=True).argsort(dim=0).double()

    excess = rank(main) - rank(others.reshape(len(main), -1)).mean(1)
    positive = excess[excess > 0]
    if not len(positive):
        return torch.zeros(len(main), dtype=torch.bool)
    return (excess > 0) & (excess >= positive.quantile(1 - share))


def adaptive_reference(penalty: Tensor, good: Tensor, least: float) -> Tensor:
    """CRD's weak hold on bad samples: penalty (m + r (1 - m)) [R], for probabilities r [R] of being good (2603.14128)."""
    return penalty * (least + good.to(penalty) * (1 - least))

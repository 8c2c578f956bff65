"""Time weights: how much each noise level counts, and the strength of guidance that comes of it.

**Reverse matching** works on the log-ratio of a step, -M = <k s, e> - 1/2 |k s|^2 with s = (mu - mu_old) / S, the noise e that
was drawn, S = sigma sqrt(D) and W from `levels`.  A weight is four numbers: `shift` k, `inner` on M before it is clipped,
`outer` on the whole term after it, and `linear`, which drops the square.

| name | shift | inner | outer | source |
|---|---|---|---|---|
| `flow-grpo` | 1 | 1 | 1 | 2505.05470; so do DDPO, DanceGRPO |
| `pcpo` | zeta D / W | 1 | 1 | PCPO as in RSM's code, zeta = 4.31521346 |
| `tempflow` | 1 | 2.25 S (hinge) or 1 | 1 or 2.25 S (ratio clip) | 2508.04324 as in RSM's code |
| `guard` | 1, linear | S | 1 / D | GRPO-Guard, 2510.22319, official code; `guard-unscaled` lacks the 1 / D, as in Flow-Factory |
| `fair-clip` | 1 | S^2 | 1 / S^2 | RSM, 2604.17415 |
| `fair-clip-2` | 1 | S^2 | sigma / (S^2 sqrt(D)) | RSM's best |

**Forward matching** works on the cost l = mean ||v - u||^2 of a sample noised to level t:

| name | cost | source |
|---|---|---|
| `uniform`, `t`, `t2` | l, t l, t^2 l | AWM, 2509.25050 |
| `huber` | t sqrt(l) | AWM |
| `ghuber` | (t / p) ((l + 1e-10)^p - 1e-10^p), p = 0.25 | AWM's default |
| `snr` | min(alpha^2 / sigma^2, cap) l | Min-SNR, 2303.09556, whose cap is 5 |
| `adaptive` | l / sg mean abs(v - u) | CRD, 2603.14128; times t it is DiffusionNFT's, which has two branches (`forms.forward.nft`) |

The realised strength h is what multiplies grad_x V in the expected gradient of the loss by the prediction: for reverse matching
response * shift * inner * outer (E[V(x') e] = S grad V), for forward matching 2 dcost/dl * sigma / alpha of a flow, since
Cov(r, u | x_t) = -sigma / alpha grad E[r | x_t].  The first reproduces the published curves up to a factor: D for Flow-GRPO,
D S for PCPO and TempFlow.
"""

import math
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from rsm_guidance.training.alignment.levels import StepGeometry

ReverseWeight = Literal["flow-grpo", "pcpo", "tempflow", "guard", "guard-unscaled", "fair-clip", "fair-clip-2"]
ForwardWeight = Literal["uniform", "t", "t2", "huber", "ghuber", "snr", "adaptive"]
Region = Literal["none", "ratio", "hinge", "kl-mask"]

ZETA = 4.3152134639895925
"""PCPO's constant for flows, in RSM's code."""

TEMPFLOW = 2.25
"""TempFlow's constant, in RSM's code: its weights then average 1 on SD3.5's ten levels."""


@dataclass(frozen=True)
class StepScale:
    """What a time weight does to one step; see the module."""

    shift: float = 1.0
    inner: float = 1.0
    outer: float = 1.0
    linear: bool = False


PLAIN = StepScale()


def step_scale(name: ReverseWeight, step: StepGeometry, region: Region = "none") -> StepScale:
    """The scale of a step under a weight of reverse matching and a trust region."""
    variance = step.std**2
    if name == "pcpo":
        return StepScale(shift=ZETA * step.drop / step.weight)
    if name == "tempflow":
        factor = TEMPFLOW * step.std
        return StepScale(inner=factor) if region == "hinge" else StepScale(outer=factor)
    if name in ("guard", "guard-unscaled"):
        return StepScale(inner=step.std, outer=1 / step.drop if name == "guard" else 1.0, linear=True)
    if name == "fair-clip":
        return StepScale(inner=variance, outer=1 / variance)
    if name == "fair-clip-2":
        return StepScale(inner=variance, outer=step.diffusion / (variance * math.sqrt(step.drop)))
    return PLAIN


def reverse_strength(step: StepGeometry, scale: StepScale) -> float:
    """h of one step of reverse matching."""
    return step.response * scale.shift * scale.inner * scale.outer


def forward_cost(
    name: ForwardWeight,
    velocity: Tensor,
    target: Tensor,
    alpha: Tensor,
    sigma: Tensor,
    p: float = 0.25,
    cap: float = 5.0,
) -> Tensor:
    """Cost [R] of velocities [R, ...] against targets u = eps - x0, each at its level (alpha, sigma) [R]."""
    error = velocity - target.to(velocity)
    squared = error.square().flatten(1).mean(1)
    if name == "adaptive":
        return squared / error.detach().abs().flatten(1).mean(1).clamp(min=1e-5)
    return cost_of(name, squared, alpha, sigma, p, cap)


def cost_of(
    name: ForwardWeight, squared: Tensor, alpha: Tensor, sigma: Tensor, p: float = 0.25, cap: float = 5.0
) -> Tensor:
    """Cost [R] of squared errors l [R]; `adaptive` is not a function of them."""
    t = sigma.to(squared)
    if name == "t":
        return t * squared
    if name == "t2":
        return t.square() * squared
    if name == "huber":
        return t * (squared + 1e-10).sqrt()
    if name == "ghuber":
        return t / p * ((squared + 1e-10).pow(p) - 1e-10**p)
    if name == "snr":
        return (alpha.to(squared) / t).square().clamp(max=cap) * squared
    if name == "uniform":
        return squared
    raise ValueError(f"the cost {name!r} is not a function of the squared error alone")


def forward_strength(slope: float, alpha: float, sigma: float) -> float:
    """h of one level of forward matching, for the derivative `slope` of the cost by l; infinite at pure noise, where grad V is 0."""
    return 2 * slope * sigma / alpha if alpha else math.inf

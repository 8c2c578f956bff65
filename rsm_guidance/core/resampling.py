"""Resampling schemes: particle counts with the right expectation, from log-weights, in float64.

Each scheme maps log-weights [..., K] to ancestor indices [..., K] such that particle i is chosen K w_i times on average
(w_i normalised).  They differ in the variance of these counts: `multinomial` > `residual`, `stratified` > `systematic`,
`ssp` (Douc & Cappe 2005, arXiv cs/0507025; Gerber, Chopin & Whiteley 2019, arXiv 1708.04221).  A particle of weight zero
is never chosen.
"""

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from rsm_guidance.core.weights import normalize

Scheme = Literal["multinomial", "residual", "stratified", "systematic", "ssp"]


def _invert(weights: Tensor, points: Tensor) -> Tensor:
    """Indices at which the cumulative weights [K] pass sorted points [N] in [0, 1)."""
    cumulative = weights.cumsum(0)
    cumulative = cumulative / cumulative[-1]
    index = torch.searchsorted(cumulative, points, right=True)
    # Rounding may put a point beyond the last cumulative weight; its owner is the last particle that has any weight.
    return index.clamp(max=int(weights.nonzero()[-1]))


def _multinomial(weights: Tensor, uniform: Tensor) -> Tensor:
    return _invert(weights, uniform.sort().values)


def _stratified(weights: Tensor, uniform: Tensor) -> Tensor:
    count = len(uniform)
    return _invert(weights, (torch.arange(count, dtype=torch.float64) + uniform) / count)


def _systematic(weights: Tensor, uniform: Tensor) -> Tensor:
    return _stratified(weights, uniform[:1].expand(len(uniform)))


def _residual(weights: Tensor, uniform: Tensor) -> Tensor:
    count = len(weights)
    expected = count * weights / weights.sum()
    copies = (expected + 1e-12).floor()  # rounding must not cost a whole copy
    kept = torch.arange(count).repeat_interleave(copies.long())
    left = count - len(kept)
    if not left:
        return kept
    rest = _multinomial((expected - copies).clamp(min=0), uniform[:left])
    return torch.cat([kept, rest]).sort().values


def _ssp(weights: Tensor, uniform: Tensor) -> Tensor:
    """Pairs of fractional counts trade mass until one of each pair is whole (Srinivasan's sampling process)."""
    count = len(weights)
    expected = count * weights / weights.sum()
    copies = expected.floor()
    fraction = (expected - copies).tolist()
    first = 0
    for step, second in enumerate(range(1, count)):
        a, b = fraction[first], fraction[second]
        up, down = min(b, 1 - a), min(a, 1 - b)  # what `first` can gain from `second`, and lose to it
        if up + down <= 0:
            first = second if a <= 0 else first
            continue
        if uniform[step] < down / (up + down):
            a, b = a + up, b - up
        else:
            a, b = a - down, b + down
        fraction[first], fraction[second] = a, b
        for index in (first, second):
            if fraction[index] > 1 - 1e-12:
                copies[index] += 1
                fraction[index] = 0.0
        first = first if fraction[first] > 1e-12 else second
    if int(copies.sum()) < count:  # the fractions left over sum to a whole copy
        copies[first] += 1
    return torch.arange(count).repeat_interleave(copies.long())


SCHEMES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "multinomial": _multinomial,
    "residual": _residual,
    "stratified": _stratified,
    "systematic": _systematic,
    "ssp": _ssp,
}


def resample(log_weights: Tensor, uniform: Tensor, scheme: Scheme = "systematic") -> Tensor:
    """Ancestors of a new generation, sorted within each group.

    Args:
        log_weights: [G, K], finite or -inf.
        uniform: [G, K] in [0, 1), independent.
        scheme: how counts are drawn.

    Returns:
        int64 [G, K].

    Raises:
        ValueError: for an unknown scheme, or a group without positive weight.
    """
    if scheme not in SCHEMES:
        raise ValueError(f"unknown resampling scheme {scheme!r}; choose one of {', '.join(SCHEMES)}")
    weights = normalize(log_weights).exp()
    rows = [SCHEMES[scheme](w, u) for w, u in zip(weights, uniform.double(), strict=True)]
    return torch.stack(rows)

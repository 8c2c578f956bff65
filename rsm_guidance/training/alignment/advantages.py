"""Advantages: what rewards say of samples once those of their group are known.

    A_i = (r_i - mean_G r) / (std + eps),  clipped to [-c, c]

G is the group of sample i: those of the same prompt, or of the same prompt and initial noise ("seed"), tree depth or step.
The deviation is the group's own (DDPO, 2305.13301; DanceGRPO, 2505.07818), that of the whole batch (Flow-GRPO, 2505.05470) or
none (GARDO, 2512.24138).  With several rewards each is normalised and the advantages are added (MixGRPO, 2507.21802), so that
a reward's scale gives it no weight.

A group whose rewards are all equal says nothing, and is dropped rather than divided by eps.  Deviations are those of the
population (divided by the number, not the number less one), as in PromptRL and numpy; ours for the other methods.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

Deviation = Literal["group", "global", "none"]

EPS = 1e-4
"""Added to a deviation before it divides, as in flow_grpo."""


@dataclass(frozen=True)
class Advantages:
    """What a batch teaches.

    Attributes:
        values: float64 [R]; 0 where a row was dropped.
        kept: bool [R], whether the row's group says anything.
        groups: number of groups.
        dropped: how many of them were dropped.
    """

    values: Tensor
    kept: Tensor
    groups: int
    dropped: int


def group_by(*keys: Tensor) -> Tensor:
    """Group numbers [R], dense from 0, of rows that agree in all whole-number keys [R], such as prompt, seed, depth, step.

    Raises:
        ValueError: if there is no key, or the keys differ in length.
    """
    if not keys or len({len(key) for key in keys}) != 1:
        raise ValueError(f"groups need keys of one length; got lengths {[len(key) for key in keys]}")
    return torch.unique(torch.stack([key.long() for key in keys], 1), dim=0, return_inverse=True)[1]


def group_mean(values: Tensor, groups: Tensor) -> Tensor:
    """The mean [R] of each row's group, for values [R] and dense group numbers [R]."""
    groups = groups.to(values.device)
    nothing = values.new_zeros(int(groups.max()) + 1 if len(groups) else 0)
    sums, sizes = (nothing.index_add(0, groups, of) for of in (values, torch.ones_like(values)))
    return (sums / sizes)[groups]


def group_std(values: Tensor, groups: Tensor) -> Tensor:
    """The standard deviation [R] of each row's group, up to rounding."""
    centred = values - group_mean(values, groups)
    return group_mean(centred.square(), groups).sqrt()


def varies(values: Tensor, groups: Tensor) -> Tensor:
    """Whether [R] the values [R] of a row's group differ at all; exact, where a mean would round."""
    count = int(groups.max()) + 1 if len(groups) else 0
    low, high = (
        torch.empty(count, dtype=values.dtype).scatter_reduce(0, groups, values, how, include_self=False)
        for how in ("amin", "amax")
    )
    return (high > low)[groups]


def advantages(
    rewards: Tensor,
    groups: Tensor,
    *,
    deviation: Deviation = "group",
    weights: Sequence[float] | None = None,
    clip: float | None = 5.0,
    min_std: float = 0.0,
    max_mean: float | None = None,
    anchor: Tensor | None = None,
) -> Advantages:
    """Advantages of rewards [R] or, one column a reward, [R, M].

    Args:
        rewards: higher is better.
        groups: dense group numbers [R]; see `group_by`.
        deviation: what divides; "global" is the deviation of all centred rewards, groups that say nothing included.
        weights: of the M advantages in their sum; 1 each by default.
        clip: bound of the sum; None for none.
        min_std: groups whose rewards deviate less, in every column, are dropped; those of no deviation always are.
        max_mean: groups whose mean reward is above it, in every column, are dropped: there is little left to learn
            (Edit-R1, 2510.16888: deviation 0.05 and mean 0.9).
        anchor: absolute terms [R] added before clipping; see `absolute`.

    Raises:
        ValueError: for rewards that are not finite, a group of one, or weights that do not match.
    """
    table = rewards.double().reshape(len(rewards), -1)
    if not bool(table.isfinite().all()):
        raise ValueError("rewards must be finite; a NaN in a group would reach all its members")
    if len(groups) and int(torch.bincount(groups).min()) < 2:
        raise ValueError("an advantage compares samples of one group; a group of one has none, draw at least two")
    shares = [1.0] * table.shape[1] if weights is None else list(weights)
    if len(shares) != table.shape[1]:
        raise ValueError(f"each of the {table.shape[1]} rewards takes one weight; got {len(shares)}")
    columns = list(table.unbind(1))
    total = sum(
        (w * _normalised(r, groups, deviation) for w, r in zip(shares, columns, strict=True)), torch.zeros(len(table))
    )
    speaks = torch.stack([varies(r, groups) & (group_std(r, groups) >= min_std) for r in columns]).any(0)
    if max_mean is not None:
        speaks &= torch.stack([group_mean(r, groups) <= max_mean for r in columns]).any(0)
    if anchor is not None:
        total, speaks = total + anchor, speaks | (anchor != 0)
    if clip is not None:
        total = total.clamp(-clip, clip)
    count = int(groups.max()) + 1 if len(groups) else 0
    alive = len(torch.unique(groups[speaks]))
    return Advantages(torch.where(speaks, total, 0.0), speaks, count, count - alive)


def _normalised(values: Tensor, groups: Tensor, deviation: Deviation) -> Tensor:
    centred = (values - group_mean(values, groups)) * varies(values, groups)
    if deviation == "none":
        return centred
    if deviation == "group":
        return centred / (group_std(values, groups) + EPS)
    return centred / (centred.square().mean().sqrt() + EPS)


def absolute(values: Tensor, scale: float) -> Tensor:
    """The absolute anchor [R] of VGPO (2512.12387): scale * (r - mean over the batch), whatever the group says.

    VGPO scales an absolute term by alpha = k std so that the group's deviation cancels and the term survives std -> 0.  What
    it is taken against is not published; against the mean of the whole batch is our choice, without which every sample of a
    positive reward would be reinforced.
    """
    centred = values.double() - values.double().mean()
    return scale * centred


def diversity(advantage: Tensor, distances: Tensor, groups: Tensor) -> Tensor:
    """Advantages [R] times d = (distance to the nearest sibling) / (its mean in the group), where they are positive.

    GARDO (2512.24138): a good sample unlike its siblings counts more.  `distances` [R] are those to the nearest sibling, for
    instance 1 - cosine of image features.
    """
    mean = group_mean(distances.double(), groups)
    factor = torch.where(mean > 0, distances.double() / mean.clamp(min=1e-12), torch.ones_like(mean))
    return torch.where(advantage > 0, advantage * factor, advantage)


def optimality(advantage: Tensor, largest: float = 5.0) -> Tensor:
    """Probability r = 1/2 + A / (2 A_max) in [0, 1] that a sample is good: the view that NFT and CRD take of advantages."""
    return (advantage / (2 * largest) + 0.5).clamp(0, 1)

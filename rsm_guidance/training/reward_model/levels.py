"""At which noise levels a reward model is trained: laws over the levels of the generator's own scheduler, by name.

A law is a pure function (u, table, **constants) -> indices [B] into the table: its quantile at u [B], uniform in (0, 1).
`uniform` and `logit-normal` are laws of a place in the table (as in the DRM's code: with a shift of 3 half of the levels lie
above sigma .75); `uniform-sigma` (as DiNa-LRM's) and `beta` are laws of sigma itself, and take the nearest level.
"""

from collections.abc import Callable

import torch
from scipy.special import betaincinv
from torch import Tensor

from rsm_guidance.core.contracts import UsageError
from rsm_guidance.reward_models.levels import LevelTable


def uniform(u: Tensor, table: LevelTable) -> Tensor:
    """Every level of the table alike."""
    return _places(u, table)


def logit_normal(u: Tensor, table: LevelTable, mean: float = 0.0, std: float = 1.0) -> Tensor:
    """Place sigmoid(z) with z ~ N(mean, std^2), 0 the noisiest: a positive mean prefers cleaner levels."""
    if not std > 0:
        raise UsageError(f"logit-normal needs a positive std; got {std}")
    return _places((mean + std * torch.special.ndtri(u)).sigmoid(), table)


def uniform_sigma(u: Tensor, table: LevelTable) -> Tensor:
    """sigma ~ U(0, 1)."""
    return table.nearest(u)


def beta(u: Tensor, table: LevelTable, a: float = 1.0, b: float = 2.0) -> Tensor:
    """sigma ~ Beta(a, b); b > a prefers cleaner levels.  The defaults are ours."""
    if not (a > 0 and b > 0):
        raise UsageError(f"beta needs positive a and b; got {a} and {b}")
    return table.nearest(torch.from_numpy(betaincinv(a, b, u.numpy())))


LEVEL_LAWS: dict[str, Callable[..., Tensor]] = {
    "uniform": uniform,
    "uniform-sigma": uniform_sigma,
    "logit-normal": logit_normal,
    "beta": beta,
}


def _places(u: Tensor, table: LevelTable) -> Tensor:
    return (u * len(table)).long().clamp(0, len(table) - 1)
